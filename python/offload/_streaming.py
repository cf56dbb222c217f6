"""Streamed parameters: they are on the device while their unit is in the window, and on the host else.

[Note: touches] A unit is made ready by a touch: the forward of one of its modules begins (in backward too, where a
checkpoint recomputes it), or backward comes to a node that made an output of it. A touch brings the unit, frees
every one outside the window and sends for the next ones, so nothing has to tell when a unit is done. The window is

- the touched unit and those within whose forward it runs: backward mixes the nodes of both;
- units whose forward is open;
- pinned units, whose weights are used from outside of their forward, so that nothing announces the use;
- the next `prefetch` ones of the recorded order.

The end of backward empties the window. Whatever is not ready wears `PendingParameter` and cannot be read.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from ._errors import OffloadError, StateError
from ._interrupts import Uninterrupted
from ._pending import make_pending, restore
from ._residency import Residency, group_by_units
from ._touch_order import TouchOrder
from ._units import Unit

__all__ = ["Streaming", "WeightStore"]


class WeightStore(Protocol):
    """What moves the bytes and knows the updates: the engine."""

    def acquire_weights(self, nbytes: int) -> Any:
        """Host bytes for the weights of a residency."""

    def start_weights(self, residency: Residency) -> Any:
        """Starts the upload, behind the updates of its parameters, in order with the compute stream."""

    def wait_weights(self, upload: Any) -> None:
        """The compute stream waits for what start_weights() returned; raises its error."""

    def settle_updates(self, parameters: Sequence[Parameter]) -> None:
        """The updates of these parameters have ended afterwards; raises their error."""

    def weight_written(self, parameter: Parameter, on_host: Tensor) -> None:
        """Somebody wrote to the parameter, which is on the device: `on_host` is to be equal afterwards."""

    def name_of(self, parameter: Tensor) -> str: ...


class Streaming:
    """See the module's text. One compute thread at a time, as autograd gives it. `units` may be none."""

    def __init__(self, units: Sequence[Unit], store: WeightStore, *, prefetch: int, poison: bool) -> None:
        self._store = store
        self._prefetch = prefetch
        self._poison = poison
        self.residencies = [Residency(parameters) for parameters in group_by_units(units)]
        self._residency_of = {id(p): residency for residency in self.residencies for p in residency.parameters}
        self._needs = [_unique(self._residency_of.get(id(p)) for _, p in unit.parameters) for unit in units]
        self._parents: list[set[int]] = [set() for _ in units]
        self._open: list[int] = []
        self._pinned: set[int] = set()
        self._training, self._evaluation = TouchOrder(), TouchOrder()
        self._order = self._training
        self._forward_runs = False
        self._backward: weakref.ref[_BackwardEnd] | None = None
        self._holds = 0
        # While state_dict() runs: a copy of each parameter that it has come to.
        self._copies: dict[int, Tensor] | None = None
        self._lends = False
        # Called before what the user wrote to a weight replaces its host bytes.
        self.before_write_back: Callable[[], None] | None = None
        # Those with bytes on the device, and what their upload must be waited for; None: ready.
        self._uploads: dict[Residency, Any] = {}
        self.peak_bytes = 0
        # The last upload of each, which may still read the host bytes.
        self.last_upload: dict[Residency, Any] = {}

    def __contains__(self, parameter: object) -> bool:
        return id(parameter) in self._residency_of

    @property
    def device_bytes(self) -> int:
        return sum(residency.nbytes for residency in self._uploads)

    @property
    def host_bytes(self) -> int:
        return sum(residency.nbytes for residency in self.residencies)

    # --- begin and end --------------------------------------------------------------------------------------

    def host_weight(self, parameter: Parameter) -> Tensor:
        """The host bytes of a streamed parameter, as a tensor like it."""
        residency = self._residency_of[id(parameter)]
        if not residency.has_host_bytes:
            residency.take_host_bytes(self._store.acquire_weights(residency.nbytes))
        return residency.on_host(parameter)

    def place(self) -> None:
        """The last part of `wrap`: values go to the host, the parameters leave. All of it happens, or nothing."""
        placed = []
        try:
            for residency in self.residencies:
                with torch.no_grad():
                    for parameter in residency.parameters:
                        self.host_weight(parameter).copy_(parameter)
                placed.append(residency)
                residency.place()
                self._guard(residency)
        except BaseException:
            self.leave([(residency, residency.resident_copies()) for residency in placed])
            raise

    def resident_copies(self) -> list[tuple[Residency, list[Tensor]]]:
        """What `leave` gives back; the values as they are on the host. Nothing is changed."""
        return [(residency, residency.resident_copies()) for residency in self.residencies]

    def leave(self, copies: Iterable[tuple[Residency, Sequence[Tensor]]]) -> None:
        """The parameters are plain and resident again, with these values."""
        for residency, values in copies:
            self._await_quietly(residency)
            self._uploads.pop(residency, None)
            for parameter in residency.parameters:
                restore(parameter)
            residency.leave(values)
        self._residency_of = {}

    def uploads_of(self, parameter: Parameter) -> list[Any]:
        """What still reads the host bytes of a parameter: its update must wait for it."""
        residency = self._residency_of.get(id(parameter))
        upload = None if residency is None else self.last_upload.get(residency)
        return [] if upload is None or upload.done else [upload]

    # --- touches --------------------------------------------------------------------------------------------

    def begin_forward(self, *, in_backward: bool) -> None:
        """The model's forward begins; whatever an exception left half done is forgotten."""
        if not self.residencies or in_backward:
            return
        if self._is_captured():
            raise StateError(
                "the model is captured into a CUDA graph, which would fix the addresses of weights that come and go: "
                "wrap with params='device' to use CUDA graphs"
            )
        self._order = self._training if torch.is_grad_enabled() else self._evaluation
        self._order.begin()
        self._open.clear()
        self._copies = None
        self._forward_runs = True
        self._backward = None
        for unit in self._pinned:
            self._bring(self._needs[unit])

    def end_forward(self, *, in_backward: bool) -> None:
        """The model's forward ended. Without a graph nothing is needed until the next one begins."""
        if not self.residencies or in_backward:
            return
        self._forward_runs = False
        self._open.clear()
        if not torch.is_grad_enabled():
            self.rest()

    def enter(self, unit: int, *, in_backward: bool) -> None:
        """The forward of `unit` begins."""
        if not self.residencies or not self._needs[unit]:
            return
        self._parents[unit].update(other for other in self._open if other != unit)
        self._touch(unit, in_backward=in_backward)
        self._open.append(unit)

    def exit(self, unit: int) -> None:
        """The forward of `unit` ended, or raised."""
        if unit in self._open:
            self._open.remove(unit)

    def touch_in_backward(self, unit: int) -> None:
        """Backward is about to run nodes of `unit`."""
        if torch.is_grad_enabled():
            raise StateError(
                "backward(create_graph=True) is not supported with params='host': the graph of a gradient would use "
                "weights that are not on the device; wrap with params='device' for double backward"
            )
        self._touch(unit, in_backward=True)

    def pin(self, unit: int) -> None:
        """From now on `unit` stays from the beginning of a forward to the end of its backward."""
        self._pinned.add(unit)

    def shares_memory(self, unit: int, tensor: Tensor) -> bool:
        """Whether `tensor` is a parameter of `unit`, or a view of one."""
        key = tensor.untyped_storage()._cdata
        return any(residency.storage_key == key for residency in self._needs[unit])

    def _touch(self, unit: int, *, in_backward: bool) -> None:
        if in_backward:
            self._watch_end_of_backward()
        self._order.record((unit, in_backward))
        wanted = {unit, *self._parents[unit], *self._open, *self._pinned}
        ahead = self._order.upcoming(self._prefetch, wanted)
        needed = [residency for number in wanted for residency in self._needs[number]]
        predicted = [residency for number in ahead for residency in self._needs[number]]
        self._free_all_but({*needed, *predicted})
        self._bring(needed)
        self._bring(predicted)
        self._make_ready(needed)

    def _is_captured(self) -> bool:
        on_cuda = self.residencies[0].parameters[0].device.type == "cuda"
        return on_cuda and torch.cuda.is_current_stream_capturing()

    def _watch_end_of_backward(self) -> None:
        """Empties the window when the outermost backward ends; those within it end before."""
        end = None if self._backward is None else self._backward()
        if end is None:
            end = _BackwardEnd(self)
            torch.autograd.Variable._execution_engine.queue_callback(end)
            self._backward = weakref.ref(end)

    # --- presence -------------------------------------------------------------------------------------------

    def empty(self) -> None:
        """Frees every unit; what the user wrote to goes to the host first."""
        self._free_all_but(())

    def begin_step(self) -> None:
        """Empties the window for a step: the weights on the host are the present ones."""
        if self._holds:
            raise StateError(
                "optim.step() inside `offload.full_params`: the weights on the device would miss the step; leave the "
                "context first"
            )
        self.empty()

    def rest(self) -> None:
        """Empties the window and sends for the units that the next forward begins with."""
        self.empty()
        if not self._holds:
            for unit in self._order.first(1 + self._prefetch):
                self._bring(self._needs[unit])

    def flush(self) -> None:
        """What the user wrote to parameters on the device is on the host afterwards."""
        for residency, upload in self._uploads.items():
            if upload is None:
                self._write_back(residency, residency.written())

    @contextlib.contextmanager
    def present(self, parameters: Iterable[Parameter] | None = None) -> Iterator[None]:
        """Inside the context these parameters (None: all) are on the device, for reading and writing."""
        wanted = self.residencies if parameters is None else self._those_of(parameters)
        self._holds += 1
        try:
            self._bring(wanted)
            self._make_ready(wanted)
            yield
        finally:
            self._holds -= 1
            for residency in wanted:
                if self._uploads.get(residency, self) is None:
                    # All parameters: writes through `.data` show in no version.
                    self._write_back(residency, residency.parameters)
            if not self._holds:
                self.empty()

    @contextlib.contextmanager
    def saving_copies(self) -> Iterator[None]:
        """Inside the context autograd saves copies of weights: they may be gone when the nodes made here run."""
        if not self.residencies:
            yield
            return
        storages = {residency.storage_key for residency in self.residencies}

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().clone() if tensor.untyped_storage()._cdata in storages else tensor

        with torch.autograd.graph.saved_tensors_hooks(copy, lambda saved: saved):
            yield

    def open_for_writing(self, parameters: Iterable[Parameter]) -> None:
        """Brings these parameters; what is written to them goes to the host at the next touch, step or state_dict()."""
        wanted = self._those_of(parameters)
        if wanted:
            self._free_all_but(wanted)
            self._bring(wanted)
            self._make_ready(wanted)

    def begin_copies(self) -> None:
        """state_dict() begins: parameters give copies of their values until end_copies()."""
        if not self._holds:
            self.empty()
        if self._copies is None:
            self._copies = {}

    def copy_of(self, parameter: Parameter) -> Tensor:
        """A copy of its value in host memory, the same one while one state_dict() runs."""
        self.flush()
        self._store.settle_updates([parameter])
        known = None if self._copies is None else self._copies.get(id(parameter))
        if known is None:
            with torch.inference_mode(False):
                known = self.host_weight(parameter)
                if not self._lends:
                    known = known.clone()
            if self._copies is not None:
                self._copies[id(parameter)] = known
        return known

    def end_copies(self) -> None:
        self._copies = None

    @contextlib.contextmanager
    def lending(self) -> Iterator[None]:
        """Inside the context state_dict() gives the host bytes themselves, to be read before a weight changes."""
        self._lends = True
        try:
            yield
        finally:
            self._lends = False

    def _those_of(self, parameters: Iterable[Parameter]) -> list[Residency]:
        return _unique(self._residency_of.get(id(parameter)) for parameter in parameters)

    def _bring(self, residencies: Iterable[Residency]) -> None:
        """Sends for those that are not on the device."""
        for residency in residencies:
            if residency in self._uploads or not residency.is_placed:
                continue
            residency.allocate(poison=self._poison)
            try:
                with Uninterrupted():  # a copy in flight that nobody knows of would write to freed memory
                    upload = self._store.start_weights(residency)
                    self._uploads[residency] = upload
                    self.last_upload[residency] = upload
                    self.peak_bytes = max(self.peak_bytes, self.device_bytes)
            except BaseException:
                if residency not in self._uploads:
                    residency.free()
                raise

    def _make_ready(self, residencies: Iterable[Residency]) -> None:
        for residency in residencies:
            upload = self._uploads.get(residency)
            if upload is None:
                continue
            try:
                self._store.settle_updates(residency.parameters)
                self._store.wait_weights(upload)
            except BaseException:
                self._free(residency)  # the next touch sends for it again
                raise
            # Interrupted here, all of it is done again.
            for parameter in residency.parameters:
                restore(parameter)
            residency.mark_equal()
            self._uploads[residency] = None

    def _free_all_but(self, kept: Iterable[Residency]) -> None:
        if self._holds:
            return
        stays = set(kept)
        for residency in [residency for residency in self._uploads if residency not in stays]:
            self._free(residency)

    def _free(self, residency: Residency) -> None:
        if self._uploads[residency] is None:
            self._write_back(residency, residency.written())
        else:
            self._await_quietly(residency)  # it writes to the memory
        # Ctrl-C may come between any two lines: it is not ready from the first on, and sent for again after the third.
        self._uploads[residency] = self.last_upload[residency]
        self._guard(residency)
        del self._uploads[residency]
        residency.free()

    def _await_quietly(self, residency: Residency) -> None:
        upload = self._uploads.get(residency)
        if upload is not None:
            with contextlib.suppress(OffloadError):  # whoever asks for the weights is told
                self._store.wait_weights(upload)

    def _write_back(self, residency: Residency, parameters: Sequence[Parameter]) -> None:
        if parameters and self.before_write_back is not None:
            self.before_write_back()
        with torch.no_grad():
            for parameter in parameters:
                residency.take_home(parameter, self._store.name_of(parameter))
                self._store.weight_written(parameter, residency.on_host(parameter))
        residency.mark_equal()

    # --- the guard ------------------------------------------------------------------------------------------

    def _guard(self, residency: Residency) -> None:
        """Nobody may read the parameters: their memory is not there, or not filled yet."""
        itself = weakref.ref(self)  # the parameters must not keep the engine
        for parameter in residency.parameters:
            make_pending(parameter, _Away(itself, weakref.ref(parameter)))

    def read_away(self, parameter: Parameter) -> Tensor | None:
        """Somebody reads a parameter that is not there; returns what stands for it, None when it is there now."""
        if self._copies is not None:
            return self.copy_of(parameter)
        if not self._forward_runs:
            raise StateError(
                f"{self._store.name_of(parameter)} is on the host (params='host'): read and write weights inside "
                "`with offload.full_params(model):`; call offload.unwrap before model.to(), .half() and the like"
            )
        # A weight of a unit that is used from outside of its forward: nothing announces that, so it stays from now on.
        residency = self._residency_of[id(parameter)]
        self._pinned.update(unit for unit, needs in enumerate(self._needs) if residency in needs)
        self._bring([residency])
        self._make_ready([residency])
        return None


