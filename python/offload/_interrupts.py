"""Short stretches of bookkeeping that a signal must not tear.

Python runs signal handlers between any two bytecodes of the main thread, and Ctrl-C's raises there. Blocking the
signal does not help: another thread of the process takes it, and Python still runs the handler in this one. So inside
`Uninterrupted` the handlers are swapped for one that records; what was recorded is raised again at the end.
"""

from __future__ import annotations

# The C half of `signal`: the other half makes enums of numbers, which costs several microseconds a block.
import _signal  # type: ignore[import-not-found]
import signal
import threading
from types import FrameType
from typing import Any

# Those whose handlers raise in practice: Ctrl-C, the terminations of a scheduler, timeouts.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Uninterrupted:
    """A `with` block that signal handlers run after, not within. Never put a wait that can be long inside.

    Blocks may nest. Threads other than the main one are never interrupted: there it does nothing.
    """

    __slots__ = ("_caught", "_handlers", "_inside")

    def __init__(self) -> None:
        self._inside = False
        self._caught: list[int] = []
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            handler = _signal.getsignal(number)
            if callable(handler):  # else the default, or ignored, or installed by native code
                self._handlers[number] = handler
                _signal.signal(number, self._record)
        self._inside = True

    def __exit__(self, *_: object) -> None:
        self._inside = False
        self._restore()
        if self._caught:
            self._raise_caught()

    def _raise_caught(self) -> None:
        """Every handler runs, as without this block, whatever the one before it raises."""
        number = self._caught.pop(0)
        try:
            signal.raise_signal(number)
        finally:
            if self._caught:
                self._raise_caught()

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self._inside:
            self._caught.append(number)
        else:  # still entering, or restoring: what this handler raises leaves at once, so all go back now
            self._restore()
            self._handlers[number](number, frame)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            if _signal.getsignal(number) == self._record:
                _signal.signal(number, handler)
