"""The optimizers and schedulers that a config names, as torch classes."""

from __future__ import annotations

import inspect
from typing import Any

import torch

import offload

from . import _schedulers
from ._constructors import share_rule
from ._settings import Optimizer, Scheduler

__all__ = ["check_share", "make_optimizer", "make_scheduler"]


def make_optimizer(settings: Optimizer, parameters: Any) -> torch.optim.Optimizer:
    """The optimizer that the config names, over parameters or groups of them.

    Adam is AdamW unless `adam_w_mode` is false, as in DeepSpeed. Raises `InvalidArgument` for what the class refuses.
    """
    name = settings.name
    if name == "Adam" and settings.adam_w_mode:
        name = "AdamW"
    kind = getattr(offload, name, None) if name == "Lion" else getattr(torch.optim, name, None)
    if kind is None:
        raise offload.InvalidArgument(f"optimizer.type={settings.name!r}: there is no such class in torch.optim")
    optimizer: torch.optim.Optimizer = _built(kind, parameters, settings.params, f"optimizer.params of {settings.name}")
    return optimizer


def check_share(ratio: float, optimizer: torch.optim.Optimizer) -> None:
    """Raises `InvalidArgument` for an optimizer that cannot have a share of its states on the host."""
    by_parameter = (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, offload.Lion)
    amsgrad = any(group.get("amsgrad") for group in optimizer.param_groups)
    if 0.0 < ratio < 1.0 and (type(optimizer) not in by_parameter or amsgrad):
        raise offload.InvalidArgument(
            share_rule(ratio, type(optimizer).__name__ + (" with amsgrad" if amsgrad else ""))
        )


def make_scheduler(settings: Scheduler, optimizer: torch.optim.Optimizer) -> Any:
    """The scheduler that the config names: one of DeepSpeed's, or a class of torch.optim.lr_scheduler."""
    kind = getattr(_schedulers, settings.name, None) if settings.name in _schedulers.__all__ else None
    kind = kind or getattr(torch.optim.lr_scheduler, settings.name, None)
    if kind is None:
        raise offload.InvalidArgument(
            f"scheduler.type={settings.name!r}: there is no such class in torch.optim.lr_scheduler"
        )
    return _built(kind, optimizer, settings.params, f"scheduler.params of {settings.name}")


def _built(kind: Any, first: Any, params: Any, what: str) -> Any:
    unknown = [name for name in params if name not in inspect.signature(kind).parameters]
    if unknown:
        raise offload.InvalidArgument(f"{what}: {kind.__name__} takes no {', '.join(map(repr, unknown))}")
    try:
        return kind(first, **params)
    except (TypeError, ValueError) as error:
        raise offload.InvalidArgument(f"{what}: {error}") from error
