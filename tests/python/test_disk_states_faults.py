"""States on disk when the disk refuses, fails or lies, and when processes share, fork or die.

A refusal at wrap leaves a plain pair. A failure in a step is told at the next wait with the parameter, the file and the
offset; then everything is refused, and what the last checkpoint has is good. Nothing else ends a training.
"""

from __future__ import annotations

import copy
import errno
import os
import re
import signal
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import Programs
from torch import nn

import offload
from offload import _native, _wrap
from test_disk_states import begin, on_disk, wide
from training import HOST, assert_same_bits, batches, loss_of, train

pytestmark = pytest.mark.usefixtures("device", "disk_calls")

TMPFS = 0x01021994
Calls = _native.FailingSystemCalls
Cause = Callable[[Calls, str, Path], None]


def scratch_files(directory: Path) -> Iterator[str]:
    """Paths of the open scratch files of the directory, whose own names are gone."""
    for name in os.listdir("/proc/self/fd"):
        link = f"/proc/self/fd/{name}"
        if os.path.lexists(link) and os.readlink(link).startswith(f"{directory}/.offload-scratch"):
            yield link


# --- refused at wrap ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "code", "text"),
    [
        ("allocate", errno.ENOSPC, "Free space"),
        ("allocate", errno.EDQUOT, "quota"),
        ("open", errno.EROFS, "read-only"),
        ("set_lock", errno.ENOLCK, "locking"),
    ],
)
@pytest.mark.parametrize("params", ["device", "host", "disk"])
def test_a_refusal_at_wrap_leaves_a_plain_pair(
    params: str, call: str, code: int, text: str, tmp_path: Path, disk_calls: Calls
) -> None:
    model = wide(torch.bfloat16)
    expected = train(*begin(model, on_disk(tmp_path, params=params)), steps=3)
    offload.unwrap(expected.model, expected.optimizer)
    twin = copy.deepcopy(model)
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    disk_calls.fail(call, 1, code)
    with pytest.raises(offload.StorageError, match=text) as refusal:
        offload.wrap(twin, plain, **on_disk(tmp_path, params=params))
    assert refusal.value.errno == code and str(tmp_path) in str(refusal.value)
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ([".offload-lock"] if call == "set_lock" else []) and list(scratch_files(tmp_path)) == []
    assert all(type(p) is nn.Parameter and p.untyped_storage().nbytes() > 0 for p in twin.parameters())
    assert not twin._forward_pre_hooks and not plain.state
    assert_same_bits(train(*offload.wrap(twin, plain, **on_disk(tmp_path, params=params)), steps=3), expected)


def test_memory_is_no_disk_and_a_torch_class_stays_in_memory(tmp_path: Path, disk_calls: Calls) -> None:
    model = wide()
    with pytest.raises(offload.InvalidArgument, match=r"SGD cannot have its states on disk.*optimizer='host'"):
        offload.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), **on_disk(tmp_path))
    with pytest.raises(offload.StorageError, match=r"none.*Create the directory"):
        begin(model, on_disk(tmp_path / "none"))
    disk_calls.pretend_file_system(TMPFS)
    with pytest.raises(offload.StorageError, match="tmpfs, which is host memory"):
        begin(model, on_disk(tmp_path))


def test_a_host_budget_without_room_for_the_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(offload.OutOfHostMemory, match=r"window +0 B +\d"):
        begin(wide(), on_disk(tmp_path, host_budget="300KiB"))
    assert list(tmp_path.iterdir()) == []


# --- failures in a step -------------------------------------------------------------------------------------


def one_step(model: nn.Module, optimizer: offload.OffloadOptimizer) -> None:
    loss_of(model, next(batches(1))).backward()
    optimizer.step()
    optimizer.zero_grad()


def flip_a_bit(calls: Calls, backend: str, directory: Path) -> None:
    (path,) = scratch_files(directory)
    with open(path, "r+b", buffering=0) as file:
        for offset in range(7, os.fstat(file.fileno()).st_size, 4096):  # some blocks are in the window still
            byte = os.pread(file.fileno(), 1, offset)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)
        os.fsync(file.fileno())


def truncate(calls: Calls, backend: str, directory: Path) -> None:
    (path,) = scratch_files(directory)
    os.truncate(path, 0)


def failing(call: str) -> Cause:
    return lambda calls, backend, directory: calls.fail(_name(call, backend), 3, errno.EIO)


