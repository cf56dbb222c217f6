"""Loads weights and optimizer states that DeepSpeed saved from one rank, at any ZeRO stage.

Their files are pickles. torch's restricted unpickler reads them, with the classes that such a checkpoint may hold added
to its list; each is replaced by an empty class of ours, so that nothing of DeepSpeed is needed and nothing of the file
runs. Stages 0 to 2 keep weights in `mp_rank_00_model_states.pt`. From stage 1 on each group of parameters is one flat
fp32 tensor, and so are its moments, in parts (`sub_group_size`) at stage 3, which keeps its weights nowhere else.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offload import Checkpoint, InvalidArgument, StorageError

__all__ = ["is_zero_checkpoint", "load_zero_checkpoint"]


def _stand_in(path: str, base: type = object) -> type:
    """A class that answers to the name of another one and does nothing but hold attributes."""
    module, _, name = path.rpartition(".")
    return type(name, (base,), {"__module__": module, "__qualname__": name})


_ALLOWED: list[Any] = [
    _stand_in("deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    _stand_in("deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    _stand_in("deepspeed.utils.tensor_fragment.fragment_address"),
    _stand_in("deepspeed.runtime.zero.config.ZeroStageEnum", int),
]

# What the model's file holds of the engine; every other entry is the user's client state.
_ENGINE_ENTRIES = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
    "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version",
    "checkpoint_parallel_dimensions",
}  # fmt: skip
_ENGINE_STATE = ("lr_scheduler", "skipped_steps", "global_steps", "global_samples")


def is_zero_checkpoint(directory: str | os.PathLike[str], tag: str) -> bool:
    """Whether DeepSpeed wrote the checkpoint `tag`."""
    return _model_file(Path(directory) / tag) is not None


def load_zero_checkpoint(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optim: torch.optim.Optimizer | None = None,
    *,
    tag: str | None = None,
    strict: bool = True,
) -> Checkpoint:
    """Loads a checkpoint that `DeepSpeedEngine.save_checkpoint` wrote with one rank.

    Args:
        directory: the one that was given to DeepSpeed. tag: None takes what its file `latest` names.
        model, optim: take the values, wrapped or not. The optimizer has the groups of theirs; None loads weights alone.
        strict: whether weights of other names than the model's are refused.

    Returns:
        The checkpoint; its client state is the user's, and their `lr_scheduler`, `global_steps`, `global_samples` and
        `skipped_steps`. A loaded fp32 master counts where the weight is its rounded value, half up: at exact ties,
        where DeepSpeed rounds to even, the weight is the master.

    Raises:
        StorageError: there is no such checkpoint, it cannot be read, or holds what no ZeRO checkpoint needs.
        InvalidArgument: it is of several ranks, or of another model or optimizer. Nothing was changed in both cases.
    """
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
    zero = next(iter(sorted(folder.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt"))), None)
    groups = saved.get("param_shapes") or ()
    states = None if zero is None else _read(zero)["optimizer_state_dict"]
    masters = None if states is None else _flat_masters(states)
    slices = None if states is None else states.get("param_slice_mappings")
    weights = dict(saved["module"])
    if path.name.startswith("zero_pp"):
        if masters is None:
            raise StorageError(f"{folder} is of stage 3 and has no optimizer states, where its weights would be")
        for master, shapes in zip(masters, groups, strict=True):
            weights.update(_in_pieces(master, shapes))
        for name, shape in (saved.get("frozen_param_shapes") or {}).items():
            weights[name] = saved["frozen_param_fragments"][name][: math.prod(shape)].view(shape)
        weights.update({name: weights[first] for name, first in (saved.get("shared_params") or {}).items()})
    _check_weights(folder, model, weights, strict=strict)
    if optim is not None:
        names = {id(p): name for name, p in model.named_parameters()}
        own = [[(names[id(p)], p) for p in group["params"] if p.requires_grad] for group in optim.param_groups]
        if states is None:
            packed = _whole_states(folder, saved.get("optimizer"), own)
        else:
            packed = _flat_states(folder, states, masters or [], groups, slices, own)
        optim.load_state_dict(packed)
    model.load_state_dict(weights, strict=strict)
    client = {key: value for key, value in saved.items() if key not in _ENGINE_ENTRIES or key in _ENGINE_STATE}
    return Checkpoint(folder, folder.name, client)


def _model_file(folder: Path) -> Path | None:
    names = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _latest(place: Path) -> str:
    try:
        tag = (place / "latest").read_text().strip()
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
    missing = sorted(own.keys() - weights.keys())
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    unexpected = sorted(weights.keys() - own.keys() - buffers)
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
    """A packed state_dict of `own` from what stage 0 saves: torch's own layout, and fp32 masters beside it."""
    if not isinstance(optimizer, Mapping):
        raise InvalidArgument(f"{folder} holds no optimizer states: pass optim=None to load its weights alone")
    base = optimizer.get("optimizer_state_dict", optimizer)
    masters = optimizer.get("fp32_groups")
    if "param_groups" not in base or (base is not optimizer and masters is None):
        raise InvalidArgument(f"{folder} holds optimizer states in a layout that is not read: pass optim=None")
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
