"""`offload bench largest`: no deeper model has a plan within the budgets, and the one that it names trains in them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

import offload
from bench_results import bench_results
from offload.cli import _bench_largest, main
from offload.cli._bench_largest import largest
from offload.cli._model_shapes import TINY, shapes

MIB = 2**20


@pytest.mark.parametrize(("device_mib", "host_mib"), [(1, 4), (3, 1), (2, 2), (0.5, 3)])
def test_no_deeper_model_has_a_plan(device_mib: float, host_mib: float) -> None:
    device_bytes, host_bytes = int(device_mib * MIB), int(host_mib * MIB)

    def fits(layers: int, places: dict[str, Any]) -> bool:
        plan = offload.estimate(_bench_largest._on_meta(TINY, layers), **places)
        return plan.device.total <= device_bytes and plan.host.total <= host_bytes

    layers, places, plan = largest(TINY, device_bytes, host_bytes)
    assert fits(layers, places) and layers > 1
    assert plan.device.total <= device_bytes and plan.host.total <= host_bytes
    for params in ("device", "host"):
        for states in _bench_largest._ON_HOST:
            deeper = {"optimizer": states, "gradients": "host", "params": params}
            assert not fits(layers + 1, deeper), deeper


def test_it_trains_within_the_budgets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    budgets = ["--device-budget", "1MiB", "--host-budget", "4MiB"]
    assert main(["bench", "largest", "--device", "cpu", *budgets, "--json", str(path)]) == 0
    result = bench_results(path)["largest"]
    stats, (row,) = result["run"]["stats"], result["run"]["steps"]
    assert result["places"]["params"] == "host" and 0 < result["places"]["optimizer"] < 1
    assert result["parameters"] == sum(map(math.prod, shapes(dataclasses.replace(TINY, layers=result["layers"]))))
    assert sum(stats["host_bytes"].values()) <= 4 * MIB and sum(stats["device_bytes"].values()) <= 1 * MIB
    assert stats["steps"] == len(result["run"]["losses"]) == 5 and row["tokens_per_s"] > 0
    assert "parameters" in capsys.readouterr().out


def test_a_plan_alone_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bench_largest, "Run", None)
    path = tmp_path / "result.json"
    budgets = ["--device-budget", "1MiB", "--host-budget", "4MiB", "--derive-only"]
    assert main(["bench", "largest", "--device", "cpu", *budgets, "--json", str(path)]) == 0
    result = bench_results(path)["largest"]
    assert result["layers"] > 1 and "run" not in result


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "both tiers are one memory"),
        (["--device-budget", "1MiB"], "give --device-budget and --host-budget"),
        (["--device-budget", "1KiB", "--host-budget", "4MiB"], "not one layer"),
        (["--device-budget", "some", "--host-budget", "4MiB"], "'some'"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "largest", "--device", "cpu", *arguments]) == 2
    assert words in capsys.readouterr().err
