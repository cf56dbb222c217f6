"""Lion: the scalars of a step, the sequence in torch operations, and the optimizer.

The order and rounding of every operation is fixed in csrc/optimizer/update_rules.h, [Note: the Lion sequence]; on fp32
tensors the native core and `lion_step_` give the same bits.

Source: Lion, arXiv 2302.06675.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._adamw import check_settings
from ._errors import InvalidArgument


@dataclass(frozen=True)
class LionHyper:
    """What a parameter group says about its update."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    maximize: bool

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> LionHyper:
        """Reads a group's present values; they may change every step."""
        beta1, beta2 = group["betas"]
        return cls(
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            weight_decay=float(group["weight_decay"]),
            maximize=bool(group.get("maximize", False)),
        )

    def scalars(self, step: int) -> dict[str, Any]:
        """The scalars of step `step` (1 for the first), as doubles."""
        return {
            "weight_scale": 1.0 - self.lr * self.weight_decay,
            "beta1": self.beta1,
            "one_minus_beta1": 1.0 - self.beta1,
            "beta2": self.beta2,
            "one_minus_beta2": 1.0 - self.beta2,
            "step_size": self.lr,
            "maximize": self.maximize,
            "step": step,
        }

    def native_scalars(self, step: int) -> _native.LionScalars:
        return _native.LionScalars(**self.scalars(step))


@torch.no_grad()
def lion_step_(master: Tensor, exp_avg: Tensor, gradient: Tensor, scalars: Mapping[str, Any]) -> None:
    """One step in torch operations, in place on tensors of one shape and dtype on any device.

    On fp32 each line rounds as the native body does: no fused operation (`lerp_`, `add_` with alpha) may stand here.
    """
    g = gradient.to(master.dtype)
    if scalars["maximize"]:
        g = -g
    direction = (exp_avg * scalars["beta1"]).add_(g * scalars["one_minus_beta1"]).sign_()
    master.mul_(scalars["weight_scale"]).sub_(direction.mul_(scalars["step_size"]))
    exp_avg.mul_(scalars["beta2"]).add_(g * scalars["one_minus_beta2"])


class Lion(torch.optim.Optimizer):
    """Lion, "evolved sign momentum": one moment, and a step of the learning rate in the direction of its sign.

    A plain torch optimizer for parameters of any float dtype on any device, its moment in the parameter's dtype. Given
    to `offload.wrap` it runs in native code, with an fp32 moment and an exact fp32 master.

    Args:
        params: parameters or groups.
        lr: learning rate, 0 or more; published runs take a 3rd to a 10th of AdamW's.
        betas: of the direction and of the moment, each in [0, 1).
        weight_decay: decoupled, 0 or more; 3 to 10 times AdamW's.
        maximize: ascend instead.

    Raises:
        InvalidArgument: a setting or gradient that is not legal; nothing was changed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        check_settings(betas, lr=lr, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        todo = [
            (parameter, LionHyper.of_group(group))
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        for parameter, _ in todo:  # before anything is changed
            if parameter.grad.layout != torch.strided:
                raise InvalidArgument("Lion takes dense gradients only: for an embedding pass sparse=False")
        for parameter, hyper in todo:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0, device="cpu")
                state["exp_avg"] = torch.zeros_like(parameter)
            state["step"] += 1
            lion_step_(parameter, state["exp_avg"], parameter.grad, hyper.scalars(int(state["step"])))
        return loss
