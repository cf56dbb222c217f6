"""What a bench is at, on stderr, for whoever waits for it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from ._bench_conditions import every

__all__ = ["Progress", "now_at", "shown"]

_FIRST_S = 2.0  # what is over sooner shows nothing
_TERMINAL_S, _LOG_S = 1.0, 10.0  # between lines: a terminal's are written over each other


class Progress:
    """The line of one part. `at` is set by what is measured; `tick` shows it when it is due."""

    def __init__(self, part: str, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.at = ""
        self._part, self._stream, self._clock = part, stream, clock
        self._terminal = stream.isatty()
        self._began = clock()
        self._due = self._began + _FIRST_S
        self._shown = False

    def tick(self) -> None:
        now = self._clock()
        if now < self._due:
            return
        self._due = now + (_TERMINAL_S if self._terminal else _LOG_S)
        at = f", {self.at}" if self.at else ""
        line = f"offload bench {self._part}: {now - self._began:.0f} s{at}"
        # Erases what is left of the line before it.
        self._stream.write(f"\r{line}\x1b[K" if self._terminal else f"{line}\n")
        self._stream.flush()
        self._shown = True

    def end(self) -> None:
        """Leaves a terminal's line empty, for what comes next."""
        if self._terminal and self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


_current: Progress | None = None


def now_at(what: str) -> None:
    """Tells whoever waits what is being measured, such as "round 3 of 9"; nothing where nobody does."""
    if _current is not None:
        _current.at = what


@contextlib.contextmanager
def shown(part: str) -> Iterator[None]:
    """Shows what `now_at` is told inside, and for how long it has been going on."""
    global _current
    progress = Progress(part, sys.stderr)
    _current = progress
    try:
        with every(_TERMINAL_S, progress.tick):
            yield
    finally:
        _current = None
        progress.end()
