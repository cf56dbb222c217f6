"""`deepspeed.comm` for one process: who am I, and collectives that have nothing to wait for."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

import offload

__all__ = [
    "all_reduce", "barrier", "broadcast", "destroy_process_group", "get_local_rank", "get_rank", "get_world_size",
    "init_distributed", "is_available", "is_initialized", "require_one_process",
]  # fmt: skip

_initialized = False


def require_one_process() -> None:
    """Raises `InvalidArgument` in a process that was started as one of several."""
    world_size = os.environ.get("WORLD_SIZE", "1").strip()
    if world_size not in ("", "1"):
        raise offload.InvalidArgument(
            f"WORLD_SIZE={world_size}: training in several processes is not supported yet (each would train a model "
            "of its own); start one process with plain python"
        )


def init_distributed(*args: Any, **kwargs: Any) -> None:
    """Accepts every argument of DeepSpeed's and starts nothing: no launcher, MPI or port is needed.

    Raises `InvalidArgument` where `WORLD_SIZE` is above 1.
    """
    global _initialized
    require_one_process()
    _initialized = True


def destroy_process_group(group: Any = None) -> None:
    global _initialized
    _initialized = False


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    """Whether `init_distributed` was called."""
    return _initialized


def get_rank(group: Any = None) -> int:
    return 0


def get_local_rank() -> int:
    return 0


def get_world_size(group: Any = None) -> int:
    return 1


def barrier(*args: Any, **kwargs: Any) -> None:
    """Returns at once: there is nobody to wait for."""


def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
    """Leaves `tensor` as it is: the sum, mean or maximum over one process."""


def broadcast(tensor: Tensor, src: int = 0, *args: Any, **kwargs: Any) -> None:
    """Leaves `tensor` as it is. Raises `InvalidArgument` for a source other than rank 0."""
    if src != 0:
        raise offload.InvalidArgument(f"broadcast(src={src}): the only rank is 0")
