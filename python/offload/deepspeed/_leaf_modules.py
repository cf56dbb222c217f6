"""`deepspeed.utils.set_z3_leaf_modules`: accepted, as which modules travel as one is found from the model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

import offload

__all__ = ["set_z3_leaf_modules", "unset_z3_leaf_modules"]


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Sequence[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Changes nothing, and returns the modules of these classes; a class may be given by its full name, or its own.

    Raises `InvalidArgument` where there are none, unless told not to.
    """
    found = [module for module in model.modules() if any(_is_of(module, kind) for kind in leaf_module_classes)]
    if not found and raise_if_not_found:
        raise offload.InvalidArgument(
            f"the model has no module of {list(leaf_module_classes)}: its blocks are found without this call; leave "
            "it out"
        )
    return found


unset_z3_leaf_modules = set_z3_leaf_modules


def _is_of(module: nn.Module, kind: type | str) -> bool:
    if isinstance(kind, type):
        return isinstance(module, kind)
    own = type(module)
    return kind in (own.__name__, f"{own.__module__}.{own.__qualname__}")
