"""`deepspeed.comm` for one process: who am I, and collectives that have nothing to wait for."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

import offload

__all__ = [
    "ReduceOp", "all_gather", "all_reduce", "barrier", "broadcast", "destroy_process_group", "get_local_rank",
    "get_rank", "get_world_group", "get_world_size", "init_distributed", "is_available", "is_initialized",
    "new_group", "reduce", "require_one_process",
]  # fmt: skip

_initialized = False


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"offload.deepspeed.comm has no {name!r}: torch.distributed has, and after init_distributed() a group of one"
    )


def require_one_process() -> None:
    """Raises `InvalidArgument` in a process that was started as one of several."""
    world_size = os.environ.get("WORLD_SIZE", "1").strip()
    if world_size not in ("", "1"):
        raise offload.InvalidArgument(
            f"WORLD_SIZE={world_size}: training in several processes is not supported yet (each would train a model "
            "of its own); start one process with plain python"
        )


def init_distributed(*args: Any, **kwargs: Any) -> None:
    """Accepts every argument of DeepSpeed's. No launcher, MPI or port is needed.

    `torch.distributed`, which scripts ask for their rank and for barriers, gets a group of this one process, unless it
    has one. `RANK`, `LOCAL_RANK` and `WORLD_SIZE`, which scripts read too, are set in the environment where no launcher
    has set them. Raises `InvalidArgument` where `WORLD_SIZE` is above 1.
    """
    global _initialized
    require_one_process()
    if torch.distributed.is_available() and not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # in this process: nothing listens
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    _initialized = True


def destroy_process_group(group: Any = None) -> None:
    """Ends the group of `torch.distributed` too."""
    global _initialized
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
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


def new_group(ranks: Any = None, *args: Any, **kwargs: Any) -> None:
    """Every group is this process: None stands for it."""


def get_world_group() -> None:
    """None stands for the group of this process."""


def barrier(*args: Any, **kwargs: Any) -> None:
    """Returns at once: there is nobody to wait for."""


def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
    """Leaves `tensor` as it is: the sum, mean or maximum over one process."""


def broadcast(tensor: Tensor, src: int = 0, *args: Any, **kwargs: Any) -> None:
    """Leaves `tensor` as it is. Raises `InvalidArgument` for a source other than rank 0."""
    if src != 0:
        raise offload.InvalidArgument(f"broadcast(src={src}): the only rank is 0")


def reduce(tensor: Tensor, dst: int = 0, *args: Any, **kwargs: Any) -> None:
    """As `all_reduce`."""


def all_gather(tensor_list: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> None:
    """Copies `tensor` into the one tensor of `tensor_list`."""
    (gathered,) = tensor_list
    gathered.copy_(tensor)
