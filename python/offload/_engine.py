"""The engine: owns the native device, pool, transfer lanes and step pipeline, and knows which units wait for what.

Gradients come in through `GradientLanes` (see `_gradient_lanes.py`), updates go out through `submit_step`, and
`make_ready` is the only place where the training thread waits for them. The engine knows parameters and their states;
modules, hooks and the optimizer's face are above it.
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
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _native
from ._activation_format import open_format
from ._activations import Activations
from ._adamw import FORMATS, check_gradient
from ._config import Config
from ._copy_lanes import CopyLanes, ticket_of, wait_to_end
from ._errors import InvalidArgument, OffloadError, StateError
from ._grad_factors import GradScale
from ._gradient_lanes import GradientLanes, StepGradient, landed
from ._interrupts import Uninterrupted
from ._native_state import Hyper, NativeState
from ._parameter_state import ParameterState
from ._pending import can_be_pending, make_pending, reading_metadata, restore
from ._plan import Plan
from ._residency import Residency
from ._state_homes import State, StateHomes
from ._state_store import StateStore, open_store
from ._streaming import Streaming
from ._units import Unit, is_dense
from ._weight_lane import DiskWeightLane, WeightLane

# The engines of this process: the last one ends the threads that they share.
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def open_device(device: torch.device) -> _native.Device:
    """The native device behind `device`. Raises `DeviceError` for one that does not answer."""
    if device.type == "cpu":
        return _native.HostDevice()
    return _native.CudaDevice(torch.cuda.current_device() if device.index is None else device.index)


@dataclass(eq=False)
class EngineUnit:
    """What the engine keeps of a unit: its number and states, and whether any of them waits for an update."""

    name: str
    number: int
    states: list[ParameterState] = field(default_factory=list)
    pending: bool = False
    called: bool = False


@dataclass(frozen=True)
class Update:
    """One parameter's share of `optim.step()`: the hyperparameters as they were at the call."""

    parameter: Parameter
    hyper: Hyper


_Work = tuple[NativeState, Update]

# Asked before the update of a state, with what it changes: when it may, or None for at once. It does not fail.
BeforeUpdate = Callable[[Iterable[Tensor]], "Future[None] | None"]


