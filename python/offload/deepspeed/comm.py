"""`deepspeed.comm` for one process: who am I, and collectives that have nothing to wait for."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

import offload

__all__ = [
    "ReduceOp", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all",
    "all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "destroy_process_group", "gather",
    "get_all_ranks_from_group", "get_global_rank", "get_local_rank", "get_rank", "get_world_group", "get_world_size",
    "inference_all_reduce", "init_distributed", "is_available", "is_initialized", "monitored_barrier", "new_group",
    "reduce", "reduce_scatter", "reduce_scatter_fn", "reduce_scatter_tensor", "require_one_process", "scatter",
]  # fmt: skip

_initialized = False

# DeepSpeed's is a package: `deepspeed.comm.comm` has the same names.
comm = sys.modules[f"{__name__}.comm"] = sys.modules[__name__]


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


def get_global_rank(group: Any = None, group_rank: int = 0) -> int:
    return 0


def get_all_ranks_from_group(group: Any = None) -> list[int]:
    return [0]


# --- collectives: what one process gets is what it gave -----------------------------------------------------------


class _Ended:
    """What a collective with `async_op=True` returns."""

    def wait(self, *args: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _handle(async_op: bool) -> _Ended | None:
    return _Ended() if async_op else None


def _check_rank(call: str, rank: int | None) -> None:
    if rank not in (0, None):
        raise offload.InvalidArgument(f"{call}={rank}): the only rank is 0")


def barrier(*args: Any, **kwargs: Any) -> _Ended | None:
    """Returns at once: there is nobody to wait for."""
    return _handle(kwargs.get("async_op", False))


monitored_barrier = barrier


def all_reduce(
    tensor: Tensor, op: Any = ReduceOp.SUM, group: Any = None, async_op: bool = False, **ignored: Any
) -> _Ended | None:
    """Leaves `tensor` as it is: the sum, mean or maximum over one process."""
    return _handle(async_op)


inference_all_reduce = all_reduce


def reduce(
    tensor: Tensor, dst: int = 0, op: Any = ReduceOp.SUM, group: Any = None, async_op: bool = False, **ignored: Any
) -> _Ended | None:
    """As `all_reduce`. Raises `InvalidArgument` for a destination other than rank 0."""
    _check_rank("reduce(dst", dst)
    return _handle(async_op)


def broadcast(tensor: Tensor, src: int = 0, group: Any = None, async_op: bool = False, **ignored: Any) -> _Ended | None:
    """Leaves `tensor` as it is. Raises `InvalidArgument` for a source other than rank 0."""
    _check_rank("broadcast(src", src)
    return _handle(async_op)


def broadcast_object_list(
    object_list: list[Any], src: int = 0, group: Any = None, device: Any = None, **ignored: Any
) -> None:
    """Leaves the list as it is. Raises `InvalidArgument` for a source other than rank 0."""
    _check_rank("broadcast_object_list(src", src)


def all_gather(
    tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False, **ignored: Any
) -> _Ended | None:
    """Copies `tensor` into the one tensor of `tensor_list`."""
    (gathered,) = tensor_list
    return _copied(gathered, tensor, async_op)


def all_gather_object(object_list: list[Any], obj: Any, group: Any = None, **ignored: Any) -> None:
    """Puts `obj` into the one place of the list."""
    object_list[:] = [obj]


def gather(
    tensor: Tensor, gather_list: list[Tensor] | None = None, dst: int = 0, group: Any = None, async_op: bool = False,
    **ignored: Any,
) -> _Ended | None:  # fmt: skip
    """As `all_gather`. Raises `InvalidArgument` for a destination other than rank 0."""
    _check_rank("gather(dst", dst)
    return all_gather(gather_list or [tensor], tensor, group, async_op)


def scatter(
    tensor: Tensor, scatter_list: list[Tensor] | None = None, src: int = 0, group: Any = None, async_op: bool = False,
    **ignored: Any,
) -> _Ended | None:  # fmt: skip
    """As `reduce_scatter`. Raises `InvalidArgument` for a source other than rank 0."""
    _check_rank("scatter(src", src)
    return reduce_scatter(tensor, scatter_list or [tensor], group=group, async_op=async_op)


def reduce_scatter(
    output: Tensor, input_list: list[Tensor], op: Any = ReduceOp.SUM, group: Any = None, async_op: bool = False,
    **ignored: Any,
) -> _Ended | None:  # fmt: skip
    """Copies the one tensor of `input_list` into `output`."""
    (own,) = input_list
    return _copied(output, own, async_op)


def reduce_scatter_tensor(
    output_tensor: Tensor, tensor: Tensor, op: Any = ReduceOp.SUM, group: Any = None, async_op: bool = False,
    **ignored: Any,
) -> _Ended | None:  # fmt: skip
    """Copies `tensor` into `output_tensor`."""
    return _copied(output_tensor, tensor, async_op)


reduce_scatter_fn = reduce_scatter_tensor


def all_gather_into_tensor(
    output_tensor: Tensor, tensor: Tensor, group: Any = None, async_op: bool = False, **ignored: Any
) -> _Ended | None:
    """Copies `tensor` into `output_tensor`."""
    return _copied(output_tensor, tensor, async_op)


def all_to_all_single(
    output: Tensor, tensor: Tensor, output_split_sizes: Any = None, input_split_sizes: Any = None, group: Any = None,
    async_op: bool = False, **ignored: Any,
) -> _Ended | None:  # fmt: skip
    """Copies `tensor` into `output`."""
    return _copied(output, tensor, async_op)


def all_to_all(
    output_tensor_list: list[Tensor],
    input_tensor_list: list[Tensor],
    group: Any = None,
    async_op: bool = False,
    **ignored: Any,
) -> _Ended | None:
    """Copies the one tensor of the second list into the one of the first."""
    (own,) = input_tensor_list
    return all_gather(output_tensor_list, own, group, async_op)


def _copied(output: Tensor, tensor: Tensor, async_op: bool) -> _Ended | None:
    """A copy of the values in their order: the two may have other shapes, as ranks stacked or in a row."""
    if output.numel() != tensor.numel():
        raise offload.InvalidArgument(
            f"the result has {output.numel()} elements and one process gives {tensor.numel()}: make it as large as that"
        )
    with torch.no_grad():
        output.copy_(tensor.reshape(output.shape))
    return _handle(async_op)
