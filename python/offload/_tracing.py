"""`offload.trace`: records what a stretch of training does, and tells where its time went."""

from __future__ import annotations

import json
import os
import struct
import threading
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from . import _native, _trace, _trace_file
from ._clocks import ClockSampler
from ._errors import InvalidArgument, StateError
from ._hooks import Hooks
from ._optimizer import OffloadOptimizer
from ._trace import Recorder
from ._trace_page import page
from ._trace_records import MemorySample, Span, TraceData
from ._trace_report import TraceReport, analyse
from ._trace_units import TracedUnits

__all__ = ["trace"]

# As csrc/base/trace_ring.h has it: begin, end, bytes, name, thread, lane, kind.
_RECORD = struct.Struct("=qqQIIBB6x")
_WAIT_KINDS = ("update", "copy")

_StrPath = str | os.PathLike[str]


class trace:
    """Records the training steps inside the context, and tells where their time went.

        with offload.trace("trace.json", html="trace.html") as trace:
            for batch in batches:
                loss(model, batch).backward()
                optim.step()
                optim.zero_grad()
        print(trace.report)

    path: a file for the trace as JSON, which Perfetto (ui.perfetto.dev) and chrome://tracing open; one that ends in
    `.gz` is compressed. html: a file for a page that needs no network. steps: recording ends after so many
    `optim.step()` calls; None: with the context. Files are written at the end of the context, after an exception too.

    Every wrapped model of the process is recorded, also one that is wrapped inside. A step ends with `step()` of the
    optimizer that steps first inside. Times are of the host's clock; on CUDA those of compute and copies are the
    device's own, and the end of the context waits for the device once. One trace runs at a time. A forked child is not
    recorded.

    With torch.profiler around the same steps, both files are on one time axis: open them together in Perfetto, or join
    them with `save(path, profiler=file)`.

    Raises `InvalidArgument` for a path that cannot be written or steps that are no positive number, and `StateError`
    when a trace runs already. `OSError` from the end of the context: a file could not be written.
    """

    def __init__(self, path: _StrPath | None = None, *, html: _StrPath | None = None, steps: int | None = None) -> None:
        for name, value in (("path", path), ("html", html)):
            _check_writable(name, value)
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise InvalidArgument(f"steps={steps!r}: give a positive whole number, or None for all inside the context")
        self._path, self._html, self._limit = path, html, steps
        self._data: TraceData | None = None
        self._report: TraceReport | None = None
        self._recording: _Recording | None = None

    @classmethod
    def load(cls, path: _StrPath) -> trace:
        """The trace that was saved as JSON. Raises `InvalidArgument` for another file."""
        loaded = cls()
        loaded._data = _trace_file.from_json(_trace_file.read_json(path), str(path))
        return loaded

    def __enter__(self) -> trace:
        if self._recording is not None or self._data is not None:
            raise StateError("a trace is recorded once: make another one with offload.trace()")
        if _trace.active() is not None:
            raise StateError("a trace runs already in this process: leave its context first")
        self._recording = _Recording(self._limit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        recording, self._recording = self._recording, None
        if recording is None or recording.process != os.getpid():
            return  # a forked child leaves the context of its parent
        self._data = recording.finish()
        if self._path is not None:
            self.save(self._path)
        if self._html is not None:
            self.save_html(self._html)

    @property
    def data(self) -> TraceData:
        """What was recorded. Raises `StateError` before the end of the context."""
        if self._data is None:
            raise StateError("the trace is not over: its report is there when its `with` block has ended")
        return self._data

    @property
    def report(self) -> TraceReport:
        """Where the steps' time went. Raises `StateError` before the end of the context."""
        if self._report is None:
            self._report = analyse(self.data)
        return self._report

    def save(self, path: _StrPath, *, profiler: _StrPath | None = None) -> None:
        """Writes the trace as JSON; with `profiler`, what `export_chrome_trace()` wrote of the same run is joined in.

        Raises `InvalidArgument` when that file is of another run, or none.
        """
        _check_writable("path", path)
        values = _trace_file.to_json(self.data)
        if profiler is not None:
            values = _trace_file.join_profiler(values, _trace_file.read_json(profiler), str(profiler))
        _trace_file.write_text(path, json.dumps(values, separators=(",", ":")))

    def save_html(self, path: _StrPath) -> None:
        """Writes a page with timeline, memory by tier and the verdict, which opens without a network."""
        _check_writable("html", path)
        _trace_file.write_text(path, page(self.data, self.report))


def _check_writable(name: str, path: _StrPath | None) -> None:
    if path is None:
        return
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidArgument(f"{name}={path!r}: give the path of a file, or None")
    folder = Path(path).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise InvalidArgument(f"{name}={os.fspath(path)!r}: give a file in a folder that exists and can be written to")


class _Recording:
    """A trace while it runs; see `_trace.Watcher`."""

    def __init__(self, limit: int | None) -> None:
        self.process = os.getpid()
        self._limit = limit
        self._stepping: weakref.ref[OffloadOptimizer] | None = None
        self._step_begin_ns = 0
        self._step_count = 0
        self._notes: list[str] = []
        # Weakly: a model that is dropped inside dies there.
        self._units: weakref.WeakKeyDictionary[Hooks, TracedUnits] = weakref.WeakKeyDictionary()
        self._models: list[dict[str, Any]] = []
        self._sampler = ClockSampler(_cuda_devices())
        self._lock = threading.Lock()
        self._running = True
        self._begin_ns = self._boundary_ns = time.monotonic_ns()
        self._realtime_offset_ns = _realtime_offset_ns()
        self._end_ns = self._begin_ns
        self._recorder = Recorder(self)
        self._handles: list[RemovableHandle] = []
        _trace.activate(self._recorder)
        try:
            for hooks in _trace.wrapped_models():
                self.model_wrapped(hooks)
            self._handles.append(register_optimizer_step_pre_hook(self._recorder.timed(self._before_step)))
            self._handles.append(register_optimizer_step_post_hook(self._recorder.timed(self._after_step)))
            self._sampler.start()
        except BaseException:
            self._stop()
            raise

    # --- models ---------------------------------------------------------------------------------------------

    def model_wrapped(self, model: Any) -> None:
        hooks: Hooks = model
        module = hooks.model()  # None: it was dropped, and its optimizer was not
        if self._running and module is not None:
            self._models.append(_facts_of(hooks))
            self._units[hooks] = TracedUnits(module, hooks, self._recorder)

    def model_unwrapped(self, model: Any) -> None:
        units = self._units.pop(model, None)
        if units is not None:
            units.remove()

    def _remove_units(self) -> None:
        for units in list(self._units.values()):
            units.remove()
        self._units.clear()

    # --- steps ----------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if isinstance(optimizer, OffloadOptimizer):
            self._step_begin_ns = time.monotonic_ns()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not isinstance(optimizer, OffloadOptimizer) or not self._running:
            return
        now_ns = time.monotonic_ns()
        _trace.record("phase", "optim.step", self._step_begin_ns, now_ns)
        self._recorder.read()
        if self._stepping is None or self._stepping() is None:
            self._stepping = weakref.ref(optimizer)
        if optimizer is not self._stepping():
            return
        self._step_count += 1
        _trace.record("step", f"step {self._step_count}", self._boundary_ns, now_ns)
        self._boundary_ns = now_ns
        if self._recorder.is_full and self._step_count != self._limit:
            self._notes.append(f"recording ended with step {self._step_count}: there was no room for more records")
            self._stop()
        elif self._step_count == self._limit:
            self._stop()

    # --- the end --------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        with self._lock:
            if not self._running:
                return
            self._running = False
        _trace.activate(None)
        self._end_ns = time.monotonic_ns()
        self._recorder.read()
        for handle in self._handles:
            handle.remove()
        self._sampler.stop()
        self._remove_units()

    def finish(self) -> TraceData:
        self._stop()
        spans, memory = _decode(self._recorder.native)
        spans += [Span(*span) for span in self._recorder.spans]
        notes = [*self._notes, *([self._sampler.note] if self._sampler.note else [])]
        try:
            for times, unread in self._recorder.unread:
                spans += [Span(lane, name, times.read(begin), times.read(end)) for lane, name, begin, end in unread]
        except RuntimeError as error:  # the device is lost: what the host has recorded is all the more of use
            notes.append(f"when units computed is not known: {error}")
        memory += [MemorySample(*sample) for sample in self._recorder.samples]
        memory += self._sampler.memory
        for model in self._models:
            if model["disk_bytes"]:
                memory.append(MemorySample("disk", "states and weights", self._begin_ns, model["disk_bytes"]))
        return TraceData(
            begin_ns=self._begin_ns,
            end_ns=self._end_ns,
            realtime_offset_ns=self._realtime_offset_ns,
            spans=tuple(sorted(spans, key=lambda span: (span.begin_ns, -span.end_ns))),
            memory=tuple(sorted(memory, key=lambda sample: sample.at_ns)),
            clocks=tuple(self._sampler.clocks),
            models=tuple(self._models),
            lost_count=self._recorder.lost_count,
            recording_ns=self._recorder.recording_ns,
            notes=tuple(notes),
        )


def _cuda_devices() -> list[torch.device]:
    """Those that this process uses: asking must not start CUDA."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    return [torch.device("cuda", torch.cuda.current_device())]


def _realtime_offset_ns() -> int:
    """What the calendar's clock is ahead of CLOCK_MONOTONIC, from the closest of several readings of one between two of
    the other: this thread may stand still in any of them."""
    readings = []
    for _ in range(5):
        before, calendar, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        readings.append((after - before, calendar - (before + after) // 2))
    return min(readings)[1]


def _facts_of(hooks: Hooks) -> dict[str, Any]:
    """What advice is weighed by, ready for JSON."""
    plan, config = hooks.engine.plan, hooks.engine.config
    return {
        "device": plan.device_kind,
        "optimizer": plan.optimizer,
        "gradients": plan.gradients,
        "params": plan.params,
        "activations": plan.activations,
        "master": plan.master,
        "moments": config.moments,
        "prefetch": plan.prefetch,
        "trainable_count": plan.trainable_count,
        "unit_count": len(hooks.engine.units),
        "disk_bytes": plan.disk.total,
        "disk_path_count": len(config.disk_paths),
        "isa": hooks.engine.isa,
    }


def _decode(records: bytes) -> tuple[list[Span], list[MemorySample]]:
    """Native records as spans, and as samples of host memory summed over all pools."""
    assert _RECORD.size == _native.TRACE_RECORD_BYTES
    spans: list[Span] = []
    memory: list[MemorySample] = []
    pools: dict[tuple[int, int], int] = {}
    sums: dict[int, int] = {}
    for begin, end, nbytes, name, thread, lane_number, kind in _RECORD.iter_unpack(records):
        lane = _native.TRACE_LANES[lane_number]
        if lane == "host_memory":
            sums[kind] = sums.get(kind, 0) + nbytes - pools.get((name, kind), 0)
            pools[name, kind] = nbytes
            memory.append(MemorySample("host", _native.TRACE_TAGS[kind], begin, sums[kind]))
            continue
        if lane == "wait":
            text = _WAIT_KINDS[kind]
        else:
            text = _native.TRACE_TAGS[kind - 1] if kind else ""
        spans.append(Span(lane, _trace.name_of(name), begin, end, nbytes, text, thread))
    return spans, memory
