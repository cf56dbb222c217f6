"""Where the config's placement becomes `offload.wrap`."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import offload

from ._offload_config import ZeroParamStatus
from ._settings import Placement

__all__ = ["Placed", "check_values", "is_wrapped", "model_of", "optimizer_of", "wrap_options"]

# Of a weight that comes and goes; scripts gather what has a `ds_id`, and read the rest as it is.
_MARKS = ("ds_id", "ds_status", "ds_shape", "ds_numel")


def is_wrapped(model: nn.Module) -> bool:
    """Whether an engine has wrapped the model."""
    return model in _wrapped


def model_of(parameter: Tensor) -> nn.Module | None:
    """The wrapped model that a parameter is of."""
    for model, wrapping in _wrapped.items():
        own = wrapping.parameters.get(id(parameter))
        if own is not None and own() is parameter:
            return model
    return None


def optimizer_of(parameter: Tensor) -> offload.OffloadOptimizer | None:
    """The optimizer of the wrapped model that a parameter is of, as long as there is its engine."""
    model = model_of(parameter)
    placed = None if model is None else _wrapped[model].placed()
    return None if placed is None else placed.wrapped


def check_values(model: nn.Module) -> None:
    """Raises `InvalidArgument` for a model that was built on the meta device and has no values yet."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise offload.InvalidArgument(
                f"{name} is on the meta device and has no values: load them first, with "
                "load_state_dict(..., assign=True)"
            )


def wrap_options(placement: Placement) -> dict[str, Any]:
    """The options of `offload.wrap` that put things where the config wants them.

    `cpu_checkpointing` moves what checkpoints save, and nothing of a model that does not checkpoint.
    """
    disk = {"disk_block": placement.disk_block, "disk_queue_depth": placement.disk_queue_depth}
    return {
        "optimizer": placement.optimizer_ratio if placement.optimizer == "host" else placement.optimizer,
        "gradients": placement.gradients,
        "params": placement.params,
        "activations": "checkpoints" if placement.activations == "host" else "device",
        "pin": "auto" if placement.pin_memory else False,
        "disk_path": placement.disk_path,
        **{name: value for name, value in disk.items() if value is not None},
    }


class Placed:
    """A wrapped model and its optimizer, which can be moved to other tiers.

    Without an optimizer a model is wrapped where its weights come and go; else it stays as it is.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer | None, options: dict[str, Any]) -> None:
        self.module = module
        self.wrapped: offload.OffloadOptimizer | None = None
        self._options = self._options_now = options
        for path in options["disk_path"] or ():  # DeepSpeed makes it too
            os.makedirs(path, exist_ok=True)
        self._first: tuple[str, str, str] | None = None  # where everything was before it moved
        parameters = {id(parameter): weakref.ref(parameter) for parameter in module.parameters()}
        wrapping = _Wrapping(parameters, weakref.ref(self))
        if optimizer is not None:
            self._plain = optimizer
            _, self.wrapped = offload.wrap(module, optimizer, **options)
        elif options["params"] != "device":
            offload.wrap(module, None, **options | {"optimizer": "device", "gradients": "device"})
        else:
            return
        _wrapped[module] = wrapping  # nothing that can fail lies between
        if options["params"] != "device":
            for number, parameter in enumerate(module.parameters()):
                values = (number, ZeroParamStatus.NOT_AVAILABLE, parameter.shape, parameter.numel())
                parameter.__dict__.update(zip(_MARKS, values, strict=True))

    def move(self, tier: str | None) -> None:
        """Everything to `tier`, None: to where it was at first. `wrapped` is another one from now on.

        An error leaves everything where it was, in another `wrapped` too.
        """
        assert self.wrapped is not None
        now = _places(self.wrapped.plan)
        self._first = self._first or now
        options = dict(self._options)
        if tier is not None:
            # What is on disk is off the device already.
            states, weights = ("disk" if options[kind] == "disk" else tier for kind in ("optimizer", "params"))
            options |= {"optimizer": states, "gradients": tier, "params": weights}
        wanted = (options["optimizer"], options["gradients"], options["params"])
        if now == (self._first if tier is None else wanted):
            return
        # unwrap gives 16-bit parameters 16-bit moments; the state dict keeps them, and the masters, in fp32.
        states = _copied(self.wrapped.state_dict())
        try:
            offload.unwrap(self.module, self.wrapped)
            self._wrap_again(states, options)
        except BaseException:  # nobody else has the states
            if not self._is_current():
                self._wrap_again(states, self._options_now)
            raise

    def _is_current(self) -> bool:
        """Whether unwrap has done nothing: a signal that came while it ended is raised after its last change."""
        try:
            if self.wrapped is None:
                with offload.full_params(self.module, ()):
                    return True
            return self.wrapped.plan is not None
        except offload.StateError:
            return False

    def _wrap_again(self, states: dict[str, Any], options: dict[str, Any]) -> None:
        self._plain.state.clear()
        _, wrapped = offload.wrap(self.module, self._plain, **options)
        try:
            wrapped.load_state_dict(states)
        except BaseException:
            offload.unwrap(self.module, wrapped)
            raise
        self.wrapped, self._options_now = wrapped, options

    def unwrap(self) -> None:
        if self.module not in _wrapped:
            return
        try:
            offload.unwrap(self.module, self.wrapped)
        except offload.OffloadError:  # nothing was changed
            raise
        except BaseException:
            if not self._is_current():
                self._forget()
            raise
        self._forget()

    def _forget(self) -> None:
        for parameter in self.module.parameters():
            for mark in _MARKS:
                parameter.__dict__.pop(mark, None)
        del _wrapped[self.module]


@dataclass(frozen=True)
class _Wrapping:
    """Of a model that is wrapped: its parameters by identity (comparing tensors compares elements), and by what."""

    parameters: dict[int, weakref.ref[nn.Parameter]]
    placed: weakref.ref[Placed]


# Parameters are given without the model that they are of. Nothing in here keeps a model.
_wrapped: weakref.WeakKeyDictionary[nn.Module, _Wrapping] = weakref.WeakKeyDictionary()


def _places(plan: offload.Plan) -> tuple[str, str, str]:
    return plan.optimizer, plan.gradients, plan.params


def _copied(state: Any) -> Any:
    """A state dict whose tensors are copies on the host: those that an optimizer shows are live."""
    if isinstance(state, torch.Tensor):
        return state.to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: _copied(value) for name, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list) else state
