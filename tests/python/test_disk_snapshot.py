"""Asynchronous saves of what is on disk: read from clones of the files, so that steps neither copy nor wait.

Everywhere with clones that are copies; in OFFLOAD_REFLINK_PATH, where that is set, with those of its file system.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import Programs

import offload
from held_saves import CHANGES, HeldWriter, leave
from offload import _disk_snapshot, _native, _running_save, _saving, _state_store, _stored_values
from test_checkpoints import assert_bits, bits_of, steps
from test_disk_states import on_disk
from test_disk_states_faults import TRAINING, scratch_files
from training import HOST, TinyLM, loss_of, make_model
from what_lives import all_gone

pytestmark = pytest.mark.usefixtures("device")

Calls = _native.FailingSystemCalls
PLACEMENTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "states": on_disk,
    "states, weights streamed": lambda path: on_disk(path, params="host"),
    "weights": lambda path: on_disk(path, optimizer="host", params="disk"),
    "states and weights": lambda path: on_disk(path, params="disk"),
    "fp32 masters": lambda path: on_disk(path, params="disk", master="fp32"),
    "two paths": lambda path: on_disk(path, params="disk", disk_path=[path / "one", path / "two"]),
}
ALL_ON_DISK = PLACEMENTS["states and weights"]


def begin(
    placement: Callable[[Path], dict[str, Any]],
    path: Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    trained: int = 3,
    width: int = 64,
) -> tuple[TinyLM, offload.OffloadOptimizer]:
    for name in ("one", "two"):
        (path / name).mkdir(exist_ok=True)
    model = make_model(dtype, tied=True, width=width)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement(path))
    steps(model, optimizer, count=trained)
    return model, optimizer


def write_all(optimizer: offload.OffloadOptimizer) -> None:
    """Updated weights are in memory until they give up their place: they are to be on disk, over the old ones."""
    optimizer.synchronize()
    optimizer._engine.weights.flush()


def files_of(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}


def assert_same_files(one: Path, other: Path) -> None:
    assert len(files_of(one)) == 2 and files_of(one) == files_of(other)


def snapshots(optimizer: offload.OffloadOptimizer) -> tuple[int, int, int]:
    """How many there were, what the present one may take, and what the files take."""
    disk = optimizer.stats().disk
    return disk["snapshot_count"], disk["snapshot_bytes"], disk["allocated_bytes"]


# --- bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_the_files_are_those_of_a_save_that_waits(
    placement: Callable[[Path], dict[str, Any]],
    dtype: torch.dtype,
    change: Callable[..., None],
    held: HeldWriter,
    cloning_disk: Path,
    tmp_path: Path,
) -> None:
    model, optimizer = begin(placement, cloning_disk, dtype, width=24)  # the changes load what is as wide
    held.release()
    offload.save_checkpoint(tmp_path, model, optimizer, tag="waits")
    held.hold()
    assert snapshots(optimizer)[:2] == (0, 0)
    save = offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True)
    count, may_take, allocated = snapshots(optimizer)
    assert (count, may_take) == (1, allocated) and allocated > 0
    assert optimizer.memory_summary().tier("disk").rows[-1].now == allocated
    disks = [cloning_disk, cloning_disk / "one", cloning_disk / "two"]
    assert sum(len(list(scratch_files(path))) for path in disks) == 2 * len(optimizer._engine.disk.stats())  # type: ignore[union-attr]
    change(model, optimizer)
    if change is not leave:
        write_all(optimizer)
    assert not save.is_done
    held.release()
    save.wait()
    assert_same_files(tmp_path / "waits", tmp_path / "one")
    if change is leave:
        assert not any(list(scratch_files(path)) for path in disks)
        return
    assert snapshots(optimizer)[:2] == (1, 0)
    assert optimizer.stats().disk["snapshot_peak_bytes"] == allocated
    assert not optimizer.stats().fallbacks or "asynchronous" not in str(optimizer.stats().fallbacks)


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_a_step_reads_copies_and_awaits_nothing_of_what_is_on_disk(
    placement: Callable[[Path], dict[str, Any]],
    held: HeldWriter,
    cloning_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, optimizer = begin(placement, cloning_disk)
    (tmp_path / "twin").mkdir()
    twin, its_optimizer = begin(lambda _: HOST, tmp_path / "twin")
    expected = bits_of(model, optimizer)
    save = offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True)

    def never(*_: Any) -> None:
        pytest.fail("read for a copy, or waited")

    with monkeypatch.context() as patch:
        for kind in (_stored_values.StoredValue, _stored_values.StoredWeight):
            patch.setattr(kind, "join", never)
        patch.setattr(_saving, "wait_until_written", never)
        steps(model, optimizer, seed=3)
        write_all(optimizer)
    assert not save.is_done
    steps(twin, its_optimizer, seed=3)
    assert_bits(bits_of(model, optimizer), bits_of(twin, its_optimizer))
    held.release()
    save.wait()
    other, resumed = begin(lambda _: HOST, tmp_path / "twin", trained=1)
    offload.load_checkpoint(tmp_path, other, resumed)
    assert_bits(bits_of(other, resumed), expected)


def test_no_memory_is_asked_for(
    held: HeldWriter,
    cloning_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where copies would take far more than there is, and the step would wait for the writer, which is held."""
    model, optimizer = begin(ALL_ON_DISK, cloning_disk)
    available = types.SimpleNamespace(available_bytes=100_000)
    assert optimizer.stats().disk["allocated_bytes"] > 5 * available.available_bytes
    monkeypatch.setattr(_saving, "probe_host", lambda: available)
    save = offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True)
    steps(model, optimizer)
    assert not save.is_done
    held.release()
    save.wait()


