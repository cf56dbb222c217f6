"""Adam and AdamW: the scalars of a step, the sequence in torch operations, and a standalone host optimizer.

The order and rounding of every operation is fixed in csrc/optimizer/update_rules.h, [Note: the AdamW sequence]. The
native core runs it over host memory, kernels/update.cu over states that stay on a CUDA device; where that is refused,
`adamw_step_` runs it in torch operations. All give the same bits.

Sources: Adam, arXiv 1412.6980; AdamW (decoupled weight decay), arXiv 1711.05101.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._errors import InvalidArgument, StateError
from ._units import is_dense

FORMATS: dict[torch.dtype, int] = {
    torch.float32: _native.FLOAT32,
    torch.bfloat16: _native.BFLOAT16,
    torch.float16: _native.FLOAT16,
}
MOMENT_FORMATS = {
    "fp32": _native.MOMENTS_FLOAT32,
    "bf16": _native.MOMENTS_BFLOAT16,
    "int8": _native.MOMENTS_INT8,
}


@dataclass(frozen=True)
class AdamWHyper:
    """What a parameter group says about its update; `decoupled` is AdamW, otherwise Adam with L2."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool

    @classmethod
    def of_group(cls, group: Mapping[str, Any], *, decoupled: bool) -> AdamWHyper:
        """Reads a group's present values; they may change every step.

        Raises `InvalidArgument` for settings that change the arithmetic and are not implemented.
        """
        if group.get("amsgrad"):
            raise InvalidArgument(
                "amsgrad=True is not supported beside groups without: set it in a group before offload.wrap"
            )
        beta1, beta2 = group["betas"]
        return cls(
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=bool(group.get("decoupled_weight_decay", decoupled)),
            maximize=bool(group.get("maximize", False)),
        )

    def scalars(self, step: int) -> dict[str, Any]:
        """The scalars of step `step` (1 for the first), as doubles; bias correction is folded into two of them."""
        correction1 = 1.0 - self.beta1**step
        correction2_sqrt = math.sqrt(1.0 - self.beta2**step)
        return {
            "weight_scale": 1.0 - self.lr * self.weight_decay if self.decoupled else 1.0,
            "l2": 0.0 if self.decoupled else self.weight_decay,
            "one_minus_beta1": 1.0 - self.beta1,
            "beta2": self.beta2,
            "one_minus_beta2": 1.0 - self.beta2,
            "step_size": self.lr / correction1 * correction2_sqrt,
            "eps": self.eps * correction2_sqrt,
            "maximize": self.maximize,
            "step": step,
        }

    def native_scalars(self, step: int) -> _native.AdamWScalars:
        return _native.AdamWScalars(**self.scalars(step))


@torch.no_grad()
def adamw_step_(
    master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, scalars: Mapping[str, Any]
) -> None:
    """One step in torch operations, in place on fp32 tensors of one shape on any device; `gradient` may be 16-bit.

    Each line rounds as the native body does: no fused operation (`addcmul_`, `lerp_`) may stand here.
    """
    g = gradient.to(torch.float32)
    if scalars["maximize"]:
        g = -g
    if scalars["l2"] != 0.0:
        g = g + master * scalars["l2"]
    else:
        master.mul_(scalars["weight_scale"])
    exp_avg.add_((g - exp_avg).mul_(scalars["one_minus_beta1"]))
    exp_avg_sq.mul_(scalars["beta2"]).add_((g * scalars["one_minus_beta2"]).mul_(g))
    # torch's fp32 square root on the CPU is not correctly rounded (MKL); through fp64 it is.
    denominator = exp_avg_sq.double().sqrt_().float().add_(scalars["eps"])
    master.sub_((exp_avg * scalars["step_size"]).div_(denominator))


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (bf16 weight rounded half up in magnitude, int16 remainder), exactly invertible.

    Bits(master) = (bits(weight) << 16) + remainder. A NaN becomes the quiet NaN of its sign with remainder 0.
    """
    bits = master.view(torch.int32).to(torch.int64)
    high = ((bits + 0x8000) >> 16).to(torch.int16)
    low = bits.to(torch.int16)  # the low half, read as signed
    nan = torch.isnan(master)
    high = torch.where(nan, torch.where(bits < 0, -0x40, 0x7FC0).to(torch.int16), high)
    low = torch.where(nan, 0, low)
    return high.view(torch.bfloat16), low


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The inverse of `split_master`: a new fp32 tensor."""
    bits = (weight.view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)
    return bits.view(torch.float32)


def round_to_weight(master: Tensor, dtype: torch.dtype) -> Tensor:
    """The working weight of an fp32 master: bf16 half up in magnitude, fp16 to nearest even, fp32 unchanged."""
    return split_master(master)[0] if dtype == torch.bfloat16 else master.to(dtype)


@torch.no_grad()
def write_weight(weight: Tensor, master: Tensor) -> None:
    """`weight` becomes `round_to_weight` of `master`, which has its strides; on the host by the native core."""
    if weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
        remainder = torch.empty(weight.numel(), dtype=torch.int16, device="cpu")  # nobody needs it
        _native.split_master(master.data_ptr(), weight.data_ptr(), remainder.data_ptr(), weight.numel())
    else:
        weight.copy_(round_to_weight(master, weight.dtype))


