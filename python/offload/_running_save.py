"""The save that may still be running, one at a time: its thread, who waits for it, and its end at exit."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

__all__ = ["CheckpointSave", "beginning", "finish_saves", "remember", "wait_until_written"]


class CheckpointSave:
    """One save, which may still be running. `path` is where the checkpoint is when it is done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._end: Callable[[], None] | None = None

    @property
    def is_done(self) -> bool:
        """Whether the checkpoint is on disk, or was given up."""
        thread = self._thread  # another one may be in wait()
        return thread is None or not thread.is_alive()

    def wait(self) -> None:
        """Returns when the checkpoint is on disk; raises, once, what kept it from being saved."""
        thread, end = self._thread, self._end  # several threads may wait
        if thread is not None:
            thread.join()
            self._thread = None
        if end is not None:
            end()
            self._end = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def start(self, write: Callable[[], None], end: Callable[[], None]) -> None:
        """Runs `write` on a thread that the interpreter waits for at exit; `wait` calls the idempotent `end`."""

        def run() -> None:
            try:
                write()
            except BaseException as error:
                self._error = error

        self._end = end
        self._thread = threading.Thread(target=run, name="offload-checkpoint")
        self._thread.start()


# The save that may still be running: there is one at a time.
_running: CheckpointSave | None = None
# Reentrant: a signal's handler may save where this thread begins to.
_beginning = threading.RLock()


def beginning() -> threading.RLock:
    """Whoever has this lock begins a save: no other thread takes what the model has, or starts a writer, meanwhile."""
    return _beginning


def finish_saves() -> None:
    """Waits for the save that is running; raises its error, if nobody was told yet."""
    global _running
    running, _running = _running, None
    if running is not None:
        running.wait()


def remember(save: CheckpointSave) -> None:
    """It is the one that may be running now."""
    global _running
    _running = save


def wait_until_written(save: CheckpointSave) -> None:
    """Returns when its thread has ended, whatever came of it: `wait` has still to be called."""
    thread = save._thread
    if thread is not None:
        thread.join()


def _report_at_exit() -> None:
    try:
        finish_saves()
    except BaseException as error:
        print(f"offload: the last checkpoint was not saved: {error}", file=sys.stderr)


def _forget_in_child() -> None:
    global _running, _beginning
    _running = None  # the thread that writes is the parent's
    _beginning = threading.RLock()  # and so may be the one that begins a save


atexit.register(_report_at_exit)
os.register_at_fork(after_in_child=_forget_in_child)
