"""load_checkpoint(): everything is checked before anything is changed."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._checkpoint_directory import open_checkpoint
from ._errors import InvalidArgument, StorageError
from ._optimizer import OffloadOptimizer
from ._running_save import finish_saves
from ._safetensors import map_tensors
from ._saving import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    Optimizers,
    model_values,
    parameter_names,
)
from ._units import check_module
from ._wrap import as_list

__all__ = ["Checkpoint", "load_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """What was loaded: where it is, its tag, and the `client_state` that was saved with it."""

    path: Path
    tag: str
    client_state: dict[str, Any]


@dataclass(frozen=True)
class Contents:
    """A verified checkpoint: its tensors lie on mapped pages of the files."""

    path: Path
    tag: str
    model: dict[str, Tensor]
    states: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def excluded(self) -> set[str]:
        """Names of weights that the save left out; a checkpoint of before that was possible has them all."""
        return set(self.state.get("excluded", ()))

    @property
    def frozen(self) -> set[str]:
        """Names of weights that did not require gradients; a checkpoint of before that was written names none."""
        return set(self.state.get("frozen", ()))


def read_checkpoint(directory: str | os.PathLike[str], tag: str | None) -> Contents:
    """Verifies every byte; raises `StorageError` naming what is missing or damaged."""
    finish_saves()
    manifest = open_checkpoint(Path(directory), tag)
    absent = {MODEL_FILE, OPTIMIZER_FILE, STATE_FILE} - manifest.files.keys()
    if absent:
        raise StorageError(f"the manifest of {manifest.path} does not list {min(absent)}: load another checkpoint")
    manifest.verify()
    model, states = (map_tensors(manifest.path / name) for name in (MODEL_FILE, OPTIMIZER_FILE))
    try:
        state = torch.load(manifest.path / STATE_FILE, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise StorageError(
            f"{manifest.path / STATE_FILE} holds what no save writes, nothing of it was run: {error}"
        ) from error
    return Contents(manifest.path, manifest.tag, model, states, state)


def load_checkpoint(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optim: Optimizers = None,
    *,
    tag: str | None = None,
    strict: bool = True,
    accept: Callable[[dict[str, Any]], None] | None = None,
) -> Checkpoint:
    """Loads what `save_checkpoint` saved, in place, under whatever placement model and optimizers have now.

    Args:
        directory: the one given to `save_checkpoint`.
        model: takes the weights and buffers; in its own dtype and on its own device.
        optim: its optimizer or optimizers, as many as were saved; None loads weights alone.
        tag: of the checkpoint; None takes the one that `latest` names.
        strict: whether weights of other names than the model's are refused. Those that `exclude_frozen` left out may
            be missing in any case, and stay as the model has them.
        accept: is given the client state when all was checked and nothing is changed yet; what it raises ends the load.

    Raises:
        StorageError: there is no such checkpoint, or a file of it is missing, short or damaged: the message names it.
        InvalidArgument: names, shapes or groups are not those of the model and the optimizers.
        In both cases nothing was changed.
    """
    check_module(model)
    optimizers = as_list(optim)
    contents = read_checkpoint(directory, tag)
    weights = model_state_dict(contents)
    _check_model(model, weights, contents.excluded, strict=strict)
    states = _optimizer_state_dicts(contents, model, optimizers) if optimizers else []
    for optimizer, state in zip(optimizers, states, strict=True):
        if isinstance(optimizer, OffloadOptimizer):
            optimizer.check_state_dict(state)
    if accept is not None:
        accept(contents.state["client_state"])
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)
    model.load_state_dict(weights, strict=strict and not contents.excluded)
    return Checkpoint(contents.path, contents.tag, contents.state["client_state"])


def model_state_dict(contents: Contents) -> OrderedDict[str, Any]:
    """What `model.load_state_dict` takes: tied names are there again."""
    weights: OrderedDict[str, Any] = OrderedDict(contents.model)
    weights.update({name: contents.model[first] for name, first in contents.state["tied"].items()})
    weights.update(contents.state["model_extra"])
    weights._metadata = contents.state["model_metadata"]  # type: ignore[attr-defined]
    return weights


def _listed(names: Sequence[str]) -> str:
    """The first of the names, and how many there are where some are left out."""
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown}, ... ({len(names)} names)"


def _check_model(model: nn.Module, weights: Mapping[str, Any], excluded: set[str], *, strict: bool) -> None:
    """torch copies what fits before it refuses the rest: so that is looked at first."""
    own, extra, _ = model_values(model)
    missing = sorted((own.keys() | extra.keys()) - weights.keys() - excluded)
    unexpected = sorted(weights.keys() - (own.keys() | extra.keys()))
    if strict and (missing or unexpected):
        lacks = [f"it has no {_listed(missing)}"] if missing else []
        lacks += [f"this model has no {_listed(unexpected)}"] if unexpected else []
        raise InvalidArgument(
            f"the checkpoint is of another model: {', and '.join(lacks)}; strict=False loads the rest"
        )
    for name, value in own.items():
        saved = weights.get(name)
        if isinstance(saved, Tensor) and saved.shape != value.shape:
            raise InvalidArgument(f"{name} has shape {tuple(saved.shape)} in the checkpoint, not {tuple(value.shape)}")


def _optimizer_state_dicts(
    contents: Contents, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> list[dict[str, Any]]:
    """What each optimizer's `load_state_dict` takes, its parameters in the order they have now."""
    saved = contents.state["optimizers"]
    if len(saved) != len(optimizers):
        raise InvalidArgument(f"the checkpoint has {len(saved)} optimizers, and {len(optimizers)} were given")
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        _packed(one, parameter_names(optimizer, index, names), contents.states, own=optimizer)
        for index, (one, optimizer) in enumerate(zip(saved, optimizers, strict=True))
    ]


def _packed(
    saved: Mapping[str, Any], names: list[list[str]], states: Mapping[str, Tensor], *, own: torch.optim.Optimizer
) -> dict[str, Any]:
    name_of: dict[int, str] = saved["names"]
    index_of = {name: index for index, name in name_of.items()}
    groups = []
    if len(saved["param_groups"]) != len(names):
        raise InvalidArgument(f"the checkpoint has {len(saved['param_groups'])} groups, the optimizer {len(names)}")
    for number, (group, now) in enumerate(zip(saved["param_groups"], names, strict=True)):
        then = {name_of[index] for index in group["params"]}
        if then != set(now):
            raise InvalidArgument(
                f"group {number} of the saved optimizer has no {sorted(set(now) - then)[:5]}, and this optimizer's "
                f"no {sorted(then - set(now))[:5]}: build it with the groups of the run that was saved"
            )
        groups.append({**group, "params": [index_of[name] for name in now]})
    state = {}
    for index, rest in saved["state"].items():
        tensors = {key: states[f"{name_of[index]}.{key}"] for key in saved["keys"].get(index, ())}
        if not isinstance(own, OffloadOptimizer):
            # A stock optimizer keeps the tensors it is given: they must not be pages of the file.
            tensors = {key: value.clone() for key, value in tensors.items()}
        state[index] = {**tensors, **rest} if isinstance(rest, Mapping) else rest
    return {"state": state, "param_groups": groups}
