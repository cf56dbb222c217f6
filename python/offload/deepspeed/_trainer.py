"""`wrap_options`: a DeepSpeed config for who trains by other means than the engine, as Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import offload

from . import _config, _placement
from ._read import read

__all__ = ["wrap_options"]


def wrap_options(config: dict[str, Any] | str | Path, *, auto: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arguments of `offload.wrap` that put tensors where a DeepSpeed config puts them.

        model, optim = offload.wrap(model, optim, **offload.deepspeed.wrap_options("ds_config.json"))

    Batch sizes, clipping, precision, optimizer and schedule are left to who trains: Hugging Face's Trainer, Accelerate
    or a loop; "auto" may stand there.

    config, auto: as for `initialize`.

    Raises `InvalidArgument` for what `initialize` refuses, and for an "auto" where a place would be.
    """
    settings, report = _config.resolve(read(config), auto=auto, for_trainer=True)
    report.raise_refusals(strict=False)
    places = sorted(path for path in report.unfilled if path.startswith("zero_optimization.offload_"))
    if places:
        raise offload.InvalidArgument(f"{places[0]} is 'auto': write a place, or pass auto={{{places[0]!r}: 'cpu'}}")
    options = _placement.wrap_options(settings.placement)
    return options if settings.precision.grad_dtype is None else options | {"grad_dtype": settings.precision.grad_dtype}
