"""torch.func and vmap ask the class of what they are given.

They wrap a tensor in C++, which asks no `__torch_function__`: a parameter whose update is on its way would be read as
it was, and one whose bytes are away would crash. No hook of torch's comes before that, so the names under which
functorch's Python knows the three functions that wrap are replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from torch._functorch import eager_transforms, vmap

from ._errors import StateError
from ._pending import PendingParameter, is_away, value_of

__all__ = ["ask_before_torch_func"]

_WRAPPERS: tuple[tuple[ModuleType, str], ...] = (
    (eager_transforms, "_wrap_for_grad"),  # grad, vjp, jacrev, hessian
    (eager_transforms, "_wrap_functional_tensor"),  # functionalize
    (vmap, "_add_batch_dim"),  # vmap, jacfwd
)
_ASKS = "_offload_asks"


def ask_before_torch_func() -> None:
    """From now on in this process; other tensors than pending parameters pass as before."""
    for module, name in _WRAPPERS:
        wrap = getattr(module, name, None)  # a torch that has it no more is without this, and the tests say so
        if wrap is not None and not hasattr(wrap, _ASKS):
            setattr(module, name, _asking(wrap))


def _asking(wrap: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(wrap)
    def asking(tensor: Any, *args: Any) -> Any:
        return wrap(_read(tensor) if isinstance(tensor, PendingParameter) else tensor, *args)

    setattr(asking, _ASKS, True)
    return asking


def _read(parameter: PendingParameter) -> Any:
    try:
        return value_of(parameter)
    except StateError as error:
        if not is_away(parameter):
            raise
        # Inside full_params autograd saves copies, by hooks that the transforms which go back refuse.
        raise StateError(
            f"{error}; torch.func.grad, vjp, jacrev and hessian take copies of weights that are made inside of it"
        ) from error
