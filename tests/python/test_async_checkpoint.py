"""async_save=True: the bits are those of the call, whatever happens before the writer is done."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import Programs

import offload
from held_saves import CHANGES, HeldWriter
from offload import _running_save, _saving, _snapshot
from test_checkpoints import assert_bits, bits_of, steps
from test_save_checkpoint import PLACEMENTS, wrapped
from training import HOST, batches, loss_of, make_model
from what_lives import all_gone

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_the_bits_are_those_of_the_call(
    placement: dict[str, Any], change: Callable[..., None], held: HeldWriter, tmp_path: Path
) -> None:
    model, optimizer = wrapped(torch.bfloat16, placement)
    steps(model, optimizer)
    expected = bits_of(model, optimizer)
    save = offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True)
    change(model, optimizer)
    assert not save.is_done
    held.release()
    save.wait()
    assert save.is_done
    assert_holds(tmp_path, placement, expected)


def test_a_thread_that_ends_a_save_late_leaves_the_next_one_alone(held: HeldWriter, tmp_path: Path) -> None:
    model, optimizer = wrapped(torch.bfloat16, HOST)
    steps(model, optimizer)
    held.release()
    first = offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True)
    real, late, gate = first._end, threading.Event(), threading.Event()
    assert real is not None

    def end() -> None:
        if threading.current_thread() is waiter:
            late.set()
            assert gate.wait(60)
        real()

    first._end = end
    waiter = threading.Thread(target=first.wait)
    waiter.start()
    assert late.wait(60)
    held.hold()
    expected = bits_of(model, optimizer)
    second = offload.save_checkpoint(tmp_path, model, optimizer, tag="two", async_save=True)
    gate.set()
    waiter.join()
    steps(model, optimizer, seed=3)
    assert not second.is_done and first.is_done
    held.release()
    second.wait()
    assert_holds(tmp_path, HOST, expected)


class ToldLock:
    """A lock that tells when somebody has to wait for it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.awaited = threading.Event()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.awaited.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_two_threads_begin_their_saves_one_after_the_other(
    held: HeldWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one model, into two directories: the second save would be watched for, and the first would be torn."""
    model, optimizer = wrapped(torch.bfloat16, HOST)
    steps(model, optimizer)
    expected = bits_of(model, optimizer)
    lock, inside, gate = ToldLock(), threading.Event(), threading.Event()
    monkeypatch.setattr(_running_save, "_beginning", lock)
    real = _saving._contents

    def contents(*given: Any, **options: Any) -> Any:
        found = real(*given, **options)
        if not inside.is_set():
            inside.set()
            assert gate.wait(60)
        return found

    monkeypatch.setattr(_saving, "_contents", contents)
    saves: dict[str, offload.CheckpointSave] = {}

    def save(name: str) -> None:
        saves[name] = offload.save_checkpoint(tmp_path / name, model, optimizer, tag="one", async_save=True)

    threads = {name: threading.Thread(target=save, args=(name,)) for name in ("first", "second")}
    threads["first"].start()
    assert inside.wait(60)
    threads["second"].start()
    assert lock.awaited.wait(60)
    gate.set()
    threads["first"].join()
    assert not saves["first"].is_done and "second" not in saves
    steps(model, optimizer, seed=3)
    held.release()
    threads["second"].join()
    for one in saves.values():
        one.wait()
    assert_holds(tmp_path / "first", HOST, expected)
    assert_holds(tmp_path / "second", HOST, bits_of(model, optimizer))


def test_weights_alone_are_copied_at_the_call(held: HeldWriter, tmp_path: Path) -> None:
    """Nobody watches the optimizer then."""
    model, optimizer = wrapped(torch.bfloat16, HOST)
    steps(model, optimizer)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    save = offload.save_checkpoint(tmp_path, model, tag="one", async_save=True)
    steps(model, optimizer, seed=3)
    held.release()
    save.wait()
    other = make_model(torch.bfloat16, seed=4, tied=True)
    offload.load_checkpoint(tmp_path, other)
    assert_bits(other.state_dict(), expected)


def test_a_stock_optimizer_is_copied_before_it_steps(held: HeldWriter, tmp_path: Path) -> None:
    model = make_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps(model, optimizer)
    expected = bits_of(model, optimizer)
    save = offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True)
    steps(model, optimizer, seed=3)
    held.release()
    save.wait()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_load_state_dict_pre_hooks
    other = make_model(torch.float32, seed=4)
    resumed = torch.optim.AdamW(other.parameters(), lr=1.0)
    offload.load_checkpoint(tmp_path, other, resumed)
    assert_bits(bits_of(other, resumed), expected)


@pytest.mark.parametrize("name", ["host", "streamed"])
def test_a_save_that_is_done_before_the_step_copies_no_state(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = wrapped(torch.bfloat16, PLACEMENTS[name])
    steps(model, optimizer)
    staged: list[Any] = []
    monkeypatch.setattr(_snapshot, "copied", staged.append)
    monkeypatch.setattr(_saving, "copied", staged.append)
    save = offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True)
    save._thread.join()  # type: ignore[union-attr]
    assert staged == []  # and no weight: each has its bytes on the host
    monkeypatch.undo()
    steps(model, optimizer)
    save.wait()


def test_where_memory_is_short_the_step_waits(
    held: HeldWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = wrapped(torch.bfloat16, HOST)
    steps(model, optimizer)
    expected = bits_of(model, optimizer)

    class NoMemory:
        available_bytes = 1000

    def probe() -> type[NoMemory]:
        held.release()  # by now the step has come
        return NoMemory

    monkeypatch.setattr(_saving, "probe_host", probe)
    monkeypatch.setattr(_snapshot._Source, "copy", lambda *_, **__: pytest.fail("copied"))
    save = offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True)
    steps(model, optimizer, count=1)
    assert save.is_done
    save.wait()
    assert_holds(tmp_path, HOST, expected)


@pytest.mark.parametrize("name", ["host", "streamed", "host fp32"])
def test_a_step_waits_for_no_copy_and_its_updates_for_theirs(
    name: str, held: HeldWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placement = PLACEMENTS["streamed"] if name == "streamed" else HOST
    dtype = torch.float32 if name == "host fp32" else torch.bfloat16
    model, optimizer = wrapped(dtype, placement)
    twin, its_optimizer = wrapped(dtype, placement)
    for pair in ((model, optimizer), (twin, its_optimizer)):
        steps(*pair)
    expected = bits_of(model, optimizer)
    gate, real = threading.Event(), _snapshot._Source.copy

    def copy_later(source: _snapshot._Source, **when: bool) -> None:
        assert gate.wait(60)
        real(source, **when)

    monkeypatch.setattr(_snapshot._Source, "copy", copy_later)
    save = offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True)
    loss_of(model, next(batches(1))).backward()
    pipeline = optimizer._engine.pipeline
    done = pipeline.stats()["job_count"]
    optimizer.step()  # nobody opened the gate yet
    assert pipeline.stats()["job_count"] == done
    gate.set()
    optimizer.zero_grad()
    steps(model, optimizer, count=2, seed=3)
    assert not save.is_done
    held.release()
    save.wait()
    assert_holds(tmp_path, placement, expected, dtype)
    loss_of(twin, next(batches(1))).backward()
    its_optimizer.step()
    its_optimizer.zero_grad()
    steps(twin, its_optimizer, count=2, seed=3)
    assert_bits(bits_of(model, optimizer), bits_of(twin, its_optimizer))


def test_a_written_weight_is_taken_after_its_copy(
    held: HeldWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step writes to the master itself then, before any update."""
    model, optimizer = wrapped(torch.bfloat16, HOST)
    steps(model, optimizer)
    expected = bits_of(model, optimizer)
    save = offload.save_checkpoint(tmp_path, model, optimizer, tag="one", async_save=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    steps(model, optimizer, count=1)
    assert not save.is_done
    held.release()
    save.wait()
    assert_holds(tmp_path, HOST, expected)


def test_a_copy_that_fails_ends_the_save_and_not_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = wrapped(torch.bfloat16, HOST)
    twin, its_optimizer = wrapped(torch.bfloat16, HOST)
    for pair in ((model, optimizer), (twin, its_optimizer)):
        steps(*pair)
    expected = bits_of(model, optimizer)
    offload.save_checkpoint(tmp_path, model, optimizer, tag="one")

    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError("no memory for a copy")

    held = HeldWriter(monkeypatch)
    save = offload.save_checkpoint(tmp_path, model, optimizer, tag="two", async_save=True)
    with monkeypatch.context() as patch:
        patch.setattr(_snapshot._Source, "copy", no_memory)
        steps(model, optimizer, seed=3)
    held.release()
    with pytest.raises(MemoryError, match="no memory for a copy"):
        save.wait()
    steps(twin, its_optimizer, seed=3)
    assert_bits(bits_of(model, optimizer), bits_of(twin, its_optimizer))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "one"]
    assert_holds(tmp_path, HOST, expected)


def assert_holds(
    directory: Path, placement: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype = torch.bfloat16
) -> None:
    other, resumed = wrapped(dtype, placement, seed=5)
    offload.load_checkpoint(directory, other, resumed)
    assert_bits(bits_of(other, resumed), expected)


def test_the_writers_error_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = wrapped(torch.bfloat16, HOST)
    steps(model, optimizer)
    offload.save_checkpoint(tmp_path, model, optimizer, tag="one")

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    for surface in ("wait", "save", "load"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            save = offload.save_checkpoint(tmp_path, model, optimizer, tag="two", async_save=True)
            save._thread.join()  # type: ignore[union-attr]
        steps(model, optimizer, count=1)
        with pytest.raises(offload.StorageError, match="'two' was not saved"):
            if surface == "wait":
                save.wait()
            elif surface == "save":
                offload.save_checkpoint(tmp_path, model, optimizer, tag="three")
            else:
                offload.load_checkpoint(tmp_path, model, optimizer)
        save.wait()
        _running_save.finish_saves()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "one"]


EXIT = """
import sys, torch, offload
from torch import nn
model = nn.Linear(1000, 1000)
optim = torch.optim.AdamW(model.parameters())
model, optim = offload.wrap(model, optim, optimizer="host", gradients="host", device="cpu")
model(torch.ones(1, 1000)).sum().backward()
optim.step()
offload.save_checkpoint(sys.argv[1], model, optim, tag="one", async_save=True)
"""


@pytest.mark.cpu_only
def test_the_end_of_the_program_waits(tmp_path: Path, programs: Programs) -> None:
    ended = programs.run(EXIT, str(tmp_path))
    assert (ended.status, ended.err) == (0, "")
    loaded = offload.load_checkpoint(tmp_path, torch.nn.Linear(1000, 1000, device="cpu"))
    assert loaded.path == tmp_path / "one"


def test_a_relative_directory_is_that_of_the_call(
    held: HeldWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    save = offload.save_checkpoint("runs", torch.nn.Linear(2, 2), tag="one", async_save=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    held.release()
    save.wait()
    assert offload.describe_checkpoint(tmp_path / "runs")["tag"] == "one"
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("placement", [*PLACEMENTS, "plain"])
def test_a_save_that_nobody_waits_for_keeps_no_model(placement: str, tmp_path: Path) -> None:
    """Dropped while the writer is at work, or later: the model is gone when it has ended."""
    if placement == "plain":
        model: Any = make_model(torch.bfloat16)
        optimizer: Any = torch.optim.AdamW(model.parameters())
    else:
        model, optimizer = wrapped(torch.bfloat16, PLACEMENTS[placement])
    steps(model, optimizer)
    save = offload.save_checkpoint(tmp_path, model, optimizer, tag="a", async_save=True)
    steps(model, optimizer, seed=4)
    watched = [weakref.ref(kept) for kept in (model, optimizer, getattr(optimizer, "_engine", model))]
    writer = save._thread
    assert writer is not None and _running_save._running is save
    del model, optimizer
    writer.join()
    assert all_gone(watched)
    save.wait()
    offload.describe_checkpoint(tmp_path)