def test_a_written_weight_and_what_it_was(
    held: HeldWriter,
    cloning_disk: Path,
    tmp_path: Path,
) -> None:
    """What a split master belongs to while the model's own weight is another one is on disk too."""
    model, optimizer = begin(ALL_ON_DISK, cloning_disk)
    with torch.no_grad(), offload.full_params(model):
        for parameter in model.parameters():
            parameter.mul_(0.5)
    held.release()
    offload.save_checkpoint(tmp_path, model, optimizer, tag="waits")
    held.hold()
    save = offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True)
    steps(model, optimizer)
    write_all(optimizer)
    held.release()
    save.wait()
    assert_same_files(tmp_path / "waits", tmp_path / "one")


@pytest.mark.parametrize("refused", [False, True], ids=["cloned", "copied"])
def test_weights_alone_are_those_of_the_call(
    refused: bool,
    held: HeldWriter,
    cloning_disk: Path,
    disk_calls: Calls,
    tmp_path: Path,
) -> None:
    """No optimizer is saved with them, and one steps."""
    model, optimizer = begin(ALL_ON_DISK, cloning_disk)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    if refused:
        disk_calls.fail("clone", 1, errno.EOPNOTSUPP)
    save = offload.save_checkpoint(tmp_path, model, tag="one", async_save=True)
    steps(model, optimizer)
    write_all(optimizer)
    offload.unwrap(model, optimizer)
    assert not save.is_done
    held.release()
    save.wait()
    other = make_model(torch.bfloat16, seed=4, tied=True, width=64)
    offload.load_checkpoint(tmp_path, other)
    assert_bits(other.state_dict(), expected)


def test_saves_after_one_another_and_a_load_in_between(cloning_disk: Path, disk_calls: Calls, tmp_path: Path) -> None:
    model, optimizer = begin(ALL_ON_DISK, cloning_disk)
    offload.save_checkpoint(tmp_path, model, optimizer, tag="waits")
    assert disk_calls.call_count("clone") == 0, "a save that waits reads what is there"
    expected = bits_of(model, optimizer)
    for tag in ("one", "two"):
        offload.save_checkpoint(tmp_path, model, optimizer, tag=tag, async_save=True)
        steps(model, optimizer, count=1)
    offload.load_checkpoint(tmp_path, model, optimizer, tag="one")
    assert_bits(bits_of(model, optimizer), expected)
    assert snapshots(optimizer)[:2] == (2, 0)
    offload.save_checkpoint(tmp_path, model, optimizer, tag="three", async_save=True).wait()
    assert_same_files(tmp_path / "three", tmp_path / "one")


