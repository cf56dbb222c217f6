"""What is recorded while a trace runs: the hand that the rest of the package lends to `offload.trace`.

The native core records into a ring of its own (csrc/base/trace_ring.h), which is read when a step ends; hooks record
here. Names cross to the core as numbers. While no trace runs, every call here is one look at a global.
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, Protocol

from . import _native

__all__ = [
    "MOST_RECORDS",
    "HookSpan",
    "Recorder",
    "activate",
    "active",
    "name_of",
    "naming",
    "number_of",
    "record",
    "unwrapped",
    "wrapped",
    "wrapped_models",
]

_Given = ParamSpec("_Given")

# So many records are kept, 160 MB of native ones. Native ones beyond that are counted as lost, until the step ends and
# the recording with it.
MOST_RECORDS = 4_000_000

# Lane, name, begin and end; these are moments of the clock of a model's device (see `_trace_units.py`).
HookSpan = tuple[str, str, Any, Any]


class Watcher(Protocol):
    """Whoever traces is told of models that come and go meanwhile."""

    def model_wrapped(self, model: Any) -> None: ...
    def model_unwrapped(self, model: Any) -> None: ...


class Recorder:
    """What one trace has recorded so far."""

    def __init__(self, watcher: Watcher) -> None:
        self.spans: list[tuple[str, str, int, int]] = []
        # Tier, kind, when, bytes in use.
        self.samples: list[tuple[str, str, int, int]] = []
        self.watcher = watcher
        # Of models by their clocks: what hooks recorded with moments that the clock reads when the trace is over.
        self.unread: list[tuple[Any, list[HookSpan]]] = []
        # What hooks that record took of the threads they ran on: these take turns.
        self.recording_ns = 0
        self._native: list[bytes] = []
        self._count = 0
        self._lost = 0

    def timed(self, hook: Callable[_Given, None]) -> Callable[_Given, None]:
        """`hook`, with what it takes counted as the recording's."""

        def counted(*args: _Given.args, **kwargs: _Given.kwargs) -> None:
            begin = time.monotonic_ns()
            try:
                hook(*args, **kwargs)
            finally:
                self.recording_ns += time.monotonic_ns() - begin

        return counted

    def read(self) -> None:
        """Takes what the native core has recorded."""
        records = _native.trace_read()
        count = len(records) // _native.TRACE_RECORD_BYTES
        if self._count + count > MOST_RECORDS:
            self._lost += count
        elif count:
            self._native.append(records)
            self._count += count

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another step."""
        return self._lost > 0 or self._count + sum(len(spans) for _, spans in self.unread) >= MOST_RECORDS

    @property
    def native(self) -> bytes:
        return b"".join(self._native)

    @property
    def lost_count(self) -> int:
        """Native records that found no room."""
        return self._lost + _native.trace_lost_count()


_active: Recorder | None = None
_wrapped: weakref.WeakSet[Any] = weakref.WeakSet()
_numbers: dict[str, int] = {"": 0}
_names: list[str] = [""]


def active() -> Recorder | None:
    """The recorder of the trace that runs."""
    return _active


def activate(recorder: Recorder | None) -> None:
    """Begins a trace, or with None ends it."""
    global _active
    if recorder is None:
        _native.trace_stop()
    else:
        _native.trace_start()
    _active = recorder


def record(lane: str, name: str, begin_ns: int, end_ns: int) -> None:
    """One span of host time, where a trace runs."""
    if _active is not None:
        _active.spans.append((lane, name, begin_ns, end_ns))


@contextlib.contextmanager
def _named(name: str, tag: _native.Tag) -> Iterator[None]:
    outer = _native.trace_label()
    _native.set_trace_label(number_of(name), 1 + _native.TRACE_TAGS.index(tag))
    try:
        yield
    finally:
        _native.set_trace_label(*outer)


_UNNAMED = contextlib.nullcontext()


def naming(name: Callable[[], str], tag: _native.Tag) -> contextlib.AbstractContextManager[None]:
    """Inside the context what this thread submits is of `name()`, with host memory of `tag`."""
    return _UNNAMED if _active is None else _named(name(), tag)


def current_name() -> str:
    """Whose what this thread submits is, where a trace runs."""
    return "" if _active is None else _names[_native.trace_label()[0]]


def number_of(name: str) -> int:
    """What stands for `name` in native records, in this process."""
    number = _numbers.get(name)
    if number is None:
        number = _numbers[name] = len(_names)
        _names.append(name)
    return number


def name_of(number: int) -> str:
    return _names[number]


def wrapped(model: Any) -> None:
    """A model was wrapped (`_hooks.Hooks` stands for it): traces that run, and later ones, show it."""
    _wrapped.add(model)
    if _active is not None:
        _active.watcher.model_wrapped(model)


def wrapped_models() -> list[Any]:
    """Those that are alive and were not unwrapped."""
    return list(_wrapped)


def unwrapped(model: Any) -> None:
    """It is plain again: nothing of a trace may stay on it."""
    _wrapped.discard(model)
    if _active is not None:
        _active.watcher.model_unwrapped(model)


def _end_in_child() -> None:
    """The models are the parent's: their states and streams are not there."""
    global _active
    _active = None
    _wrapped.clear()


os.register_at_fork(after_in_child=_end_in_child)
