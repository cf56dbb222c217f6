"""What a command is at, on stderr, for whoever waits: a bar of `rich` on a terminal that has it, else plain lines."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from ._every import every
from ._table import console_on

if TYPE_CHECKING:
    import rich.progress

__all__ = ["Progress", "now_at", "shown"]

_FIRST_S = 2.0  # what is over sooner shows no line that it was not asked for
_TERMINAL_S, _LOG_S = 1.0, 10.0  # between two looks of the bar, and between two lines
_SHOWN_STEPS = 10


class Progress:
    """What one command is at. `at` is set by what works; `tick` shows it when it is due.

    steps: how many there will be; 0 where that is not known.
    """

    def __init__(
        self, what: str, stream: TextIO, clock: Callable[[], float] = time.monotonic, *, steps: int = 0
    ) -> None:
        self.at = ""
        self._what, self._stream, self._clock, self._steps = what, stream, clock, steps
        self._done = 0
        self._console = console_on(stream)
        self._bar: rich.progress.Progress | None = None
        self._began = clock()
        self._due = self._began + _FIRST_S

    def step(self, number: int, told: str) -> None:
        """So many steps are done; lines show the first, the last and some of those between, however fast they are."""
        self._done, self.at = number, f"step {number}/{self._steps}  {told}"
        every_so_many = max(1, self._steps // _SHOWN_STEPS)
        if self._console is None and (number in (1, self._steps) or number % every_so_many == 0):
            self._print(f"{self._what}: {self.at}")

    def tick(self) -> None:
        now = self._clock()
        if now < self._due:
            return
        since = f"{self._what}: {now - self._began:.0f} s"
        if self._console is None:
            self._print(f"{since}, {self.at}" if self.at else since)
        else:
            self._due = now + _TERMINAL_S
            self._draw(self._console, since)

    def end(self) -> None:
        """Takes the bar away: the line is free for what comes next."""
        if self._bar is not None:
            self._bar.stop()

    def _print(self, line: str) -> None:
        self._due = self._clock() + _LOG_S
        self._stream.write(f"{line}\n")
        self._stream.flush()

    def _draw(self, console: rich.console.Console, since: str) -> None:
        if self._bar is None:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(bar_width=20),
                progress.TextColumn("{task.fields[at]}", markup=False),
                console=console,
                auto_refresh=False,  # a thread that draws ten times a second would take from what is measured
                transient=True,
                redirect_stdout=False,  # what is piped away stays out of the terminal
            )
            self._bar.add_task(since, total=self._steps or None, at=self.at)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], description=since, completed=self._done, at=self.at, refresh=True)


_current: Progress | None = None


def now_at(what: str) -> None:
    """Tells whoever waits what is being done, such as "round 3 of 9"; nothing where nobody does."""
    if _current is not None:
        _current.at = what


@contextlib.contextmanager
def shown(what: str, *, steps: int = 0) -> Iterator[Progress]:
    """Shows what `now_at` or `Progress.step` is told inside, and for how long it has been going on."""
    global _current
    progress = Progress(what, sys.stderr, steps=steps)
    _current = progress
    try:
        with every(_TERMINAL_S, progress.tick):
            yield progress
    finally:
        _current = None
        progress.end()