def test_before_the_first_step_there_are_weights_alone(cloning_disk: Path, tmp_path: Path) -> None:
    model, optimizer = begin(on_disk, cloning_disk, trained=0)
    offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True).wait()
    assert snapshots(optimizer)[:2] == (0, 0), "nothing of the save is on disk"


# --- where there is no snapshot -----------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EXDEV, errno.ENOSPC, errno.EIO, errno.EINVAL])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_refusal_is_shown_and_the_save_is_the_same(
    nth: int,
    code: int,
    held: HeldWriter,
    cloning_disk: Path,
    disk_calls: Calls,
    tmp_path: Path,
) -> None:
    """Of either path: then none is cloned."""
    model, optimizer = begin(PLACEMENTS["two paths"], cloning_disk)
    held.release()
    offload.save_checkpoint(tmp_path, model, optimizer, tag="waits")
    held.hold()
    disk_calls.fail("clone", nth, code)
    save = offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True)
    assert snapshots(optimizer)[:2] == (0, 0)
    (why,) = [text for text in optimizer.stats().fallbacks if "asynchronous save" in text]
    assert f"a reflink of a file in {cloning_disk / ('one', 'two')[nth - 1]} failed" in why
    assert os.strerror(code) in why
    for path in ("one", "two"):
        assert len(list(scratch_files(cloning_disk / path))) == 1
    steps(model, optimizer)  # copied before
    write_all(optimizer)
    assert not save.is_done
    held.release()
    save.wait()
    assert_same_files(tmp_path / "waits", tmp_path / "one")
    offload.save_checkpoint(tmp_path, model, optimizer, tag="two", async_save=True).wait()
    assert snapshots(optimizer)[:2] == (1, 0)
    assert not [text for text in optimizer.stats().fallbacks if "asynchronous save" in text]


def test_no_threads_for_a_clone_are_a_refusal(cloning_disk: Path, tmp_path: Path, disk_calls: Calls) -> None:
    model, optimizer = begin(ALL_ON_DISK, cloning_disk)
    if optimizer._engine.disk.stats()[0]["backend"] == "io_uring":  # type: ignore[union-attr]
        disk_calls.fail("uring_setup", 1, errno.ENOMEM)
    else:
        disk_calls.fail("open", 1, errno.EMFILE)
    offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True).wait()
    assert snapshots(optimizer)[:2] == (0, 0)
    assert any("asynchronous save" in text for text in optimizer.stats().fallbacks)


