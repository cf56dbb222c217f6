"""Scales of a gradient that wait for the optimizer, and the probe that decides which may wait.

[Note: probing a scale] The optimizer applies a pending factor as `round(float32(g) <op> value)`. Whether that gives
torch's own bits depends on the operation, the dtypes, the device and the kind of the scalar: on a CPU a bf16
`_foreach_mul_` rounds its scalar differently from `mul_`, and a CUDA division by a CPU scalar multiplies by the
reciprocal. Nothing of this is documented, so torch is asked: once per combination its operation runs on every kind of
value, and a factor may wait only in a form that gave the same bits everywhere. Otherwise the operation runs at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "DIVIDE", "MULTIPLY", "MULTIPLY_RECIPROCAL", "MULTIPLY_WIDE", "SCALES", "UNSCALE", "Factor", "GradScale",
    "HostBytes", "apply_factor", "make_factor", "scaled",
]  # fmt: skip

# FactorKind of csrc/optimizer/update_rules.h.
MULTIPLY, DIVIDE, MULTIPLY_RECIPROCAL, MULTIPLY_WIDE = 0, 1, 2, 3

_aten = torch.ops.aten

# GradScaler's operation: its list is scaled, and the second operand is set to 1 where a value is not finite.
UNSCALE = _aten._amp_foreach_non_finite_check_and_unscale_.default

Apply = Callable[[Tensor, Any], object]

# What `step()` multiplies gradients with: a number, or an fp32 tensor of one element on the device that computes.
GradScale = float | Tensor

# How each operation is called for one gradient and one scale.
SCALES: dict[Any, Apply] = {
    _aten.mul_.Tensor: _aten.mul_.Tensor,
    _aten.mul_.Scalar: _aten.mul_.Scalar,
    _aten.div_.Tensor: _aten.div_.Tensor,
    _aten.div_.Scalar: _aten.div_.Scalar,
    _aten._foreach_mul_.Scalar: lambda gradient, scale: _aten._foreach_mul_.Scalar([gradient], scale),
    _aten._foreach_mul_.Tensor: lambda gradient, scale: _aten._foreach_mul_.Tensor([gradient], scale),
    _aten._foreach_mul_.ScalarList: lambda gradient, scale: _aten._foreach_mul_.ScalarList([gradient], [scale]),
    _aten._foreach_div_.Scalar: lambda gradient, scale: _aten._foreach_div_.Scalar([gradient], scale),
    _aten._foreach_div_.Tensor: lambda gradient, scale: _aten._foreach_div_.Tensor([gradient], scale),
    _aten._foreach_div_.ScalarList: lambda gradient, scale: _aten._foreach_div_.ScalarList([gradient], [scale]),
    UNSCALE: lambda gradient, scale: UNSCALE([gradient], torch.zeros_like(scale), scale),
}


class HostBytes(Protocol):
    """A copy in host memory that has landed or is landing; keeps its memory alive.

    address: of the first byte. ticket: `done`, and `wait()`, which blocks until the bytes are there.
    """

    @property
    def address(self) -> int: ...
    @property
    def ticket(self) -> Any: ...


class _Landing(Protocol):
    def to_host(self, tensor: Tensor) -> HostBytes: ...


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """One pending scale. `apply(gradient)` runs torch's own operation in place, on the scale as it was at the call.

    kind, value: the optimizer's form of it, value in fp32; where `held` is there its fp32 is the value.
    """

    kind: int
    value: float
    held: HostBytes | None
    apply: Callable[[Tensor], object]


def make_factor(operation: Any, scale: Any, dtype: torch.dtype, device: torch.device, store: _Landing) -> Factor | None:
    """`operation` by `scale` as a factor for gradients of `dtype` on `device`; None: it cannot wait.

    scale: a Python number, or a tensor of no dimensions on `device` or on the CPU. It is copied here:
    a later edit does not reach the factor. Nothing is read back from a device.
    """
    kind_of_scale = _kind_of_scale(scale, device)
    if kind_of_scale is None:
        return None
    form = _native_form(operation, dtype, device, kind_of_scale)
    if form is None:
        return None
    kind, rounding = form
    if isinstance(scale, Tensor):
        scale = scale.detach().clone()
    value, held = 0.0, None
    if isinstance(scale, Tensor) and scale.device == device:
        # .to() may return the clone itself, which the factor keeps reading: the store gets one of its own.
        held = store.to_host(scale.to(rounding).to(torch.float32, copy=True))
    else:
        value = float(torch.as_tensor(scale, dtype=torch.float64, device="cpu").to(rounding).to(torch.float32))
    apply = SCALES[operation]
    return Factor(kind, value, held, lambda gradient: apply(gradient, scale))


def _kind_of_scale(scale: Any, device: torch.device) -> tuple[Any, ...] | None:
    """What of a scale can change the rounding; None for what is not probed."""
    if type(scale) in (int, float):
        return (type(scale),)
    if type(scale) is not Tensor or scale.dim() > 0 or not scale.is_floating_point():
        return None
    if scale.device != device and scale.device.type != "cpu":
        return None
    return (scale.dtype, scale.device.type)


@functools.cache
def _native_form(
    operation: Any, dtype: torch.dtype, device: torch.device, kind_of_scale: tuple[Any, ...]
) -> tuple[int, torch.dtype] | None:
    """(kind, dtype that the scale is rounded to) that gives torch's bits; see [Note: probing a scale].

    Waits for the device, once per combination, and uses no other one: that would cost a context there.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None  # the optimizer reads no other
    candidates = [
        (kind, rounding)
        for kind in (MULTIPLY, DIVIDE, MULTIPLY_RECIPROCAL)
        for rounding in dict.fromkeys((torch.float32, dtype))
    ]
    # The short lengths take the scalar tails of vectorised loops.
    values = _probe_values(dtype)
    with torch.inference_mode(False), torch.no_grad():
        for number in _PROBE_SCALES:
            if kind_of_scale[0] is int:
                scale: Any = int(number) if abs(number) < 2**31 else 1
            elif kind_of_scale[0] is float:
                scale = number
            else:
                place = device if kind_of_scale[1] == device.type else kind_of_scale[1]
                scale = torch.tensor(number, dtype=kind_of_scale[0], device=place)
            exact = torch.as_tensor(scale, dtype=torch.float64, device="cpu")
            for piece in (values, values[-1009:], values[5:18], values[7:8]):
                probed = piece.to(device, copy=True)
                try:
                    SCALES[operation](probed, scale)
                except RuntimeError:
                    return None  # illegal for this scale: torch shall raise it to the caller
                probed = probed.cpu()
                candidates = [form for form in candidates if _same(_emulate(piece, exact, *form), probed)]
            if not candidates:
                return None
    return candidates[0]


