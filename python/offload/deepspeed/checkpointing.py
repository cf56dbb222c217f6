"""`deepspeed.checkpointing`: activation checkpointing, whose inputs may wait for backward on the host."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint

import offload

from . import _config

__all__ = [
    "checkpoint", "configure", "is_configured", "model_parallel_cuda_manual_seed", "non_reentrant_checkpoint", "reset",
    "set_num_layers",
]  # fmt: skip


@dataclass
class _State:
    configured: bool = False
    region: Any = None  # where checkpointed inputs leave to the host


_state = _State()


def configure(
    mpu_: Any = None,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Sets up `checkpoint()`. Calling it is not needed; `checkpoint_in_cpu` sends saved inputs to the host.

    deepspeed_config: its `cpu_checkpointing` says so too. The engine does that for its whole model, without this call.
    The other arguments are accepted: one process has nothing to partition, and the host memory has no use for them.
    """
    if checkpoint_in_cpu is None and deepspeed_config is not None:
        checkpoint_in_cpu = _config.load(deepspeed_config).activation_checkpointing.cpu_checkpointing
    _state.configured = True
    _state.region = offload.offload_activations() if checkpoint_in_cpu else None


def is_configured() -> bool:
    """Whether `configure()` was called, by the program or by `initialize`."""
    return _state.configured


def reset() -> None:
    """Forgets nothing: what backward of an unfinished step would need is freed with its graph."""


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs `function(*args, **kwargs)` and saves those alone; backward computes the rest again, with the same random
    state.
    """
    if kwargs:  # torch would take some of the names for its own
        function = functools.partial(function, **kwargs)
    if _state.region is None:
        return torch_checkpoint.checkpoint(function, *args, use_reentrant=False)
    with _state.region:
        return torch_checkpoint.checkpoint(function, *args, use_reentrant=False)


def non_reentrant_checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """As `checkpoint`."""
    return checkpoint(function, *args)


def set_num_layers(nlayers: int) -> None:
    """Accepted: the number of layers is not needed in advance."""


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seeds torch's generators; one process has no state of a model-parallel rank beside them."""
    torch.manual_seed(seed)
