"""What a step does: gradients, hyperparameters and the user's writes in, jobs of the native pipeline out.

`_engine.py` knows who waits for these updates from then on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _native
from ._adamw import FORMATS, check_gradient
from ._copy_lanes import ticket_of
from ._errors import OffloadError
from ._grad_factors import GradScale
from ._gradient_lanes import JobGradient, landed
from ._interrupts import Uninterrupted
from ._native_state import Hyper, NativeState
from ._parameter_state import ParameterState
from ._pending import can_be_pending, is_pending, reading_metadata

if TYPE_CHECKING:
    from ._engine import Engine


@dataclass(frozen=True)
class Update:
    """One parameter's share of `optim.step()`: the hyperparameters as they were at the call."""

    parameter: Parameter
    hyper: Hyper


_Work = tuple[NativeState, Update]


class EngineStep:
    """See the module's text. `submit` is the step of native optimizers.

    The step of others is `settle`, `float32_gradients`, `reseed_written`, their own work on the masters, and `publish`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.count = 0
        self.peak_gradient_bytes = 0  # of those on the device, which are all there at a step

    def submit(
        self, updates: Sequence[Update], adopt: Callable[[Parameter], NativeState], grad_scale: GradScale = 1.0
    ) -> None:
        """Submits the updates in the order in which the next forward needs them, and returns.

        adopt: gives the state of a parameter, made as its optimizer begins one where there is none yet.
        Parameters are pending from here until their unit's next forward, or any other access, waits for them.
        All of the step happens, or none: Ctrl-C comes before it or after it. Raises before anything is changed when a
        gradient cannot be used.
        """
        self._engine.refuse_after_failure()
        self.check_gradients([update.parameter for update in updates])
        self._engine.streaming.begin_step()
        states = [adopt(update.parameter) for update in updates]
        work = list(zip(states, updates, strict=True))
        of_host = reading_metadata(lambda: [pair for pair in work if self._runs_on_host(pair[0])])
        # Of a unit, the small ones first: those beside each other share an upload.
        reading_metadata(lambda: of_host.sort(key=lambda pair: pair[0].parameter.numel()))
        next_use = self._engine.next_use()
        of_host.sort(key=lambda pair: next_use(pair[0]))
        if self._goes_backwards([state for state, _ in of_host]):
            of_host.reverse()
        of_device = [pair for pair in work if pair[0].by_device]
        without_elements = [s for s in states if not s.by_device and s.parameter.numel() == 0]
        self._update(of_host, of_device, without_elements, grad_scale)
        self._engine.streaming.end_step()

    @staticmethod
    def _runs_on_host(state: ParameterState) -> bool:
        return not state.by_device and state.parameter.numel() > 0

    def check_gradients(self, parameters: Sequence[Parameter]) -> None:
        """Raises `InvalidArgument` naming the first parameter whose gradient no update can use."""
        gradients = reading_metadata(lambda: [p.grad for p in parameters])
        on_device = sum([g.numel() * g.element_size() for g in gradients if type(g) is Tensor])
        self.peak_gradient_bytes = max(self.peak_gradient_bytes, on_device)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert gradient is not None
            check_gradient(self._engine.name_of(parameter), gradient)

    def float32_gradients(self, parameters: Sequence[Parameter]) -> list[Tensor]:
        """Their gradients in fp32 on the tier of the states, where nothing else reads them: they may be edited.

        Raises the error of a gradient that did not arrive, with the parameter's name.
        """
        if self._engine.plan.optimizer == "device":
            return [self._engine.lanes.on_device(parameter).to(torch.float32) for parameter in parameters]
        taken = [self._engine.lanes.for_step(parameter) if parameter.numel() > 0 else None for parameter in parameters]
        with contextlib.suppress(OffloadError):  # landed() raises it with the name
            self._engine.lanes.wait_for_plain_gradients()
        gradients = [
            landed(p, self._engine.name_of(p), gradient) for p, gradient in zip(parameters, taken, strict=True)
        ]
        for ticket in self._engine.lanes.in_flight():  # an upload may still read the bytes
            with contextlib.suppress(OffloadError):  # whoever asked for it is told
                ticket.wait()
        return gradients

    def settle(self, states: Sequence[ParameterState]) -> None:
        """Every update and upload has ended afterwards."""
        self._engine.refuse_after_failure()
        self._engine.streaming.begin_step()
        if self._engine.speculation is not None:
            self._engine.speculation.settle()
        self._engine.finish(states)

    def publish(self, states: Sequence[ParameterState], *, is_step: bool) -> None:
        """The fp32 masters of settled states were written: the parameters follow, in the order of their next use.

        is_step: by a step, which is counted. Those of states on the host are pending until their upload has ended.
        """
        try:
            with Uninterrupted():
                for state in sorted(states, key=self._engine.next_use()):
                    state.follow_master()
                    state.step += 1
                    if state.on_host and not state.streamed and state.parameter.numel() > 0:
                        self._engine.await_update(state, self._submit_weight(state))
                    else:
                        self._engine.wrote(state)
                self.count += is_step
        except Exception as error:  # some weights follow their masters, others do not
            self._engine.fail(str(error))
            raise
        self._finish_what_cannot_wait(states)
        self._engine.streaming.end_step()

    def _submit_weight(self, state: ParameterState) -> _native.Ticket:
        parameter = state.parameter
        if self._engine.config.poison_enabled:
            parameter.detach().fill_(float("nan"))
        return self._engine.transfers.submit_to_device(
            parameter.data_ptr(),
            state.working_weight().data_ptr(),
            parameter.numel() * parameter.element_size(),
            self._engine.lanes.compute_stream(),
        )

    def reseed_written(self, states: Sequence[ParameterState]) -> None:
        """What the user wrote is the master.

        After all that a step may be refused for: where the writes are taken back then, masters are what they were.
        """
        for state in states:
            written = reading_metadata(lambda: state.parameter._version) != state.version  # noqa: B023  # called now
            # A pending parameter has not been touched since the last step: any access would have made it current.
            if written or (not state.streamed and not is_pending(state.parameter) and state.has_moved()):
                self.reseed(state)

    def reseed(self, state: ParameterState) -> None:
        """The user wrote to the parameter, or gave it other storage: its values are the master, its new place is known.

        Raises `StateError` when it has another layout than its state.
        """
        self._engine.finish([state])
        if self._engine.speculation is not None:
            self._engine.speculation.settle([state.parameter])
        for ticket in self.readers_of(state):
            ticket.wait()
        if state.streamed and state.on_host:
            state.adopt_host_weight()
            return
        if state.streamed:
            self._engine.streaming.open_for_writing([state.parameter])
        elif state.has_moved() and id(state.parameter) in self._engine.slots and isinstance(state, NativeState):
            self._engine.add_slot(state)
        state.adopt_parameter()

    def _update(
        self,
        of_host: Sequence[_Work],
        of_device: Sequence[_Work],
        without_elements: Sequence[NativeState],
        grad_scale: GradScale,
    ) -> None:
        """The host's part first: it runs while the device updates its own. One without elements counts its steps."""
        read = self._host_gradients(of_host, grad_scale)
        states = [state for state, _ in of_host]
        self.reseed_written([*states, *without_elements])
        jobs = self._host_jobs(of_host, read)
        speculation = self._engine.speculation
        if speculation is not None:
            speculation.expect(zip([state.parameter for state in states], read, strict=True))
        if self._engine.config.poison_enabled:
            self._engine.finish(states)
        begun = False
        try:
            with Uninterrupted():
                tickets = self._submit(jobs, states) if jobs else []
                begun = bool(jobs)
                if speculation is not None:
                    speculation.submitted()
                for state, taken, ticket in zip(states, read, tickets, strict=True):
                    state.step += 1
                    taken.release_after(ticket)
                    self._engine.await_update(state, ticket)
                for state, update in of_device:
                    gradient = self._ready_on_device(state)
                    begun = True
                    state.update_on_device(gradient, update.hyper.scalars(state.step + 1), grad_scale)
                    state.step += 1
                    self._engine.wrote(state)
                self._await_device([state for state, _ in of_device])
                for state in without_elements:
                    state.step += 1
                self.count += 1
                begun = False
        except BaseException as error:  # part of the step is done, or it is not known any more who is pending
            if begun:
                self._engine.fail(str(error))
                with contextlib.suppress(OffloadError):  # what was launched may still run
                    self._await_device([state for state, _ in of_device])
            raise
        self._finish_what_cannot_wait(states)

    def _ready_on_device(self, state: NativeState) -> Tensor:
        """The gradient; what the update writes to is there, and nobody reads it."""
        for reader in self.readers_of(state):
            reader.wait()
        gradient = self._engine.lanes.on_device(state.parameter)
        if state.on_host:
            stream = self._engine.lanes.compute_stream()
            for upload in self._engine.streaming.uploads_of(state.parameter):
                self._engine.transfers.wait_on_stream(stream, upload)
        elif state.streamed:  # written back when the next one comes that travels with others
            self._engine.streaming.open_for_writing([state.parameter])
        self.reseed_written([state])
        return gradient

    def _await_device(self, states: Sequence[NativeState]) -> None:
        """Those on the host are the device's until it has come here."""
        crossing = [state for state in states if state.on_host]
        if crossing:
            stream = self._engine.lanes.compute_stream()
            ticket = self._engine.transfers.submit_batch("to_host", [], stream)  # no bytes: a mark
            for state in crossing:
                self._engine.await_state(state, ticket)

    def _host_gradients(self, work: Sequence[_Work], grad_scale: GradScale) -> list[JobGradient]:
        scale = self._engine.lanes.scale_for_step(grad_scale if work else 1.0)
        read = [self._engine.lanes.for_step(state.parameter, scale) for state, _ in work]
        # A plain gradient is still the user's own tensor: it must have left before the user can write to it.
        self._engine.lanes.wait_for_plain_gradients()
        return read

    def _host_jobs(self, work: Sequence[_Work], read: Sequence[JobGradient]) -> list[Any]:
        """What the pipeline is to run over these gradients."""
        jobs = []
        scalars: dict[tuple[Hyper, int], Any] = {}
        for (state, update), taken in zip(work, read, strict=True):
            key = (update.hyper, state.step + 1)
            if key not in scalars:
                scalars[key] = update.hyper.native_scalars(state.step + 1)
            tickets = [*taken.tickets, *self._engine.streaming.uploads_of(state.parameter), *self.readers_of(state)]
            jobs.append(
                (self._engine.slots[id(state.parameter)], taken.address, FORMATS[taken.dtype], tickets, scalars[key],
                 taken.factors)
            )  # fmt: skip
        return jobs

    def readers_of(self, state: ParameterState) -> list[_native.Ticket]:
        """What still reads the state's tensors for somebody else."""
        watch = self._engine.watch
        reader = None if watch is None else watch.before_update(state.tensors())
        return [] if reader is None or reader.done() else [ticket_of(reader)]

    def _submit(self, jobs: Sequence[Any], states: Sequence[ParameterState]) -> list[_native.Ticket]:
        values: list[tuple[Tensor, Tensor]] = []
        if self._engine.config.poison_enabled:
            for state in states:
                if not state.streamed:
                    weight = state.parameter.detach()
                    # That of a state whose update ran ahead is not this one, or not yet again.
                    is_current = state.has_host_weight() and self._engine.speculation is None
                    values.append((weight, state.working_weight() if is_current else weight.clone()))
        try:
            for weight, _ in values:
                weight.fill_(float("nan"))
            if self._engine.homes.store is not None:
                self._engine.homes.store.tell_written(self._engine.pipeline.states_written)
            stream, backwards = self._engine.lanes.compute_stream(), self._goes_backwards(states)
            return self._engine.weights.submit(
                list(jobs), states, lambda jobs: self._engine.pipeline.submit(jobs, stream, backwards=backwards)
            )
        except BaseException:
            for weight, value in values:
                weight.copy_(value)
            raise

    def _goes_backwards(self, states: Sequence[ParameterState]) -> bool:
        """Every other step over states on disk: what the one updated last is still in the window, and comes first."""
        return self._engine.homes.store is not None and max((state.step for state in states), default=0) % 2 == 1

    def _finish_what_cannot_wait(self, states: Sequence[ParameterState]) -> None:
        """A Parameter subclass cannot announce a read: nobody may see it before it is current."""
        self._engine.bring_current(
            [state for state in states if not (self._engine.config.lazy and can_be_pending(state.parameter))]
        )