class Engine:
    """See the module's text."""

    def __init__(self, device: torch.device, plan: Plan, config: Config, units: Sequence[Unit]) -> None:
        self.plan = plan
        self.config = config
        self.device = open_device(device)
        options = {"pin": config.pins_on(device.type), "poison": config.poison_enabled}
        beside = plan.activation_host_bytes + plan.unified.total
        self.pool = _native.HostPool(self.device, budget_bytes=plan.host_capacity - beside, **options)
        self.transfers = _native.TransferQueue(self.device)
        self.disk = open_store(config.disk_paths, **config.disk_settings) if plan.disk.total else None
        store: StateStore | None = None
        if plan.disk_window is not None:
            assert self.disk is not None
            store = StateStore(self.disk, self.pool, plan.disk_window)
        self.pipeline = _native.StepPipeline(self.transfers, window=None if store is None else store.window)
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
        self.before_update: BeforeUpdate | None = None
        self.isa = _native.active_isa()
        self.step_count = 0
        self.peak_gradient_bytes = 0  # of those on the device, which are all there at a step
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
        self._slots: dict[int, int] = {}
        self._tickets: dict[int, _native.Ticket] = {}
        # By parameter, a number that grows with every update submitted.
        self._submitted: dict[int, int] = {}
        self._submissions = itertools.count()
        # Units in the order in which the latest forward touched them: the order of the next update.
        self._touched: dict[EngineUnit, None] = {}
        streamed = units if plan.params != "device" else ()
        self.weights = WeightLane(self)
        if plan.weight_cache is not None:
            assert self.disk is not None
            self.weights = DiskWeightLane(self, self.disk, plan.weight_cache)
        poison = config.poison_enabled
        self.streaming = Streaming(streamed, self.weights, device, prefetch=plan.prefetch, poison=poison)
        self.homes = StateHomes(plan, config, self.pool, self.streaming, store, self._names, device)
        # Before the states and parameters are freed, and before the interpreter tears its modules down.
        _engines.add(self)
        self._finalizer = weakref.finalize(
            self, _drain, self.pipeline, self._tickets, self.lanes, self.streaming.window.last_upload
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
        self.streaming.place(sum(self.homes.host_bytes(parameter, kind) for parameter, kind in parameters))
        self.weights.flush()
        self.homes.reserve_unified(parameters)
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
            if state.on_host and isinstance(state, NativeState):
                self._add_slot(state)
            for unit in self._units_of.get(id(parameter), ()):
                unit.states.append(state)
            self.states[id(parameter)] = state
        return state

    def _add_slot(self, state: NativeState) -> None:
        slot = self.pipeline.add_slot(**self.homes.slot_of(state))
        self._slots[id(state.parameter)] = slot
        if state.stored is not None:
            state.stored.slot = slot

    # --- the step -------------------------------------------------------------------------------------------

    def submit_step(self, updates: Sequence[Update], kind: type[NativeState], grad_scale: GradScale = 1.0) -> None:
        """Submits the updates in the order in which the next forward needs them, and returns.

        Parameters are pending from here until their unit's next forward, or any other access, waits for them.
        All of the step happens, or none: Ctrl-C comes before it or after it. Raises before anything is changed when a
        gradient cannot be used.
        """
        self._refuse_after_failure()
        self.check_gradients([update.parameter for update in updates])
        self.streaming.begin_step()
        states = [self.adopt(update.parameter, kind) for update in updates]
        self._reseed_written([state for state in states if state.on_host or not state.streamed])
        work = list(zip(states, updates, strict=True))
        order = {unit: position for position, unit in enumerate(self._touched)}
        of_host = reading_metadata(lambda: [pair for pair in work if pair[0].on_host and pair[0].parameter.numel() > 0])
        # Of a unit, the small ones first: those beside each other share an upload.
        reading_metadata(lambda: of_host.sort(key=lambda pair: pair[0].parameter.numel()))
        of_host.sort(key=lambda pair: self._position(pair[0], order))
        if self._goes_backwards([state for state, _ in of_host]):
            of_host.reverse()
        self._update(of_host, [pair for pair in work if not pair[0].on_host], grad_scale)
        self.streaming.rest()

    def check_gradients(self, parameters: Sequence[Parameter]) -> None:
        """Raises `InvalidArgument` naming the first parameter whose gradient no update can use."""
        gradients = reading_metadata(lambda: [p.grad for p in parameters])
        on_device = sum([g.numel() * g.element_size() for g in gradients if type(g) is Tensor])
        self.peak_gradient_bytes = max(self.peak_gradient_bytes, on_device)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert gradient is not None
            check_gradient(self.name_of(parameter), gradient)

    def float32_gradients(self, parameters: Sequence[Parameter]) -> list[Tensor]:
        """Their gradients in fp32 on the tier of the states, where nothing else reads them: they may be edited.

        Raises the error of a gradient that did not arrive, with the parameter's name.
        """
        if self.plan.optimizer == "device":
            return [self.lanes.on_device(parameter).to(torch.float32) for parameter in parameters]
        taken = [self.lanes.for_step(parameter) if parameter.numel() > 0 else None for parameter in parameters]
        with contextlib.suppress(OffloadError):  # landed() raises it with the name
            self.lanes.wait_for_plain_gradients()
        gradients = [landed(p, self.name_of(p), gradient) for p, gradient in zip(parameters, taken, strict=True)]
        for ticket in self.lanes.in_flight():  # an upload may still read the bytes
            with contextlib.suppress(OffloadError):  # whoever asked for it is told
                ticket.wait()
        return gradients

    def settle(self, states: Sequence[ParameterState]) -> None:
        """Masters and parameters agree afterwards: every upload has ended, and what the user wrote is the master."""
        self._refuse_after_failure()
        self.streaming.begin_step()
        self._finish(states)
        self._reseed_written(states)

    def publish(self, states: Sequence[ParameterState]) -> None:
        """The fp32 masters of settled states were written: the parameters follow, in the order of their next use.

        Those of states on the host are pending until their upload has ended.
        """
        order = {unit: position for position, unit in enumerate(self._touched)}
        try:
            with Uninterrupted():
                for state in sorted(states, key=lambda state: self._position(state, order)):
                    state.follow_master()
                    state.step += 1
                    if state.on_host and not state.streamed and state.parameter.numel() > 0:
                        self._await(state, self._submit_weight(state))
                    else:
                        self._wrote(state)
                self.step_count += 1
        except Exception as error:  # some weights follow their masters, others do not
            self._failure = str(error)
            raise
        self._finish_what_cannot_wait(states)
        self.streaming.rest()

    def _submit_weight(self, state: ParameterState) -> _native.Ticket:
        parameter = state.parameter
        if self.config.poison_enabled:
            parameter.detach().fill_(float("nan"))
        return self.transfers.submit_to_device(
            parameter.data_ptr(),
            state.working_weight().data_ptr(),
            parameter.numel() * parameter.element_size(),
            self.lanes.compute_stream(),
        )

    def _reseed_written(self, states: Sequence[ParameterState]) -> None:
        for state in states:
            written = reading_metadata(lambda: state.parameter._version) != state.version  # noqa: B023  # called now
            # A pending parameter has not been touched since the last step: any access would have made it current.
            if written or (not state.streamed and id(state.parameter) not in self._tickets and state.has_moved()):
                self.reseed(state)

    def reseed(self, state: ParameterState) -> None:
        """The user wrote to the parameter, or gave it other storage: its values are the master, its new place is known.

        Raises `StateError` when it has another layout than its state.
        """
        self._finish([state])
        for ticket in self._readers_of(state):
            ticket.wait()
        if state.streamed and state.on_host:
            state.adopt_host_weight()
            return
        if state.streamed:
            self.streaming.open_for_writing([state.parameter])
        elif state.has_moved() and state.on_host and isinstance(state, NativeState):
            self._add_slot(state)
        state.adopt_parameter()

    def _position(self, state: ParameterState, order: Mapping[EngineUnit, int]) -> int:
        return min((order.get(u, len(order)) for u in self._units_of.get(id(state.parameter), ())), default=0)

    def _update(self, of_host: Sequence[_Work], of_device: Sequence[_Work], grad_scale: GradScale) -> None:
        """The host's part first: it runs while the device updates its own."""
        jobs, read = self._host_jobs(of_host, grad_scale)
        states = [state for state, _ in of_host]
        if self.config.poison_enabled:
            self._finish(states)
        begun = False
        try:
            with Uninterrupted():
                tickets = self._submit(jobs, states) if jobs else []
                begun = bool(jobs)
                for state, taken, ticket in zip(states, read, tickets, strict=True):
                    state.step += 1
                    taken.release_after(ticket)
                    self._await(state, ticket)
                for state, update in of_device:
                    for reader in self._readers_of(state):
                        reader.wait()
                    gradient = self.lanes.on_device(state.parameter)
                    if state.streamed:  # written back when the next one comes that travels with others
                        self.streaming.open_for_writing([state.parameter])
                        self._reseed_written([state])
                    begun = True
                    state.update_on_device(gradient, update.hyper.scalars(state.step + 1), grad_scale)
                    state.step += 1
                    self._wrote(state)
                self.step_count += 1
                begun = False
        except BaseException as error:  # part of the step is done, or it is not known any more who is pending
            if begun:
                self._failure = str(error)
            raise
        self._finish_what_cannot_wait(states)

    def _host_jobs(self, work: Sequence[_Work], grad_scale: GradScale) -> tuple[list[Any], list[StepGradient]]:
        """What the pipeline is to run, and the gradients that it reads."""
        jobs = []
        read = []
        scale = self.lanes.scale_for_step(grad_scale if work else 1.0)
        scalars: dict[tuple[Hyper, int], Any] = {}
        for state, update in work:
            key = (update.hyper, state.step + 1)
            if key not in scalars:
                scalars[key] = update.hyper.native_scalars(state.step + 1)
            taken = self.lanes.for_step(state.parameter, scale)
            tickets = [*taken.tickets, *self.streaming.uploads_of(state.parameter), *self._readers_of(state)]
            jobs.append(
                (self._slots[id(state.parameter)], taken.address, FORMATS[taken.dtype], tickets, scalars[key],
                 taken.factors)
            )  # fmt: skip
            read.append(taken)
        # A plain gradient is still the user's own tensor: it must have left before the user can write to it.
        self.lanes.wait_for_plain_gradients()
        return jobs, read

    def _readers_of(self, state: ParameterState) -> list[_native.Ticket]:
        """What still reads the state's tensors for somebody else."""
        reader = self.before_update(state.tensors()) if self.before_update is not None else None
        return [] if reader is None or reader.done() else [ticket_of(reader)]

    def _submit(self, jobs: Sequence[Any], states: Sequence[ParameterState]) -> list[_native.Ticket]:
        values: list[tuple[Tensor, Tensor]] = []
        if self.config.poison_enabled:
            for state in states:
                if not state.streamed:
                    weight, value = state.parameter.detach(), state.working_weight()
                    values.append((weight, value if state.has_host_weight() else value.clone()))
        try:
            for weight, _ in values:
                weight.fill_(float("nan"))
            if self.homes.store is not None:
                self.homes.store.tell_written(self.pipeline.states_written)
            stream, backwards = self.lanes.compute_stream(), self._goes_backwards(states)
            return self.weights.submit(
                list(jobs), states, lambda jobs: self.pipeline.submit(jobs, stream, backwards=backwards)
            )
        except BaseException:
            for weight, value in values:
                weight.copy_(value)
            raise

    def _goes_backwards(self, states: Sequence[ParameterState]) -> bool:
        """Every other step over states on disk: what the one updated last is still in the window, and comes first."""
        return self.homes.store is not None and max((state.step for state in states), default=0) % 2 == 1

    def _await(self, state: ParameterState, ticket: _native.Ticket) -> None:
        """The parameter is pending until `ticket` ends."""
        self._tickets[id(state.parameter)] = ticket
        self._submitted[id(state.parameter)] = next(self._submissions)
        self._wrote(state)
        for unit in self._units_of.get(id(state.parameter), ()):
            unit.pending = True
        if can_be_pending(state.parameter) and not state.streamed:
            make_pending(state.parameter, lambda: self._finish([state]))

    def _finish_what_cannot_wait(self, states: Sequence[ParameterState]) -> None:
        """A Parameter subclass cannot announce a read: nobody may see it before it is current."""
        self._finish([state for state in states if not (self.config.lazy and can_be_pending(state.parameter))])

    @staticmethod
    def _wrote(state: ParameterState) -> None:
        """The step wrote to the parameter: autograd must see a new version, and we must know it as our own."""
        torch.autograd.graph.increment_version(state.parameter)
        state.version = reading_metadata(lambda: state.parameter._version)

    # --- readiness ------------------------------------------------------------------------------------------

    def make_ready(self, unit: EngineUnit) -> None:
        """Called before the forward of `unit`: waits for the updates of its own parameters only."""
        unit.called = True
        if unit not in self._touched:
            self._touched[unit] = None
        if unit.pending:
            self._finish(unit.states)
            unit.pending = False
        self.streaming.enter(unit.number, in_backward=_in_backward())

    def leave(self, unit: EngineUnit) -> None:
        """Called after the forward of `unit`, also when it raised."""
        self.streaming.exit(unit.number, in_backward=_in_backward())

    def begin_forward(self) -> None:
        """Called before the forward of the model: a new order is recorded, and units without a forward are made ready.

        Such a unit's weights are used from outside of it, so nothing announces the use.
        """
        self._refuse_after_failure()
        self._touched.clear()
        self.lanes.begin_backward_order()
        for unit in self.units:
            if unit.pending and not unit.called:
                self._finish(unit.states)
                unit.pending = False
        self.streaming.begin_forward(in_backward=_in_backward())

    def end_forward(self) -> None:
        """Called after the forward of the model, also when it raised."""
        self.streaming.end_forward(in_backward=_in_backward())

    def synchronize(self) -> None:
        """Waits for every submitted update; the parameters are plain again."""
        self._refuse_after_failure()
        self._finish(list(self.states.values()))
        for unit in self.units:
            unit.pending = False
        self.weights.check(wait=True)

    def _finish(self, states: Sequence[ParameterState]) -> None:
        waiting = [state for state in states if id(state.parameter) in self._tickets]
        if not waiting:
            return
        try:
            self.pipeline.wait([self._tickets[id(state.parameter)] for state in waiting])
        except OffloadError as error:
            self._refuse_after_failure()
            name = next((state.name for state in waiting if _has_failed(self._tickets[id(state.parameter)])), "")
            if name in str(error):
                self._failure = str(error)
                raise
            self._failure = f"{name}: {error}"
            raise type(error)(self._failure) from error
        for state in waiting:
            self._tickets.pop(id(state.parameter), None)  # another thread may have waited too
            if can_be_pending(state.parameter) and not state.streamed:
                restore(state.parameter)

    def latest_update(self, parameters: Sequence[Parameter]) -> _native.Ticket | None:
        """The last submitted update of these parameters: jobs run in that order, so it ends after the others."""
        if not self._tickets:
            return None
        waiting = [id(parameter) for parameter in parameters if id(parameter) in self._tickets]
        return self._tickets[max(waiting, key=self._submitted.__getitem__)] if waiting else None

    def settle_updates(self, parameters: Sequence[Parameter]) -> None:
        """The updates of these parameters have ended afterwards."""
        if self._tickets:
            self._finish([self.states[id(parameter)] for parameter in parameters if id(parameter) in self.states])

    def require_own_process(self) -> None:
        """Raises `StateError` in a forked child: the pool's pages are not there, touching a state would crash."""
        if os.getpid() != self._process:
            raise StateError(
                f"this optimizer belongs to process {self._process} and was forked into {os.getpid()}: the states "
                "are not in a child; call offload.wrap there, on a model of its own"
            )

    def _refuse_after_failure(self) -> None:
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


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _has_failed(ticket: _native.Ticket) -> bool:
    try:
        ticket.wait()
    except OffloadError:
        return True
    return False


def _drain(
    pipeline: _native.StepPipeline,
    tickets: Mapping[int, _native.Ticket],
    lanes: GradientLanes,
    uploads: Mapping[Residency, _native.Ticket],
) -> None:
    """Ends the work in flight on memory that is about to go. `pipeline` is kept until then: it must die first."""
    ended = wait_to_end((*tickets.values(), *lanes.in_flight(), *uploads.values()))
    if ended and not list(_engines):  # len() may count engines that are being finalized
        _native.end_shared_threads()
