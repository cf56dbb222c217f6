"""What `offload bench` makes of its parts: one report, with figures in one shape, whatever fails."""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from bench_results import bench_results
from offload import InvalidArgument
from offload.cli import _bench, _bench_adamw, _bench_pool, main
from offload.cli._bench_figures import figure, figure_rows
from offload.cli._bench_spread import low_median_high, median_interval, summary


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every part gives one figure and measures nothing; under its name stands what it was asked with."""
    asked: dict[str, Any] = {}

    def stub(part: str) -> Any:
        def run(options: Any) -> Iterator[dict[str, Any]]:
            asked[part] = options
            yield {"name": part, "device": "cpu"}

        return run

    for part in _bench.PARTS:
        module = importlib.import_module(f"offload.cli._bench_{part}")
        monkeypatch.setattr(module, "run", stub(part))
        monkeypatch.setattr(module, "figures", lambda result: [figure(result["name"], "s", summary([1.0]))])
        monkeypatch.setattr(module, "pieces", lambda result: [f"text of {result['name']}"], raising=False)
    return asked


# --- parts that no other test runs ----------------------------------------------------------------------------------


def test_adamw_stands_beside_its_ceilings_and_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    assert main(["bench", "adamw", "--quick", "--json", str(path)]) == 0
    result = bench_results(path)["adamw"]
    figures = {one["name"]: one for one in result["figures"]}
    fp32 = figures[f"offload fp32 {offload.environment()['isa']}"]
    ceiling, peer = figures["streaming, fp32"], figures["torch fp32 fused"]
    assert (ceiling["side"], peer["side"]) == ("ceiling", "peer")
    assert fp32["share_of_ceiling"] == pytest.approx(ceiling["median"] / fp32["median"])
    assert fp32["times_as_fast_as"]["torch fp32 fused"] == pytest.approx(peer["median"] / fp32["median"])
    assert "torch fp32 fused" in capsys.readouterr().out


class _Peer(torch.optim.SGD):
    """Stands in for another library's optimizer: takes the arguments of AdamW and moves its weights."""

    def __init__(self, parameters: Any, lr: float, weight_decay: float, adamw_mode: bool = True) -> None:
        super().__init__(parameters, lr=1.0)


def test_peers_are_measured_where_they_are_and_named_where_they_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    bitsandbytes = types.ModuleType("bitsandbytes")
    bitsandbytes.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", bitsandbytes)
    _, absent = _bench_adamw._installed_peers(4098)
    assert absent["deepspeed"] == "not installed"
    assert absent["bitsandbytes"].startswith("AttributeError: "), "one that is broken costs no other figure"
    bitsandbytes.__dict__["optim"] = types.SimpleNamespace(AdamW8bit=_Peer)
    peers, absent = _bench_adamw._installed_peers(4098)
    assert [peer.name for peer in peers] == ["bitsandbytes 8-bit"] and "bitsandbytes" not in absent


