"""The command: parsing without torch, the demo end to end, its checks, its exit codes."""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload import _activations, _copy_lanes
from offload.cli import _train, main
from offload.cli._corpus import batches, read_corpus
from offload.cli._peak import measured_peak
from offload.cli._table import Table
from offload.cli._training import MasterAdamW, Run, build_model, learning_rate_share

TINY = ["--layers", "2", "--hidden", "64", "--length", "16", "--batch", "2"]


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "offload", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_do_not_import_torch(flag: str) -> None:
    code = (
        "import sys\nfrom offload.cli import main\n"
        f"try:\n    main([{flag!r}])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "offload" in result.stdout


def test_module_and_command_agree() -> None:
    assert run_command("--version").stdout.startswith("offload ")
    assert "exit codes" in run_command("--help").stdout


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--steps", "0"],
        ["train", "--size", "few"],
        ["train", "--params", "5M"],
        ["train", "--dtype", "int8"],
        ["bench", "it"],
        ["bench"],
        ["bench", "adamw", "--device", "cpu"],
        ["bench", "train", "--beside", "weights"],
        ["fly"],
    ],
)
def test_bad_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


def test_an_unreachable_device_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--device", "cuda:99"]) == 2
    assert "cuda:99" in capsys.readouterr().err


@pytest.mark.usefixtures("disk_calls")
def test_train_with_states_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo, its states larger than the host budget that all of it stays within: the bits of a resident run."""
    demo = ["train", "--layers", "2", "--hidden", "128", "--length", "16", "--batch", "2", "--accumulate", "1"]
    where = ["--optimizer", "disk", "--disk-path", str(tmp_path), "--host-budget", "3MiB"]
    assert main([*demo, *where, "--steps", "4", "--check", "--json"]) == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert report["check"]["nothing_offloaded"]["ok"] and "equal bit for bit" in output.err
    on_disk = sum(report["bytes"]["disk"].values())
    assert report["stats"]["pool"]["peak_used_bytes"] <= 3 << 20 < on_disk, report["stats"]
    assert report["stats"]["disk"]["allocated_bytes"] >= on_disk and report["stats"]["host_bytes"]["moments"] == 0
    assert "states on disk" in output.err and list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("disk_calls")
def test_train_with_states_and_weights_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = ["train", "--layers", "5", "--hidden", "128", "--length", "16", "--batch", "2", "--accumulate", "1"]
    where = ["--optimizer", "disk", "--params", "disk", "--disk-path", str(tmp_path), "--host-budget", "5MiB"]
    assert main([*demo, *where, "--steps", "3", "--check", "--json"]) == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert report["check"]["nothing_offloaded"]["ok"] and "equal bit for bit" in output.err
    memory, disk = report["host_memory"], report["stats"]["disk"]
    assert memory["obtained_bytes"] <= memory["budget_bytes"] == 5 << 20 < sum(report["bytes"]["disk"].values())
    assert re.search(r"host memory +\S+ MiB used at most, \S+ MiB obtained: within the budget of 5.00 MiB", output.err)
    assert report["bytes"]["host"]["cache"] < report["bytes"]["disk"]["working"]
    assert disk["weights_read_bytes"] > 3 * report["bytes"]["disk"]["working"] and list(tmp_path.iterdir()) == []


def test_train_with_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--steps", "6", "--check", "--json"]) == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert report["steps"] == 6 and len(report["losses"]) == 6
    assert report["check"]["nothing_offloaded"] | {"tokens_per_s": 0} == {
        "ok": True,
        "steps": 6,
        "largest_loss_difference": 0.0,
        "largest_weight_difference": 0.0,
        "tokens_per_s": 0,
        "peak_device_bytes": report["check"]["nothing_offloaded"]["peak_device_bytes"],
    }
    assert report["check"]["plain_torch"]["ok"]
    # The run was offloaded: states and gradients on the host, none on the device.
    assert report["bytes"]["host"]["moments"] == 8 * report["parameters"]
    assert report["bytes"]["device"]["moments"] == report["bytes"]["device"]["gradients"] == 0
    assert report["stats"]["host_bytes"]["moments"] >= 8 * report["parameters"]
    assert report["stats"]["steps"] == 6 and 0 <= report["hidden_share"] <= 1
    assert "equal bit for bit" in output.err, "with --json the table goes to stderr"


def test_train_with_activations_on_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--steps", "3", "--check", "--activations", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "activations off the device" in text and "with nothing offloaded, activations included" in text
    assert main(["train", *TINY, "--steps", "1", "--activations", "moon"]) == 2
    assert "activations='moon'" in capsys.readouterr().err


def test_train_with_a_share_of_the_states_on_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--steps", "3", "--check", "--json", "--optimizer", "0.7"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["check"]["nothing_offloaded"]["ok"]
    on_device, on_host = (report["bytes"][tier]["moments"] for tier in ("device", "host"))
    assert 0 < on_device <= 0.3 * (on_device + on_host)
    assert main(["train", *TINY, "--steps", "1", "--optimizer", "1.7"]) == 2
    assert "a share, a float from 0.0 to 1.0" in capsys.readouterr().err


@pytest.mark.parametrize("moments", ["bf16", "int8"])
def test_train_with_small_moments(moments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--steps", "3", "--moments", moments, "--check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["moments"] == moments
    assert report["check"].keys() == {"nothing_offloaded"} and report["check"]["nothing_offloaded"]["ok"]
    bytes_an_element = report["bytes"]["host"]["moments"] / report["parameters"]
    assert bytes_an_element == 4 if moments == "bf16" else 2 < bytes_an_element < 2.1


def test_train_with_bf16_masters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--steps", "3", "--master", "bf16", "--moments", "int8", "--check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["master"] == "bf16" and report["bytes"]["host"]["master"] == 0
    assert report["check"].keys() == {"nothing_offloaded"} and report["check"]["nothing_offloaded"]["ok"]


def test_train_in_fp32(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--steps", "3", "--check", "--dtype", "float32"]) == 0
    text = capsys.readouterr().out
    assert "equal to rounding" in text and "tokens/s" in text and "of it hidden" in text


def test_equal_seeds_give_equal_runs(capsys: pytest.CaptureFixture[str]) -> None:
    losses = []
    for seed in ("1", "1", "2"):
        assert main(["train", *TINY, "--steps", "3", "--seed", seed, "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["losses"])
    assert losses[0] == losses[1] != losses[2]


def test_a_failed_check_exits_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    honest = _train.train

    def tampered(*arguments: Any, **options: Any) -> Run:
        run = honest(*arguments, **options)
        if options["placement"] == "device":
            run.losses[-1] += 2.0**-20
        return run

    monkeypatch.setattr(_train, "train", tampered)
    assert main(["train", *TINY, "--steps", "2", "--check"]) == 1
    assert "NOT equal bit for bit" in capsys.readouterr().out


def test_a_loss_that_is_nan_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = _train.train

    def tampered(*arguments: Any, **options: Any) -> Run:
        run = honest(*arguments, **options)
        if options["placement"] is None:
            run.losses[-1] = math.nan  # behind one that is right
        return run

    monkeypatch.setattr(_train, "train", tampered)
    assert main(["train", *TINY, "--steps", "2", "--check", "--json"]) == 1
    plain = json.loads(capsys.readouterr().out)["check"]["plain_torch"]
    assert not plain["ok"] and math.isnan(plain["largest_loss_difference"])


@pytest.fixture
def no_collection() -> Iterator[None]:
    """A collection while bytes are counted would take off those of earlier runs."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