def test_both_what_is_overwritten_and_the_checkpoint_must_fit(
    cloning_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = begin(PLACEMENTS["two paths"], cloning_disk)
    (cloning_disk / "saved").mkdir()
    files = optimizer.stats().disk["allocated_bytes"]
    beside = offload.save_checkpoint(cloning_disk / "saved", model, optimizer, tag="waits").path
    checkpoint = sum(path.stat().st_size for path in beside.iterdir() if path.name != "manifest.json")
    kept = sum(each + each // 64 for each in (path["allocated_bytes"] for path in optimizer._engine.disk.stats()))  # type: ignore[union-attr]
    assert kept > files

    class Full(types.SimpleNamespace):
        stat, fspath = staticmethod(os.stat), staticmethod(os.fspath)
        free = 0

        def statvfs(self, path: str) -> types.SimpleNamespace:
            return types.SimpleNamespace(f_bavail=self.free, f_frsize=1)

    full = Full()
    monkeypatch.setattr(_disk_snapshot, "os", full)
    for free, is_taken in ((kept + checkpoint, True), (kept + checkpoint - 1, False)):
        full.free = free
        before = snapshots(optimizer)[0]
        offload.save_checkpoint(cloning_disk / "saved", model, optimizer, tag="one", async_save=True).wait()
        assert snapshots(optimizer)[0] == before + is_taken
        told = [text for text in optimizer.stats().fallbacks if "free, and a reflink beside training may take" in text]
        assert len(told) == (not is_taken)


# --- failures -----------------------------------------------------------------------------------------------


@pytest.fixture
def pair_and_twin(
    cloning_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[TinyLM, offload.OffloadOptimizer, TinyLM, offload.OffloadOptimizer]]:
    monkeypatch.setenv("OFFLOAD_DISK_BACKEND", "threads")
    (tmp_path / "twin").mkdir()
    yield (*begin(ALL_ON_DISK, cloning_disk), *begin(lambda _: HOST, tmp_path / "twin"))


def clone_of(directory: Path) -> str:
    """The last file that was made there; names end in a number."""
    return max(scratch_files(directory), key=lambda path: int(re.findall(r"\d+", os.readlink(path))[-1]))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_ends_the_save_and_not_the_training(
    code: int,
    held: HeldWriter,
    pair_and_twin: Any,
    cloning_disk: Path,
    disk_calls: Calls,
    tmp_path: Path,
) -> None:
    model, optimizer, twin, its_optimizer = pair_and_twin
    save = offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True)
    disk_calls.fail("pwrite", 2, code)
    steps(model, optimizer, seed=3)
    steps(twin, its_optimizer, seed=3)
    assert_bits(bits_of(model, optimizer), bits_of(twin, its_optimizer))
    held.release()
    with pytest.raises(offload.StorageError, match="the clone gave its space to the writes of the training") as told:
        save.wait()
    assert told.value.errno == errno.ENOSPC and not (tmp_path / "one").exists()
    assert len(list(scratch_files(cloning_disk))) == 1 and snapshots(optimizer)[1] == 0
    offload.save_checkpoint(tmp_path, model, optimizer, tag="two", async_save=True).wait()
    offload.save_checkpoint(tmp_path, model, optimizer, tag="waits")
    assert_same_files(tmp_path / "two", tmp_path / "waits")


@pytest.mark.parametrize("fault", ["read", "flipped bit", "checkpoint's disk"])
def test_a_failure_of_the_save_is_its_own(
    fault: str,
    held: HeldWriter,
    pair_and_twin: Any,
    cloning_disk: Path,
    disk_calls: Calls,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, optimizer, twin, its_optimizer = pair_and_twin
    save = offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True)
    steps(model, optimizer, seed=3)
    optimizer.synchronize()
    text = "checksum differs"
    if fault == "read":
        disk_calls.fail("pread", 1, errno.EIO, 1 << 30)
        text = r"its states on disk: reading .*\(EIO\)"
    elif fault == "flipped bit":
        with open(clone_of(cloning_disk), "r+b", buffering=0) as file:
            for offset in range(7, os.fstat(file.fileno()).st_size, 4096):
                byte = os.pread(file.fileno(), 1, offset)[0]
                os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)
            os.fsync(file.fileno())
    else:
        text = "No space left on device"

        def full(*_: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
    held.release()
    with pytest.raises(offload.StorageError, match=text):
        save.wait()
    disk_calls.fail("pread", 0, 0)
    assert len(list(scratch_files(cloning_disk))) == 1 and snapshots(optimizer)[1] == 0
    steps(model, optimizer, seed=4)
    for seed in (3, 4):
        steps(twin, its_optimizer, seed=seed)
    assert_bits(bits_of(model, optimizer), bits_of(twin, its_optimizer))


def test_a_writer_that_does_not_start_leaves_no_clone(
    cloning_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = begin(ALL_ON_DISK, cloning_disk)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True)
    assert len(list(scratch_files(cloning_disk))) == 1 and snapshots(optimizer)[1] == 0
    steps(model, optimizer)
    offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True).wait()


def test_a_failed_update_leaves_the_save_as_it_was(
    held: HeldWriter,
    pair_and_twin: Any,
    disk_calls: Calls,
    tmp_path: Path,
) -> None:
    model, optimizer, twin, its_optimizer = pair_and_twin
    expected = bits_of(twin, its_optimizer)
    save = offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True)
    disk_calls.fail("pwrite", 2, errno.EIO)
    with pytest.raises(offload.StorageError):
        steps(model, optimizer)
        optimizer.synchronize()
    disk_calls.fail("pwrite", 0, 0)
    offload.unwrap(model, optimizer)
    held.release()
    save.wait()
    steps(twin, its_optimizer)
    offload.load_checkpoint(tmp_path, twin, its_optimizer)
    assert_bits(bits_of(twin, its_optimizer), expected)


