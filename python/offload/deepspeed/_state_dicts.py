"""`deepspeed.utils.zero_to_fp32`: the fp32 weights of a checkpoint, offload's own or one rank's of DeepSpeed."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import offload

from ._placement import is_wrapped
from ._zero_checkpoint import is_zero_checkpoint, zero_checkpoint_weights

__all__ = [
    "clone_tensors_for_torch_save",
    "convert_zero_checkpoint_to_fp32_state_dict",
    "convert_zero_checkpoint_to_state_dict",
    "get_fp32_state_dict_from_zero_checkpoint",
    "load_state_dict_from_zero_checkpoint",
    "replacing",
]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Tensor]:
    """Weights and buffers by name, on the CPU: every floating-point tensor in fp32, of 16-bit weights the masters.

    tag: None takes the one that the file `latest` names. lazy_mode: tensors may lie on pages of the checkpoint's files,
    and take no memory until they are read; `.contiguous()` of one is a tensor here too. Tied weights are one tensor. At
    stage 0 DeepSpeed keeps masters where this does not read them: its 16-bit weights are widened.

    Raises `StorageError` for a checkpoint that is not there or is damaged, and `InvalidArgument` for one of several
    ranks.
    """
    directory = os.fspath(checkpoint_dir)
    if is_zero_checkpoint(directory, tag):
        weights = zero_checkpoint_weights(directory, tag=tag, exclude_frozen=exclude_frozen_parameters)
    else:
        weights = offload.checkpoint_weights(directory, dtype="fp32", tag=tag, exclude_frozen=exclude_frozen_parameters)
    if lazy_mode:
        return weights
    own = {id(value): value for value in weights.values()}
    copies = {key: value.clone() for key, value in own.items()}
    return {name: copies[id(value)] for name, value in weights.items()}


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> nn.Module:
    """Loads the fp32 weights of a checkpoint into `model` and returns it: on the CPU, unless it is an engine's.

    Names that only one of the two has are passed over. Raises as `get_fp32_state_dict_from_zero_checkpoint`.
    """
    weights = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag, lazy_mode=True)
    if not is_wrapped(model):
        model.cpu()
    model.load_state_dict(weights, strict=False)
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """`convert_zero_checkpoint_to_state_dict` in fp32."""
    convert_zero_checkpoint_to_state_dict(
        checkpoint_dir, output_dir, torch.float32, max_shard_size, safe_serialization, tag, exclude_frozen_parameters
    )


def convert_zero_checkpoint_to_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    dtype: torch.dtype | str = torch.float32,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Writes the weights of a checkpoint to `output_dir`, as Hugging Face's `from_pretrained` reads them.

    Args:
        dtype: of floating-point tensors: torch.float32, bfloat16 or float16, or their names.
        max_shard_size: bytes, or text such as "5GB" or "500MiB": more go to several files and an index. None: one file.
        safe_serialization: `model.safetensors` instead of `pytorch_model.bin`; needs the package safetensors.
        checkpoint_dir, tag, exclude_frozen_parameters: as for `get_fp32_state_dict_from_zero_checkpoint`.

    Raises as that does, and `InvalidArgument` for another dtype or size. Each file is replaced when it is whole.
    """
    wanted, limit = _dtype_of(dtype), _bytes_of(max_shard_size)
    write = _safetensors_writer() if safe_serialization else torch.save
    weights = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag, exclude_frozen_parameters, lazy_mode=True)
    stem, suffix = ("model", ".safetensors") if safe_serialization else ("pytorch_model", ".bin")
    shards = _shards({name: _nbytes(value, wanted) for name, value in weights.items()}, limit)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}-{number:05}-of-{len(shards):05}{suffix}" if len(shards) > 1 else stem + suffix
        # Copies: a file takes the whole storage of a view, and safetensors none that two names share.
        shard = {
            name: weights[name].to(wanted if weights[name].is_floating_point() else weights[name].dtype, copy=True)
            for name in names
        }
        with replacing(folder / file) as aside:
            write(shard, aside)
        where.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(_nbytes(value, wanted) for value in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        with replacing(folder / f"{stem}{suffix}.index.json") as aside:
            aside.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in the place of `path`, which it takes when it is whole; after an error there is none of it."""
    aside = path.with_name(f".{path.name}.part")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _shards(nbytes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """Names in their order, as many a file as fit; what is larger than a file has one of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, count in nbytes.items():
        if limit is not None and shards[-1] and filled + count > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += count
    return shards


def _nbytes(value: Tensor, dtype: torch.dtype) -> int:
    return value.numel() * (dtype.itemsize if value.is_floating_point() else value.itemsize)


def _dtype_of(given: torch.dtype | str) -> torch.dtype:
    name = str(given).removeprefix("torch.").lower()
    found = _DTYPES.get(name) or next((dtype for dtype in _DTYPES.values() if str(dtype) == f"torch.{name}"), None)
    if found is None:
        legal = ", ".join(f"{dtype} ({short})" for short, dtype in _DTYPES.items())
        raise offload.InvalidArgument(f"dtype={given!r}: legal are {legal}")
    return found


def _bytes_of(given: str | int | None) -> int | None:
    if given is None or isinstance(given, int):
        return given
    found = re.fullmatch(r"(\d+)\s*([A-Z]*)", given.upper())
    if found is None or found[2] not in _UNITS:
        raise offload.InvalidArgument(f"max_shard_size={given!r}: give bytes, or text such as '5GB' or '500MiB'")
    return int(found[1]) * _UNITS[found[2]]


def _safetensors_writer() -> Any:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise offload.InvalidArgument(
            "safe_serialization=True needs the package safetensors: pip install safetensors; "
            "offload.export_checkpoint writes one such file without it"
        ) from error
    return lambda tensors, path: save_file(tensors, path, metadata={"format": "pt"})


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """`item` with every tensor in its lists, tuples and dicts replaced by a copy on `device`, of its own storage."""
    if isinstance(item, Tensor):
        return item.detach().to(device, copy=True)
    if isinstance(item, (list, tuple)):
        copies = [clone_tensors_for_torch_save(value, device) for value in item]
        return copies if isinstance(item, list) else tuple(copies)
    if isinstance(item, dict):
        return type(item)({key: clone_tensors_for_torch_save(value, device) for key, value in item.items()})
    return item
