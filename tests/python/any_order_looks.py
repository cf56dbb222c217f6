"""What a user sees of a pair, and where two of them differ."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training import same_bits

if TYPE_CHECKING:
    from any_order import Side


def gradients(side: Side) -> Any:
    return [None if p.grad is None else p.grad.detach().clone() for p in side.parameters]


def norms(side: Side) -> Any:
    return [None if p.grad is None else p.grad.norm() for p in side.parameters]


def weights(side: Side) -> Any:
    return {name: value.clone() for name, value in side.model.state_dict().items()}


def weights_read(side: Side) -> Any:
    with side.full():
        return [p.detach().clone() for p in side.parameters]


def states(side: Side) -> Any:
    saved = copy.deepcopy(side.optimizer.state_dict())
    for group in saved["param_groups"]:  # torch adds it to the defaults in a load, and to the groups that come later
        group.pop("differentiable", None)
    return saved | {"state": {key: settled(state) for key, state in saved["state"].items()}}


def live_states(side: Side) -> Any:
    known = side.optimizer.state
    return [settled(copy.deepcopy(dict(known[p]))) if p in known else None for p in side.parameters]


def settled(state: dict[str, Any]) -> dict[str, Any]:
    """Before the first step a master is the weight, and follows one that is written at once or in the step.

    So does a bf16 master.
    """
    master = state.get("master")
    follows = master is not None and (state.get("step", 1) == 0 or master.dtype == torch.bfloat16)
    return {key: value for key, value in state.items() if key != "master" or not follows}


def logged(side: Side) -> Any:
    """What hooks saw since the last look."""
    seen = list(side.log)
    side.log.clear()
    return seen


def held(side: Side) -> Any:
    """A reference to a gradient, whatever became of it since."""
    return None if side.held is None else side.held.detach().clone()


LOOKS = {look.__name__: look for look in (gradients, norms, weights, weights_read, states, live_states, logged, held)}


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """Where two nested values differ, to the bit; None where they do not."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{where}: {one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}"
        if one.is_floating_point() and not same_bits(one.detach().contiguous(), other.detach().contiguous()):
            return f"{where}: {one} and {other}"
        return None if torch.equal(one, other) or one.is_floating_point() else f"{where}: {one} and {other}"
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if set(one) != set(other):
            return f"{where}: keys {set(one) ^ set(other)}"
        pairs: Any = ((f"{where}.{key}", one[key], other[key]) for key in one)
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return f"{where}: {len(one)} and {len(other)}"
        pairs = ((f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(one, other, strict=True)))
    else:
        return None if type(one) is type(other) and one == other else f"{where}: {one!r} and {other!r}"
    return next((found for where, a, b in pairs if (found := difference(a, b, where)) is not None), None)
