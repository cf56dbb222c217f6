"""Values that lie in two halves, or on disk: they are joined, or read, where somebody asks for them.

A `LentWeight` is a tensor in the place of one on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ._adamw import join_master
from ._disk_snapshot import DiskSnapshot

__all__ = ["LentWeight", "SplitMaster", "StoredValue", "StoredWeight", "flat"]


@dataclass(frozen=True)
class SplitMaster:
    """The two live halves of a split master: the bf16 `weight` and the int16 `remainder` of its fp32 value."""

    weight: Tensor
    remainder: Tensor

    def join(self) -> Tensor:
        return join_master(self.weight, self.remainder)

    def join_into(self, out: Tensor) -> None:
        """`join()` without a tensor in between; `out` is fp32 and of the halves' shape."""
        bits = out.view(torch.int32)
        bits.copy_(self.weight.view(torch.int16)).bitwise_left_shift_(16).add_(self.remainder)


# Fills the tensor from that place on, with what the disk has now, or had in the snapshot.
Read = Callable[[int, Tensor, DiskSnapshot | None], None]


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """The value of a weight on disk, until the weight changes. `read(begin, ...)` counts bytes."""

    read: Read
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]

    def read_into(self, out: Tensor, first: int, snapshot: DiskSnapshot | None = None) -> None:
        """Fills `out` (flat, of the weight's dtype) with elements from `first` on, in storage order."""
        self.read(first * self.dtype.itemsize, out.view(torch.uint8), snapshot)

    def is_contiguous(self) -> bool:
        """Whether storage order is that of the elements."""
        return torch.empty_strided(self.shape, self.strides, device="meta").is_contiguous()

    def in_memory(self) -> list[Tensor]:
        return []

    def with_copies(self) -> StoredWeight:
        return self

    def join(self, snapshot: DiskSnapshot | None = None) -> Tensor:
        """A tensor of it in host memory."""
        with torch.inference_mode(False):
            value = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="cpu")
            self.read_into(flat(value), 0, snapshot)
        return value


@dataclass(frozen=True)
class StoredValue:
    """An fp32 array of a state on disk, read where it is asked for; of a parameter with this shape and these strides.

    `elements` are the values in storage order, or the remainders of split masters whose upper halves `weight` has;
    `elements(first, ...)` counts them. One of the two may be in memory.
    """

    elements: Read | Tensor
    shape: torch.Size
    strides: tuple[int, ...]
    weight: Tensor | StoredWeight | None = None

    def read_into(self, out: Tensor, first: int, snapshot: DiskSnapshot | None = None) -> None:
        """Fills `out` (flat fp32) with elements from `first` on, in storage order."""
        values = out if self.weight is None else torch.empty(out.numel(), dtype=torch.int16, device="cpu")
        if isinstance(self.elements, Tensor):
            values.copy_(self.elements[first : first + out.numel()])
        else:
            self.elements(first, values, snapshot)
        if self.weight is None:
            return
        if isinstance(self.weight, StoredWeight):
            weight = torch.empty(out.numel(), dtype=self.weight.dtype, device="cpu")
            self.weight.read_into(weight, first, snapshot)
        else:
            weight = flat(self.weight)[first : first + out.numel()]
        SplitMaster(weight, values).join_into(out)

    def is_contiguous(self) -> bool:
        """Whether storage order is that of the elements."""
        return torch.empty_strided(self.shape, self.strides, device="meta").is_contiguous()

    def in_memory(self) -> list[Tensor]:
        """The part that is no disk's."""
        return [part for part in (self.elements, self.weight) if isinstance(part, Tensor)]

    def with_copies(self) -> StoredValue:
        """The same, whatever is written to that part."""
        elements = self.elements.clone() if isinstance(self.elements, Tensor) else self.elements
        weight = self.weight.clone() if isinstance(self.weight, Tensor) else self.weight
        return replace(self, elements=elements, weight=weight)

    def join(self, snapshot: DiskSnapshot | None = None) -> Tensor:
        """A tensor of it in host memory."""
        value = torch.empty_strided(self.shape, self.strides, dtype=torch.float32, device="cpu")
        self.read_into(flat(value), 0, snapshot)
        return value


class LentWeight(Tensor):
    """What state_dict() gives for a weight that is to be saved from disk: any operation reads it first."""

    stored: StoredWeight

    @staticmethod
    def __new__(cls, stored: StoredWeight) -> LentWeight:
        lent: LentWeight = Tensor._make_wrapper_subclass(
            cls, stored.shape, strides=stored.strides, dtype=stored.dtype, device=torch.device("cpu")
        )
        lent.stored = stored
        return lent

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:  # what state_dict() does to each of them
            return LentWeight(args[0].stored)
        args, kwargs = tree_map_only(LentWeight, lambda lent: lent.stored.join(), (args, kwargs or {}))
        return func(*args, **kwargs)


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in storage order."""
    return tensor.as_strided((tensor.numel(),), (1,))
