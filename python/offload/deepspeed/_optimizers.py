"""The optimizers and schedulers that a config names, as torch classes."""

from __future__ import annotations

import inspect
from typing import Any

import torch

import offload

from . import _schedulers
from ._constructors import placement_rule
from ._settings import Optimizer, Placement, Scheduler

__all__ = ["check_placement", "make_optimizer", "make_scheduler", "try_out"]


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


def check_placement(placement: Placement, optimizer: torch.optim.Optimizer) -> None:
    """Raises `InvalidArgument` for an optimizer that cannot train where the config puts things."""
    native = (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, offload.Lion)
    amsgrad = any(group.get("amsgrad") for group in optimizer.param_groups)
    if type(optimizer) not in native or amsgrad:
        reason = placement_rule(placement, type(optimizer).__name__ + (" with amsgrad" if amsgrad else ""))
        if reason is not None:
            raise offload.InvalidArgument(reason)


def make_scheduler(settings: Scheduler, optimizer: torch.optim.Optimizer) -> Any:
    """The scheduler that the config names: one of DeepSpeed's, or a class of torch.optim.lr_scheduler."""
    kind = getattr(_schedulers, settings.name, None) if settings.name in _schedulers.__all__ else None
    kind = kind or getattr(torch.optim.lr_scheduler, settings.name, None)
    if kind is None:
        raise offload.InvalidArgument(
            f"scheduler.type={settings.name!r}: there is no such class in torch.optim.lr_scheduler"
        )
    return _built(kind, optimizer, settings.params, f"scheduler.params of {settings.name}")


def try_out(named: Optimizer | Scheduler) -> None:
    """Raises `InvalidArgument` for arguments that the class refuses, whatever it is to work on."""
    # A list of rates has one for each group, and a schedule that goes on finds where each began.
    count = max((len(value) for value in named.params.values() if isinstance(value, list)), default=1)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "initial_lr": 1e-3} for _ in range(max(1, count))]
    if isinstance(named, Optimizer):
        make_optimizer(named, groups)
    else:
        make_scheduler(named, torch.optim.AdamW(groups))


def _built(kind: Any, first: Any, params: Any, what: str) -> Any:
    unknown = [name for name in params if name not in inspect.signature(kind).parameters]
    if unknown:
        raise offload.InvalidArgument(f"{what}: {kind.__name__} takes no {', '.join(map(repr, unknown))}")
    try:
        return kind(first, **params)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise offload.InvalidArgument(f"{what}: {error}") from error
