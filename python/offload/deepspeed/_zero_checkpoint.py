"""Loads weights and optimizer states that DeepSpeed saved from one rank, at any ZeRO stage.

Their files are pickles. torch's restricted unpickler reads them, with the classes that such a checkpoint may hold added
to its list; each is replaced by an empty class of ours, so that nothing of DeepSpeed is needed and nothing of the file
runs. Stages 0 to 2 keep weights in `mp_rank_00_model_states.pt`. From stage 1 on each group of parameters is one flat
fp32 tensor, and so are its moments, in parts (`sub_group_size`) at stage 3, which keeps its weights nowhere else.
"""

from __future__ import annotations

import argparse
import enum
import itertools
import math
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offload import Checkpoint, InvalidArgument, OffloadOptimizer, StorageError

__all__ = [
    "COUNTERS",
    "ENGINE_ENTRY",
    "DynamicLossScaler",
    "LossScaler",
    "ZeroStageEnum",
    "fragment_address",
    "is_zero_checkpoint",
    "load_zero_checkpoint",
    "zero_checkpoint_weights",
]

# In the client state of a loaded checkpoint: what the engine itself goes on from.
ENGINE_ENTRY = "deepspeed_engine"
COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def _stand_in(path: str, base: type = object) -> type:
    """A class that answers to the name of another one and does nothing but hold attributes."""
    module, _, name = path.rpartition(".")
    return type(name, (base,), {"__module__": module, "__qualname__": name})


# Scripts import these too, to tell `torch.load` that they may be in a file.
LossScaler = _stand_in("deepspeed.runtime.fp16.loss_scaler.LossScaler")
DynamicLossScaler = _stand_in("deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler")
fragment_address = _stand_in("deepspeed.utils.tensor_fragment.fragment_address")
ZeroStageEnum = enum.Enum(
    "ZeroStageEnum",
    {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3, "max_stage": 3},
    module="deepspeed.runtime.zero.config",
    type=int,
)


def _stage(kind: Any, name: Any) -> Any:
    """In the place of `getattr`, by which the first releases of Python 3.11 (Debian 12's) pickle what is of an enum."""
    if kind is ZeroStageEnum and name in ZeroStageEnum.__members__:
        return ZeroStageEnum[name]
    raise pickle.UnpicklingError(f"getattr({kind!r}, {name!r}) is no stage of ZeRO")


# argparse.Namespace: scripts save their arguments in the client state.
_ALLOWED: list[Any] = [
    *(LossScaler, DynamicLossScaler, fragment_address, ZeroStageEnum, argparse.Namespace),
    (_stage, "builtins.getattr"),
]

# What the model's file holds of the engine; every other entry is the user's client state.
_ENGINE_ENTRIES = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
    "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version",
    "checkpoint_parallel_dimensions",
}  # fmt: skip


def is_zero_checkpoint(directory: str | os.PathLike[str], tag: str | None) -> bool:
    """Whether DeepSpeed wrote the checkpoint `tag`, None: the one that `latest` names."""
    place = Path(directory)
    return _model_file(place / (_latest(place) if tag is None else tag)) is not None


