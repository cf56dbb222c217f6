"""Optimizer states in torch's own Adam and AdamW layout: what is saved, and what is checked before any of it is loaded.

A state holds `step`, fp32 `exp_avg` and `exp_avg_sq` and, for a 16-bit parameter, its fp32 `master`. Stock torch loads
that too (it casts the moments and has no use for the master), and what stock torch saved loads here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ._adamw import AdamWHyper
from ._errors import InvalidArgument
from ._parameter_state import ParameterState

Groups = Sequence[dict[str, Any]]
SavedState = Mapping[str, Any]

_HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")
# How torch is to run the update says nothing about the training: a loaded group keeps its own.
_IMPLEMENTATION_FLAGS = ("foreach", "fused", "capturable", "differentiable")


def dump(state: ParameterState) -> dict[str, Any]:
    """The state as `optimizer.state` shows it: the live tensors, and a new one for a split master."""
    dumped: dict[str, Any] = {
        "step": torch.tensor(float(state.step), device="cpu"),
        "exp_avg": state.exp_avg,
        "exp_avg_sq": state.exp_avg_sq,
    }
    if state.parameter.dtype != torch.float32:
        dumped["master"] = state.master_value()
    return dumped


def plain(state: ParameterState) -> dict[str, Any]:
    """What stock torch would hold: moments in the parameter's dtype on its device."""
    device, dtype = state.parameter.device, state.parameter.dtype
    return {
        "step": torch.tensor(float(state.step), device="cpu"),
        "exp_avg": state.exp_avg.detach().to(device, dtype, copy=True),
        "exp_avg_sq": state.exp_avg_sq.detach().to(device, dtype, copy=True),
    }


def check(
    groups: Groups, state_dict: Mapping[str, Any], name_of: Callable[[Parameter], str], *, decoupled: bool
) -> list[tuple[Parameter, SavedState | None]]:
    """Every parameter of `groups` with its saved state. Raises `InvalidArgument` for anything that cannot be loaded."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise InvalidArgument(
            "this is no optimizer state: it needs the keys 'state' and 'param_groups', as optimizer.state_dict() has"
        )
    saved_groups = state_dict["param_groups"]
    counts = [len(group["params"]) for group in groups]
    saved_counts = [len(group["params"]) for group in saved_groups]
    if counts != saved_counts:
        raise InvalidArgument(f"the loaded state has groups of {saved_counts} parameters, this optimizer of {counts}")
    for number, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        missing = [key for key in _HYPERPARAMETERS if key not in saved_group]
        if missing:
            raise InvalidArgument(
                f"group {number} of the loaded state has no {missing[0]!r}; Adam and AdamW states can be loaded"
            )
        try:
            AdamWHyper.of_group({**group, **saved_group}, decoupled=decoupled)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"group {number} of the loaded state: {error}") from error
    saved_states = state_dict["state"]
    indices = [index for group in saved_groups for index in group["params"]]
    unknown = sorted(map(str, saved_states.keys() - set(indices)))
    if unknown:
        raise InvalidArgument(f"the loaded state has an entry {unknown[0]!r} that is in none of its groups")
    parameters = [parameter for group in groups for parameter in group["params"]]
    pairs = [(parameter, saved_states.get(index)) for parameter, index in zip(parameters, indices, strict=True)]
    for parameter, saved in pairs:
        if saved:
            check_state(name_of(parameter), parameter, saved)
    return pairs


def check_state(name: str, parameter: Tensor, saved: SavedState) -> None:
    """Raises `InvalidArgument` unless `saved` is an Adam state of this parameter, of which nothing is NaN."""
    if "max_exp_avg_sq" in saved:
        raise InvalidArgument(f"{name}: the state comes from amsgrad=True, which is not supported")
    for key in ("step", "exp_avg", "exp_avg_sq"):
        if saved.get(key) is None:
            raise InvalidArgument(f"{name}: the loaded state has no {key!r}; Adam and AdamW states can be loaded")
    step = saved["step"]
    if isinstance(step, Tensor) and step.numel() == 1:
        step = step.item()
    if not isinstance(step, (int, float)) or not step >= 0 or not float(step).is_integer():
        raise InvalidArgument(f"{name}: step is {step!r}; it must be a whole number, 0 or more")
    for key in ("exp_avg", "exp_avg_sq", "master"):
        value = saved.get(key)
        if value is None and key == "master":
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta:
            what = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise InvalidArgument(f"{name}: {key} is {what}; it must be a tensor of floating-point values")
        if value.shape != parameter.shape:
            raise InvalidArgument(f"{name}: {key} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
        if bool(value.isnan().any()):
            raise InvalidArgument(f"{name}: {key} contains NaN, that run had diverged: load an earlier checkpoint")


def load_group(group: dict[str, Any], saved_group: Mapping[str, Any], *, decoupled: bool) -> None:
    """Takes over the hyperparameters, and what else the saved group holds but parameters and implementation flags."""
    group.update(
        {
            key: copy.deepcopy(value)
            for key, value in saved_group.items()
            if key != "params" and key not in _IMPLEMENTATION_FLAGS
        }
    )
    if decoupled:  # as torch: an AdamW stays one when it loads what an Adam saved
        group["decoupled_weight_decay"] = True


@torch.no_grad()
def load(state: ParameterState, saved: SavedState) -> None:
    """Writes a checked state in place: no tensor of ours changes its storage, its dtype or its tier."""
    state.step = int(saved["step"])
    state.exp_avg.copy_(saved["exp_avg"])
    state.exp_avg_sq.copy_(saved["exp_avg_sq"])
    master = saved.get("master")
    if master is not None:
        state.set_master(master)
    else:
        state.seed_master()


@torch.no_grad()
def reset(state: ParameterState) -> None:
    """The saved run had no state of this parameter: it starts anew from its weight."""
    state.step = 0
    state.exp_avg.zero_()
    state.exp_avg_sq.zero_()
    state.seed_master()
