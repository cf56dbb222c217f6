"""Gradients of 16-bit parameters that add up in fp32: torch itself widens each one before it adds it to `p.grad`."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from ._errors import InvalidArgument

__all__ = ["WideGradient", "check_grad_dtype"]


def check_grad_dtype(name: str | None) -> None:
    """Raises `InvalidArgument` where torch cannot be told the dtype of a gradient."""
    if name is not None and not hasattr(torch.Tensor, "grad_dtype"):
        raise InvalidArgument(
            f"grad_dtype={name!r}: torch {torch.__version__} has no Tensor.grad_dtype: install torch 2.10 or newer, or "
            "leave the option out"
        )


class WideGradient:
    """Until `remove()` the gradient of a parameter is fp32, and so is one that it has already."""

    def __init__(self, parameter: Parameter) -> None:
        self._parameter = parameter
        _set_grad_dtype(parameter, torch.float32)

    def remove(self) -> None:
        _set_grad_dtype(self._parameter, self._parameter.dtype)


@torch.no_grad()
def _set_grad_dtype(parameter: Parameter, dtype: torch.dtype) -> None:
    # None of this reads the parameter, which may be away.
    with torch._C.DisableTorchFunctionSubclass():
        gradient = parameter.grad
        parameter.grad = None
        parameter.grad_dtype = dtype
        if gradient is not None:
            parameter.grad = gradient.to(dtype)