def load_zero_checkpoint(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optim: torch.optim.Optimizer | None = None,
    *,
    tag: str | None = None,
    strict: bool = True,
    accept: Callable[[dict[str, Any]], None] | None = None,
) -> Checkpoint:
    """Loads a checkpoint that `DeepSpeedEngine.save_checkpoint` wrote with one rank.

    Args:
        directory: the one that was given to DeepSpeed. tag: None takes what its file `latest` names.
        model, optim: take the values, wrapped or not. The optimizer has the groups of theirs; None loads weights alone.
        strict: whether weights of other names than the model's are refused.
        accept: is given the client state when nothing is changed yet; what it raises ends the load.

    Returns:
        The checkpoint; its client state is the user's, and under `ENGINE_ENTRY` their `COUNTERS`, `lr_scheduler` and
        `loss_scale`, as far as they saved them. A loaded fp32 master counts where the weight is its rounded value, half
        up: at exact ties, where DeepSpeed rounds to even, the weight is the master.

    Raises:
        StorageError: there is no such checkpoint, it cannot be read, or holds what no ZeRO checkpoint needs.
        InvalidArgument: it is of several ranks, or of another model or optimizer. Nothing was changed in both cases.
    """
    zero = _open(directory, tag)
    folder, saved, states, masters, groups = zero.folder, zero.model, zero.states, zero.masters, zero.groups
    weights = zero.weights()
    _check_weights(folder, model, weights, strict=strict)
    if optim is not None:
        names = {id(p): name for name, p in model.named_parameters()}
        own = [[(names[id(p)], p) for p in group["params"] if p.requires_grad] for group in optim.param_groups]
        if states is None:
            packed = _whole_states(folder, saved.get("optimizer"), own)
        else:
            packed = _flat_states(folder, states, masters or [], groups, zero.slices, own)
    client = {key: value for key, value in saved.items() if key not in _ENGINE_ENTRIES}
    client[ENGINE_ENTRY] = {
        **{name: saved[name] for name in COUNTERS if name in saved},
        "lr_scheduler": saved.get("lr_scheduler"),
        "loss_scale": _loss_scale(saved.get("optimizer") if states is None else states),
    }
    if isinstance(optim, OffloadOptimizer):
        optim.check_state_dict(packed)
    if accept is not None:
        accept(client)
    if optim is not None:
        optim.load_state_dict(packed)
    model.load_state_dict(weights, strict=strict)
    return Checkpoint(folder, folder.name, client)


def zero_checkpoint_weights(
    directory: str | os.PathLike[str], *, tag: str | None = None, exclude_frozen: bool = False
) -> dict[str, Tensor]:
    """Weights and buffers in fp32 by name: the masters where ZeRO kept some, on mapped pages of the files.

    Raises as `load_zero_checkpoint`.
    """
    zero = _open(directory, tag)
    weights = zero.weights()
    for master, shapes, number in zip(zero.masters or (), zero.groups, itertools.count()):
        weights.update(_in_pieces(master, shapes, None if zero.slices is None else zero.slices[number]))
    weights.update(zero.tied(weights))
    frozen = zero.frozen(weights) if exclude_frozen else ()
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor) and name not in frozen}
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


