"""What changes a state of a parameter sees of it at a time: all of one in memory, a stretch of one on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ._adamw import round_to_weight, split_master
from ._stored_values import flat

__all__ = ["Piece", "Stretch", "whole"]


@dataclass(frozen=True)
class Piece:
    """Elements of a state that are in memory together.

    `weight` is the host's working copy, where there is one beside the master; `of` gives the same elements of any
    tensor of the parameter's shape, in storage order those from `begin` on.
    """

    weight: Tensor | None
    master: Tensor | None
    remainder: Tensor | None
    moments: Mapping[str, Any]
    of: Callable[[Tensor], Tensor]
    begin: int = 0

    def set_master(self, value: Tensor) -> None:
        if self.remainder is not None:
            weight, low = split_master(value)
            self.remainder.copy_(low)
            assert self.weight is not None
            self.weight.copy_(weight)
            return
        if self.master is not None:
            self.master.copy_(value)
        if self.weight is not None:
            self.weight.copy_(round_to_weight(value, self.weight.dtype))

    def adopt(self, changed: Tensor, weight: Tensor) -> None:
        """The 16-bit `weight` is the master where it has changed."""
        if self.remainder is not None:
            self.remainder.masked_fill_(changed, 0)
        elif self.master is not None:
            self.master.copy_(torch.where(changed, weight.to(torch.float32), self.master))


def whole(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Stretch:
    """`count` elements from `begin` on, in the storage order of `parameter`, of tensors of its shape."""

    parameter: Parameter
    begin: int
    count: int

    def __call__(self, tensor: Tensor) -> Tensor:
        like = self.parameter
        if tensor.stride() != like.stride() and not (tensor.is_contiguous() and like.is_contiguous()):
            tensor = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device).copy_(
                tensor
            )
        return flat(tensor)[self.begin : self.begin + self.count]
