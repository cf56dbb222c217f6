"""One save at a time in a directory of checkpoints: who is refused, and what a dead process leaves."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import nn

import offload
from offload import _directory_lock, _durable_files
from offload._directory_lock import DirectoryLock

MODEL = nn.Linear(2, 2)


def save(directory: Path, *, tag: str = "one", **options: bool) -> offload.CheckpointSave:
    return offload.save_checkpoint(directory, MODEL, tag=tag, **options)


@contextmanager
def another_process(run: Callable[[], None]) -> Iterator[int]:
    """A fork that does `run`, says so, and stays until it is killed: its number."""
    told, tell = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            run()
            os.write(tell, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    assert os.read(told, 1) == b"x"
    os.close(told)
    try:
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def hold_at_first_write(directory: Path) -> Callable[[], None]:
    """A save that stops where it has written nothing, and goes on when the process that runs it ends."""

    def run() -> None:
        reached, never = threading.Event(), threading.Event()

        def stop(*_: object) -> None:
            reached.set()
            never.wait()

        _durable_files._write_all = stop
        threading.Thread(target=save, args=(directory,), daemon=True).start()
        assert reached.wait(60)

    return run


def test_another_process_is_named_and_its_death_ends_its_lock(tmp_path: Path) -> None:
    save(tmp_path, tag="zero")
    with another_process(hold_at_first_write(tmp_path)) as process:
        before = sorted(tmp_path.rglob("*"))
        for asynchronous in (False, True):
            with pytest.raises(offload.StateError, match=rf"process {process} is saving a checkpoint into"):
                save(tmp_path, async_save=asynchronous)
        assert sorted(tmp_path.rglob("*")) == before, "a refused save touches nothing"
        save(tmp_path / "own", tag="one")
    assert (tmp_path / ".lock").exists(), "killed, so the file is there, and says nothing"
    save(tmp_path, tag="one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "one", "own", "zero"]


def test_a_refusal_that_is_kept_locks_nobody_out(tmp_path: Path) -> None:
    with another_process(hold_at_first_write(tmp_path)), pytest.raises(offload.StateError) as kept:
        save(tmp_path)
    save(tmp_path)
    assert kept.value.__traceback__ is not None


def test_two_saves_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, gate = threading.Event(), threading.Event()
    real = _durable_files._write_all

    def held(*arguments: object) -> None:
        reached.set()
        assert gate.wait(60)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(_durable_files, "_write_all", held)
    first = threading.Thread(target=save, args=(tmp_path / "there",))
    first.start()
    assert reached.wait(60)
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with pytest.raises(offload.StateError, match=rf"this process {os.getpid()} is saving"):
        save(tmp_path / "link", tag="two")
    gate.set()
    first.join()
    monkeypatch.undo()
    save(tmp_path / "link", tag="two")
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["latest", "one", "two"]


def test_an_asynchronous_save_has_the_lock_until_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = _durable_files._write_all
    monkeypatch.setattr(_durable_files, "_write_all", lambda *given: gate.wait(60) and real(*given))
    running = save(tmp_path, async_save=True)
    with pytest.raises(offload.StateError, match=f"this process {os.getpid()}"):
        DirectoryLock(tmp_path)
    gate.set()
    running.wait()
    DirectoryLock(tmp_path).release()
    save(tmp_path, tag="two")  # and another save waits for it as before


def test_a_lock_does_not_pass_to_a_child_and_is_not_ended_by_it(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)

    def refused() -> None:
        lock.release()  # as the child's end would
        with pytest.raises(offload.StateError, match=f"process {os.getppid()} is saving"):
            DirectoryLock(tmp_path)

    with another_process(refused):
        assert (tmp_path / ".lock").exists()
    lock.release()
    with another_process(lambda: DirectoryLock(tmp_path).release()):
        DirectoryLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_dropped_is_released(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path / "made")
    del lock
    gc.collect()
    assert list(tmp_path.iterdir()) == [], "and the directory that was made for it goes"


def test_a_lock_file_that_its_owner_removes_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking: the lock would be one on a file that nobody finds."""
    real, calls = fcntl.lockf, 0

    def lockf(file: int, kind: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            (tmp_path / ".lock").unlink()
        real(file, kind)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    lock = DirectoryLock(tmp_path)
    assert calls == 2 and (tmp_path / ".lock").exists()
    lock.release()


def test_a_file_system_without_locks_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match="without locks.*nothing keeps two processes"):
        save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "one"]


def test_a_directory_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(offload.StorageError, match="the checkpoint was not saved"):
        save(tmp_path / "file")


def test_a_lock_may_end_while_its_thread_takes_another_one(tmp_path: Path) -> None:
    """As the garbage collector does it, which comes at any allocation."""
    lock = DirectoryLock(tmp_path)
    ended = threading.Event()

    def nested() -> None:
        with _directory_lock._guard:
            lock.release()
        ended.set()

    threading.Thread(target=nested, daemon=True).start()
    assert ended.wait(60)
    DirectoryLock(tmp_path).release()
