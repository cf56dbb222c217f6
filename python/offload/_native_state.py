"""What the native optimizers keep of a parameter: its master and their moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from ._adagrad import adagrad_step_
from ._adamw import adamw_step_, join_master, round_to_weight, split_master
from ._grad_factors import GradScale, scaled
from ._kernels import Found, find_kernels
from ._lion import lion_step_
from ._moments import MOMENTS, Float32Moment, Moment, RandomWords, moment_bytes, round_stochastically_, seed_of
from ._parameter_size import MOMENT_BLOCK, MasterFormat
from ._parameter_state import Allocate, ParameterState, WeightHome
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
    # The kernel that runs the step on a CUDA device.
    kernel: ClassVar[str]
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
        by_device: bool,
        master_format: MasterFormat,
        streamed: bool,
        allocate: Allocate,
        store: StateStore | None = None,
        weight_home: WeightHome | None = None,
        moments: str,
        rounding_seed: int,
    ) -> None:
        super().__init__(
            name,
            parameter,
            value,
            on_host=on_host,
            by_device=by_device,
            master_format=master_format,
            streamed=streamed,
            allocate=allocate,
            store=store,
            weight_home=weight_home,
        )
        self.rounding_seed = seed_of(name, rounding_seed)
        self.initial_moment = 0.0
        if self.stored is None:
            kept_as = MOMENTS[moments]
            self.moments = {key: kept_as(allocate, argument) for key, argument in self.moment_arguments.items()}
        else:
            self._write_first_values(value)
        # Of states that the device updates: what does it, or why torch operations do.
        self.kernels, self.kernel_refusal = find_kernels(parameter.device) if by_device else Found(None, None)

    @classmethod
    def moment_bytes(cls, form: str) -> tuple[int, int]:
        count, (each, block) = len(cls.moment_arguments), moment_bytes(form)
        return count * each, count * block

    @classmethod
    def moment_sizes(cls, form: str, numel: int) -> list[int]:
        """Bytes of each array of the moments of so many elements."""
        each, block = moment_bytes(form)
        return [each * numel, block * -(-numel // MOMENT_BLOCK)] * len(cls.moment_arguments)

    @torch.no_grad()
    def _write_first_values(self, value: Tensor) -> None:
        for piece in self.pieces(read=False):
            self._seed(piece, value)
            for moment in piece.moments.values():
                moment.fill(0.0)

    def begin_moments(self, value: float) -> None:
        """Makes `value` what the moments of a state without a step are."""
        if value != self.initial_moment:
            self.initial_moment = value
            self.reset_moments()

    @torch.no_grad()
    def reset_moments(self) -> None:
        for piece in self.pieces():
            for moment in piece.moments.values():
                moment.fill(self.initial_moment)

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *(part for moment in self.moments.values() for part in moment.tensors())]

    @classmethod
    def arrays_on_disk(cls, dtype: torch.dtype, *, split: bool, streamed: bool) -> dict[str, torch.dtype]:
        arrays = super().arrays_on_disk(dtype, split=split, streamed=streamed)
        return {**arrays, **dict.fromkeys(cls.moment_arguments.values(), torch.float32)}

    def _named_moments(self, arrays: dict[str, Tensor]) -> dict[str, Moment]:
        return {key: Float32Moment.over(arrays[argument], argument) for key, argument in self.moment_arguments.items()}

    def moment_values(self) -> dict[str, Tensor]:
        """In fp32: the live tensors where they are that, else new ones."""
        if self.stored is None:
            return {key: moment.value() for key, moment in self.moments.items()}
        return {key: self._stored_value(argument).join() for key, argument in self.moment_arguments.items()}

    def live_moments(self) -> Mapping[str, Any]:
        """The moments where they lie: tensors, or what makes the values from them."""
        if self.stored is None:
            return {key: moment.live() for key, moment in self.moments.items()}
        return {key: self._stored_value(argument) for key, argument in self.moment_arguments.items()}

    def native_moments(self) -> dict[str, int]:
        """The moments as arguments of the native core; 0 for one that this optimizer does not keep, or has on disk."""
        arguments = {"exp_avg": 0, "exp_avg_sq": 0, "rounding_seed": self.rounding_seed}
        for moment in self.moments.values():
            arguments |= moment.native()
        return arguments

    @torch.no_grad()
    def update_on_device(self, gradient: Tensor, scalars: dict[str, Any], grad_scale: GradScale) -> None:
        """One step by the device, behind what its current stream has: for states that are `by_device`.

        gradient: there, with the parameter's strides; grad_scale multiplies it in fp32. Of a state on the host, what a
        kernel reads and writes may be touched by nobody before that stream has come there.
        """
        words = RandomWords(self.rounding_seed, scalars["step"])
        # What the master goes by: the parameter, and what the host has of one that is streamed.
        kept = self.working_weight()
        weight = kept if self.streamed and self.on_host else self.parameter.detach()
        copy = kept if self.on_host and not self.streamed else None
        is_master = self.parameter.dtype == torch.float32 or self.master_format == "bf16"
        master = weight if is_master else self.master if self.remainder is None else self.remainder
        assert master is not None
        if self.kernels is not None:
            arrays = (master, None if is_master else weight, self.native_moments(), gradient)
            self.kernels.update_(self.kernel, *arrays, scalars, grad_scale, words.key, copy)
            return
        place = gradient.device
        value = master.to(place, torch.float32)  # itself where it is that
        if self.remainder is not None:
            value = join_master(weight.to(place), self.remainder.to(place))
        moments = [moment.value().to(place) for moment in self.moments.values()]
        type(self).torch_step(value, *moments, scaled(gradient, grad_scale), scalars)
        for moment, stepped in zip(self.moments.values(), moments, strict=True):
            moment.keep(stepped, words)
        if self.remainder is not None:
            self.remainder.copy_(split_master(value)[1])
        elif self.master_format != "bf16" and value is not master:
            master.copy_(value)
        if self.master_format == "bf16":
            round_stochastically_(weight, value, words, "master")
        elif not is_master:
            weight.copy_(round_to_weight(value, weight.dtype))
        if copy is not None:
            copy.copy_(weight)


class AdamWState(NativeState):
    optimizers = "Adam and AdamW"
    hyperparameters = ("lr", "betas", "eps", "weight_decay")
    moment_arguments = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}  # noqa: RUF012
    kernel = "adamw"
    torch_step = staticmethod(adamw_step_)


class LionState(NativeState):
    optimizers = "Lion"
    hyperparameters = ("lr", "betas", "weight_decay")
    moment_arguments = {"exp_avg": "exp_avg"}  # noqa: RUF012
    kernel = "lion"
    torch_step = staticmethod(lion_step_)


class AdagradState(NativeState):
    optimizers = "Adagrad"
    hyperparameters = ("lr", "lr_decay", "eps", "weight_decay")
    moment_arguments = {"sum": "exp_avg_sq"}  # noqa: RUF012
    kernel = "adagrad"
    torch_step = staticmethod(adagrad_step_)
    from_the_start = True
