"""Optimizer states in torch's own layout: what is saved, and what is checked before any of it is loaded.

A native state holds `step`, its moments in fp32 (of smaller formats: their values) and, for a 16-bit parameter, its
`master`: in fp32, or the bf16 weight that is its own.
Stock torch loads that too (it casts the moments and has no use for the master), and what stock torch saved loads here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ._errors import InvalidArgument
from ._native_state import NativeState

Groups = Sequence[dict[str, Any]]
SavedState = Mapping[str, Any]

# How torch is to run the update says nothing about the training: a loaded group keeps its own.
_IMPLEMENTATION_FLAGS = ("foreach", "fused", "capturable", "differentiable")


def dump(state: NativeState, *, joined: bool = True) -> dict[str, Any]:
    """The state as `optimizer.state` shows it: fp32 tensors, new ones of what is split, small or on disk.

    With `joined` False nothing is made: the tensors as they lie, and what makes the values from them.
    """
    dumped: dict[str, Any] = {"step": torch.tensor(float(state.step), device="cpu")}
    dumped |= state.moment_values() if joined else state.live_moments()
    if state.parameter.dtype != torch.float32:
        dumped["master"] = state.master_value() if joined else state.live_master()
    return dumped


def plain(state: NativeState) -> dict[str, Any]:
    """What stock torch would hold: moments in the parameter's dtype on its device."""
    device, dtype = state.parameter.device, state.parameter.dtype
    moments = {key: value.detach().to(device, dtype, copy=True) for key, value in state.moment_values().items()}
    return {"step": torch.tensor(float(state.step), device="cpu"), **moments}


def pair(
    groups: Groups, state_dict: Mapping[str, Any]
) -> tuple[list[tuple[Parameter, SavedState | None]], dict[Any, Any]]:
    """Every parameter of `groups` with its saved state, and the entries that belong to no parameter.

    Raises `InvalidArgument` for what is no state of an optimizer with these groups.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise InvalidArgument(
            "this is no optimizer state: it needs the keys 'state' and 'param_groups', as optimizer.state_dict() has"
        )
    saved_groups, saved_states = state_dict["param_groups"], state_dict["state"]
    if (
        not isinstance(saved_groups, (list, tuple))
        or not all(isinstance(group, Mapping) and "params" in group for group in saved_groups)
        or not isinstance(saved_states, Mapping)
    ):
        raise InvalidArgument(
            "this is no optimizer state: it needs a list of dicts with 'params' as 'param_groups' and a dict as "
            "'state', as optimizer.state_dict() has"
        )
    counts = [len(group["params"]) for group in groups]
    saved_counts = [len(group["params"]) for group in saved_groups]
    if counts != saved_counts:
        raise InvalidArgument(f"the loaded state has groups of {saved_counts} parameters, this optimizer of {counts}")
    indices = [index for group in saved_groups for index in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    pairs = [(parameter, saved_states.get(index)) for parameter, index in zip(parameters, indices, strict=True)]
    for _, saved in pairs:
        if not isinstance(saved, Mapping | None):
            raise InvalidArgument(f"the loaded state has {saved!r} for a parameter; it must be a dict of its entries")
    known = set(indices)
    return pairs, {key: value for key, value in saved_states.items() if key not in known}


def check_groups(
    groups: Groups, saved_groups: Groups, kind: type[NativeState], read: Callable[[Mapping[str, Any]], Any]
) -> None:
    """Raises `InvalidArgument` unless the saved groups have this optimizer's hyperparameters, which `read` reads."""
    for number, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        missing = [key for key in kind.hyperparameters if key not in saved_group]
        if missing:
            raise InvalidArgument(
                f"group {number} of the loaded state has no {missing[0]!r}; {kind.optimizers} states can be loaded"
            )
        try:
            read({**group, **saved_group})
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"group {number} of the loaded state: {error}") from error


def check_state(name: str, parameter: Tensor, saved: SavedState, kind: type[NativeState]) -> None:
    """Raises `InvalidArgument` unless `saved` is a state of that kind of this parameter, of which nothing is NaN."""
    if "max_exp_avg_sq" in saved:
        raise InvalidArgument(
            f"{name}: the state comes from amsgrad=True and this optimizer has amsgrad=False: build it with "
            "amsgrad=True before offload.wrap"
        )
    for key in ("step", *kind.moment_arguments):
        if saved.get(key) is None:
            raise InvalidArgument(f"{name}: the loaded state has no {key!r}; {kind.optimizers} states can be loaded")
    step = saved["step"]
    if isinstance(step, Tensor) and step.numel() == 1:
        step = step.item()
    if not isinstance(step, (int, float)) or not step >= 0 or not float(step).is_integer():
        raise InvalidArgument(f"{name}: step is {step!r}; it must be a whole number, 0 or more")
    for key in (*kind.moment_arguments, "master"):
        value = saved.get(key)
        if value is not None:
            check_entry(name, parameter, key, value, (*kind.moment_arguments, "master"))


def check_entry(name: str, parameter: Tensor, key: str, value: Any, legal: Collection[str]) -> None:
    """Raises `InvalidArgument` unless `value` can be the tensor `key` of a state, whose tensors are `legal`."""
    if key not in legal:
        raise InvalidArgument(f"{name}: its state has no {key!r}; it has {', '.join(sorted(legal))}")
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta:
        what = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        raise InvalidArgument(f"{name}: {key} is {what}; it must be a tensor of floating-point values")
    if value.shape != parameter.shape:
        raise InvalidArgument(f"{name}: {key} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
    if bool(value.isnan().any()):
        raise InvalidArgument(f"{name}: {key} contains NaN, that run had diverged: load an earlier checkpoint")


def load_group(group: dict[str, Any], saved_group: Mapping[str, Any]) -> None:
    """Takes over the hyperparameters, and what else the saved group holds but parameters and implementation flags."""
    group.update(
        {
            key: copy.deepcopy(value)
            for key, value in saved_group.items()
            if key != "params" and key not in _IMPLEMENTATION_FLAGS
        }
    )


@torch.no_grad()
def load(state: NativeState, saved: SavedState) -> None:
    """Writes a checked state in place: no tensor of ours changes its storage, its dtype or its tier."""
    state.step = int(saved["step"])
    for piece in state.pieces():
        for key, moment in piece.moments.items():
            moment.load(piece.of(saved[key]))
    master = saved.get("master")
    if master is not None:
        state.set_master(master)
    else:
        state.seed_master()


@torch.no_grad()
def reset(state: NativeState) -> None:
    """The saved run had no state of this parameter: it starts anew from its weight."""
    state.step = 0
    state.reset_moments()
    state.seed_master()
