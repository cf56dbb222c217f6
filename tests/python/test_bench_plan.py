"""`offload bench plan`: predictions come first and are those that are compared. Never how good they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.cli import _bench_plan, main


def _run(path: Path, *arguments: str) -> dict[str, Any]:
    assert main(["bench", "plan", "--quick", *arguments, "--json", str(path)]) == 0
    result: dict[str, Any] = json.loads(path.read_text())["results"]["plan"]
    return result


def test_the_grid_is_large_enough() -> None:
    grid = _bench_plan._grid(quick=False)
    assert len(set(grid)) == len(grid) >= 24
    for shape in _bench_plan._SHAPES:  # each sees clipping, and every link
        rows = [setting for setting in grid if setting.shape == shape]
        assert {setting.clips for setting in rows} == {True, False}
        assert {setting.link for setting in rows} == set(_bench_plan._LINKS)


def test_predictions_are_written_first_and_measured_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    predicted = _run(tmp_path / "predictions.json", "--predict-only")
    # Ends of long sums beside the sum of one step: rates that are measured decide how they are rounded.
    assert all(row["predicted_s"] >= row["bound_s"] * (1 - 1e-9) > 0 for row in predicted["rows"])
    assert all("step_s" not in row for row in predicted["rows"])
    measured = _run(tmp_path / "measured.json", "--predictions", str(tmp_path / "predictions.json"))
    assert measured["rates"] == predicted["rates"]
    for before, after in zip(predicted["rows"], measured["rows"], strict=True):
        assert {name: after[name] for name in before} == before
        assert after["error"] == before["predicted_s"] / after["step_s"]["median"] - 1
    within = [abs(row["error"]) <= measured["tolerance"] for row in measured["rows"]]
    assert measured["within"] == sum(within) / len(within)
    assert f"of {len(within)} settings" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_what_is_offloaded_crosses_the_capped_link() -> None:
    """A device that is not capped would measure something else than what was predicted."""
    shape = _bench_plan._QUICK_SHAPES["deep"]
    nbytes = 2 * sum(size.numel for size in _bench_plan._sizes(shape))
    setting = _bench_plan.Setting("deep", "optimizer+gradients", 1, True, (4.0 * nbytes, 1e12))
    assert min(_bench_plan._measure(setting, shape, 1)) >= 0.25


def test_predictions_of_another_grid_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "predictions.json"
    _run(path, "--predict-only")
    capsys.readouterr()
    assert main(["bench", "plan", "--predictions", str(path)]) == 2
    assert "its settings are others" in capsys.readouterr().err
    path.write_text("{}")
    assert main(["bench", "plan", "--quick", "--predictions", str(path)]) == 2
    assert "--predict-only" in capsys.readouterr().err
