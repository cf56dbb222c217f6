"""The engine: owns the native device, pool, transfer lanes and step pipeline, and knows which units wait for what.

Gradients come in through `GradientLanes` (see `_gradient_lanes.py`), updates go out through `EngineStep` (see
`_engine_step.py`), and `make_ready` is the only place where the training thread waits for them. The engine knows
parameters and their states; modules, hooks and the optimizer's face are above it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from . import _native
from ._activation_format import open_format
from ._activations import Activations
from ._adamw import FORMATS
from ._config import Config
from ._copy_lanes import CopyLanes, end_work
from ._engine_step import EngineStep
from ._errors import InvalidArgument, OffloadError, StateError
from ._gradient_lanes import GradientLanes
from ._interrupts import Uninterrupted
from ._kernels import load_copy_kernel
from ._native_state import NativeState
from ._parameter_state import ParameterState
from ._pending import can_be_pending, make_pending, reading_metadata, restore
from ._plan import Plan
from ._residency import Residency
from ._speculation import Speculation
from ._state_homes import State, StateHomes
from ._state_store import StateStore, open_store
from ._streaming import Streaming
from ._units import Unit, is_dense
from ._weight_lane import DiskWeightLane, WeightLane

_process = os.getpid()  # this one: units ask for it several times a step, each a system call


def _note_fork() -> None:
    global _process
    _process = os.getpid()


os.register_at_fork(after_in_child=_note_fork)

# The engines of this process: the last one ends the threads that they share.
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()

_graph_task = torch._C._current_graph_task_id  # the number of the backward that runs on this thread
_NO_BACKWARD = -1


def open_device(device: torch.device) -> _native.Device:
    """The native device behind `device`. Raises `DeviceError` for one that does not answer."""
    if device.type == "cpu":
        return _native.HostDevice()
    return _native.CudaDevice(torch.cuda.current_device() if device.index is None else device.index)


@dataclass(eq=False)
class EngineUnit:
    """What the engine keeps of a unit: its number and states, and whether any of them waits for an update.

    touch: what nodes of autograd call before they run, of one whose weights come and go.
    """

    name: str
    number: int
    states: list[ParameterState] = field(default_factory=list)
    pending: bool = False
    called: bool = False
    touch: Callable[[object], None] | None = None


@dataclass(frozen=True)
class StateWatch:
    """Asked before states, or weights on the host, are written to; none of it fails.

    before_update: before each update of a step, with what it changes: when it may, or None for at once. before_change:
    before everything else. before_end: before they go, and their files. keeps_disk: files may change unannounced.
    """

    before_change: Callable[[], None]
    before_update: Callable[[Iterable[Tensor]], Future[None] | None]
    before_end: Callable[[], None]
    keeps_disk: bool


class Engine:
    """See the module's text."""

    def __init__(self, device: torch.device, plan: Plan, config: Config, units: Sequence[Unit]) -> None:
        self.plan = plan
        self.config = config
        self.device = open_device(device)
        self.copy_kernel_refusal = load_copy_kernel(self.device)
        options = {"pin": config.pins_on(device.type), "poison": config.poison_enabled}
        budget_bytes = plan.host_capacity - plan.activation_host_bytes
        self.pool = _native.HostPool(self.device, budget_bytes=budget_bytes, **options)
        self.transfers = _native.TransferQueue(self.device)
        # Also where nothing trains yet: what does later has its states there.
        on_disk = plan.disk_window is not None or plan.weight_cache is not None
        self.disk = open_store(config.disk_paths, **config.disk_settings) if on_disk else None
        store: StateStore | None = None
        if plan.disk_window is not None:
            assert self.disk is not None
            store = StateStore(self.disk, self.pool, plan.disk_window)
        window = None if store is None else store.window
        wants_ahead = config.run_ahead and plan.params == "host"
        self.pipeline = _native.StepPipeline(self.transfers, window=window, run_ahead=wants_ahead)
        # Whether a forward goes on while the host updates a streamed weight: the stream that uploads it waits.
        self.runs_ahead = wants_ahead and not self.pipeline.run_ahead_refusal
        self.lanes = GradientLanes(device, self.pool, self.transfers)
        self.activations: Activations | None = None
        if plan.activations != "device":
            # A pool of their own: they come and go in other sizes, and must not take the place of a gradient.
            pool = _native.HostPool(self.device, budget_bytes=plan.activation_host_bytes, **options)
            self.activations = Activations(
                CopyLanes(device, pool, self.transfers),
                device,
                budget=plan.activation_host_bytes,
                keep=config.activation_keep,
                checkpoints_only=plan.activations == "checkpoints",
                form=open_format(config.activation_format, device),
                poison=config.poison_enabled,
            )
        # What may be refused is made by now, and goes with the exception: nothing that lasts refers to the engine yet.
        if plan.weight_cache is None:
            self.weights = WeightLane(self)
        else:
            assert self.disk is not None
            self.weights = DiskWeightLane(self, self.disk, plan.weight_cache)
        self.watch: StateWatch | None = None
        self.isa = _native.active_isa()
        self.step = EngineStep(self)
        self._process = os.getpid()
        # Optimizers that run as their own class: their states are torch's, outside the pool.
        self.torch_optimizers: list[torch.optim.Optimizer] = []
        self.torch_update_s = 0.0
        # Text: an exception would keep the frames it came through, and with them the user's model, for good.
        self._failure: str | None = None
        self.units = [EngineUnit(unit.name, number) for number, unit in enumerate(units)]
        self._units_of: dict[int, list[EngineUnit]] = {}
        self._names: dict[int, str] = {}
        for unit, engine_unit in zip(units, self.units, strict=True):
            for name, parameter in unit.parameters:
                self._units_of.setdefault(id(parameter), []).append(engine_unit)
                self._names[id(parameter)] = name
        # Keyed by identity: hashing a tensor compares elements. The states keep the parameters alive.
        self.states: dict[int, ParameterState] = {}
        self.slots: dict[int, int] = {}
        self._tickets: dict[int, _native.Ticket] = {}
        # By parameter, a number that grows with every update submitted.
        self._submitted: dict[int, int] = {}
        self._submissions = itertools.count()
        # Units in the order in which the latest forward touched them: the order of the next update.
        self._touched: dict[EngineUnit, None] = {}
        streamed = units if plan.params != "device" else ()
        poison = config.poison_enabled
        self.streaming = Streaming(streamed, self.weights, device, prefetch=plan.prefetch, poison=poison)
        self.homes = StateHomes(plan, config, self.pool, self.streaming, store, self._names)
        self.speculation = Speculation(self, plan.host.backups) if plan.host.backups else None
        # Before the states and parameters are freed, and before the interpreter tears its modules down.
        _engines.add(self)
        self._finalizer = weakref.finalize(
            self,
            _drain,
            self.pipeline,
            self.transfers,
            self._tickets,
            self.lanes,
            self.streaming.window.last_upload,
            [] if self.speculation is None else self.speculation.latest,
        )

    # --- states ---------------------------------------------------------------------------------------------

    def name_of(self, parameter: Tensor) -> str:
        return self._names.get(id(parameter)) or f"a parameter of shape {tuple(parameter.shape)} outside the model"

    def settle_in(self, parameters: Sequence[tuple[Parameter, type[ParameterState]]]) -> None:
        """Streamed weights go to the host; pages and disk space of these parameters' states and gradients are obtained.

        Warns when the pages could not be locked: training goes on, at the speed of pageable memory. Whatever it raises,
        the weights are to come back by `streaming.give_back()`.
        """
        if self.homes.store is not None:
            self.homes.store.reserve(sum(self.homes.disk_bytes(parameter, kind) for parameter, kind in parameters))
        nbytes = sum(self.homes.host_bytes(parameter, kind) for parameter, kind in parameters)
        self.streaming.place(nbytes + self.plan.host.backups)
        self.weights.flush()
        pool = self.pool.stats()
        if pool["pin_refused"]:
            warnings.warn(
                f"offload trains on pageable host memory, at a fraction of the link's speed: {pool['pin_refusal']}",
                stacklevel=3,  # the caller of wrap()
            )

    def check_trainable(self, parameter: Parameter) -> None:
        """Raises `InvalidArgument` for dtypes and layouts that no state can mirror."""
        name = self.name_of(parameter)
        if parameter.dtype not in FORMATS:
            raise InvalidArgument(
                f"{name}: dtype {parameter.dtype} cannot be trained; legal are float32, bfloat16 and float16"
            )
        if not is_dense(parameter):
            raise InvalidArgument(
                f"{name}: strides {parameter.stride()} of shape {tuple(parameter.shape)} are not dense; "
                "make the parameter contiguous before wrapping"
            )

    def make_room(self, parameters: Sequence[Parameter], kind: type[ParameterState]) -> None:
        """Before parameters of a new group are adopted: pages and disk space for all of them, or none.

        Raises as `adopt` would for one of them, and for one that is not where the model computes.
        """
        for parameter in parameters:
            if is_lazy(parameter) or parameter.device != self.lanes.device:
                what = "has no shape yet" if is_lazy(parameter) else f"is on {parameter.device}"
                raise InvalidArgument(
                    f"a parameter of the new group {what}: this model trains on {self.lanes.device}; make or move it "
                    "there first"
                )
            self.check_trainable(parameter)
        new = [parameter for parameter in parameters if id(parameter) not in self.states]
        if self.homes.store is not None:
            self.homes.store.reserve(sum(self.homes.disk_bytes(parameter, kind) for parameter in new))
        self.lanes.reserve(sum(self.homes.host_bytes(parameter, kind) for parameter in new))

    def adopt(self, parameter: Parameter, kind: type[State]) -> State:
        """Makes the state of a parameter: its master is its present value, its moments are zero.

        Raises as `check_trainable`, and `OutOfHostMemory` over the budget.
        """
        known = self.states.get(id(parameter))
        if known is not None:
            assert isinstance(known, kind)
            return known
        self.check_trainable(parameter)
        state = self.homes.make(self.name_of(parameter), parameter, kind)
        with Uninterrupted():
            if not state.by_device and isinstance(state, NativeState):
                self.add_slot(state)
            for unit in self._units_of.get(id(parameter), ()):
                unit.states.append(state)
            self.states[id(parameter)] = state
        return state

    def add_slot(self, state: NativeState) -> None:
        """The pipeline knows where the state is from now on, and where the parameter is."""
        slot = self.pipeline.add_slot(**self.homes.slot_of(state))
        self.slots[id(state.parameter)] = slot
        if state.stored is not None:
            state.stored.slot = slot

    # --- a save that is being written -----------------------------------------------------------------------

    def watch_states(self, watch: StateWatch | None) -> None:
        """None ends what was asked for."""
        self.watch = watch
        if self in _engines:  # a closed one has no window
            self.streaming.window.before_write_back = None if watch is None else watch.before_change

    def announce_change(self) -> None:
        """States are about to be written to."""
        if self.watch is not None:
            self.watch.before_change()

    def announce_end(self) -> None:
        """States are about to go."""
        if self.watch is not None:
            self.watch.before_end()

    # --- readiness ------------------------------------------------------------------------------------------

    def make_ready(self, unit: EngineUnit) -> None:
        """Called before the forward of `unit`: waits for the updates of its own parameters only."""
        unit.called = True
        if unit not in self._touched:
            self._touched[unit] = None
        if unit.pending:
            self._finish_pending(unit)
        self.streaming.enter(unit.number, in_backward=_graph_task() != _NO_BACKWARD)

    def _finish_pending(self, unit: EngineUnit) -> None:
        # The weights of the others are where compute runs, behind the update.
        states = [state for state in unit.states if not state.by_device]
        self.bring_current(self._not_followed(states))
        # Of states that are on their way to disk the next use is told, if they do not come there.
        unit.pending = any(id(state.parameter) in self._tickets for state in states)

    def leave(self, unit: EngineUnit) -> None:
        """Called after the forward of `unit`, also when it raised."""
        self.streaming.exit(unit.number, in_backward=_graph_task() != _NO_BACKWARD)

    def begin_forward(self) -> None:
        """Called before the forward of the model: a new order is recorded, and units without a forward are made ready.

        Such a unit's weights are used from outside of it, so nothing announces the use.
        """
        self.refuse_after_failure()
        self._touched.clear()
        self.lanes.begin_backward_order()
        for unit in self.units:
            if unit.pending and not unit.called:
                self._finish_pending(unit)
        self.streaming.begin_forward(in_backward=_in_backward())

    def end_forward(self) -> None:
        """Called after the forward of the model, also when it raised."""
        self.streaming.end_forward(in_backward=_in_backward())

    def synchronize(self) -> None:
        """Waits for every submitted update; the parameters are plain again."""
        self.refuse_after_failure()
        if self.speculation is not None:
            self.speculation.settle()
        self.finish(list(self.states.values()))
        self.weights.check(wait=True)

    def await_update(self, state: ParameterState, ticket: _native.Ticket) -> None:
        """The parameter is pending until `ticket` ends."""
        self.await_state(state, ticket)
        self.wrote(state)
        for unit in self._units_of.get(id(state.parameter), ()):
            unit.pending = True
        if can_be_pending(state.parameter) and not state.streamed:
            make_pending(state.parameter, lambda: self.bring_current([state]))

    def await_state(self, state: ParameterState, ticket: _native.Ticket) -> None:
        """Until `ticket` ends, what the host has of the state and of a streamed weight is being updated."""
        self._tickets[id(state.parameter)] = ticket
        self._submitted[id(state.parameter)] = next(self._submissions)

    @staticmethod
    def wrote(state: ParameterState) -> None:
        """The step wrote to the parameter: autograd must see a new version, and we must know it as our own."""
        torch.autograd.graph.increment_version(state.parameter)
        state.version = reading_metadata(lambda: state.parameter._version)

    def next_use(self) -> Callable[[ParameterState], int]:
        """A key that sorts states in the order in which the next forward needs them."""
        order = {unit: position for position, unit in enumerate(self._touched)}
        last = len(order)
        return lambda state: min(
            (order.get(unit, last) for unit in self._units_of.get(id(state.parameter), ())), default=0
        )

    def bring_current(self, states: Sequence[ParameterState]) -> None:
        """Waits for the weights of these states; their parameters are plain again. States may be on their way to disk
        still.
        """
        self._wait_for(states, weights_alone=True)

    def finish(self, states: Sequence[ParameterState]) -> None:
        """Waits for the submitted updates of these states, to their end; their parameters are plain again."""
        self._wait_for(states, weights_alone=False)

    def _wait_for(self, states: Sequence[ParameterState], *, weights_alone: bool) -> None:
        tickets = self._tickets
        waiting = [(state, ticket) for state in states if (ticket := tickets.get(id(state.parameter))) is not None]
        if not waiting:
            return
        try:
            self.pipeline.wait([self.pipeline.weight(ticket) if weights_alone else ticket for _, ticket in waiting])
        except OffloadError as error:
            self.refuse_after_failure()
            # An update's error names its parameter, which may be another than those that are waited for.
            if any(f"parameter '{state.name}'" in str(error) for state in self.states.values()):
                self._failure = str(error)
                raise
            name = next((state.name for state, ticket in waiting if _has_failed(ticket)), "")
            self._failure = f"{name}: {error}"
            raise type(error)(self._failure) from error
        for state, ticket in waiting:
            # Another thread may have waited too, and the next step may have been submitted since: that is not over.
            if tickets.get(id(state.parameter), ticket) is not ticket:
                continue
            if ticket.done:
                tickets.pop(id(state.parameter), None)
            if can_be_pending(state.parameter) and not state.streamed:
                restore(state.parameter)

    def latest_update(self, parameters: Sequence[Parameter]) -> _native.Ticket | None:
        """Ends with the last submitted update of these parameters: jobs run in that order, so after the others."""
        if not self._tickets:
            return None
        tickets = self._tickets
        waiting = {key: ticket for key in map(id, parameters) if (ticket := tickets.get(key)) is not None}
        if self.plan.unified_states and len({self.states[key].by_device for key in waiting}) > 1:
            # Of a unit that shares a weight with another: the host and the device each keep to an order of their own.
            self.pipeline.wait([ticket for key, ticket in waiting.items() if self.states[key].by_device])
        return self.pipeline.weight(waiting[max(waiting, key=self._submitted.__getitem__)]) if waiting else None

    def settle_updates(self, parameters: Iterable[Parameter]) -> None:
        """The updates of these parameters are over afterwards."""
        if self._tickets:
            self.bring_current([self.states[id(parameter)] for parameter in parameters if id(parameter) in self.states])

    def _not_followed(self, states: list[ParameterState]) -> list[ParameterState]:
        """Without those of whose update an upload is all that has to wait. Of one that has ended the error is told."""
        if not self.runs_ahead:
            return states
        ticket_of = self._tickets.get
        return [s for s in states if not s.streamed or (t := ticket_of(id(s.parameter))) is None or t.done]

    def follow_updates(self, parameters: Iterable[Parameter]) -> None:
        """As `settle_updates`, but for those that only an upload has to wait for."""
        if self._tickets:
            states = [self.states[id(parameter)] for parameter in parameters if id(parameter) in self.states]
            self.bring_current(self._not_followed(states))

    @property
    def is_forked(self) -> bool:
        """Whether this is a forked child: nothing native works here."""
        return self._process != _process

    def require_own_process(self) -> None:
        """Raises `StateError` in a forked child: the pool's pages are not there, touching a state would crash."""
        if self._process != _process:
            raise StateError(
                f"this optimizer belongs to process {self._process} and was forked into {_process}: the states "
                "are not in a child; call offload.wrap there, on a model of its own"
            )

    def refuse_after_failure(self) -> None:
        """A failed update is told once as it was, then so: some parameters took the step, others did not."""
        if not self.has_failed:
            self.weights.check()
        else:
            raise StateError(
                "an earlier update failed, so weights and optimizer states are no longer those of one step: call "
                f"offload.unwrap, load your last checkpoint and wrap again. The failure was: {self._failure}"
            )

    # --- the end --------------------------------------------------------------------------------------------

    @property
    def has_failed(self) -> bool:
        """Whether an update failed, or a write of states or weights to disk, and the error was raised."""
        if self._failure is None and self.homes.store is not None:
            self._failure = self.homes.store.loss
        if self._failure is None:
            self._failure = self.weights.loss
        return self._failure is not None

    def fail(self, why: str) -> None:
        """Weights or states are lost: everything but the end is refused from now on."""
        self._failure = why

    def abandon(self) -> None:
        """After a failed update: waits for work in flight, whatever its end; the parameters are plain again."""
        if self.speculation is not None:
            self.speculation.settle()
        for ticket in self._tickets.values():
            with contextlib.suppress(OffloadError):  # the first error was raised already
                ticket.wait()
        for state in self.states.values():
            if can_be_pending(state.parameter) and not state.streamed:
                restore(state.parameter)
        self._tickets.clear()

    def drop_states(self) -> None:
        """Gives up the memory of every state. Nothing may be updated any more."""
        self.states.clear()
        self.torch_optimizers.clear()
        for unit in self.units:
            unit.states.clear()

    def close(self) -> None:
        """Ends the lanes, the sequencer and, for the last engine, the shared threads, and gives up every state.

        Comes after `synchronize` or `abandon`. Use nothing after it.
        """
        _engines.discard(self)
        self._finalizer()
        self.drop_states()
        self.homes.close()
        self.weights.close()
        if self.disk is not None:
            self.disk.close()
        self.activations = None  # what graphs still hold keeps its lanes
        del self.pipeline, self.homes, self.lanes, self.transfers, self.pool, self.device, self.streaming, self.weights
        del self.step, self.speculation


def _in_backward() -> bool:
    return _graph_task() != _NO_BACKWARD


def _has_failed(ticket: _native.Ticket) -> bool:
    try:
        ticket.wait()
    except OffloadError:
        return True
    return False


def _drain(
    pipeline: _native.StepPipeline,
    transfers: _native.TransferQueue,
    tickets: Mapping[int, _native.Ticket],
    lanes: GradientLanes,
    uploads: Mapping[Residency, _native.Ticket],
    ahead: Sequence[_native.Ticket],
) -> None:
    """Ends the work in flight on memory that is about to go. `pipeline` is kept until then: it must die first."""
    ended = end_work(transfers, (*tickets.values(), *lanes.in_flight(), *uploads.values(), *ahead))
    if ended and not list(_engines):  # len() may count engines that are being finalized
        _native.end_shared_threads()
