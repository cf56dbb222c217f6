"""`offload env --disk-path` and `offload bench disk`: what they report, and that a wrong figure cannot be reported."""

from __future__ import annotations

import gc
import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from bench_results import check_figures
from offload import StorageError, _native
from offload.cli import _bench_disk, _bench_disk_peers, _bench_disk_weights, main

MIB = 2**20


def test_env_shows_how_a_directory_serves(
    disk_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # no path is so long
    assert main(["env", "--disk-path", disk_path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    (disk,) = facts["disks"]
    assert disk["directory"] == disk_path and disk["free_bytes"] > 0
    assert (disk["backend"] == "io_uring") == (disk["uring_refusal"] is None)
    assert facts["isa"] == _native.active_isa() and facts["host"]["cpu_count"] > 0
    assert main(["env", "--disk-path", disk_path]) == 0
    text = capsys.readouterr().out
    assert f"instruction set {facts['isa']} of {', '.join(_native.available_isas())}" in text
    assert disk_path in text and disk["backend"] in text and "O_DIRECT" in text
    assert os.listdir(disk_path) == []


def test_env_says_why_a_slower_way_is_taken(
    disk_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OFFLOAD_DISK_BACKEND", "threads")
    assert main(["env", "--disk-path", disk_path]) == 0
    output = capsys.readouterr().out
    assert f"{disk_path}: no io_uring: not asked for" in output and "unset OFFLOAD_DISK_BACKEND" in output


def test_env_without_disks_and_with_one_that_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    assert "host" in capsys.readouterr().out
    assert offload.environment()["disks"] == []
    assert main(["env", "--disk-path", "/nowhere"]) == 2
    assert "Create the directory" in capsys.readouterr().err


# --- bench --------------------------------------------------------------------------------------------------


def test_bench_reports_every_mode_and_side(disk_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "disk", "--quick", "--disk-path", disk_path, "--json", "-"]) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)["results"]["disk"]
    check_figures(result)
    assert [row["mode"] for row in result["rows"]] == ["read", "write", "both"]
    for row in result["rows"]:
        rates = row["gb_per_s"]
        assert {*result["facts"], "raw"} <= set(rates)
        assert all(len(rates[name]["samples"]) == 3 for name in result["facts"])
        for name in result["facts"]:
            assert row["share_of_raw"][name] == rates[name]["median"] / rates["raw"]["median"] > 0
    assert result["bytes"] == 32 * MIB and "threads" in result["facts"]
    weights = result["weights"]
    assert weights["read_bytes"] > weights["weight_bytes"] > weights["cache_bytes"] > 0
    assert weights["written_bytes"] > 0.5 * weights["weight_bytes"]
    shares = zip(weights["larger_s"]["samples"], weights["in_memory_s"]["samples"], strict=True)
    assert all(larger >= resident > 0 for larger, resident in shares)
    update = result["update"]
    states = 10 * update["parameters"]
    assert update["written_bytes"] >= states and states > update["read_bytes"] >= states - update["window_bytes"]
    assert 0 < update["window_bytes"] <= 8 * MIB
    for name, raw in (("share_of_larger", "larger_s"), ("share_of_both", "both_s")):
        shares = zip(update[name]["samples"], update[raw]["samples"], update["update_s"]["samples"], strict=True)
        assert all(share == raw_s / own_s > 0 for share, raw_s, own_s in shares)
    assert "of raw" in output.err and disk_path in output.err
    gc.collect()  # the model whose states were updated
    assert os.listdir(disk_path) == []


def test_weights_on_disk_that_train_to_other_losses_are_not_reported(
    disk_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = _bench_disk_weights._Steps.seconds

    def seconds(steps: Any) -> float:
        elapsed = honest(steps)
        steps.losses[-1] += 1.0 if steps.stats() else 0.0
        return elapsed

    monkeypatch.setattr(_bench_disk_weights._Steps, "seconds", seconds)
    with pytest.raises(AssertionError, match="other losses than weights in memory"):
        _bench_disk_weights.measure_weights(disk_path, 0, 1, lambda mode: 1.0)


def test_fio_is_asked_where_it_is_installed(
    disk_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fio = tmp_path / "bin" / "fio"
    fio.parent.mkdir()
    job = '{"read": {"bw_bytes": 3e9}, "write": {"bw_bytes": 1e9}}'
    fio.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho \'{{"jobs": [{job}, {job}]}}\'\n')
    fio.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fio.parent}:{os.environ['PATH']}")
    assert main(["bench", "disk", "--quick", "--disk-path", disk_path, "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)["results"]["disk"]
    assert [row["gb_per_s"]["fio"]["median"] for row in result["rows"]] == [8.0] * 3
    read, write, both = (tmp_path / "calls").read_text().splitlines()
    assert "--rw=read" in read and "--rw=write" not in read and f"--size={4 * MIB}" in read
    assert "--rw=write" in write and "--numjobs=8" in write
    assert both.count("--numjobs=4") == 2 and both.count(f"--size={4 * MIB}") == 2
    fio.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    assert main(["bench", "disk", "--quick", "--disk-path", disk_path]) == 2
    assert "fio ended with code 3: broken" in capsys.readouterr().err


def test_bytes_that_did_not_move_are_found(disk_path: str) -> None:
    tier = _bench_disk.TierSide(disk_path, 16, "threads", _native.HostPool())
    tier.check()
    honest: Any = tier._file

    class Lazy:
        submit_write = staticmethod(honest.submit_write)

        @staticmethod
        def submit_read(offset: int, destination: int, nbytes: int) -> _native.Ticket:
            return _native.Ticket()

    tier._file = Lazy()  # type: ignore[assignment]
    with pytest.raises(AssertionError, match="other bytes"):
        tier.check()


class AsyncIo:
    """DeepSpeed's async I/O: what is submitted is moved in `wait`, and a window is never larger than its queue."""

    def __init__(self, block_size: int, queue_depth: int, intra_op_parallelism: int) -> None:
        assert (block_size, queue_depth) == (MIB, 32) and intra_op_parallelism > 0
        self.queued: list[tuple[str, torch.Tensor, str, int]] = []
        self.lossy = False

    def new_cpu_locked_tensor(self, count: int, example: torch.Tensor) -> torch.Tensor:
        return torch.empty(count, dtype=example.dtype)

    def free_cpu_locked_tensor(self, buffer: torch.Tensor) -> None:
        assert not self.queued

    def async_pread(self, buffer: torch.Tensor, name: str, offset: int) -> int:
        self.queued.append(("read", buffer, name, offset))
        return 0

    def async_pwrite(self, buffer: torch.Tensor, name: str, offset: int) -> int:
        self.queued.append(("write", buffer, name, offset))
        return 0

    def wait(self) -> int:
        assert len({buffer.data_ptr() for _, buffer, _, _ in self.queued}) == len(self.queued) > 0
        for verb, buffer, name, offset in self.queued:
            with open(name, "r+b", buffering=0) as file:
                file.seek(offset)
                if verb == "write":
                    assert offset + buffer.nbytes <= os.path.getsize(name)
                    file.write(memoryview(buffer.numpy()))
                elif not self.lossy:
                    file.readinto(memoryview(buffer.numpy()))
        moved = len(self.queued)
        self.queued.clear()
        return moved


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """An installed DeepSpeed; `compatible` says whether its library can be built."""
    facts = types.SimpleNamespace(compatible=True)
    library = types.SimpleNamespace(aio_handle=AsyncIo)
    builder = types.SimpleNamespace(is_compatible=lambda: facts.compatible, load=lambda: library)
    for name in ("deepspeed", "deepspeed.ops", "deepspeed.ops.op_builder"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    module.__dict__["AsyncIOBuilder"] = lambda: builder
    return facts


def test_deepspeeds_io_takes_its_turns(
    deepspeed: types.SimpleNamespace, disk_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "disk", "--quick", "--disk-path", disk_path, "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)["results"]["disk"]
    check_figures(result)
    figures = {one["name"]: one for one in result["figures"]}
    for mode in ("read", "write", "both"):
        peer, ours = figures[f"{mode}, deepspeed"], figures[f"{mode}, threads"]
        assert peer["side"] == "peer" and peer["samples"] == 3
        assert ours["times_as_fast_as"] == {"deepspeed": pytest.approx(ours["median"] / peer["median"])}
    assert result["absent_peers"] == {}
    gc.collect()
    assert os.listdir(disk_path) == []


def test_deepspeeds_io_that_cannot_be_built_is_named(
    deepspeed: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    deepspeed.compatible = False
    assert "libaio" in str(_bench_disk_peers.deepspeed_refusal())
    sys.modules["deepspeed.ops.op_builder"].__dict__.pop("AsyncIOBuilder")
    assert str(_bench_disk_peers.deepspeed_refusal()).startswith("AttributeError")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert _bench_disk_peers.deepspeed_refusal() == "not installed"


def test_deepspeeds_bytes_that_did_not_move_are_found(deepspeed: types.SimpleNamespace, disk_path: str) -> None:
    side = _bench_disk_peers.DeepSpeedSide(disk_path, 11, block=MIB, chunk=8, window=32)
    side.check()
    side._handles["read"].lossy = True
    with pytest.raises(AssertionError, match="other bytes"):
        side.check()
    side.close()
    assert os.listdir(disk_path) == []


def test_a_short_raw_transfer_is_found(disk_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = _bench_disk.RawSide(disk_path, 8, False, _native.HostPool())
    monkeypatch.setattr(os, "preadv", lambda *arguments: 7)
    with pytest.raises(StorageError, match="a raw read moved 7 of 1048576 bytes"):
        raw.seconds({"read": (0, 8)})
    raw.close()


def test_the_halves_of_both_share_no_block(disk_path: str) -> None:
    seen: list[dict[str, tuple[int, int]]] = []

    class Recorder:
        def seconds(self, spans: dict[str, tuple[int, int]]) -> float:
            seen.append(spans)
            return 1.0

    rates = _bench_disk._measure({"a": Recorder()}, "both", 9, 2)
    assert seen == [{"read": (0, 4), "write": (4, 9)}] * 3
    assert rates == {"a": [9 * MIB / 1e9] * 2}