# --- ends ---------------------------------------------------------------------------------------------------


def test_what_is_dropped_while_it_is_saved_goes_with_the_save(
    held: HeldWriter,
    cloning_disk: Path,
    tmp_path: Path,
) -> None:
    model, optimizer = begin(ALL_ON_DISK, cloning_disk)
    save = offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True)
    steps(model, optimizer)
    watched = [weakref.ref(kept) for kept in (model, optimizer, optimizer._engine)]
    del model, optimizer
    inherited = os.open(clone_of(cloning_disk), os.O_RDONLY)  # as a forked child would have it
    try:
        assert os.fstat(inherited).st_size > 0
        held.release()
        assert save._thread is not None
        save._thread.join()
        assert os.fstat(inherited).st_size == 0, "its space is free"
    finally:
        os.close(inherited)
    assert all_gone(watched)
    save.wait()
    assert list(scratch_files(cloning_disk)) == []
    offload.describe_checkpoint(tmp_path)


HELD = """
import threading
from offload import _durable_files
calls.pretend_clones()
gate, write_all = threading.Event(), _durable_files._write_all
def held(*arguments):
    gate.wait()
    write_all(*arguments)
_durable_files._write_all = held
offload.save_checkpoint(sys.argv[1] + "/saved", model, optimizer, tag="one", async_save=True)
train(model, optimizer, steps=1)
assert optimizer.stats().disk["snapshot_bytes"] > 0
"""


@pytest.mark.cpu_only
@pytest.mark.parametrize("end", ["kill", "exit", "fork"])
def test_a_process_that_ends_while_it_saves_leaves_no_file(end: str, tmp_path: Path, programs: Programs) -> None:
    code = {
        "kill": "import signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "exit": "gate.set()",
        "fork": """
child = os.fork()
if child == 0:
    del model, optimizer
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
gate.set()
""",
    }[end]
    (tmp_path / "saved").mkdir()
    ended = programs.run(TRAINING + HELD + code, str(tmp_path), str(Path(__file__).parent))
    assert ended.status == (-signal.SIGKILL if end == "kill" else 0), ended.err
    left = sorted(path.name for path in tmp_path.iterdir())
    if end == "kill":
        assert left == [".offload-lock", "saved"]
    else:
        assert left == ["saved"]
        assert offload.describe_checkpoint(tmp_path / "saved")["tag"] == "one"


# --- what is shown ------------------------------------------------------------------------------------------


def test_the_probe_says_whether_a_disk_has_reflinks(
    cloning_disk: Path, disk_calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload import _disk

    store: Any = _state_store.DiskStore  # with the calls of the fixture
    monkeypatch.setattr(_disk, "DiskStore", store)
    facts = _disk.probe_disk(cloning_disk)
    assert (facts.reflink, facts.reflink_refusal) == (True, None)
    disk_calls.fail("clone", 1, errno.EOPNOTSUPP)
    facts = _disk.probe_disk(cloning_disk)
    assert not facts.reflink and "(EOPNOTSUPP)" in str(facts.reflink_refusal)
    assert list(cloning_disk.iterdir()) == [] and list(scratch_files(cloning_disk)) == []


def test_losses_are_the_same(cloning_disk: Path, tmp_path: Path) -> None:
    """With a save in every other step, none of which is waited for."""
    (tmp_path / "twin").mkdir()
    losses = []
    for model, optimizer in (begin(ALL_ON_DISK, cloning_disk), begin(lambda _: HOST, tmp_path / "twin")):
        losses.append([])
        for number in range(6):
            if number % 2 and optimizer.plan.disk.total:
                offload.save_checkpoint(tmp_path, model, optimizer, tag=str(number), async_save=True)
            loss = loss_of(model, torch.full((2, 5), number, device=torch.get_default_device()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    _running_save.finish_saves()  # as the end of a program does: the next test may count what writes
    assert losses[0] == losses[1]
