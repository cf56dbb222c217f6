"""Activations rounded to a byte an element on their way to the host: lossy, and only where that was asked for.

The formats are fixed in kernels/activations.cu, [Note: activation formats]; the kernels there run on CUDA devices, and
the torch operations here, with the same bits, where those cannot be had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ._activation_order import SCALE_BLOCK, packed_bytes, scale_bytes
from ._adamw import FORMATS
from ._config import ActivationForm
from ._kernels import find_kernels

__all__ = ["ActivationFormat", "may_be_rounded", "open_format"]

# kLeast of kernels/activations.cu.
_LEAST = 2.0**-100
# Elements that torch operations convert at a time: temporaries of all of a large activation would not fit beside it.
_CHUNK = SCALE_BLOCK << 12
_EXPONENT = 0x7F800000
_QUIET_NAN = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}
_INTEGERS = {2: torch.int16, 4: torch.int32}


def may_be_rounded(tensor: Tensor) -> bool:
    """Whether what autograd saves as `tensor` may come back rounded, and the rest of its storage with it.

    Only what gradients flow through: inputs, masks, indices and what an operation keeps for itself stay exact. So do
    numbers that stand for a row, which backward divides by, and logarithms of probabilities, which it exponentiates. A
    storage that holds more than one tensor and its views may hold anything, and a scale would be of all of it.
    """
    base = tensor if tensor._base is None else tensor._base
    node = tensor.grad_fn
    return (
        tensor.dtype in FORMATS
        and tensor.requires_grad
        and tensor.dim() > 0
        and tensor.shape[-1] > 1
        and base.dtype == tensor.dtype
        and base.nbytes == tensor.untyped_storage().nbytes()
        and (node is None or node.name() != "LogSoftmaxBackward0")
    )


class ActivationFormat:
    """`"int8"` or `"fp8"` for activations on `device`, by its kernels or by torch operations."""

    def __init__(self, name: ActivationForm, device: torch.device) -> None:
        self._name = name
        self._kernels, self._refusal = find_kernels(device, "activations")
        self._codes = _INT8 if name == "int8" else _FP8

    def fallbacks(self) -> list[str]:
        """Every slower path that is taken, one sentence each."""
        if self._refusal is None:
            return []
        return [f"activations are rounded to {self._name} by separate torch operations: {self._refusal}"]

    @staticmethod
    def packed_bytes(count: int) -> int:
        """Bytes of so many elements: the fp32 scales of their blocks, and a code each."""
        return packed_bytes(count)

    @torch.no_grad()
    def pack(self, values: Tensor) -> Tensor:
        """The bytes of contiguous fp32, bf16 or fp16 `values`, on their device; current stream."""
        count = values.numel()
        packed = torch.empty(self.packed_bytes(count), dtype=torch.uint8, device=values.device)
        codes, scales = _parts(packed, count)
        if self._kernels is not None:
            self._kernels.encode(self._name, values, codes, scales)
            return packed
        for begin, end in _chunks(count):
            blocks = slice(begin // SCALE_BLOCK, -(-end // SCALE_BLOCK))
            codes[begin:end], scales[blocks] = self._codes.encoded(values[begin:end].to(torch.float32))
        return packed

    @torch.no_grad()
    def unpack(self, packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """`count` values in `dtype` from what `pack` made of as many."""
        values = torch.empty(count, dtype=dtype, device=packed.device)
        codes, scales = _parts(packed, count)
        if self._kernels is not None:
            self._kernels.decode(self._name, codes, scales, values)
            return values
        bits = values.view(_INTEGERS[dtype.itemsize])
        for begin, end in _chunks(count):
            scale = _spread(scales[begin // SCALE_BLOCK : -(-end // SCALE_BLOCK)], end - begin)
            value = self._codes.decoded(codes[begin:end], scale)
            values[begin:end] = value
            bits[begin:end].masked_fill_(value.isnan(), _QUIET_NAN[dtype])  # a cast may give another
        return values


def open_format(name: ActivationForm, device: torch.device) -> ActivationFormat | None:
    """None for `"exact"`."""
    return None if name == "exact" else ActivationFormat(name, device)


class _Int8:
    def scales_of(self, largest: Tensor) -> Tensor:
        # By a tensor: on CUDA torch divides by a number as it multiplies by its reciprocal.
        scale = largest / torch.full_like(largest, 126.0)
        return (scale.view(torch.int32) & ~0xFF).view(torch.float32)

    def encoded(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 codes and fp32 scales of fp32 values, the first of a block."""
        level, scales = _levels(value, self.scales_of)
        code = level.round().to(torch.int8)
        code.masked_fill_(value == torch.inf, 127).masked_fill_(value == -torch.inf, -127)
        return code.masked_fill_(value.isnan(), -128).view(torch.uint8), scales

    def decoded(self, codes: Tensor, scale: Tensor) -> Tensor:
        code = codes.view(torch.int8)
        value = code.to(torch.float32) * scale
        value.masked_fill_(code == 127, torch.inf).masked_fill_(code == -127, -torch.inf)
        return value.masked_fill_(code == -128, torch.nan)


class _Fp8:
    def scales_of(self, largest: Tensor) -> Tensor:
        return ((largest.view(torch.int32) & _EXPONENT) - (7 << 23)).view(torch.float32)

    def encoded(self, value: Tensor) -> tuple[Tensor, Tensor]:
        level, scales = _levels(value, self.scales_of)
        # torch's own E4M3 has finite values where IEEE 754 has infinities, and the same codes below them.
        code = level.to(torch.float8_e4m3fn).view(torch.uint8)
        sign = code & 0x80
        code = (code & 0x7F).clamp_(max=0x77) | sign
        code = torch.where(value.isinf(), 0x78 | (value < 0).to(torch.uint8) << 7, code)
        return code.masked_fill_(value.isnan(), 0x7F), scales

    def decoded(self, codes: Tensor, scale: Tensor) -> Tensor:
        magnitude = codes & 0x7F
        value = codes.view(torch.float8_e4m3fn).to(torch.float32) * scale
        value = torch.where(magnitude == 0x78, torch.copysign(torch.full_like(value, torch.inf), value), value)
        return value.masked_fill_(magnitude > 0x78, torch.nan)


_INT8, _FP8 = _Int8(), _Fp8()


def _levels(value: Tensor, scales_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """fp32 values over the scales of their blocks, 0 for what is not finite; and the scales."""
    finite = value.masked_fill(~value.isfinite(), 0.0)
    largest = torch.nn.functional.pad(finite.abs(), (0, -value.numel() % SCALE_BLOCK)).view(-1, SCALE_BLOCK).amax(1)
    is_least = largest < _LEAST
    scales = scales_of(largest.masked_fill(is_least, 1.0)).masked_fill_(is_least, 0.0)
    to_level = (torch.ones_like(scales) / scales).masked_fill_(is_least, 0.0)
    return finite * _spread(to_level, value.numel()), scales


def _spread(of_blocks: Tensor, count: int) -> Tensor:
    """The number of its block for each of `count` elements."""
    return of_blocks.repeat_interleave(SCALE_BLOCK)[:count]


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, count, _CHUNK):
        yield begin, min(begin + _CHUNK, count)


def _parts(packed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The codes and the scales in it."""
    scales = packed[: scale_bytes(count)].view(torch.float32)
    return packed[scale_bytes(count) :], scales