def test_a_budget_for_a_quarter_of_the_weights_trains_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is on its way adds to a peak, as much as the machine is slow: here each has left before the next is made.
    monkeypatch.setattr(_copy_lanes, "_RING_BYTES", 0)
    monkeypatch.setattr(_activations.Activations, "_room", lambda _: 0)
    sizes = ["--layers", "12", "--hidden", "64", "--length", "64", "--batch", "4", "--steps", "3"]

    def report(*arguments: str) -> dict[str, Any]:
        assert main(["train", *sizes, "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    resident = report("--params", "device")
    weights = resident["bytes"]["device"]["weights"]
    streamed = report("--device-budget", str(weights // 4), "--check")
    assert all(check["ok"] for check in streamed["check"].values())
    assert streamed["losses"] == resident["losses"]
    assert 0 < streamed["stats"]["peak_weight_bytes"] <= weights // 4 < resident["stats"]["peak_weight_bytes"]
    smallest = report("--device-budget", str(weights // 4), "--activations", "host")
    assert smallest["losses"] == resident["losses"] and smallest["stats"]["activations"]["offloaded_bytes"] > 0
    peaks = [run["peak_device"]["bytes"] for run in (resident, streamed, smallest)]
    assert peaks[2] < 0.8 * peaks[1] and peaks[0] - peaks[1] >= 0.7 * weights, (peaks, weights)
    assert main(["train", *sizes]) == 0
    assert "weights on the device" in capsys.readouterr().out


@pytest.mark.usefixtures("no_collection")
def test_the_peak_of_a_card_is_not_that_of_earlier_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    model.itself = [model]  # as hooks do
    left, there = weakref.ref(model), []
    del model
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: there.append(left()))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 7)
    with measured_peak(torch.device("cuda", 0), 0) as peak:
        pass
    assert there == [None] and (peak.nbytes, peak.source) == (7, "torch.cuda.max_memory_allocated")


@pytest.mark.parametrize("step_bytes", [0, 1 << 20])
def test_the_measured_peak_is_that_of_torchs_allocator(step_bytes: int) -> None:
    with measured_peak(torch.device("cpu"), 100) as peak:
        largest = torch.ones(step_bytes + 4096, dtype=torch.uint8)
        del largest
        torch.ones(64)
    assert step_bytes + 4196 <= peak.nbytes <= step_bytes + 2 * 4196 and peak.source == "torch.profiler"


def test_ctrl_c_ends_with_the_table_so_far() -> None:
    arguments = [sys.executable, "-m", "offload", "train", *TINY, "--steps", "1000000", "--json"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        while not process.stderr.readline().startswith("offloaded: step 1/"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    report = json.loads(output)
    assert report["interrupted"] and report["steps"] == len(report["losses"])
    assert "Traceback" not in errors


def test_size_flag_sizes_the_model() -> None:
    for asked in (100_000, 200_000, 700_000, 1_000_000, 5_000_000, 20_000_000):
        options = argparse.Namespace(hidden=None, size=asked, layers=6, length=16, seed=0, dtype="float32")
        count = sum(parameter.numel() for parameter in build_model(options).parameters())
        assert 0.85 * asked < count < 1.15 * asked


def test_the_schedule_warms_up_and_decays() -> None:
    shares = [learning_rate_share(step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and max(shares) == 1.0
    assert shares.index(1.0) in (9, 10)
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert 0.1 <= shares[-1] < 0.11


def test_corpus_and_batches_are_deterministic() -> None:
    corpus = read_corpus()
    assert corpus.dtype == torch.uint8 and len(corpus) > 1_000_000
    first, second = (next(batches(corpus, batch=3, length=8, seed=5)) for _ in range(2))
    assert first.shape == (3, 8) and first.dtype == torch.int64
    assert torch.equal(first, second)


def test_a_folder_without_sources_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no Python sources"):
        read_corpus(tmp_path)


def test_master_adamw_is_adamw_over_fp32_copies() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(16).bfloat16())
    master = torch.nn.Parameter(weight.detach().float())
    ours, stock = MasterAdamW([weight], lr=0.1), torch.optim.AdamW([master], lr=0.1)
    for _ in range(3):
        weight.grad = torch.randn(16).bfloat16()
        master.grad = weight.grad.float()
        ours.step()
        stock.step()
        assert torch.equal(weight.detach(), master.detach().bfloat16())
    ours.zero_grad()
    assert weight.grad is None


def test_table_aligns_columns() -> None:
    lines = str(Table([("kind", "bytes"), ("weights", "1"), ("m", "1000")])).splitlines()
    assert lines == ["kind     bytes", "--------------", "weights      1", "m         1000"]
