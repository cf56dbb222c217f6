"""Streamed parameters: they are on the device while their unit is in the window, and on the host or on disk else.

[Note: touches] A unit is made ready by a touch: the forward of one of its modules begins (in backward too, where a
checkpoint recomputes it), or backward comes to a node that made an output of it, or what else left it (`_hooks.py`
looks where). A touch brings the unit, frees every one outside the window and sends for the next ones, so nothing has to
tell when a unit is done. The window is

- the touched unit and those within whose forward it runs: backward mixes the nodes of both;
- units whose forward is open;
- pinned units, whose weights are used from outside of their forward, so that nothing announces the use;
- the next `prefetch` ones of the recorded order.

The end of backward empties the window.
"""

from __future__ import annotations

import bisect
import contextlib
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ._autocast_cache import AutocastCache
from ._away import AwayParameter
from ._cuda_graphs import refuse_capture
from ._errors import OffloadError, StateError
from ._residency import Residency, group_by_units, trim_heap
from ._stored_values import StoredWeight
from ._touch_order import TouchOrder
from ._uncompiled import not_compiled
from ._units import Unit
from ._weight_copies import WeightCopies
from ._weight_window import WeightStore, WeightWindow

__all__ = ["Streaming"]

# The number that autograd gives to the next node of this thread.
_next_node = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]


