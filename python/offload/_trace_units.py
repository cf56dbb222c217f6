"""Records when the units of a wrapped model compute, by hooks that are there while a trace runs.

On the CPU a time is that of the hook. On CUDA it is an event of the compute stream, which tells when the device came to
it, and is read when the trace is over.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from . import _native, _trace
from ._hooks import ForwardHook, Hooks, ModuleHook, tensors_in
from ._trace import HookSpan, Recorder

__all__ = ["CudaTimes", "HostTimes", "TracedUnits", "times_of"]

# In the metadata of a node of autograd: backward is watched from there already.
_WATCHED = "offload.traced"


class HostTimes:
    """Times of a device whose compute is synchronous."""

    now: Callable[[], Any] = staticmethod(time.monotonic_ns)

    def read(self, moment: Any) -> int:
        return int(moment)


class CudaTimes:
    """Events of the current compute stream, beside one whose time on the host is known.

    Making it and the first read() wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reference = _timed_event()
        self._reference.record(torch.cuda.current_stream(device))
        self._reference.synchronize()
        self._reference_ns = time.monotonic_ns()
        self._ended = False

    def now(self) -> Any:
        event = _timed_event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def read(self, moment: Any) -> int:
        if not self._ended:
            torch.cuda.synchronize(self._device)
            self._ended = True
        milliseconds: float = self._reference.elapsed_time(moment)
        return self._reference_ns + int(milliseconds * 1e6)


def _timed_event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


Times = HostTimes | CudaTimes


def times_of(device: torch.device) -> Times:
    return HostTimes() if device.type == "cpu" else CudaTimes(device)


