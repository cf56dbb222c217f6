"""How gradients travel: off the device as backward makes them, back for accumulation, and into the update.

`GradientLanes` is the store that `HostGrad` cells use (`_host_grad.GradStore`). It owns the order in which backward
produces gradients, for prefetching.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _native
from ._copy_lanes import CopyLanes, LandedBytes
from ._errors import OffloadError
from ._grad_factors import MULTIPLY_WIDE, GradScale, apply_factor
from ._host_grad import HostBytes, HostGrad, hold
from ._pending import PendingParameter, reading_metadata
from ._uncompiled import not_compiled

# Factors are fp32 scalars.
_SCALAR_BYTES = 4
_graph_task = torch._C._current_graph_task_id
# What autograd numbers no backward with.
_NO_BACKWARD = -1


# A GradScale as jobs read it: a number, or the host copy of one, on its way or landed.
StepScale = float | LandedBytes


@dataclass(frozen=True)
class JobGradient:
    """What a job reads: the gradient's bytes in the parameter's element order, and its pending factors."""

    address: int
    dtype: torch.dtype
    tickets: list[_native.Ticket]
    factors: list[tuple[int, int, float]]
    _read: list[LandedBytes]

    def float32(self, parameter: Parameter) -> Tensor:
        """Waits until the bytes have landed: the gradient in fp32 on the host, factors applied.

        It is over the bytes themselves when they need neither a factor nor widening.
        """
        for ticket in self.tickets:
            ticket.wait()
        stored = torch.frombuffer(self._read[0].buffer, dtype=self.dtype)
        wide = stored.as_strided(parameter.shape, parameter.stride()).to(torch.float32)
        for kind, address, value in self.factors:
            number = ctypes.c_float.from_address(address).value if address else value
            wide = apply_factor(wide, kind, number, self.dtype)
        return wide

    def release_after(self, ticket: _native.Ticket) -> None:
        """The bytes may be reused only once the job is done, even if every gradient is dropped now."""
        for landed in self._read:
            landed.buffer.release_after(ticket)


def landed(parameter: Parameter, name: str, gradient: JobGradient | None) -> Tensor:
    """The gradient in fp32 on the host, None for one without elements. Raises what kept it from arriving."""
    if gradient is None:
        return torch.empty_strided(parameter.shape, parameter.stride(), dtype=torch.float32, device="cpu")
    try:
        return gradient.float32(parameter)
    except OffloadError as error:
        raise type(error)(f"{name}: its gradient did not arrive: {error}") from error


def _scaled(gradient: JobGradient, scale: StepScale) -> JobGradient:
    if isinstance(scale, LandedBytes):
        gradient.tickets.append(scale.ticket)
        gradient.factors.append((MULTIPLY_WIDE, scale.address, 0.0))
        gradient._read.append(scale)
    elif scale != 1.0:
        gradient.factors.append((MULTIPLY_WIDE, 0, scale))
    return gradient


class GradientLanes(CopyLanes):
    """See the module's text. One compute thread at a time, as autograd gives it."""

    def __init__(self, device: torch.device, pool: _native.HostPool, transfers: _native.TransferQueue) -> None:
        super().__init__(device, pool, transfers)
        self.learned: dict[Any, dict[str, int]] = {}
        self._wide = threading.local()  # memory for `widened`: on the CPU each thread runs a backward of its own
        self._plain_ticket: _native.Ticket | None = None
        # id of a parameter -> the one whose gradient backward makes next. Weakly: gradients refer to their lanes, and
        # the garbage collector does not see through a parameter's .grad. A guess: an id may be another one's by now.
        self._next: dict[int, weakref.ref[Parameter]] = {}
        self._latest: int | None = None
        self._backward = _NO_BACKWARD  # the latest one that a gradient left in
        # Called when a gradient has left in backward, and at the end of a backward that any has left in.
        self.on_leave: Callable[[Parameter], None] | None = None
        self.on_end: Callable[[], None] | None = None

    # --- the store of HostGrad ------------------------------------------------------------------------------

    def to_host(self, tensor: Tensor) -> LandedBytes:
        """Starts the copy of a dense tensor's bytes in storage order; keeps the tensor until they have landed.

        Small ones of one backward may start together, at its end at the latest.
        """
        scalar = tensor.nbytes <= _SCALAR_BYTES
        backward = _graph_task()
        if backward not in (_NO_BACKWARD, self._backward):
            self._departures.submit()  # what waits since a backward that raised, and so had no end
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
            self._backward = backward
        may_wait = backward != _NO_BACKWARD
        return self.send(tensor, "staging" if scalar else "gradients", self.compute_stream(), may_wait=may_wait)

    @property
    def any_waits(self) -> bool:
        """Whether a gradient that has left is not submitted yet."""
        return bool(self._departures.copies)

    @not_compiled
    def _end_backward(self) -> None:
        self._departures.submit()
        if self.on_end is not None:
            self.on_end()

    def to_device(self, held: HostBytes, out: Tensor) -> None:
        """Fills `out` (same dense strides); the compute stream waits, not the host."""
        self.wait_upload(self.start_upload(held, out))

    def widened(self, tensor: Tensor) -> Tensor:
        """A dense tensor's values in fp32 and in its own strides, until this thread's next call."""
        memory: Tensor | None = getattr(self._wide, "memory", None)
        if memory is None or memory.numel() < tensor.numel():
            with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
                memory = torch.empty(tensor.numel(), dtype=torch.float32, device=tensor.device)
            self._wide.memory = memory
        return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    # --- leaving in backward --------------------------------------------------------------------------------

    def take(self, parameter: Parameter, name: str) -> None:
        """Called when backward has added to `parameter.grad`: the gradient leaves, the next earlier sum comes."""
        hold(parameter, name, self)
        itself = weakref.ref(parameter)  # the same object at every call
        if self._latest is not None and self._next.get(self._latest) is not itself:
            self._next[self._latest] = itself
        self._latest = id(parameter)
        reference = self._next.get(self._latest)
        following = None if reference is None else reference()
        if following is not None:
            # One of a unit that was not touched yet is pending.
            away = type(following) is PendingParameter
            earlier = reading_metadata(functools.partial(getattr, following, "grad")) if away else following.grad
            if type(earlier) is HostGrad:
                earlier.cell.prefetch()
        if self.on_leave is not None:
            self.on_leave(parameter)

    def begin_backward_order(self) -> None:
        """The next gradient is the first of a backward: nothing precedes it."""
        self._latest = None

    # --- entering the update --------------------------------------------------------------------------------

    def scale_for_step(self, scale: GradScale) -> StepScale:
        """For `for_step`. A tensor leaves as soon as it is computed: nothing waits here."""
        return self.to_host(scale) if isinstance(scale, Tensor) else scale

    def for_step(self, parameter: Parameter, scale: StepScale = 1.0) -> JobGradient:
        """The parameter's gradient on the host, in the parameter's own element order; `scale` is its last factor."""
        gradient, strides = reading_metadata(lambda: (parameter.grad, parameter.stride()))
        assert gradient is not None
        if isinstance(gradient, HostGrad):
            held = gradient.cell.for_step()
            if held.strides == strides:
                factors = [(kind, address, value) for kind, address, value, _ in held.factors]
                read = (held.bytes, *(keep for *_, keep in held.factors if keep is not None))
                mine = [landed for landed in read if isinstance(landed, LandedBytes)]
                return _scaled(JobGradient(held.bytes.address, held.dtype, held.tickets, factors, mine), scale)
        plain = self.on_device(parameter)
        landed = self.to_host(plain)
        self._plain_ticket = landed.ticket
        return _scaled(JobGradient(landed.address, plain.dtype, [landed.ticket], [], [landed]), scale)

    def on_device(self, parameter: Parameter) -> Tensor:
        """The parameter's gradient as a plain device tensor with the parameter's strides."""
        gradient = parameter.grad
        assert gradient is not None
        plain = gradient.cell.materialize() if isinstance(gradient, HostGrad) else gradient.detach()
        if plain.stride() == parameter.stride():
            return plain
        like_parameter = torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=plain.dtype, device=plain.device
        )
        return like_parameter.copy_(plain)

    def wait_for_plain_gradients(self) -> None:
        """The compute stream waits until the plain gradients that a step reads have left."""
        ticket, self._plain_ticket = self._plain_ticket, None  # a failed copy is told of once
        if ticket is not None:
            self._transfers.wait_on_stream(self.compute_stream(), ticket)
