"""Adagrad: the scalars of a step, and the sequence in torch operations.

The order and rounding of every operation is fixed in csrc/optimizer/update_rules.h, [Note: the Adagrad sequence]; the
native core and `adagrad_step_` give the same bits.

Source: Adagrad, Duchi, Hazan and Singer, JMLR 12 (2011).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _native


@dataclass(frozen=True)
class AdagradHyper:
    """What a parameter group says about its update."""

    lr: float
    lr_decay: float
    eps: float
    weight_decay: float
    maximize: bool

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> AdagradHyper:
        """Reads a group's present values; they may change every step."""
        return cls(
            lr=float(group["lr"]),
            lr_decay=float(group["lr_decay"]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            maximize=bool(group.get("maximize", False)),
        )

    def scalars(self, step: int) -> dict[str, Any]:
        """The scalars of step `step` (1 for the first), as doubles."""
        return {
            "l2": self.weight_decay,
            "step_size": self.lr / (1.0 + (step - 1) * self.lr_decay),
            "eps": self.eps,
            "maximize": self.maximize,
            "step": step,
        }

    def native_scalars(self, step: int) -> _native.AdagradScalars:
        return _native.AdagradScalars(**self.scalars(step))


@torch.no_grad()
def adagrad_step_(master: Tensor, sum_of_squares: Tensor, gradient: Tensor, scalars: Mapping[str, Any]) -> None:
    """One step in torch operations, in place on fp32 tensors of one shape on any device; `gradient` may be 16-bit.

    Each line rounds as the native body does: no fused operation (`addcmul_`, `addcdiv_`) may stand here.
    """
    g = gradient.to(torch.float32)
    if scalars["maximize"]:
        g = -g
    if scalars["l2"] != 0.0:
        g = g + master * scalars["l2"]
    sum_of_squares.add_(g * g)
    # torch's fp32 square root on the CPU is not correctly rounded (MKL); through fp64 it is.
    denominator = sum_of_squares.double().sqrt_().float().add_(scalars["eps"])
    master.sub_((g * scalars["step_size"]).div_(denominator))
