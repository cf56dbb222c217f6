"""`--compare`: what counts as worse, what cannot be compared, and how the command ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offload.cli import _bench_pool, main
from offload.cli._bench_compare import compare, verdict
from offload.cli._bench_figures import Better, Figure, Side, figure

QUIET = {"others_cpus": 0.0, "stolen_cpus": 0.0, "gpu": None}
MACHINE = {"machine": "x86_64", "cpu": "Some", "cpu_count": 2, "accelerator": None, "torch": "2.13.0"}


def spread(median: float, low: float, high: float, *, better: Better = "lower", side: Side = "ours") -> Figure:
    samples = {"samples": [low, median, high], "median": median, "p20": low, "p80": high}
    return figure("step", "s", samples, better=better, side=side)


def report(*figures: Figure, part: str = "step", **more: Any) -> dict[str, Any]:
    result = {"device": "cpu", "arguments": {"quick": False}, "conditions": QUIET, "figures": list(figures)}
    return {"schema_version": 2, "environment": MACHINE, "results": {part: result | more}}


@pytest.mark.parametrize(
    ("new", "better", "expected"),
    [
        (spread(2.0, 1.9, 2.1), "lower", "worse"),
        (spread(0.5, 0.4, 0.6), "lower", "better"),
        (spread(2.0, 1.9, 2.1), "higher", "better"),
        (spread(0.5, 0.4, 0.6), "higher", "worse"),
        (spread(2.0, 1.1, 2.1), "lower", "same"),  # its fastest are as fast as the slowest were
        (spread(0.5, 0.4, 0.9), "lower", "same"),
        (spread(1.0, 0.5, 2.0), "lower", "same"),  # one range within the other
    ],
)
def test_ranges_that_overlap_are_the_same(new: Figure, better: Better, expected: str) -> None:
    old = spread(1.0, 0.9, 1.1, better=better)
    assert verdict(old, new | {"better": better}) == expected


@pytest.mark.parametrize(("now", "expected"), [(1.049, "same"), (1.051, "worse"), (0.951, "same"), (0.949, "better")])
def test_a_change_of_five_percent_is_none(now: float, expected: str) -> None:
    assert verdict(spread(1.0, 1.0, 1.0), spread(now, now, now)) == expected


def test_ceilings_and_peers_are_judged_and_do_not_count() -> None:
    sides: tuple[Side, ...] = ("ours", "peer", "ceiling")
    old = report(*({**spread(1.0, 1.0, 1.0, side=side), "name": side} for side in sides))
    new = report(*({**spread(2.0, 2.0, 2.0, side=side), "name": side} for side in sides))
    compared = compare(old, new)
    assert [(row["side"], row["verdict"], row["change"]) for row in compared["figures"]] == [
        (side, "worse", 1.0) for side in sides
    ]
    assert compared["counts"] == {"better": 0, "worse": 1, "same": 0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "cuda:0"}, "on cpu earlier, on cuda:0 now"),
        ({"arguments": {"quick": True}}, "measured with quick=False earlier, True now"),
        ({"figures": []}, "has no figures now"),
        ({"part": "link"}, "measured earlier only"),
    ],
)
def test_what_was_measured_otherwise_is_named_and_not_judged(change: dict[str, Any], words: str) -> None:
    new = report(*change.pop("figures", [spread(9.0, 9.0, 9.0)]), **change)
    compared = compare(report(spread(1.0, 1.0, 1.0)), new)
    assert compared["figures"] == [] and compared["not_compared"]["step"] == words


def test_versions_noise_and_lone_figures_are_told() -> None:
    old, new = report(spread(1.0, 1.0, 1.0)), report({**spread(1.0, 1.0, 1.0), "name": "another"})
    new["environment"] = MACHINE | {"torch": "2.14.0"}
    new["results"]["step"]["conditions"] = QUIET | {"others_cpus": 1.5}
    compared = compare(old, new)
    assert compared["missing"] == ["step: another", "step: step"]
    assert compared["remarks"] == ["torch was 2.13.0, is 2.14.0", "step, now: other processes used 1.5 CPUs"]


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """`bench pool` gives this one figure."""
    holder = {"figure": spread(1.0, 0.9, 1.1)}

    def run(options: Any) -> Iterator[dict[str, Any]]:
        yield {"name": "pool"}

    monkeypatch.setattr(_bench_pool, "run", run)
    monkeypatch.setattr(_bench_pool, "figures", lambda result: [holder["figure"]])
    return holder


@pytest.mark.parametrize(("new", "verdict", "code"), [(3.0, "worse", 1), (0.3, "better", 0), (1.0, "same", 0)])
def test_the_command_ends_with_1_where_something_is_worse(
    new: float,
    verdict: str,
    code: int,
    measured: dict[str, Figure],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old_path, new_path = tmp_path / "old.json", tmp_path / "new.json"
    assert main(["bench", "pool", "--json", str(old_path)]) == 0
    measured["figure"] = spread(new, new, new)
    capsys.readouterr()
    assert main(["bench", "pool", "--json", str(new_path), "--compare", str(old_path)]) == code
    output = capsys.readouterr()
    compared = json.loads(new_path.read_text())["comparison"]
    assert [row["verdict"] for row in compared["figures"]] == [verdict] and compared["counts"][verdict] == 1
    assert f"1 {verdict}" in output.out.replace("the same", "same") and "ranges of p20 to p80" in output.out
    # Two files are compared without measuring anything.
    assert main(["bench", "report", str(new_path), "--compare", str(old_path)]) == code
    text = capsys.readouterr().out
    assert "# new beside old" in text
    assert (f"| pool | step | 1 (0.9 to 1.1) | {new:g} ({new:g} to {new:g}) | s |" in text) == (verdict != "same")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"environment": MACHINE | {"cpu": "Other"}}, "is of another machine: cpu Other and"),
        ({"schema_version": 7}, "schema version 7"),
        ({"results": {"adamw": {"figures": [1]}}}, "has figures of adamw, not of pool"),
        ({"results": {"pool": {"name": "pool"}}}, "has figures of no part, not of pool"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_measured(
    change: dict[str, Any],
    words: str,
    measured: dict[str, Figure],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "old.json"
    assert main(["bench", "pool", "--json", str(path)]) == 0
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    monkeypatch.setattr(_bench_pool, "run", None)
    assert main(["bench", "pool", "--compare", str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error and str(path) in error