class _Away:
    """What a parameter that is not on the device answers with; see `_pending.make_pending`."""

    def __init__(self, streaming: weakref.ref[Streaming], parameter: weakref.ref[Parameter]) -> None:
        self._streaming = streaming
        self._parameter = parameter

    def _those(self) -> tuple[Streaming, Parameter]:
        streaming, parameter = self._streaming(), self._parameter()
        if streaming is None or parameter is None:
            raise StateError("this parameter is of a wrapped model that is gone, and so are its bytes on the host")
        return streaming, parameter

    def __call__(self) -> Tensor | None:
        streaming, parameter = self._those()
        return streaming.read_away(parameter)

    def copy(self) -> Parameter:
        """A resident parameter with its value."""
        streaming, parameter = self._those()
        value = streaming.copy_of(parameter).to(parameter.device, copy=True)
        return Parameter(value, requires_grad=parameter.requires_grad)

    def __reduce__(self) -> Any:
        raise StateError("a parameter that is on the host cannot be pickled by its attributes: save model.state_dict()")


class _BackwardEnd:
    """Autograd keeps it among the callbacks of a backward: it is called when that ends, and dies when that fails."""

    __slots__ = ("__weakref__", "_streaming")

    def __init__(self, streaming: Streaming) -> None:
        self._streaming = streaming

    def __call__(self) -> None:
        self._streaming.empty()


def _unique(residencies: Iterable[Residency | None]) -> list[Residency]:
    return list(dict.fromkeys(residency for residency in residencies if residency is not None))