@dataclass(frozen=True)
class _Zero:
    """One rank's checkpoint: the files of the model and of the optimizer, None where the optimizer is in the first.

    masters: flat fp32 weights of each of `groups`, which have the shapes by name. slices: where each lies.
    """

    folder: Path
    model: dict[str, Any]
    states: Mapping[str, Any] | None
    masters: list[Tensor] | None
    is_stage_3: bool

    @property
    def groups(self) -> Sequence[Mapping[str, Sequence[int]]]:
        return self.model.get("param_shapes") or ()

    @property
    def slices(self) -> Sequence[Mapping[str, Any]] | None:
        return None if self.states is None else self.states.get("param_slice_mappings")

    def tied(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        return {name: weights[first] for name, first in (self.model.get("shared_params") or {}).items()}

    def frozen(self, weights: Mapping[str, Any]) -> set[str]:
        """Names of what is in no group, and no buffer; none at stage 0, which does not say what the groups are."""
        trained = {name for group in self.groups for name in group}
        known = trained.union(self.model.get("buffer_names") or (), self.model.get("shared_params") or ())
        return weights.keys() - known if trained else set()

    def weights(self) -> dict[str, Any]:
        """What `model.state_dict()` gave; at stage 3 its parameters are the masters."""
        weights = dict(self.model["module"])
        if not self.is_stage_3:
            return weights
        if self.masters is None:
            raise StorageError(f"{self.folder} is of stage 3 and has no optimizer states, where its weights would be")
        for master, shapes in zip(self.masters, self.groups, strict=True):
            weights.update(_in_pieces(master, shapes))
        for name, shape in (self.model.get("frozen_param_shapes") or {}).items():
            weights[name] = self.model["frozen_param_fragments"][name][: math.prod(shape)].view(shape)
        return weights | self.tied(weights)


def _open(directory: str | os.PathLike[str], tag: str | None) -> _Zero:
    place = Path(directory)
    folder = place / (_latest(place) if tag is None else tag)
    path = _model_file(folder)
    if path is None:
        raise StorageError(f"there is no DeepSpeed checkpoint in {folder}: it has no mp_rank_00_model_states.pt")
    saved = _read(path)
    if saved.get("dp_world_size", 1) != 1 or saved.get("mp_world_size", 1) != 1:
        raise InvalidArgument(
            f"{folder} was saved by {saved.get('dp_world_size')} data-parallel and {saved.get('mp_world_size')} "
            "model-parallel ranks, and one rank's can be loaded: convert it with DeepSpeed's zero_to_fp32 first"
        )
    file = next(iter(sorted(folder.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt"))), None)
    states = None if file is None else _read(file)["optimizer_state_dict"]
    masters = None if states is None else _flat_masters(states)
    return _Zero(folder, saved, states, masters, path.name.startswith("zero_pp"))


# Our names and theirs: stage 0 saves all but the last in its optimizer's states, the others in an object in theirs.
_SCALE_NAMES = {
    "scale": "cur_scale",
    "step": "cur_iter",
    "last_overflow": "last_overflow_iter",
    "hysteresis": "cur_hysteresis",
}


def _loss_scale(states: Any) -> dict[str, Any]:
    """What they saved of the loss scale; of a static one, and without fp16, that is little or nothing."""
    scaler = states.get("loss_scaler") if isinstance(states, Mapping) else None
    saved = vars(scaler) if scaler is not None else states
    if not isinstance(saved, Mapping):
        return {}
    return {ours: saved[theirs] for ours, theirs in _SCALE_NAMES.items() if theirs in saved}


def _model_file(folder: Path) -> Path | None:
    names = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _latest(place: Path) -> str:
    try:
        tag = (place / "latest").read_text(errors="replace").strip()
    except FileNotFoundError:
        raise StorageError(f"there is no checkpoint in {place}: it has no file 'latest'; pass tag=") from None
    if not tag or "/" in tag or tag.startswith("."):
        raise StorageError(f"{place / 'latest'} holds {tag!r}, which is no tag: pass tag=")
    return tag


def _read(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            saved: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise StorageError(
            f"{path} is damaged, or holds what offload does not load from a file (nothing of it was run): {error}"
        ) from error
    if not isinstance(saved, dict) or not {"module", "optimizer_state_dict"} & saved.keys():
        raise StorageError(f"{path} holds neither a model nor optimizer states as DeepSpeed saves them")
    return saved


def _flat_masters(states: Mapping[str, Any]) -> list[Tensor]:
    """Flat fp32 weights: one tensor a group, at stage 3 one a sub-group."""
    for key in ("single_partition_of_fp32_groups", "fp32_flat_groups"):
        if key in states:
            return list(states[key])
    raise StorageError("the optimizer states hold no fp32 weights: this layout of a ZeRO checkpoint is not known")


def _in_pieces(
    flat: Tensor, shapes: Mapping[str, Sequence[int]], slices: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Views of a flat tensor by parameter: one after another, or where `slices` has them (they may be aligned)."""
    pieces = {}
    position = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        start = position if slices is None else int(slices[name].start)
        position = start + count
        if position > flat.numel():
            raise StorageError(f"{name} ends at {position:,} of {flat.numel():,} elements: not one rank's checkpoint")
        pieces[name] = flat[start:position].view(tuple(shape))
    return pieces


def _check_weights(folder: Path, model: nn.Module, weights: Mapping[str, Any], *, strict: bool) -> None:
    """torch copies what fits before it refuses the rest: so that is looked at first."""
    own = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in module._non_persistent_buffers_set:
                own[f"{path}.{name}" if path else name] = buffer.shape
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted(name for name in weights.keys() - own.keys() if isinstance(weights[name], Tensor))
    if strict and (missing or unexpected):
        raise InvalidArgument(
            f"{folder} is of another model: it has no {missing[:5]}, and this model no {unexpected[:5]}"
        )
    for name, shape in own.items():
        if name in weights and weights[name].shape != shape:
            raise InvalidArgument(f"{name} has shape {tuple(weights[name].shape)} in {folder}, not {tuple(shape)}")


# What one group has now: the name and the parameter of each.
_Own = list[list[tuple[str, nn.Parameter]]]


def _flat_states(
    folder: Path,
    states: Mapping[str, Any],
    masters: Sequence[Tensor],
    groups: Sequence[Mapping[str, Sequence[int]]],
    slices: Sequence[Mapping[str, Any]] | None,
    own: _Own,
) -> dict[str, Any]:
    """A packed state_dict of `own` from flat states; a part of a group has whole parameters."""
    base = states.get("base_optimizer_state") or states.get("optimizer_state_dict")
    if not isinstance(base, Mapping) or "state" not in base:
        raise InvalidArgument(
            f"{folder} holds its optimizer states by tensor ('elastic_checkpoint'), which is not read"
        )
    saved_names = [{name for part in group["params"] for name in groups[part]} for group in base["param_groups"]]
    if saved_names != [{name for name, _ in group} for group in own]:
        raise InvalidArgument(
            f"{folder} has groups of {[len(group) for group in saved_names]} parameters, and those of the optimizer "
            f"({[len(group) for group in own]}) are not the same by name: build it with the groups of that run"
        )
    packed: dict[str, Any] = {"state": {}, "param_groups": []}
    for group, mine in zip(base["param_groups"], own, strict=True):
        pieces: dict[str, dict[str, Tensor]] = {}
        shared = {"step": group["step"]} if "step" in group else {}
        for part in group["params"]:
            where = None if slices is None else slices[part]
            for key, value in {**base["state"].get(part, {}), "master": masters[part]}.items():
                if isinstance(value, Tensor) and value.ndim == 1:
                    pieces.setdefault(key, {}).update(_in_pieces(value, groups[part], where))
                else:
                    shared[key] = value
        _append(packed, group, mine, pieces, shared)
    return packed


def _whole_states(folder: Path, optimizer: Any, own: _Own) -> dict[str, Any]:
    """A packed state_dict of `own` from what stage 0 saves: torch's own layout, and fp32 masters beside it.

    FusedAdam's are flat, one tensor a group; there the names are those that the optimizer's parameters have now.
    """
    if not isinstance(optimizer, Mapping):
        raise InvalidArgument(f"{folder} holds no optimizer states: load its weights alone")
    flat = optimizer.get("fp32_groups_flat")
    if flat is not None:
        shapes = [{name: p.shape for name, p in group} for group in own]
        if [master.numel() for master in flat] != [sum(map(math.prod, group.values())) for group in shapes]:
            raise InvalidArgument(
                f"{folder} has flat groups of {[master.numel() for master in flat]} elements, and those of the "
                f"optimizer have other sizes: build it with the groups of that run"
            )
        return _flat_states(folder, optimizer, flat, shapes, None, own)
    base = optimizer.get("optimizer_state_dict", optimizer)
    masters = optimizer.get("fp32_groups")
    if "param_groups" not in base or (base is not optimizer and masters is None):
        raise InvalidArgument(f"{folder} holds optimizer states in a layout that is not read: load its weights alone")
    counts = [len(group["params"]) for group in base["param_groups"]]
    if counts != [len(group) for group in own]:
        raise InvalidArgument(f"{folder} has groups of {counts} parameters, the optimizer {[len(g) for g in own]}")
    packed: dict[str, Any] = {"state": {}, "param_groups": []}
    for number, (group, mine) in enumerate(zip(base["param_groups"], own, strict=True)):
        pieces: dict[str, dict[str, Any]] = {}
        for place, ((name, _), index) in enumerate(zip(mine, group["params"], strict=True)):
            entries = dict(base["state"].get(index, {}))
            if masters is not None:
                entries["master"] = masters[number][place]
            for key, value in entries.items():
                pieces.setdefault(key, {})[name] = value
        _append(packed, group, mine, pieces, {"step": group["step"]} if "step" in group else {})
    return packed


def _append(
    packed: dict[str, Any],
    group: Mapping[str, Any],
    mine: Sequence[tuple[str, nn.Parameter]],
    pieces: Mapping[str, Mapping[str, Any]],
    shared: Mapping[str, Any],
) -> None:
    first = len(packed["state"])
    for index, (name, parameter) in enumerate(mine, first):
        entries = {**shared, **{key: values[name] for key, values in pieces.items() if name in values}}
        if parameter.dtype == torch.float32:
            entries.pop("master", None)
        # Copies: a stock optimizer keeps the tensors it is given, and these are pages of the file.
        packed["state"][index] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in entries.items()}
    settings = {key: value for key, value in group.items() if key not in ("params", "step")}
    packed["param_groups"].append({**settings, "params": list(range(first, first + len(mine)))})
