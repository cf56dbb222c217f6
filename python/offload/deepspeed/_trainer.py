"""`wrap_options`: a DeepSpeed config for who trains by other means than the engine, as Hugging Face's Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import offload

from . import _config, _placement
from ._read import read

__all__ = ["wrap_options"]

_TRAINERS_OWN = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler",
)  # fmt: skip


def wrap_options(config: dict[str, Any] | str | Path, *, auto: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arguments of `offload.wrap` that put tensors where a DeepSpeed config puts them.

        model, optim = offload.wrap(model, optim, **offload.deepspeed.wrap_options("ds_config.json"))

    Batch sizes, clipping, precision, optimizer and schedule are left to who trains: Hugging Face's Trainer, Accelerate
    or a loop. "auto" may stand there; a UserWarning names those that say something else.

    config, auto: as for `initialize`.

    Raises `InvalidArgument` for what `initialize` refuses of the rest, and for an "auto" where a place would be.
    """
    given = read(config)
    kept = {name: value for name, value in given.items() if name not in _TRAINERS_OWN}
    # Of the sizes nothing is read, but there have to be some.
    settings, report = _config.resolve(kept | {"train_batch_size": "auto"}, auto=auto, for_trainer=True)
    report.raise_refusals(strict=False)
    left = [_shown(name, given[name]) for name in _TRAINERS_OWN if name in given and _says_something(given[name])]
    left += [settings.precision.dtype] if settings.precision.dtype != "fp32" else []
    if left:
        warnings.warn(
            f"wrap_options says where tensors live, and reads nothing else: {', '.join(left)}: give these to what "
            "trains, and load the model in its dtype",
            UserWarning,
            stacklevel=2,
        )
    places = sorted(path for path in report.unfilled if path.startswith("zero_optimization.offload_"))
    if places:
        raise offload.InvalidArgument(f"{places[0]} is 'auto': write a place, or pass auto={{{places[0]!r}: 'cpu'}}")
    options = _placement.wrap_options(settings.placement)
    return options if settings.precision.grad_dtype is None else options | {"grad_dtype": settings.precision.grad_dtype}


def _says_something(value: Any) -> bool:
    """Whether a value, or anything in a section, is more than "auto"."""
    if isinstance(value, Mapping):
        return any(map(_says_something, value.values()))
    return value is not None and value != "auto"


def _shown(name: str, value: Any) -> str:
    return name if isinstance(value, Mapping) else f"{name}={value!r}"
