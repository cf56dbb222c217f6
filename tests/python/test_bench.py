"""`offload bench train` and others: what they report, and that a wrong figure cannot be reported. Never how fast."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from bench_results import bench_results
from offload import _activations
from offload.cli import _bench_engine, _bench_model, _bench_peers, _bench_train, main
from offload.cli._device import make_deterministic
from offload.cli._model_shapes import TINY, shapes
from offload.deepspeed._engine import Engine

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ["--beside", "compute", "resident", "torch"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tiny model gains nothing by more, and a busy machine makes torch's threads wait for each other."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """`bench train` makes algorithms deterministic for the whole process."""
    filling = torch.utils.deterministic.fill_uninitialized_memory
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warns)
    torch.utils.deterministic.fill_uninitialized_memory = filling


@pytest.mark.usefixtures("torch_settings")
def test_runs_whose_bits_are_compared_refuse_other_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch is to warn only, it has fused attention add up its gradients in the order of its threads."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # as the user set it
    make_deterministic(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    make_deterministic(torch.device("cuda", 0))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


# --- swap ---------------------------------------------------------------------------------------------------


def test_swap_reports_what_was_streamed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "swap.json"
    assert main(["bench", "swap", "--quick", "--device", "cpu", "--json", str(path)]) == 0
    result = bench_results(path)["swap"]
    assert (result["name"], result["device"], result["units"]) == ("swap", "cpu", 24)
    assert set(result["hooks"]["added_us"]) == {"1 parameters a unit", "9 parameters a unit"}
    # Every unit comes once in forward and once in backward, but the last three, which stay from one to the other: the
    # one in use and two sent for ahead.
    moved = result["link"]["transfer_s"]["median"] * result["link_bytes_per_s"]
    assert 45 * result["unit_bytes"] <= moved <= 46 * result["unit_bytes"]
    assert len(result["link"]["share"]["samples"]) == len(result["balance"]["step_s"]["samples"]) == 2
    assert "nothing of use" in result["balance"]["synthetic"] and result["balance"]["step_over_larger"] > 0
    assert "share of the link" in capsys.readouterr().out


# --- engine -------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench engine` says by the environment where the engine computes."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.usefixtures("accelerator_setting")
def test_engine_reports_a_ratio_a_block(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "engine.json"
    assert main(["bench", "engine", "--quick", "--device", "cpu", "--json", str(path)]) == 0
    result = bench_results(path)["engine"]
    assert (result["name"], result["device"], result["blocks"], result["steps"]) == ("engine", "cpu", 4, 1)
    assert [(row["dtype"], row["clip_norm"]) for row in result["rows"]] == [
        ("float32", 0.0), ("float32", 1.0), ("bfloat16", 1.0),
    ]  # fmt: skip
    for row in result["rows"]:
        wrap, engine = row["wrap_step_s"]["samples"], row["engine_step_s"]["samples"]
        assert row["overhead"]["samples"] == [one / other - 1.0 for one, other in zip(engine, wrap, strict=True)]
        assert len(wrap) == 3 and row["overhead"]["target"] == 0.02
        assert row["cpu_overhead"]["median_between"][0] <= row["cpu_overhead"]["median"]
        own = [row["own_us"][part] for part in ("forward", "backward", "step")]
        assert [len(part["samples"]) for part in own] == [result["calls"]] * 3
        added = sum(part["median"] for part in own) * 1e-6
        assert row["own_share"] == pytest.approx(added / row["wrap_step_s"]["median"])
    # Without clipping the two run the same arithmetic.
    assert len(set(result["rows"][0]["last_loss"].values())) == 1
    shown = capsys.readouterr().out
    assert "the engine adds" in shown and "overhead in CPU time, bfloat16, clipped" in shown
    assert not [record for record in caplog.records if record.name == "offload.deepspeed"], "it would be on stdout"


@pytest.mark.usefixtures("accelerator_setting")
def test_an_engine_that_trains_otherwise_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "step", lambda engine: engine.optimizer.zero_grad())
    monkeypatch.setattr(_bench_engine, "_RATE", 1e-1)
    with pytest.raises(AssertionError, match="losses differ, so the steps do"):
        main(["bench", "engine", "--quick", "--device", "cpu"])


# --- every part ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part", ["activations", "checkpoint", "engine", "link", "step", "swap", "train", "unified", "update"]
)
@pytest.mark.parametrize(("name", "reason"), [("cuda:99", "not there"), ("moon", "no device"), ("meta", "supported")])
def test_a_device_that_cannot_be_measured_is_named(
    part: str, name: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", part, "--quick", "--device", name]) == 2
    error = capsys.readouterr().err
    assert repr(name) in error and reason in error


def test_a_run_that_is_stopped_leaves_what_it_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(options: Any) -> Iterator[dict[str, Any]]:
        yield {"runs": {}}
        raise KeyboardInterrupt

    monkeypatch.setattr(_bench_train, "run", stopped)
    path = tmp_path / "result.json"
    assert main(["bench", "train", "--json", str(path)]) == 130
    assert bench_results(path)["train"]["runs"] == {}
    assert "stopped" in capsys.readouterr().err


# --- update -------------------------------------------------------------------------------------------------


def test_update_reports_ours_beside_a_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "update.json"
    assert main(["bench", "update", "--quick", "--device", "cpu", "--json", str(path)]) == 0
    result = bench_results(path)["update"]
    small = {"offload bf16, bf16 moments", "offload bf16, int8 moments", "offload bf16 master, int8 moments"}
    assert set(result["share_of_copy"]) == {"offload fp32", "offload bf16", *small}
    assert set(result["seconds"]) == {"copy", "torch fp32 fused", "torch bf16 casts + fused", *result["share_of_copy"]}
    copied = 8 * result["count"] / result["seconds"]["copy"]["median"]
    updated = 28 * result["count"] / result["seconds"]["offload fp32"]["median"]
    assert result["share_of_copy"]["offload fp32"] == pytest.approx(updated / copied)
    (fallback,) = result["fallbacks"]
    assert "separate torch operations" in fallback and fallback in capsys.readouterr().out


# --- train --------------------------------------------------------------------------------------------------


def train(path: Path, *arguments: str) -> dict[str, Any]:
    assert main(["bench", "train", "--quick", "--device", "cpu", *arguments, "--json", str(path)]) == 0
    return bench_results(path)["train"]


@pytest.mark.parametrize("name", ["tiny", "1b", "8b"])
def test_the_model_has_the_shapes_that_the_bound_counts(name: str) -> None:
    shape, meta = _bench_train._SIZES[name][0], torch.device("meta")
    model = _bench_model.build(shape, 2048, meta, meta, checkpointing=True)
    assert [tuple(parameter.shape) for parameter in model.parameters()] == shapes(shape)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.usefixtures("torch_settings")
def test_train_compares_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(tmp_path / "result.json", "--steps", "3", "--tokens", "64", "128", "--micro-batch", "64", *BESIDE)
    runs, name = result["runs"], "optimizer+gradients"
    assert list(runs) == ["compute", "resident", "torch", name] and result["interleaved"]
    # Two steps to warm up, and one more before each of the three blocks of one timed step, for each number of tokens.
    assert all(len(one["losses"]) == 14 for one in runs.values())
    for one in (runs["resident"], runs["torch"], runs[name]):
        assert [(row["tokens"], row["micro_batches"]) for row in one["steps"]] == [(64, 1), (128, 2)]
        assert all(len(row["step_s"]["samples"]) == 3 for row in one["steps"])
    # A step of compute has one micro-batch, whatever the others have.
    assert [(row["tokens"], len(row["step_s"]["samples"])) for row in runs["compute"]["steps"]] == [(64, 6)]
    assert result["losses_equal_resident"] and runs[name]["losses"] == runs["resident"]["losses"]
    assert runs["torch"]["losses"] != runs["resident"]["losses"], "bf16 moments are another training"
    # The offloaded run was offloaded, the resident one was not.
    count = result["parameters"]
    offloaded, resident = (runs[name]["stats"] for name in (name, "resident"))
    assert offloaded["host_bytes"]["moments"] >= 8 * count and "moments" not in offloaded["device_bytes"]
    assert resident["device_bytes"]["moments"] == 8 * count and resident["host_bytes"]["moments"] == 0
    one, two = runs[name]["steps"]
    assert one["moved_bytes"]["to_host"] >= 2 * count and two["moved_bytes"]["to_host"] >= 4 * count
    assert set(one["bound"]) == {"compute_s", "to_host_s", "to_device_s", "host_update_s"}
    assert two["bound"]["compute_s"] == pytest.approx(2 * one["bound"]["compute_s"])
    assert one["share_of_link"]["to_host"] > 0 and one["step_over_resident"] > 0
    assert "equal bit for bit" in capsys.readouterr().out


@pytest.mark.usefixtures("torch_settings")
def test_train_goes_on_when_a_run_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = _bench_train.Offloaded

    def too_large(size: Any, device: Any, places: dict[str, str], **options: Any) -> Any:
        if not places:
            raise torch.OutOfMemoryError("tried to allocate 112 GiB\nand more")
        return honest(size, device, places, **options)

    monkeypatch.setattr(_bench_train, "Offloaded", too_large)
    monkeypatch.setattr(_bench_train, "free_bytes", lambda device: 0)  # one run after the other
    arguments = ["--steps", "1", "--offload", "gradients", "--tokens", "16", "--no-checkpointing", *BESIDE]
    result = train(tmp_path / "result.json", *arguments)
    assert not result["interleaved"] and result["micro_batch_tokens"] == result["sequence_tokens"] == 16
    assert result["runs"]["resident"] == {"does_not_fit": "tried to allocate 112 GiB"}
    assert len(result["runs"]["torch"]["losses"]) == 4
    (row,) = result["runs"]["gradients"]["steps"]
    assert "losses_equal_resident" not in result and row["share_of_bound"] > 0
    assert "host_update_s" not in row["bound"], "the optimizer was on the device"
    assert result["runs"]["gradients"]["stats"]["device_bytes"]["moments"] == 8 * result["parameters"]
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.usefixtures("torch_settings")
def test_train_with_several_placements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_activations, "MIN_BYTES", 1)  # the model is small
    names = ["optimizer+gradients+params+activations", "optimizer:0.5+gradients", "optimizer:unified+gradients"]
    names += ["activations:int8", "optimizer:unified=0.6,host=0.4+gradients", "optimizer+params:ahead"]
    sizes = ["--steps", "1", "--tokens", "64", "--micro-batch", "32", "--vocabulary", "128", "--no-checkpointing"]
    result = train(tmp_path / "result.json", *sizes, "--beside", "compute", "resident", "--offload", *names)
    everything, half, unified, rounded, parts, ahead = (result["runs"][name] for name in names)
    assert result["losses_equal_resident"] and everything["losses_equal_resident"] and half["losses_equal_resident"]
    assert everything["stats"]["host_bytes"]["weights"] > 1.9 * result["parameters"]
    assert everything["stats"]["activations"]["offloaded_bytes"] > 0
    sent = rounded["stats"]["activations"]
    assert sent["sent_bytes"] < sent["offloaded_bytes"] * 0.8 and "losses_equal_resident" not in rounded
    moments = 8 * result["parameters"]
    assert 0.4 * moments < half["stats"]["device_bytes"]["moments"] <= 0.5 * moments
    rates, moved = result["ceilings_bytes_per_s"], 2 * result["parameters"]
    bound = everything["steps"][0]["bound"]
    assert bound["to_host_s"] == pytest.approx(2 * moved / rates["to_host"])
    # Weights come once or twice in each micro-batch, and the sums of the first one come back in the second.
    assert 3 * moved < bound["to_device_s"] * rates["to_device"] < 5 * moved
    halved = half["steps"][0]["bound"]  # of whole parameters
    assert halved["host_update_s"] == pytest.approx(bound["host_update_s"] / 2, rel=0.1)
    assert halved["to_host_s"] == pytest.approx(bound["to_host_s"] / 2, rel=0.1)
    assert halved["to_device_s"] == pytest.approx(moved / rates["to_device"], rel=0.1)
    assert everything["steps"][0]["forecast_s"] >= max(bound.values())
    assert unified["losses_equal_resident"] and unified["stats"]["host_bytes"]["moments"] >= moments
    crossing = unified["steps"][0]["bound"]  # remainders and moments, and the gradients of two micro-batches
    assert set(crossing) == {"compute_s", "to_host_s", "to_device_s", "host_update_s"}
    assert crossing["to_device_s"] == pytest.approx((10 / 2 + 2) * moved / rates["to_device"])
    assert ahead["losses_equal_resident"] and ahead["stats"]["host_bytes"]["weights"] > 1.9 * result["parameters"]
    assert ahead["steps"][0]["forecast_s"] > 0
    waits = any("run_ahead" in why for why in ahead["stats"]["fallbacks"])
    assert waits == (result["device"] == "cpu")
    assert parts["losses_equal_resident"] and parts["stats"]["host_bytes"]["moments"] >= moments
    shared = parts["steps"][0]["bound"]  # of whole parameters
    # Host memory serves both.
    assert shared["host_update_s"] == pytest.approx((0.4 + 0.6 * 22 / 30) * bound["host_update_s"], rel=0.15)
    assert shared["to_device_s"] == pytest.approx(
        (0.6 * 10 / 2 + 0.4 * 2) * moved / rates["to_device"], rel=0.15
    )  # of the others weights, and sums of the first micro-batch


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "33"], "--tokens 33"),
        (["--tokens", "32", "80"], "--tokens 80"),
        (["--micro-batch", "48"], "--micro-batch 48"),
        (["--offload", "optimizer", "weights"], "--offload weights"),
        (["--offload", "optimizer:half"], "--offload optimizer:half"),
        (["--offload", "gradients:unified"], "--offload gradients:unified"),
        (["--offload", "optimizer:1.5"], "optimizer=1.5"),
        (["--device-cap", "4", "--device", "cpu"], "only CUDA's allocator"),
    ],
)
def test_what_train_cannot_do_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", "--quick", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_bound_is_the_largest_part() -> None:
    def one(seconds: float, *losses: float, **more: Any) -> dict[str, Any]:
        row = {"tokens": 64, "micro_batches": 1, "step_s": {"median": seconds}}
        return {"steps": [row], "losses": list(losses), **more}

    places = {"optimizer": "host", "gradients": "host", "params": "device", "activations": "device"}
    count = sum(map(math.prod, shapes(TINY)))
    rates = {"to_host": 1.0 * count, "to_device": 0.5 * count, "host_memory_while_copying": 6.0 * count}
    result = {
        "parameters": count,
        "size": "tiny",
        "vocabulary": TINY.vocabulary,
        "ceilings_bytes_per_s": rates,
        "runs": {
            "compute": one(3.0, 1, 1),
            "resident": one(4.0, 1, 2.5, places=dict.fromkeys(places, "device")),
            "offloaded": one(8.0, 1, 2, places=places),
            "torchao": {"unavailable": "not installed"},
        },
    }
    concluded = _bench_train.conclude(result)
    (row,) = concluded["runs"]["offloaded"]["steps"]
    expected = {"compute_s": 3.0, "to_host_s": 2.0, "to_device_s": 4.0, "host_update_s": 5.0}
    assert row["bound"] == pytest.approx(expected)
    assert row["bound_by"] == "host_update_s" and row["share_of_bound"] == pytest.approx(5 / 8)
    assert concluded["losses_equal_resident"] is False and row["step_over_resident"] == 2.0
    assert concluded["runs"]["torchao"] == {"unavailable": "not installed"}


# --- peers --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("torch_settings")
def test_peers_train_the_same_or_say_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise TypeError("of their own\nin many lines")

    monkeypatch.setitem(_bench_train.PEERS, "deepspeed", broken)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    path = tmp_path / "result.json"
    sizes = ["--steps", "1", "--tokens", "64", "--micro-batch", "32"]
    result = train(path, *sizes, "--offload", "--beside", "resident", "fsdp2", "torchao", "deepspeed")
    runs = result["runs"]
    assert runs["deepspeed"] == {"failed": "TypeError: of their own"}
    without_streams = "record_event" in runs["fsdp2"].get("failed", "")
    assert result["absent_peers"] == {
        "torchao": runs["torchao"]["unavailable"],
        "deepspeed": "TypeError: of their own",
        **({"fsdp2": runs["fsdp2"]["failed"]} if without_streams else {}),
    }
    assert set(runs["torchao"]) == {"unavailable"} and "torchao" in runs["torchao"]["unavailable"]
    if without_streams:
        pytest.skip("FSDP2 of torch 2.6 cannot use a CPU's streams")
    # Same weights, tokens and precision: only the order of sums differs.
    assert "fp32 masters" in runs["fsdp2"]["precision"] and len(runs["fsdp2"]["losses"]) == 4
    assert runs["fsdp2"]["losses"] == pytest.approx(runs["resident"]["losses"], abs=1e-3)
    assert runs["fsdp2"]["losses"][0] != runs["fsdp2"]["losses"][2]
    assert runs["fsdp2"]["steps"][0]["step_over_resident"] > 0 and "bound" not in runs["fsdp2"]["steps"][0]


def test_a_peer_that_the_host_cannot_hold_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bench_peers.offload, "environment", lambda: {"host": {"available_bytes": 2**30}})
    with pytest.raises(offload.OutOfHostMemory, match=r"2\.00 GiB of host memory; 1\.00 GiB"):
        _bench_peers._require_host_bytes(2 * 2**30, None)
    _bench_peers._require_host_bytes(2 * 2**30, "3GiB")  # of memory that grows as it is used
    with pytest.raises(offload.OutOfHostMemory, match=r"4\.00 GiB of host memory; 3\.00 GiB"):
        _bench_peers._require_host_bytes(4 * 2**30, "3GiB")


# --- make gpu-test ------------------------------------------------------------------------------------------


def test_gpu_targets_refuse_a_machine_without_a_card() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benches/require_gpu.py")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "sees no NVIDIA device" in done.stderr and "REQUIRE_GPU=0" in done.stderr


@pytest.mark.parametrize(("equal", "code"), [(True, 0), (False, 1)])
def test_unequal_losses_fail_the_command(
    equal: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_bench_train, "run", lambda _: iter([{"name": "train", "losses_equal_resident": equal}]))
    monkeypatch.setattr(_bench_train, "pieces", lambda _: [])
    monkeypatch.setattr(_bench_train, "figures", lambda _: [])
    assert main(["bench", "train", "--size", "tiny"]) == code