# Exact, inexact in every format, ties, tiny, zero, overflow, subnormal and not finite.
_PROBE_SCALES = (1 / 3, 1.0, 0.5, -0.7, 1e-3, 0.99951171875, 1.00390625, 3.0, 7.0, 1000.0, 65537.0, 16777217.0,
                 1 / 65536, 1e-6, 1e-20, 1e-40, 3e38, 0.0, float("inf"), float("nan"))  # fmt: skip


def _probe_values(dtype: torch.dtype) -> Tensor:
    """Every bit pattern of a 16-bit format; a spread of fp32, its subnormals included. On the CPU."""
    if dtype != torch.float32:
        return torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cpu").to(torch.int16).view(dtype)
    spread = torch.arange(-(2**31), 2**31, 400_009, dtype=torch.int64, device="cpu")  # a prime: the low bits vary
    subnormal = torch.arange(0, 2**23, 8209, dtype=torch.int64, device="cpu")
    return torch.cat((spread, subnormal)).to(torch.int32).view(dtype)


def _emulate(gradient: Tensor, scale: Tensor, kind: int, rounding: torch.dtype) -> Tensor:
    """What the optimizer computes, on the CPU."""
    value = float(scale.to(rounding).to(torch.float32))
    return apply_factor(gradient.to(torch.float32), kind, value, gradient.dtype).to(gradient.dtype)


def apply_factor(wide: Tensor, kind: int, value: float, dtype: torch.dtype) -> Tensor:
    """A factor as the native update applies it, in separate operations: a new tensor, rounded to `dtype`, in fp32.

    wide: an fp32 tensor on the CPU; value: an fp32 value.
    """
    # Expanded, so that torch cannot take a path of its own for scalars.
    factor = torch.full((1,), value, dtype=torch.float32, device="cpu").expand(wide.shape).contiguous()
    if kind == MULTIPLY:
        scaled = wide * factor
    elif kind == DIVIDE:
        scaled = wide / factor
    else:
        scaled = wide * (torch.ones_like(factor) / factor)
    return scaled.to(dtype).to(torch.float32)


def scaled(gradient: Tensor, scale: GradScale) -> Tensor:
    """What `step(grad_scale=scale)` makes of a gradient: itself, or a new one in fp32."""
    if not isinstance(scale, Tensor) and scale == 1.0:
        return gradient
    return gradient.to(torch.float32) * scale


def _same(left: Tensor, right: Tensor) -> bool:
    """Equal bit for bit; a NaN equals any NaN."""
    bits = torch.int32 if left.dtype == torch.float32 else torch.int16
    return bool(((left.view(bits) == right.view(bits)) | (left.isnan() & right.isnan())).all())
