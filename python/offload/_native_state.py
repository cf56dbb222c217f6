"""What the native optimizers keep of a parameter: its master and, in fp32, their moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from ._adagrad import adagrad_step_
from ._adamw import adamw_step_, round_to_weight
from ._lion import lion_step_
from ._parameter_state import Allocate, ParameterState, StoredValue
from ._state_store import StateStore


class Hyper(Protocol):
    """The hyperparameters of one group at one step: hashable, equal when the updates are."""

    def scalars(self, step: int) -> dict[str, Any]:
        """The scalars of step `step` (1 for the first), as doubles."""

    def native_scalars(self, step: int) -> Any:
        """The same as an object of the native core."""


class NativeState(ParameterState):
    """Master and moments of `parameter`; `moments` holds them by the name that a state_dict has for each."""

    may_split = True
    may_be_stored = True
    # The optimizers that keep such a state, in words, and what a group of theirs must say.
    optimizers: ClassVar[str]
    hyperparameters: ClassVar[tuple[str, ...]]
    # Names of the moments, each with its argument of the native core.
    moment_arguments: ClassVar[Mapping[str, str]]
    # The step in torch operations: of master, the moments in their order, gradient and scalars.
    torch_step: ClassVar[Callable[..., None]]
    # Whether torch's class makes the state with the optimizer, and not with the first step.
    from_the_start: ClassVar[bool] = False

    def __init__(
        self,
        name: str,
        parameter: Parameter,
        value: Tensor,
        *,
        on_host: bool,
        split: bool,
        streamed: bool,
        allocate: Allocate,
        store: StateStore | None = None,
    ) -> None:
        super().__init__(
            name, parameter, value, on_host=on_host, split=split, streamed=streamed, allocate=allocate, store=store
        )
        self.initial_moment = 0.0
        if self.stored is None:
            self.moments = {key: allocate(torch.float32, "moments").zero_() for key in self.moment_arguments}
        else:
            self._write_first_values(value)

    @torch.no_grad()
    def _write_first_values(self, value: Tensor) -> None:
        for piece in self.pieces(read=False):
            self._seed(piece, value)
            for moment in piece.moments.values():
                moment.zero_()

    def begin_moments(self, value: float) -> None:
        """Makes `value` what the moments of a state without a step are."""
        if value != self.initial_moment:
            self.initial_moment = value
            self.reset_moments()

    @torch.no_grad()
    def reset_moments(self) -> None:
        for piece in self.pieces():
            for moment in piece.moments.values():
                moment.fill_(self.initial_moment)

    @classmethod
    def arrays_on_disk(cls, dtype: torch.dtype, *, split: bool, streamed: bool) -> dict[str, torch.dtype]:
        arrays = super().arrays_on_disk(dtype, split=split, streamed=streamed)
        return {**arrays, **dict.fromkeys(cls.moment_arguments.values(), torch.float32)}

    def _named_moments(self, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: arrays[argument] for key, argument in self.moment_arguments.items()}

    def live_moments(self) -> Mapping[str, Tensor | StoredValue]:
        """The moments where they lie."""
        if self.stored is None:
            return self.moments
        return {key: self._stored_value(argument) for key, argument in self.moment_arguments.items()}

    def moment_addresses(self) -> dict[str, int]:
        """The moments as arguments of the native core; 0 for one that this optimizer does not keep, or has on disk."""
        if self.stored is not None:
            return {"exp_avg": 0, "exp_avg_sq": 0}
        addresses = {argument: self.moments[key].data_ptr() for key, argument in self.moment_arguments.items()}
        return {"exp_avg": 0, "exp_avg_sq": 0, **addresses}

    @torch.no_grad()
    def update_on_device(self, gradient: Tensor, scalars: dict[str, Any]) -> None:
        """One step in torch operations where the states are: for states that stay on the device."""
        master = self.master_value()
        type(self).torch_step(master, *self.moments.values(), gradient, scalars)
        if self.parameter.dtype != torch.float32:
            self.working_weight().copy_(round_to_weight(master, self.parameter.dtype))


class AdamWState(NativeState):
    optimizers = "Adam and AdamW"
    hyperparameters = ("lr", "betas", "eps", "weight_decay")
    moment_arguments = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}  # noqa: RUF012
    planned_moment_bytes = 8
    torch_step = staticmethod(adamw_step_)


class LionState(NativeState):
    optimizers = "Lion"
    hyperparameters = ("lr", "betas", "weight_decay")
    moment_arguments = {"exp_avg": "exp_avg"}  # noqa: RUF012
    planned_moment_bytes = 4
    torch_step = staticmethod(lion_step_)


class AdagradState(NativeState):
    optimizers = "Adagrad"
    hyperparameters = ("lr", "lr_decay", "eps", "weight_decay")
    moment_arguments = {"sum": "exp_avg_sq"}  # noqa: RUF012
    planned_moment_bytes = 4
    torch_step = staticmethod(adagrad_step_)
    from_the_start = True