class TracedUnits:
    """The hooks of one wrapped model; `remove()` leaves none, and what is left on a graph does nothing."""

    def __init__(self, model: nn.Module, hooks: Hooks, recorder: Recorder) -> None:
        self._recorder = recorder
        self._engine = weakref.ref(hooks.engine)
        self._times = times_of(hooks.engine.streaming.device)
        self._spans: list[HookSpan] = []
        recorder.unread.append((self._times, self._spans))  # outlive the model
        self._forwards: list[tuple[str, Any]] = []
        # The unit whose backward runs, and its beginning; that of the whole backward.
        self._unit: tuple[str, Any] | None = None
        self._backward: Any = None
        self._end: weakref.ref[_BackwardEnd] | None = None
        self._handles: list[RemovableHandle] = []
        self._replaced: list[tuple[ModuleHook, Callable[[], None] | None]] = []
        # Where nothing is streamed, the first sample stays true, and nobody works between two units' backwards.
        self._streams = bool(hooks.engine.streaming.residencies)
        for name, weakly, ready in hooks.modules:
            module = weakly()
            # What is the model's own is there in all of its forward.
            if module is not None and module is not model:
                self._around(ready, name)
                self._after_forward(module, "compute", name)
        # The label before all other hooks: what the engine waits for then is no unit's. The beginning after them.
        clear = ModuleHook(recorder.timed(functools.partial(self._label, "")))
        begin = ModuleHook(recorder.timed(functools.partial(self._begin_forward, "phase", "forward")))
        self._handles += [
            model.register_forward_pre_hook(clear, prepend=True),
            model.register_forward_pre_hook(begin),
        ]
        self._after_forward(model, "phase", "forward")
        hooks.engine.lanes.trace_sample()
        if hooks.engine.activations is not None:
            hooks.engine.activations.trace_sample()
        self._sample()

    def _around(self, ready: ModuleHook, name: str) -> None:
        """In the engine's own hook before a unit's forward: every hook more is Python that compute has driven out of
        the caches. What the engine waits for there is the unit's."""
        make_ready = ready.call
        label, begin = self._recorder.timed(self._label), self._recorder.timed(self._begin_forward)

        def traced() -> None:
            label(name)
            if make_ready is not None:
                make_ready()
            begin("compute", name)

        self._replaced.append((ready, make_ready))
        ready.call = traced

    def _after_forward(self, module: nn.Module, lane: str, name: str) -> None:
        # A backward's end of one unit comes before what the engine does for the next, its beginning after.
        if self._streams and lane == "compute":
            close = ForwardHook(self._recorder.timed(self._watcher(lane, name, opens=False)))
            self._handles.append(module.register_forward_hook(close, prepend=True))
        watch = self._watcher(lane, name, opens=True)

        def ended(given: Any, output: Any) -> None:
            self._end_forward(lane, name)
            watch(given, output)

        hook = ForwardHook(self._recorder.timed(ended))
        self._handles.append(module.register_forward_hook(hook, always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for hook, call in self._replaced:
            hook.call = call
        self._replaced.clear()
        self._forwards.clear()
        self._unit = self._backward = None
        _native.set_trace_label(0)

    def _sample(self) -> None:
        engine = self._engine()
        if engine is not None:
            window = engine.streaming.window.device_bytes
            self._recorder.samples.append(("device", "streamed weights", time.monotonic_ns(), window))

    # --- forward --------------------------------------------------------------------------------------------

    def _label(self, name: str) -> None:
        _native.set_trace_label(_trace.number_of(name))

    def _begin_forward(self, lane: str, name: str) -> None:
        if lane == "phase":  # whatever an exception left open is forgotten
            self._forwards.clear()
            self._unit = self._backward = None
        self._forwards.append((name, self._times.now()))
        if self._streams:
            self._sample()

    def _end_forward(self, lane: str, name: str) -> None:
        # A recompute in backward is over: what comes now is of that backward.
        _native.set_trace_label(0 if self._unit is None else _trace.number_of(self._unit[0]))
        while self._forwards:
            opened, begin = self._forwards.pop()
            if opened == name:
                self._spans.append((lane, name, begin, self._times.now()))
                return

    # --- backward -------------------------------------------------------------------------------------------

    def _watcher(self, lane: str, name: str, *, opens: bool) -> Callable[[Any, Any], None]:
        """After a forward: backward tells before it runs the nodes that made the outputs."""
        itself = weakref.ref(self)  # graphs must not keep what was recorded
        key = f"{_WATCHED} {opens}"

        def touch(_: Any) -> None:
            units = itself()
            if units is not None and units._handles:
                timed = units._recorder.timed
                timed(units._open_backward)(lane, name) if opens else timed(units._close_unit)()

        def watch(_: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                for tensor in tensors_in(output):
                    node: Any = tensor.grad_fn
                    if node is not None and key not in node.metadata:
                        node.metadata[key] = name
                        node.register_prehook(touch)

        return watch

    def _close_unit(self) -> None:
        if self._unit is not None:
            name, begin = self._unit
            self._unit = None
            self._spans.append(("compute", f"{name} backward", begin, self._times.now()))

    def _open_backward(self, lane: str, name: str) -> None:
        if self._end is None or self._end() is None:
            end = _BackwardEnd(self)
            torch.autograd.Variable._execution_engine.queue_callback(end)
            self._end = weakref.ref(end)
            self._backward = self._times.now()
        if lane == "compute":
            self._close_unit()
            _native.set_trace_label(_trace.number_of(name))
            self._unit = (name, self._times.now())
            if self._streams:
                self._sample()

    def end_backward(self) -> None:
        self._end = None
        self._close_unit()
        _native.set_trace_label(0)
        if self._backward is not None:
            self._spans.append(("phase", "backward", self._backward, self._times.now()))
            self._backward = None


class _BackwardEnd:
    """Autograd keeps it among the callbacks of a backward: it is called when that ends, and dies when that fails."""

    __slots__ = ("__weakref__", "_units")

    def __init__(self, units: TracedUnits) -> None:
        self._units = weakref.ref(units)

    def __call__(self) -> None:
        units = self._units()
        if units is not None:
            units._recorder.timed(units.end_backward)()
