"""The model of a pair in plain torch that a wrapped pair must equal to the bit, whatever is done to both.

`plain_optimizers.py` has its optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY = 11
DEPTH = 3


class Fault(Exception):
    """What the user's own code raises."""


class _Trap(torch.autograd.Function):
    """The identity; its backward raises when armed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, armed: bool) -> Tensor:
        ctx.armed = armed
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.armed:
            raise Fault
        return gradient, None


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """A few kinds of parameters and a buffer; what a forward does is drawn anew for each."""

    def __init__(self, tied: bool, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(DEPTH))
        self.scale = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.register_buffer("seen", torch.zeros(()))
        if tied:
            self.head.weight = self.embedding.weight
        self.skipped: int | None = None
        self.checkpointed: str | None = None  # "reentrant" or not
        self.fault = ""

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        x = self.embedding(tokens)
        for index, block in enumerate(self.blocks):
            if index == self.skipped:
                continue
            if index == 1 and self.fault == "forward":
                raise Fault
            if index == 1:
                x = _Trap.apply(x, self.fault == "backward")
            reentrant = self.checkpointed == "reentrant"
            x = checkpoint(block, x, use_reentrant=reentrant) if self.checkpointed else block(x)
        return self.head(x * self.scale)