def test_deepspeeds_update_runs_in_fp32(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    adam = types.ModuleType("deepspeed.ops.adam")

    def make(parameters: list[torch.nn.Parameter], **options: Any) -> _Peer:
        print("ninja: no work to do")
        assert options["adamw_mode"] and all(parameter.dtype == torch.float32 for parameter in parameters)
        return _Peer(parameters, **options)

    adam.__dict__["DeepSpeedCPUAdam"] = make
    monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", adam)
    for name in ("deepspeed", "deepspeed.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    variant = _bench_adamw._deepspeed(4098)
    variant.measure()
    assert variant.name == "deepspeed fp32" and capsys.readouterr().out == "", "stdout is for results"


def test_a_cards_pinned_allocator_stands_beside_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def empty(*shape: int, pin_memory: bool, **more: Any) -> None:
        asked.append((shape, pin_memory))

    monkeypatch.setattr(torch, "empty", empty)
    assert _bench_pool._torch_pinned_ns() > 0 and set(asked) == {((1 << 20,), True)}
    sides = {"offload": iter([9.0, 1.0, 2.0]).__next__, "torch": iter([9.0, 4.0, 6.0]).__next__}
    samples = _bench_pool._in_turns(sides, 2)
    assert samples["offload"]["samples"] == [1.0, 2.0] and samples["torch"]["samples"] == [4.0, 6.0]
    result = {
        "acquire_release_ns": samples["offload"],
        "peers_acquire_release_ns": {"torch": samples["torch"]},
        "map_and_first_touch_gb_per_s": {},
    }
    ours, peer = _bench_pool.figures(result)
    assert ours["times_as_fast_as"] == {"torch": 4.0} and peer["side"] == "peer"


def test_step_tells_compute_from_update(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert main(["bench", "step", "--quick", "--device", "cpu", "--json", str(path)]) == 0
    overlap = bench_results(path)["step"]["overlap"]
    assert "sleep" in overlap["synthetic"]
    assert overlap["step_s"]["p20"] <= overlap["step_s"]["median"] <= overlap["step_s"]["p80"]


@pytest.mark.parametrize("part", ["pool", "checkpoint"])
def test_other_parts_report_figures(part: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert main(["bench", part, "--quick", "--json", str(path)]) == 0
    assert len(bench_results(path)[part]["figures"]) >= 3


# --- all of them ----------------------------------------------------------------------------------------------------


def test_all_measures_every_part_into_one_report(
    stubs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    assert main(["bench", "all", "--quick", "--device", "cpu", "--json", str(path)]) == 0
    output, report = capsys.readouterr(), json.loads(path.read_text())
    assert list(bench_results(path)) == list(_bench.PARTS) == list(stubs)
    assert report["quick"] is True and report["environment"]["torch"] == torch.__version__
    assert all(options.quick and getattr(options, "device", "cpu") == "cpu" for options in stubs.values())
    # Each has its own options, and the largest model the budgets that it needs on a CPU.
    assert stubs["disk"].gib == 1 and stubs["train"].size == "tiny" and stubs["largest"].host_budget == "4MiB"
    assert report["results"]["disk"]["arguments"] == {"quick": True, "disk_path": ".", "gib": 1}
    # The default device and the same one by its name are one.
    assert report["results"]["link"]["arguments"] == {"quick": True}
    assert all(f"text of {part}" in output.out for part in _bench.PARTS) and "{" not in output.out
    assert all(f"offload bench {part}: measuring" in output.err for part in _bench.PARTS)


@pytest.mark.usefixtures("stubs")
def test_json_in_the_place_of_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For whoever pipes it on: one object on stdout, nothing else, and no file of that name."""
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "all", "--quick", "--device", "cpu", "--json", "-"]) == 0
    output = capsys.readouterr()
    assert list(json.loads(output.out)["results"]) == list(_bench.PARTS) and not list(tmp_path.iterdir())
    assert all(f"text of {part}" in output.err for part in _bench.PARTS)


@pytest.mark.parametrize(
    ("error", "outcome", "code"),
    [
        (ModuleNotFoundError("No module named 'transformers'"), {"unavailable": "No module named 'transformers'"}, 0),
        (InvalidArgument("full"), {"failed": "InvalidArgument: full"}, 1),
        (AssertionError("other gradients"), {"failed": "AssertionError: other gradients"}, 1),
    ],
)
def test_a_part_that_cannot_run_costs_no_other(
    error: Exception,
    outcome: dict[str, str],
    code: int,
    stubs: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(options: Any) -> Iterator[dict[str, Any]]:
        yield from ()
        raise error

    monkeypatch.setattr(importlib.import_module("offload.cli._bench_engine"), "run", refuse)
    path = tmp_path / "result.json"
    assert main(["bench", "all", "--quick", "--device", "cpu", "--json", str(path)]) == code
    results = json.loads(path.read_text())["results"]
    assert list(results) == list(_bench.PARTS) and results["engine"] == outcome
    assert main(["bench", "report", str(path), "--out", str(tmp_path / "report.md")]) == 0
    assert str(error) in (tmp_path / "report.md").read_text()
    if not isinstance(error, AssertionError):
        assert main(["bench", "engine", "--quick"]) == 2, "alone it is an error"


def test_a_part_alone_has_its_own_arguments(stubs: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert main(["bench", "disk", "--gib", "3", "--json", str(path)]) == 0
    assert bench_results(path)["disk"]["arguments"] == {"quick": False, "disk_path": ".", "gib": 3}
    assert list(stubs) == ["disk"]


# --- figures --------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_median_holds_it_in_95_of_100_cases() -> None:
    """As many of 100 samples lie below their median as coins show heads."""
    low, high = median_interval([float(rank) for rank in range(100, 0, -1)])
    chance = sum(math.comb(100, heads) for heads in range(int(low), int(high))) / 2**100
    assert 0.95 <= chance < 0.96
    assert median_interval([2.0]) == (2.0, 2.0)


def test_summary_orders_its_samples() -> None:
    assert summary([3.0, 1.0, 2.0, 5.0, 4.0]) == {
        "samples": [3.0, 1.0, 2.0, 5.0, 4.0],
        "median": 3.0,
        "p20": 2.0,
        "p80": 4.0,
    }
    assert low_median_high([2.0, 9.0, 1.0]) == {"min": 1.0, "median": 2.0, "max": 9.0} and low_median_high([]) is None


def test_shares_and_ratios_are_above_one_where_we_are_better() -> None:
    seconds, faster, slower = summary([2.0]), summary([1.0]), summary([8.0])
    took = figure("step", "ms", seconds, scale=1e3, ceiling=("bound", 1.5), peers={"a": slower, "b": faster})
    assert took["median"] == 2000.0 and took["share_of_ceiling"] == 0.75
    assert took["times_as_fast_as"] == {"a": 4.0, "b": 0.5}
    rate = figure("copy", "GB/s", seconds, better="higher", ceiling=("raw", 4.0), peers={"a": slower, "b": faster})
    assert rate["share_of_ceiling"] == 0.5 and rate["times_as_fast_as"] == {"a": 0.25, "b": 2.0}
    # A clock that is too coarse gives no ratio.
    assert figure("step", "s", summary([0.0]), peers={"a": seconds})["times_as_fast_as"] == {}


def test_a_table_shows_who_was_measured() -> None:
    one = figure("copy", "GB/s", summary([1.0, 2.0]), side="peer", better="higher")
    two = figure("copy", "GB/s", summary([3.0]), better="higher", ceiling=("raw", 4.0), peers={"a": summary([1.5])})
    assert figure_rows([one, two])[1:] == [
        ("copy (peer)", "1", "1", "2", "GB/s", "", ""),
        ("copy", "3", "3", "3", "GB/s", "0.750 of raw", "a 2.00"),
    ]
