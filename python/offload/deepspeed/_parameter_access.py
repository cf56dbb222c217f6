"""`deepspeed.utils.safe_get_full_...` and their like: fp32 weight, gradient and states of one parameter.

What is got, from wherever it is, is a new fp32 tensor on the device that computes; None for a parameter that no engine
trains. What is set is of the parameter's shape, in any float dtype, on any device. One process has whole tensors, so
the `local` functions give and take the same values in one dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import offload

from ._placement import model_of, optimizer_of

__all__ = [
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "safe_update_full_grad_vectorized",
]


@torch.no_grad()
def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """The fp32 master of a 16-bit parameter, and the value of one in fp32."""
    optimizer, model = _trainer_of(param), model_of(param)
    if optimizer is None or model is None:
        return None
    state = optimizer.state_of(param)
    if "master" in state:
        return _given(param, state["master"])
    with offload.full_params(model, [param]):
        return _given(param, param)


def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Makes `value` the fp32 weight; the parameter itself becomes its rounded value at once (DeepSpeed's, at a step).

    A parameter that no engine trains is left as it is.
    """
    _write(param, "master", value)


@torch.no_grad()
def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """A moment, by the name that torch's optimizer has for it: `exp_avg`. Raises `InvalidArgument` for another."""
    optimizer = _trainer_of(param)
    if optimizer is None:
        return None
    state = optimizer.state_of(param)
    value = state.get(optim_state_key)
    if not isinstance(value, Tensor) or value.shape != param.shape:
        legal = [key for key, other in state.items() if isinstance(other, Tensor) and other.shape == param.shape]
        there = f"it has {', '.join(sorted(legal))}" if legal else "its class makes what it keeps in the first step"
        raise offload.InvalidArgument(f"the state has no {optim_state_key!r}: {there}")
    return _given(param, value)


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Writes a moment. A parameter that no engine trains is left as it is."""
    _write(param, optim_state_key, value)


@torch.no_grad()
def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """The gradient between backward and step, as far as it is accumulated, times the loss scale; None without one."""
    return None if param.grad is None else _given(param, param.grad)


@torch.no_grad()
def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """Writes the gradient. Raises `StateError` where there is none, and `InvalidArgument` for another shape."""
    if param.grad is None:
        raise offload.StateError("the parameter has no gradient: set it between engine.backward() and engine.step()")
    if value.shape != param.shape:
        raise offload.InvalidArgument(f"the gradient has shape {tuple(param.shape)}, the value {tuple(value.shape)}")
    param.grad.copy_(value)


def safe_update_full_grad_vectorized(
    param_list: Iterable[nn.Parameter], update_func: Callable[[Tensor, nn.Parameter], Tensor]
) -> None:
    """Replaces the gradient of each parameter that has one by `update_func(gradient, parameter)`."""
    for param in param_list:
        gradient = safe_get_full_grad(param)
        if gradient is not None:
            safe_set_full_grad(param, update_func(gradient, param))


def safe_get_local_fp32_param(param: nn.Parameter) -> Tensor | None:
    return _flat(safe_get_full_fp32_param(param))


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    return _flat(safe_get_full_optimizer_state(param, optim_state_key))


def safe_get_local_grad(param: nn.Parameter) -> Tensor | None:
    return _flat(safe_get_full_grad(param))


def safe_set_local_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    safe_set_full_fp32_param(param, value.reshape(param.shape))


def safe_set_local_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    safe_set_full_optimizer_state(param, value.reshape(param.shape), optim_state_key)


def safe_set_local_grad(param: nn.Parameter, value: Tensor) -> None:
    safe_set_full_grad(param, value.reshape(param.shape))


def _given(param: Tensor, value: Tensor) -> Tensor:
    return value.detach().to(param.device, torch.float32, copy=True)


def _flat(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.flatten()


def _write(param: nn.Parameter, key: str, value: Tensor) -> None:
    optimizer = _trainer_of(param)
    if optimizer is not None:
        optimizer.write_state(param, {key: value})


def _trainer_of(param: nn.Parameter) -> offload.OffloadOptimizer | None:
    """The optimizer that updates the parameter."""
    optimizer = optimizer_of(param)
    if optimizer is None or not param.requires_grad:
        return None
    return optimizer if any(p is param for group in optimizer.param_groups for p in group["params"]) else None