class Streaming:
    """See the module's text. One compute thread at a time, as autograd gives it. `units` may be none."""

    def __init__(
        self, units: Sequence[Unit], store: WeightStore, device: torch.device, *, prefetch: int, poison: bool
    ) -> None:
        self._store = store
        self.device = device
        self._prefetch = prefetch
        self.window = WeightWindow(store, poison=poison)
        self.residencies = [Residency(parameters) for parameters in group_by_units(units)]
        self._residency_of = {id(p): residency for residency in self.residencies for p in residency.parameters}
        self._needs = [_unique(self._residency_of.get(id(p)) for _, p in unit.parameters) for unit in units]
        self._parents: list[set[int]] = [set() for _ in units]
        self._open: list[int] = []
        # Of each open unit, and of each that has ended in this forward in that order: the numbers that autograd gave to
        # the nodes it made, from the first to behind the last.
        self._began: list[int] = []
        self._made: list[tuple[int, int, int]] = []
        self.autocast = AutocastCache(device)
        self._pinned: set[int] = set()
        self._training, self._evaluation = TouchOrder(), TouchOrder()
        self._order = self._training
        self._forward_runs = False
        self._backward: weakref.ref[_BackwardEnd] | None = None
        self._latest: list[Residency] = []  # of the latest touch
        self._holds = set[object]()  # one for each `present()` that runs
        self.copies = WeightCopies(store, self.window)

    def __contains__(self, parameter: object) -> bool:
        return id(parameter) in self._residency_of

    # --- begin and end --------------------------------------------------------------------------------------

    def host_weight(self, parameter: Parameter) -> Tensor:
        """The host bytes of a streamed parameter, as a tensor like it; on disk they stay until another one's are asked.

        Raises `StorageError` when they cannot be read.
        """
        residency = self._residency_of[id(parameter)]
        self._store.hold(residency)
        return residency.on_host(parameter)

    def residency_of(self, parameter: Parameter) -> Residency | None:
        """What a streamed parameter travels with."""
        return self._residency_of.get(id(parameter))

    def stored_weight(self, parameter: Parameter) -> StoredWeight:
        """The value of a weight on disk, for who reads it before it changes."""
        stored = self._store.stored_weight(self._residency_of[id(parameter)], parameter)
        assert stored is not None
        return stored

    def present_value(self, parameter: Parameter) -> Tensor:
        """The same, with what was written to the parameter while it is on the device."""
        residency = self._residency_of[id(parameter)]
        if self.window.is_ready(residency):
            # All parameters: writes through `.data` show in no version.
            self.window.write_back(residency, residency.parameters)
        return self.host_weight(parameter)

    def place(self, more_host_bytes: int) -> None:
        """Values go from where they are to their homes, one residency after another, and the parameters leave.

        Each gives up its memory before the next one's is taken: beside the weights there is one residency more, or a
        run of small ones. more_host_bytes: to be obtained with theirs. After an error `give_back()` undoes it.
        """
        itself = weakref.ref(self)  # the parameters must not keep the engine
        for run in self._store.reserve(self.residencies, more_host_bytes):
            for residency in run:
                self._store.give_host_bytes(residency)
                answers = [AwayParameter(itself, weakref.ref(parameter)) for parameter in residency.parameters]
                residency.place(answers, self.device)
            trim_heap()

    def give_back(self) -> None:
        """Undoes `place`, or what happened of it: the parameters are plain and where the user made them."""
        for residency in self._store.in_memory_first(self.residencies):
            if residency.is_placed:
                with contextlib.suppress(OffloadError):  # nobody asks for the weights on the device any more
                    for upload in self.uploads_of(residency.parameters[0]):
                        upload.wait()
                self.window.forget(residency)
                self._store.hold_or_lose(residency)
                residency.return_home()
                self._store.take_host_bytes_back(residency)
        self._residency_of = {}

    def resident_copies(self, *, lossy: bool) -> list[tuple[Residency, list[Tensor]]]:
        """What `leave` gives back; the values as they are in their homes. Nothing is changed.

        Raises `StorageError` for what cannot be read; with `lossy` that is NaN.
        """
        copies = []
        for residency in self._store.in_memory_first(self.residencies):
            (self._store.hold_or_lose if lossy else self._store.hold)(residency)
            copies.append((residency, residency.resident_copies()))
        return copies

    def leave(self, copies: Iterable[tuple[Residency, Sequence[Tensor]]]) -> None:
        """The parameters are plain and resident again, with these values."""
        for residency, values in copies:
            self.window.forget(residency)
            residency.leave(values)
        self._residency_of = {}

    def uploads_of(self, parameter: Parameter) -> list[Any]:
        """What still reads the host bytes of a parameter: its update must wait for it."""
        residency = self._residency_of.get(id(parameter))
        upload = None if residency is None else self.window.last_upload.get(residency)
        return [] if upload is None or upload.done else [upload]

    # --- touches --------------------------------------------------------------------------------------------

    def begin_forward(self, *, in_backward: bool) -> None:
        """The model's forward begins; whatever an exception left half done is forgotten."""
        if not self.residencies or in_backward:
            return
        refuse_capture("weights that come and go: keep them on the device (params='device')")
        self._order = self._training if torch.is_grad_enabled() else self._evaluation
        self._order.begin()
        self._close_all()
        self._made.clear()
        self.copies.forget()
        self._forward_runs = True
        self._backward = None
        for unit in self._pinned:
            self.window.bring(self._needs[unit])

    def end_forward(self, *, in_backward: bool) -> None:
        """The model's forward ended. Without a graph nothing is needed until the next one begins."""
        if not self.residencies or in_backward:
            return
        self._forward_runs = False
        self._close_all()
        if not torch.is_grad_enabled():
            self.rest()

    def enter(self, unit: int, *, in_backward: bool) -> None:
        """The forward of `unit` begins."""
        if not self.residencies or not self._needs[unit]:
            return
        if self._open:
            self._parents[unit].update(other for other in self._open if other != unit)
        self._touch(unit, in_backward=in_backward)
        self._open.append(unit)
        self._began.append(_next_node())
        self.autocast.enter(len(self._open))

    def exit(self, unit: int, *, in_backward: bool) -> None:
        """The forward of `unit` ended, or raised. Who reads its weights from now on is seen, and pins it.

        Not after a recompute in backward: it reads what the forward read, so the unit is pinned already.
        """
        if unit in self._open:
            place = self._open.index(unit)
            began = self._began.pop(place)
            del self._open[place]
            self.autocast.exit(len(self._open))
            if self._forward_runs:  # in backward it does not
                self._made.append((began, _next_node(), unit))
        if in_backward or self._holds:
            return
        used: set[Residency] = set()
        for other in (*self._open, *self._pinned):
            used.update(self._needs[other])
        for residency in self._needs[unit]:
            if residency not in used and self.window.is_ready(residency):
                self.window.hide(residency)

    def _close_all(self) -> None:
        """Those left open are of a forward that Ctrl-C ended."""
        self._open.clear()
        self._began.clear()
        self.autocast.forget()

    def touch_in_backward(self, unit: int) -> None:
        """Backward is about to run nodes of `unit`. Inside `present()` what they save of weights is kept."""
        if torch.is_grad_enabled() and not self._holds:
            raise StateError(
                "create_graph=True over weights that come and go: the graph of a gradient would use weights that are "
                "not on the device; take it inside `with offload.full_params(model):`, or wrap with params='device'"
            )
        self._touch(unit, in_backward=True)

    def refuse_torch_func(self, parameters: Iterable[Any]) -> None:
        """Raises `StateError` where torch.func would go back through weights of ours: no node of it can be watched."""
        if any(id(parameter) in self._residency_of for parameter in parameters):
            raise StateError(
                "torch.func (grad, vjp, vmap and their kin) over weights that come and go: its backward would use "
                "weights that are not on the device; give it copies by torch.func.functional_call, made inside "
                "`with offload.full_params(model):`, or wrap with params='device'"
            )

    @property
    def innermost(self) -> int | None:
        """The unit whose forward runs, of several the innermost."""
        return self._open[-1] if self._open else None

    def maker_of(self, node: int, within: int | None) -> int | None:
        """The unit whose forward made a node of autograd, by the node's number: one that ran within the forward of
        `within` (None: any), else `within`."""
        place = bisect.bisect_right(self._made, node, key=lambda made: made[1])
        if place < len(self._made):
            began, _, unit = self._made[place]
            if began <= node and (within is None or within in self._parents[unit]):
                return unit
        return within

    def pin(self, unit: int) -> None:
        """From now on `unit` stays from the beginning of a forward to the end of its backward."""
        self._pinned.add(unit)

    def why_it_stays(self, parameter: Parameter) -> str | None:
        """Why a streamed parameter is on the device from the beginning of a forward to the end of its backward."""
        residency = self._residency_of[id(parameter)]
        users = {unit for unit, needs in enumerate(self._needs) if residency in needs}
        if users & self._pinned:
            return "it is used from outside of its unit's forward"
        if users & set().union(*self._parents):
            return "the forward of its unit runs around those of others"
        return None

    def shares_memory(self, unit: int, tensor: Tensor) -> bool:
        """Whether `tensor` is a parameter of `unit`, or a view of one."""
        key = tensor.untyped_storage()._cdata
        return key in [residency.storage_key for residency in self._needs[unit]]

    def _touch(self, unit: int, *, in_backward: bool) -> None:
        if in_backward:
            self._watch_end_of_backward()
        self._order.record((unit, in_backward))
        # Loops, where a comprehension would be a call of its own: this runs twice for every unit of every step.
        wanted = {unit, *self._parents[unit], *self._open, *self._pinned}
        needed: list[Residency] = []
        for number in wanted:
            needed += self._needs[number]
        self._latest = needed
        predicted: list[Residency] = []
        for number in self._order.upcoming(self._prefetch, wanted):
            predicted += self._needs[number]
        if not self._holds:
            self.window.free_all_but({*needed, *predicted})
        self._store.expect(self._coming)
        self.window.bring(needed)
        self.window.bring(predicted)
        self._store.read_ahead()
        self.window.make_ready(needed)

    def _coming(self) -> Iterator[Residency]:
        """The residencies in the order of what is left of the pass, and of the next."""
        return self._residencies_of(self._order.ahead())

    def next_pass(self) -> Iterator[Residency]:
        """The residencies in the order in which the next pass needs them."""
        return self._residencies_of(self._order.next_pass())

    def _residencies_of(self, units: Iterable[int]) -> Iterator[Residency]:
        for unit in units:
            yield from self._needs[unit]

    def _watch_end_of_backward(self) -> None:
        """Empties the window when the outermost backward ends; those within it end before."""
        end = None if self._backward is None else self._backward()
        if end is None:
            end = _BackwardEnd(self)
            torch.autograd.Variable._execution_engine.queue_callback(end)
            self._backward = weakref.ref(end)

    def end_backward(self) -> None:
        """Called when the outermost backward ends."""
        self._backward = None
        self.empty()

    # --- presence -------------------------------------------------------------------------------------------

    def empty(self) -> None:
        """Frees every unit; what the user wrote to goes to the host first."""
        self._free_all_but(())

    def begin_step(self) -> None:
        """Empties the window for a step: the weights on the host are the present ones."""
        self.refuse_while_present("optim.step()", "the weights on the device would miss the step")
        self.copies.forget()
        self.empty()

    def refuse_while_present(self, call: str, why: str) -> None:
        """Raises `StateError` inside `present()`."""
        if self._holds:
            raise StateError(f"{call} inside `offload.full_params`: {why}; leave the context first")

    def end_step(self) -> None:
        """After `begin_step`, with the updates submitted. In a hook that steps in backward its unit comes back."""
        self.rest()
        if torch._C._current_graph_task_id() != -1 and self._backward is not None and self._backward() is not None:
            self.window.bring(self._latest)
            self.window.make_ready(self._latest)

    def rest(self) -> None:
        """Empties the window and sends for the units that the next forward begins with."""
        self.empty()
        if not self._holds:
            self._store.expect(self.next_pass)
            for unit in self._order.first(1 + self._prefetch):
                self.window.bring(self._needs[unit])
            self._store.read_ahead()

    @contextlib.contextmanager
    def present(self, parameters: Iterable[Parameter] | None = None) -> Iterator[None]:
        """Inside the context these parameters (None: all) are on the device, for reading and writing."""
        wanted = self.residencies if parameters is None else self._those_of(parameters)
        hold = object()
        try:
            self._holds.add(hold)
            self.copies.clear()  # of what may be written to now
            self.window.bring(wanted)
            self.window.make_ready(wanted)
            yield
        finally:
            self._holds.discard(hold)
            with contextlib.ExitStack() as ends:  # all of it, whatever one of them raises
                if not self._holds:
                    ends.callback(self.empty)
                for residency in wanted:
                    if self.window.is_ready(residency):
                        # All parameters: writes through `.data` show in no version.
                        ends.callback(self.window.write_back, residency, residency.parameters)

    @contextlib.contextmanager
    def saving_copies(self) -> Iterator[None]:
        """Inside the context autograd saves copies of weights: they may be gone when the nodes made here run."""
        if not self.residencies:
            yield
            return
        storages = {residency.storage_key for residency in self.residencies}

        def copy(tensor: Tensor) -> Tensor:
            # Never itself: an output that its own node keeps is a cycle that nobody collects.
            saved = tensor.detach()
            return saved.clone() if tensor.untyped_storage()._cdata in storages else saved

        with torch.autograd.graph.saved_tensors_hooks(copy, lambda saved: saved):
            yield

    def open_for_writing(self, parameters: Iterable[Parameter]) -> None:
        """Brings these parameters; what is written to them goes to the host at the next touch, step or state_dict()."""
        wanted = self._those_of(parameters)
        if wanted:
            self.copies.forget()
            self._free_all_but(wanted)
            self.window.bring(wanted)
            self.window.make_ready(wanted)

    def bring(self, parameter: Parameter) -> None:
        """Backward reads the value of `parameter`, mostly of a unit that was touched; it stays until the next touch."""
        wanted = self._those_of([parameter])
        self.window.bring(wanted)
        self.window.make_ready(wanted)

    def begin_copies(self, module: int) -> None:
        """state_dict() of a module begins."""
        if not self._holds:
            self.empty()
        self.copies.begin(module)

    def copy_of(self, parameter: Parameter) -> Tensor:
        """A copy of its value in host memory, the same one while one state_dict() runs."""
        return self.copies.of(self._residency_of[id(parameter)], parameter)

    def _those_of(self, parameters: Iterable[Parameter]) -> list[Residency]:
        return _unique(self._residency_of.get(id(parameter)) for parameter in parameters)

    def _free_all_but(self, kept: Collection[Residency]) -> None:
        if not self._holds:
            self.window.free_all_but(kept)

    # --- reads of parameters that are away ------------------------------------------------------------------

    def read_away(self, parameter: Parameter) -> Tensor | None:
        """Somebody reads a parameter that is not there; returns what stands for it, None when it is there now."""
        if self.copies.are_asked:
            return self.copy_of(parameter)
        if not self._forward_runs and torch._C._current_graph_task_id() != -1:  # in a hook of the user's
            self._watch_end_of_backward()
            self.bring(parameter)
            return None
        if not self._forward_runs:
            raise StateError(
                f"{self._store.name_of(parameter)} is on the host or on disk (params=): read and write weights inside "
                "`with offload.full_params(model):`; train them with the optimizer that offload.wrap returned; call "
                "offload.unwrap before model.to(), .half() and the like"
            )
        # A weight of a unit that is used from outside of its forward: nothing announces that, so it stays from now on.
        residency = self._residency_of[id(parameter)]
        self._pinned.update(unit for unit, needs in enumerate(self._needs) if residency in needs)
        self.window.bring([residency])
        self.window.make_ready([residency])
        return None


class _BackwardEnd:
    """Autograd keeps it among the callbacks of a backward: it is called when that ends, and dies when that fails, or a
    little later: a thread of autograd may hold the backward for longer than its caller."""

    __slots__ = ("__weakref__", "_streaming")

    def __init__(self, streaming: Streaming) -> None:
        self._streaming = streaming

    @not_compiled
    def __call__(self) -> None:
        self._streaming.end_backward()


def _unique(residencies: Iterable[Residency | None]) -> list[Residency]:
    return list(dict.fromkeys(residency for residency in residencies if residency is not None))
