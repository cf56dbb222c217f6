"""`deepspeed.utils.timer`: named timers of a script's own; the device's work is waited for at their ends."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import offload

from ._log import log_dist
from .accelerator import get_accelerator

__all__ = ["SynchronizedWallClockTimer"]


class SynchronizedWallClockTimer:
    """`timers("forward").start()`, `.stop()`; times are milliseconds, added up until they are reset."""

    class Timer:
        """One of them."""

        def __init__(self, name: str) -> None:
            self.name_ = name
            self._records: list[float] = []
            self._began: float | None = None

        @property
        def started_(self) -> bool:
            """Whether it is running."""
            return self._began is not None

        def start(self) -> None:
            if self._began is not None:
                raise offload.StateError(f"timer {self.name_!r} is running: stop() it first")
            get_accelerator().synchronize()
            self._began = time.perf_counter()

        def stop(self, reset: bool = False, record: bool = False) -> None:
            if self._began is None:
                raise offload.StateError(f"timer {self.name_!r} is not running: start() it first")
            get_accelerator().synchronize()
            self._records.append((time.perf_counter() - self._began) * 1e3)
            self._began = None

        def reset(self) -> None:
            """Forgets everything, a running time too."""
            self._records.clear()
            self._began = None

        def elapsed(self, reset: bool = True) -> float:
            """Milliseconds so far, those of a running time too; it goes on from now."""
            running = self.started_
            if running:
                self.stop()
            total = sum(self._records)
            if reset:
                self.reset()
            if running:
                self.start()
            return total

        def mean(self) -> float:
            """Milliseconds of one time, the tenth at either end left out."""
            times = sorted(self._records)
            cut = round(len(times) * 0.1)
            times = times[cut : len(times) - cut]
            return sum(times) / len(times) if times else 0.0

    def __init__(self) -> None:
        self.timers: dict[str, SynchronizedWallClockTimer.Timer] = {}

    def __call__(self, name: str) -> Timer:
        return self.timers.setdefault(name, self.Timer(name))

    def get_timers(self) -> dict[str, Timer]:
        return self.timers

    def log(
        self,
        names: Iterable[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool = False,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Logs the milliseconds of these timers, divided by `normalizer`; those that are not there are passed over."""
        known = [name for name in names if name in self.timers]
        times = (f" | {name}: {self.timers[name].elapsed(reset=reset) / normalizer:.2f}" for name in known)
        log_dist("time (ms)" + "".join(times), ranks=ranks)