def check_gradient(name: str, gradient: Tensor) -> None:
    """Raises `InvalidArgument` naming the parameter if its gradient cannot be used here."""
    if gradient.layout != torch.strided:
        raise InvalidArgument(
            f"{name}: gradient has layout {gradient.layout}; only dense (torch.strided) gradients are supported: "
            "for an embedding pass sparse=False"
        )
    if gradient.dtype not in FORMATS:
        raise InvalidArgument(f"{name}: gradient has dtype {gradient.dtype}; legal are float32, bfloat16 and float16")


def check_settings(betas: Any, **others: Any) -> None:
    """Raises `InvalidArgument` for what is no pair of betas, and of the others for what is no number from 0 on."""
    for name, value in others.items():
        if not isinstance(value, (int, float, Tensor)) or not value >= 0.0:
            raise InvalidArgument(f"{name}={value!r}: must be >= 0")
    numbers = betas if isinstance(betas, (tuple, list)) else ()
    if len(numbers) != 2 or not all(isinstance(b, (int, float, Tensor)) and 0.0 <= b < 1.0 for b in numbers):
        raise InvalidArgument(f"betas={betas!r}: must be two numbers in [0, 1)")


class AdamW(torch.optim.Optimizer):
    """AdamW for parameters in host memory, one SIMD pass over fp32, bf16 or fp16 parameters.

    A drop-in for `torch.optim.AdamW`: `state_dict` has its layout and loads into it and back. Moments are fp32 for
    every parameter dtype. 16-bit parameters train on an exact fp32 master: bf16 ones keep a signed 16-bit
    `remainder` beside the parameter, fp16 ones an fp32 `master`.

    Args:
        params: parameters or groups, dense, on the CPU, fp32, bf16 or fp16.
        lr, betas, eps, weight_decay, maximize: as in torch; each may differ by group and change every step.
        amsgrad: only False.

    Raises:
        InvalidArgument: a setting, parameter or gradient that is not legal; nothing was changed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
    ) -> None:
        check_settings(betas, lr=lr, eps=eps, weight_decay=weight_decay)
        if amsgrad:
            raise InvalidArgument("amsgrad=True is not supported: pass amsgrad=False")
        # The keys that torch.optim.AdamW's groups have, so that a state_dict moves freely between the two.
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": False,
            "maximize": maximize, "foreach": None, "capturable": False, "differentiable": False, "fused": None,
            "decoupled_weight_decay": True,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the parameters must be dense host memory of a supported dtype."""
        super().add_param_group(param_group)
        for index, parameter in enumerate(self.param_groups[-1]["params"]):
            if parameter.device.type != "cpu" or parameter.dtype not in FORMATS or not is_dense(parameter):
                self.param_groups.pop()
                raise InvalidArgument(
                    f"parameter {index} of the group is {parameter.dtype} on {parameter.device} with strides "
                    f"{parameter.stride()}: offload.AdamW takes dense float32, bfloat16 or float16 CPU tensors; "
                    "use offload.wrap for parameters on another device"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        todo = [
            (parameter, AdamWHyper.of_group(group, decoupled=True))
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        for parameter, _ in todo:  # before anything is changed
            check_gradient("a parameter of shape " + str(tuple(parameter.shape)), parameter.grad)
        for parameter, hyper in todo:
            self._update(parameter, hyper)
        return loss

    def _update(self, parameter: Tensor, hyper: AdamWHyper) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0, device="cpu")
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        split = parameter.dtype == torch.bfloat16
        if split and "remainder" not in state:
            state["remainder"] = torch.zeros_like(parameter, dtype=torch.int16)
        if parameter.dtype == torch.float16 and "master" not in state:
            state["master"] = parameter.detach().to(torch.float32)
        master = state["remainder"] if split else state.get("master", parameter)
        state["step"] += 1
        gradient = parameter.grad
        assert gradient is not None
        if gradient.stride() != parameter.stride():  # elements must lie in the parameter's own order
            gradient = torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
        _native.update_states(
            gradient=gradient.data_ptr(),
            gradient_format=FORMATS[gradient.dtype],
            master=master.data_ptr(),
            master_format=_native.MASTER_SPLIT if split else _native.MASTER_FLOAT32,
            weight=0 if parameter.dtype == torch.float32 else parameter.data_ptr(),
            weight_format=FORMATS[parameter.dtype],
            exp_avg=state["exp_avg"].data_ptr(),
            exp_avg_sq=state["exp_avg_sq"].data_ptr(),
            count=parameter.numel(),
            scalars=hyper.native_scalars(int(state["step"])),
        )
        torch.autograd.graph.increment_version(parameter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but moments and masters stay fp32 (stock torch casts them to the parameter's dtype)."""
        super().load_state_dict(state_dict)
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved_ids, parameters, strict=True):
            saved = state_dict["state"].get(index)
            if saved:
                if "max_exp_avg_sq" in saved:
                    raise StateError("the state comes from amsgrad=True, which offload.AdamW does not support")
                self.state[parameter] = {
                    key: like_parameter(value, parameter) if value.dim() else value.detach().clone().cpu()
                    for key, value in saved.items()
                }


def like_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    """A host copy of `value` with the strides of `parameter`: fp32, or int16 for a remainder."""
    dtype = torch.int16 if value.dtype == torch.int16 else torch.float32
    return torch.empty_like(parameter, dtype=dtype, device="cpu").copy_(value)
