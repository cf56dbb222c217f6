"""`offload bench unified`: what it reports, and that a step that went wrong is not reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench_results import bench_results
from offload.cli import _bench_unified, main


def test_unified_stands_beside_the_hosts_update(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "unified.json"
    assert main(["bench", "unified", "--quick", "--device", "cpu", "--json", str(path)]) == 0
    result = bench_results(path)["unified"]
    assert set(result["seconds"]) == {"device", "unified", "half", "host"} and result["kind"] is None
    ((name, why),) = result["refused"].items()
    assert name == "managed" and why in capsys.readouterr().out
    rates, taken = result["gb_per_s"], result["seconds"]["unified"]["median"]
    way = max(10 / rates["to_device"], 12 / rates["to_host"]) * result["count"] / 1e9
    assert result["share_of_link"] == {"unified": pytest.approx(way / taken)}
    assert rates["unified"] == pytest.approx(22 * result["count"] / taken / 1e9)
    assert set(result["host_over"]) == {"device", "unified", "half"}


def test_unified_over_states_that_differ_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _bench_unified._wrapped

    def other(name: str, count: int, device: torch.device) -> Any:
        weights, step = made(name, count, device)
        if name == "host":
            weights[-1].mul_(2)
        return weights, step

    monkeypatch.setattr(_bench_unified, "_wrapped", other)
    with pytest.raises(AssertionError, match="weights of (host and device|device and host) differ"):
        main(["bench", "unified", "--quick", "--device", "cpu"])
