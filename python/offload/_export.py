"""What is in a checkpoint, and its weights as one file that Hugging Face reads."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _durable_files as durable
from ._errors import InvalidArgument, StorageError
from ._loading import Contents, read_checkpoint
from ._snapshot import Cast, TensorFile, Value

__all__ = ["checkpoint_weights", "describe_checkpoint", "export_checkpoint"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def describe_checkpoint(directory: str | os.PathLike[str], *, tag: str | None = None) -> dict[str, Any]:
    """Verifies every byte of a checkpoint and returns what is in it, as plain values.

    `tag` None takes the one that `latest` names. Raises `StorageError` naming what is missing or damaged.
    """
    contents = read_checkpoint(directory, tag)
    dtypes: dict[str, int] = {}
    for value in contents.model.values():
        name = str(value.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + value.numel()
    return {
        "path": str(contents.path),
        "tag": contents.tag,
        "files": {path.name: path.stat().st_size for path in sorted(contents.path.iterdir())},
        "weights": len(contents.model),
        "elements_by_dtype": dtypes,
        "tied": dict(contents.state["tied"]),
        "excluded": sorted(contents.excluded),
        "optimizers": [
            {"groups": len(one["param_groups"]), "parameters": len(one["names"]), "with_state": len(one["state"])}
            for one in contents.state["optimizers"]
        ],
        "client_state": sorted(map(str, contents.state["client_state"])),
    }


def export_checkpoint(
    directory: str | os.PathLike[str], out: str | os.PathLike[str], *, dtype: str, tag: str | None = None
) -> Path:
    """Writes weights and buffers of a checkpoint to one safetensors file, and returns its path.

    Args:
        directory: the one given to `save_checkpoint`.
        out: the file; replaced at once when all of it is written. Of tied weights it has the first name.
        dtype: of floating-point tensors: "fp32" (of a 16-bit model: its exact masters), "bf16" or "fp16".
        tag: of the checkpoint; None takes the one that `latest` names.

    Raises `InvalidArgument` for another dtype, and `StorageError` for a damaged checkpoint or a disk that refuses.
    """
    if dtype not in _DTYPES:
        raise InvalidArgument(f"dtype={dtype!r}: legal are {', '.join(map(repr, _DTYPES))}")
    wanted = _DTYPES[dtype]
    values: dict[str, Value] = {
        name: Cast(value, wanted) if _differs(value, wanted) else value
        for name, value in _exact_weights(read_checkpoint(directory, tag), wanted).items()
    }
    file = TensorFile(values, {"format": "pt"})
    path = Path(out)
    aside = path.with_name(f".{path.name}.unfinished")
    try:
        durable.write_file(aside, file.nbytes, file.take)
        durable.rename(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise StorageError(f"{path} was not written, it needs {file.nbytes:,} bytes: {error}") from error
        raise
    return path


def checkpoint_weights(
    directory: str | os.PathLike[str], *, dtype: str, tag: str | None = None, exclude_frozen: bool = False
) -> dict[str, Tensor]:
    """Weights and buffers of a checkpoint by all their names in `model.state_dict()`; `export_checkpoint`'s values.

    Tensors on the CPU: those that need no cast lie on mapped pages of the file and take no memory until they are read.
    exclude_frozen: without the weights that did not require gradients when they were saved.

    Raises as `export_checkpoint`.
    """
    if dtype not in _DTYPES:
        raise InvalidArgument(f"dtype={dtype!r}: legal are {', '.join(map(repr, _DTYPES))}")
    contents = read_checkpoint(directory, tag)
    wanted = _DTYPES[dtype]
    weights = {
        name: value.to(wanted) if _differs(value, wanted) else value
        for name, value in _exact_weights(contents, wanted).items()
    }
    weights.update({name: weights[first] for name, first in contents.state["tied"].items()})
    for name in contents.frozen if exclude_frozen else ():
        weights.pop(name, None)
    return weights


def _exact_weights(contents: Contents, wanted: torch.dtype) -> dict[str, Tensor]:
    """The weights, or for fp32 their masters, as they are in the file; tied ones once."""
    masters = contents.states if wanted == torch.float32 else {}
    return {name: masters.get(f"{name}.master", value) for name, value in contents.model.items()}


def _differs(value: Tensor, dtype: torch.dtype) -> bool:
    return value.is_floating_point() and value.dtype != dtype