def shortened(calls: Calls, backend: str, directory: Path) -> None:
    # A file that ends early moves nothing at the second attempt; each of those that follow is shortened too.
    calls.shorten(_name("read", backend), 2, 100)


def _name(call: str, backend: str) -> str:
    return f"uring_{call}" if backend == "io_uring" else f"p{call}"


FAULTS: dict[str, tuple[Cause, str]] = {
    "read": (failing("read"), r"update failed: reading \d+ bytes at offset \d+ of .*\(EIO\).*dmesg"),
    "write": (failing("write"), r"states were not written: writing \d+ bytes at offset \d+ of .*\(EIO\).*dmesg"),
    "short read": (shortened, r"update failed: reading \d+ bytes at offset \d+ of .*moved 100 of \d+ bytes"),
    "flipped bit": (flip_a_bit, r"update failed: reading \d+ bytes at offset \d+ of .*checksum differs"),
    "no file": (truncate, r"update failed: reading \d+ bytes at offset \d+ of .*moved 0 of \d+ bytes"),
}


@pytest.mark.parametrize("backend", ["io_uring", "threads"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_in_a_step(
    fault: str, backend: str, tmp_path: Path, disk_calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFLOAD_DISK_BACKEND", backend)
    (tmp_path / "disk").mkdir()
    try:
        model, optimizer = begin(wide(torch.bfloat16), on_disk(tmp_path / "disk"))
    except offload.StorageError as refusal:
        assert backend == "io_uring" and "io_uring" in str(refusal)
        pytest.skip("this kernel gives no io_uring")
    train(model, optimizer, steps=2)
    optimizer.synchronize()
    offload.save_checkpoint(tmp_path / "saved", model, optimizer, tag="good")
    cause, text = FAULTS[fault]
    cause(disk_calls, backend, tmp_path / "disk")
    with pytest.raises(offload.StorageError, match=r"parameter '[\w.]+': its " + text) as failure:
        one_step(model, optimizer)
        optimizer.synchronize()
    assert failure.value.errno in (errno.EIO, None)
    assert str(tmp_path / "disk") in str(failure.value) and "checkpoint" in str(failure.value)
    for call in (optimizer.step, optimizer.synchronize, optimizer.state_dict, lambda: model(next(batches(1)))):
        with pytest.raises(offload.StateError, match=r"earlier update failed.*checkpoint.*at offset"):
            call()
    model, plain = offload.unwrap(model, optimizer)
    assert list((tmp_path / "disk").iterdir()) == [] and list(scratch_files(tmp_path / "disk")) == []

    assert isinstance(plain, torch.optim.AdamW)
    model, optimizer = offload.wrap(model, plain, **on_disk(tmp_path / "disk"))
    offload.load_checkpoint(tmp_path / "saved", model, optimizer)
    undisturbed = train(*begin(wide(torch.bfloat16), HOST), steps=2)
    expected = train(undisturbed.model, undisturbed.optimizer, steps=2)
    assert_same_bits(train(model, optimizer, steps=2), expected)


def test_a_failure_in_a_save_or_a_state_dict_ends_no_training(
    tmp_path: Path, disk_calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFLOAD_DISK_BACKEND", "threads")
    (tmp_path / "disk").mkdir()
    expected = train(*begin(wide(), HOST), steps=4)
    trained = train(*begin(wide(), on_disk(tmp_path / "disk")), steps=2)
    model, optimizer = trained.model, trained.optimizer
    optimizer.synchronize()
    for async_save in (False, True):
        disk_calls.fail("pread", 5, errno.EIO)
        with pytest.raises(offload.StorageError, match=r"[\w.]+: its states on disk: reading .*\(EIO\)"):
            offload.save_checkpoint(tmp_path / "saved", model, optimizer, tag="bad", async_save=async_save).wait()
    disk_calls.fail("pread", 5, errno.EIO)
    with pytest.raises(offload.StorageError, match=r"[\w.]+: its states on disk: reading .*\(EIO\)"):
        optimizer.state_dict()
    data = batches(4)
    for _ in range(2):
        next(data)
    for tokens in data:
        loss_of(model, tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    weights = model.state_dict()
    assert all(torch.equal(weights[name], expected.weights[name]) for name in weights)


def test_a_failed_write_of_an_edit_is_told_and_refused(
    tmp_path: Path, disk_calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFLOAD_DISK_BACKEND", "threads")
    model, optimizer = begin(wide(torch.bfloat16), on_disk(tmp_path))
    train(model, optimizer, steps=1)
    optimizer.synchronize()
    disk_calls.fail("pwrite", 2, errno.EIO)
    with pytest.raises(offload.StorageError, match=r"[\w.]+: its states on disk: writing .*\(EIO\)"):
        optimizer.resync()
    for call in (optimizer.resync, optimizer.state_dict, lambda: model(next(batches(1)))):
        with pytest.raises(offload.StateError, match=r"checkpoint.*writing \d+ bytes at offset"):
            call()
    model, plain = offload.unwrap(model, optimizer)
    assert isinstance(plain, torch.optim.AdamW) and list(tmp_path.iterdir()) == []
    train(*offload.wrap(model, plain, **on_disk(tmp_path)), steps=1)


# --- processes ----------------------------------------------------------------------------------------------

TRAINING = """
import os, sys
sys.path.insert(0, sys.argv[2])
import torch, offload
from offload import _native, _disk, _state_store
import functools
calls = _native.FailingSystemCalls()
calls.pretend_file_system(0xEF53)
_state_store.DiskStore = functools.partial(_disk.DiskStore, calls=calls)
from test_disk_states import begin, on_disk, wide
from training import train, batches, loss_of
model, optimizer = begin(wide(), on_disk(sys.argv[1], params="disk"))
train(model, optimizer, steps=1)
"""


HOLD = """
import signal
with open(sys.argv[3], "w") as ready:
    print(os.getpid(), file=ready)
signal.pause()
"""


def test_one_path_has_one_process_and_is_free_after_a_signal(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, programs: Programs
) -> None:
    ready = tmp_path_factory.mktemp("ready") / "fifo"
    os.mkfifo(ready)  # a read waits until the holder has written
    for number in (signal.SIGTERM, signal.SIGKILL):
        arguments = str(tmp_path), str(Path(__file__).parent), str(ready)
        with ThreadPoolExecutor() as meanwhile:
            ended = meanwhile.submit(programs.run, TRAINING + HOLD, *arguments)
            holder = int(ready.read_text())
            try:
                with pytest.raises(offload.StorageError, match=f"in use by process {holder}"):
                    begin(wide(), on_disk(tmp_path))
            finally:
                os.kill(holder, number)
        assert ended.result().status == -number, ended.result().err
        assert [path.name for path in tmp_path.iterdir()] == [".offload-lock"], "no data stays behind"
    (tmp_path / ".offload-scratch-1-0").write_bytes(b"of a process that died before it removed the name")
    model, optimizer = begin(wide(), on_disk(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".offload-lock"]
    (path,) = scratch_files(tmp_path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    offload.unwrap(model, optimizer)
    assert list(tmp_path.iterdir()) == []


FORK = """
child = os.fork()
if child == 0:
    try:
        optimizer.state_dict()
    except offload.StateError as error:
        os._exit(0 if "forked" in str(error) else 1)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
train(model, optimizer, steps=2)
print("done")
"""


@pytest.mark.parametrize(("code", "output"), [(FORK, "done\n"), ("optimizer.step()", "")], ids=["fork", "no unwrap"])
def test_a_fork_and_an_exit_without_unwrap_leave_nothing(
    code: str, output: str, tmp_path: Path, programs: Programs
) -> None:
    ended = programs.run(TRAINING + code, str(tmp_path), str(Path(__file__).parent))
    assert (ended.status, ended.out) == (0, output), ended.err
    assert list(tmp_path.iterdir()) == []


# --- the plan -----------------------------------------------------------------------------------------------


def test_auto_takes_the_disk_when_host_memory_does_not_suffice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_wrap, "_measure", lambda *_: None)  # else a card keeps what fits of the states
    model = wide()
    sizes: dict[str, Any] = {"device_budget": "600KiB", "disk_path": tmp_path, "disk_block": 4096}
    _, on_host = begin(model, {**sizes, "host_budget": "64MiB"})
    assert on_host.plan.optimizer == "host" and on_host.plan.disk.total == 0 and list(tmp_path.iterdir()) == []
    wrapped, optimizer = begin(model, {**sizes, "host_budget": "600KiB"})
    plan = optimizer.plan
    assert plan.optimizer == "disk" and plan.host.total <= 600 << 10 < plan.host.total + plan.disk.total
    assert re.search(r"optimizer on the host, .* of 600.00 KiB host memory", plan.explain())
    assert re.search(rf"disk: .* in {tmp_path}, through a window of", plan.explain())
    assert_same_bits(train(wrapped, optimizer, steps=3), train(*begin(model, HOST), steps=3))
