"""`offload bench activations`: what left the device in each way, and that a changed gradient is not reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import offload
from bench_results import bench_results
from offload.cli import _bench_activations, main

BLOCK_BYTES = 4 * 512 * 128 * (1 + 4 + 4)  # the inputs of both layers and of GELU, in fp32


def test_activations_stand_beside_save_on_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    assert main(["bench", "activations", "--quick", "--device", "cpu", "--json", str(path)]) == 0
    result = bench_results(path)["activations"]
    ways = result["ways"]
    assert list(ways) == ["resident", "torch save_on_cpu", "offload", "offload, keep=0"]
    # The last square saves its input, and the first layer's input is nobody's output: it may leave as well.
    saved = 4 * BLOCK_BYTES + 4 * 512 * 128
    assert ways["resident"]["bytes"] == 0 and "bound_s" not in ways["resident"]
    assert saved - 4 * 512 * 128 <= ways["offload, keep=0"]["bytes"] <= saved
    assert 0.8 * saved < ways["offload"]["bytes"] <= ways["offload, keep=0"]["bytes"]
    weights = 4 * 2 * 4 * 128 * 128 * 4
    assert ways["torch save_on_cpu"]["bytes"] >= saved + weights // 2, "it moves weights, too"
    rates = result["link_bytes_per_s"]
    copies = [ways["offload"]["bytes"] / rates[lane] for lane in ("to_host", "to_device")]
    compute = [result[name]["median"] for name in ("forward_s", "backward_s")]
    assert ways["offload"]["bound_s"] == pytest.approx(sum(map(max, compute, copies)))
    assert all(len(way["step_s"]["samples"]) == 3 for way in ways.values())
    link = result["link"]
    assert 0.8 * link["units"] * link["unit_bytes"] <= link["moved_bytes"] < link["units"] * link["unit_bytes"]
    assert 0 < link["share"]["median"] < 1.1, "no faster than the rate that the link was given"
    assert "equal bit for bit" in capsys.readouterr().out


def test_activations_that_come_back_changed_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lossy(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            def pack(tensor: Tensor) -> Tensor:
                return tensor.bfloat16()

            super().__init__(pack, lambda tensor: tensor.float())

    monkeypatch.setattr(_bench_activations, "save_on_cpu", Lossy)
    with pytest.raises(AssertionError, match="torch save_on_cpu gives other gradients"):
        main(["bench", "activations", "--quick", "--device", "cpu"])


def test_regions_that_move_nothing_are_not_called_offloading(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = offload.offload_activations
    monkeypatch.setattr(offload, "offload_activations", lambda device, **more: honest(device, budget=0, **more))
    with pytest.raises(AssertionError, match="moved nothing"):
        main(["bench", "activations", "--quick", "--device", "cpu"])
