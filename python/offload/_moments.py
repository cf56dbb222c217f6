"""How the moments of native optimizers are stored: in fp32, or lossy in bf16 or int8; and stochastic rounding.

The formats and the bits that they are rounded with are fixed in csrc/optimizer/update_rules.h, [Note: small moments]
and [Note: stochastic rounding]. The native core rounds states on the host, kernels/update.cu those on a CUDA device;
these are the same formats in torch operations, for states on the device where it has no kernels, and for what is loaded
and shown. All give the same bits.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._adamw import MOMENT_FORMATS, split_master
from ._parameter_size import MOMENT_BLOCK
from ._parameter_state import Allocate
from ._stored_values import flat

# Elements that are converted at a time: temporaries of all of a large parameter would not fit beside it.
_CHUNK = MOMENT_BLOCK << 12
_WORD = 0xFFFFFFFF
_INFINITY = 0x7F800000


def moment_bytes(form: str) -> tuple[int, int]:
    """Bytes of one moment: for each element, and more for each MOMENT_BLOCK of them."""
    return {"fp32": (4, 0), "bf16": (2, 0), "int8": (1, 4)}[form]


# --- random words -------------------------------------------------------------------------------------------


def seed_of(name: str, seed: int) -> int:
    """What the state of the parameter of this name is rounded with, when the run's `rounding_seed` is `seed`."""
    key: int = zlib.crc32(name.encode()) + _scrambled(seed & _WORD)
    return key & _WORD


class RandomWords:
    """The random words of one parameter in one step."""

    def __init__(self, seed: int, step: int) -> None:
        self.key: int = _scrambled((seed + _scrambled(step & _WORD)) & _WORD)

    def bits(self, begin: int, end: int, argument: str, device: torch.device) -> Tensor:
        """16 for each element from `begin` to `end`, as int64: those of a moment, or of the `"master"`."""
        if argument == "master":
            return self._words(_scrambled(self.key), begin, end, device) & 0xFFFF
        words = self._words(self.key, begin, end, device)
        return words & 0xFFFF if argument == "exp_avg" else words >> 16

    @staticmethod
    def _words(key: int, begin: int, end: int, device: torch.device) -> Tensor:
        index = torch.arange(begin, end, dtype=torch.int64, device=device)
        words: Tensor = _scrambled((index + key) & _WORD)
        return words


def _scrambled(words: Any) -> Any:
    """A word, or int64 words."""
    words = ((words ^ (words >> 16)) * 0x7FEB352D) & _WORD
    words = ((words ^ (words >> 15)) * 0x846CA68B) & _WORD
    return words ^ (words >> 16)


def round_stochastically_(kept: Tensor, value: Tensor, words: RandomWords, argument: str) -> None:
    """Makes `kept`, in bf16, the fp32 `value` of its strides; NaN is kept. argument: as for `RandomWords.bits`."""
    kept, elements = flat(kept), flat(value)
    for begin, end in _chunks(kept.numel()):
        part = elements[begin:end]
        raised = (_words_of(part) + words.bits(begin, end, argument, part.device)) >> 16
        quiet = (_words_of(part) >> 16 & 0x8000) | 0x7FC0
        kept[begin:end].view(torch.int16).copy_(torch.where(part.isnan(), quiet, raised).to(torch.int16))


# --- the formats --------------------------------------------------------------------------------------------


class Float32Moment:
    """A moment in fp32: exact, and what the others are read as."""

    def __init__(self, allocate: Allocate, argument: str) -> None:
        self._argument = argument
        self._value = allocate(torch.float32, "moments").zero_()

    @classmethod
    def over(cls, value: Tensor, argument: str) -> Float32Moment:
        """Of a tensor that has its values already."""
        moment = cls.__new__(cls)
        moment._argument, moment._value = argument, value
        return moment

    @property
    def nbytes(self) -> int:
        return self._value.nbytes

    def tensors(self) -> list[Tensor]:
        """What a step changes."""
        return [self._value]

    def value(self) -> Tensor:
        """In fp32, in the parameter's shape and strides: the live tensor where that is fp32, else a new one."""
        return self._value

    def live(self) -> Any:
        """What a checkpoint takes: the live tensor, or what makes the values when they are written."""
        return self._value

    def load(self, value: Tensor) -> None:
        """Takes over these values, on any device, in the nearest that the format has."""
        self._value.copy_(value)

    def fill(self, value: float) -> None:
        self._value.fill_(value)

    def keep(self, value: Tensor, words: RandomWords) -> None:
        """Stores what a step left in the tensor that `value()` gave, or in a copy of it elsewhere."""
        if value is not self._value:
            self._value.copy_(value)

    def native(self) -> dict[str, int]:
        """Its arguments of the native core."""
        return {self._argument: self._value.data_ptr(), "moment_format": MOMENT_FORMATS["fp32"]}


class BFloat16Moment:
    """A moment in bf16, rounded stochastically in a step."""

    def __init__(self, allocate: Allocate, argument: str) -> None:
        self._argument = argument
        self._value = allocate(torch.bfloat16, "moments").zero_()

    @property
    def nbytes(self) -> int:
        return self._value.nbytes

    def tensors(self) -> list[Tensor]:
        return [self._value]

    def value(self) -> Tensor:
        return self._value.to(torch.float32)

    def live(self) -> Any:
        return self._value

    def load(self, value: Tensor) -> None:
        kept, elements = flat(self._value), flat(_laid_out_as(self._value, value))
        for begin, end in _chunks(kept.numel()):
            kept[begin:end] = split_master(elements[begin:end].to(torch.float32))[0]

    def fill(self, value: float) -> None:
        self._value.fill_(value)

    def keep(self, value: Tensor, words: RandomWords) -> None:
        round_stochastically_(self._value, value, words, self._argument)

    def native(self) -> dict[str, int]:
        return {self._argument: self._value.data_ptr(), "moment_format": MOMENT_FORMATS["bf16"]}


class Int8Moment:
    """A moment in a byte an element and a scale for every MOMENT_BLOCK of them, in the order that they have in memory.

    Of a second moment the square root is stored. What was decoded is encoded to the same values again.
    """

    def __init__(self, allocate: Allocate, argument: str) -> None:
        self._argument = argument
        self._is_root = argument == "exp_avg_sq"
        self._levels = _ROOT_LEVELS if self._is_root else _FIRST_LEVELS
        self.codes = allocate(torch.uint8, "moments").zero_()
        self.scales = allocate(torch.float32, "moments", -(-self.codes.numel() // MOMENT_BLOCK)).zero_()

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.scales]

    def value(self) -> Tensor:
        value = torch.empty_like(self.codes, dtype=torch.float32)
        elements, codes = flat(value), flat(self.codes)
        for begin, end in _chunks(codes.numel()):
            elements[begin:end] = self._decoded(codes[begin:end].to(torch.int32), self.scales[_blocks(begin, end)])
        return value

    def join(self) -> Tensor:
        """The values, for the writer of a checkpoint."""
        return self.value()

    def live(self) -> Any:
        return self

    def load(self, value: Tensor) -> None:
        self._encode(_laid_out_as(self.codes, value), None)

    def fill(self, value: float) -> None:
        self._encode(torch.full_like(self.codes, value, dtype=torch.float32), None)

    def keep(self, value: Tensor, words: RandomWords) -> None:
        self._encode(value, words)

    def native(self) -> dict[str, int]:
        return {
            self._argument: self.codes.data_ptr(),
            f"{self._argument}_scales": self.scales.data_ptr(),
            "moment_format": MOMENT_FORMATS["int8"],
        }

    def _decoded(self, codes: Tensor, scales: Tensor) -> Tensor:
        scale = scales.repeat_interleave(MOMENT_BLOCK)[: codes.numel()]
        if self._is_root:
            root = self._levels.decoded(codes) * scale
            return root * root
        magnitude = self._levels.decoded(codes & 0x7F) * scale
        return torch.where(codes >= 0x80, -magnitude, magnitude)

    def _encode(self, value: Tensor, words: RandomWords | None) -> None:
        codes, elements = flat(self.codes), flat(value)
        for begin, end in _chunks(codes.numel()):
            part = elements[begin:end].to(torch.float32)
            # torch's fp32 square root on the CPU is not correctly rounded (MKL); through fp64 it is.
            magnitude = part.double().sqrt_().float() if self._is_root else part.abs()
            scales = self._levels.scales_of(magnitude)
            self.scales[_blocks(begin, end)] = scales
            to_level = torch.where(scales > 0, torch.ones_like(scales) / scales, 0)
            level = magnitude * to_level.repeat_interleave(MOMENT_BLOCK)[: end - begin]
            random = None if words is None else words.bits(begin, end, self._argument, part.device)
            code = self._levels.encoded(level, random)
            if self._is_root:  # never zero for what is not: the step divides by it
                code = torch.maximum(code, (level != 0).to(code.dtype))
            else:
                code = code | (_words_of(part) >> 24 & 0x80)
            codes[begin:end] = code.to(torch.uint8)


class _Levels:
    """The levels of an 8-bit code with so many bits of mantissa; blocks whose largest is below `least` are zero."""

    def __init__(self, mantissa_bits: int, top_code: int, least: float) -> None:
        self._shift = 23 - mantissa_bits
        self._offset = float(1 << mantissa_bits)
        self._offset_bits = (127 + mantissa_bits) << 23
        self._top_code = top_code
        self._top = float(self.decoded(torch.tensor([top_code], dtype=torch.int32, device="cpu")))
        self._least = least

    def decoded(self, codes: Tensor) -> Tensor:
        """fp32 levels of int32 codes."""
        return ((codes << self._shift) + self._offset_bits).view(torch.float32) - self._offset

    def encoded(self, level: Tensor, random: Tensor | None) -> Tensor:
        """int64 codes; `random`, words below 2^16, decides which neighbour; without it the nearer one."""
        half = 1 << (self._shift - 1)
        raise_by = half if random is None else (random << (self._shift - 16)) + (1 << (self._shift - 17))
        code = (_words_of(level + self._offset) + raise_by - self._offset_bits) >> self._shift
        return code.clamp(max=self._top_code)

    def scales_of(self, magnitude: Tensor) -> Tensor:
        """One scale for each block; the last may be shorter."""
        padded = torch.nn.functional.pad(magnitude, (0, -magnitude.numel() % MOMENT_BLOCK))
        bits = _words_of(padded).bitwise_and_(0x7FFFFFFF).view(-1, MOMENT_BLOCK).amax(1).to(torch.int32)
        largest = bits.view(torch.float32)
        # By a tensor: on CUDA torch divides by a number as it multiplies by its reciprocal.
        scales = largest / torch.full_like(largest, self._top)
        scales = (scales.view(torch.int32) & ~0xFF).view(torch.float32)
        scales = torch.where(largest < self._least, 0.0, scales)
        return torch.where(bits >= _INFINITY, float("nan"), scales)


_FIRST_LEVELS = _Levels(4, 127, 2.0**-100)
_ROOT_LEVELS = _Levels(5, 255, 2.0**-50)

Moment = Float32Moment | BFloat16Moment | Int8Moment
MOMENTS: dict[str, type[Moment]] = {"fp32": Float32Moment, "bf16": BFloat16Moment, "int8": Int8Moment}


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, count, _CHUNK):
        yield begin, min(begin + _CHUNK, count)


def _blocks(begin: int, end: int) -> slice:
    return slice(begin // MOMENT_BLOCK, -(-end // MOMENT_BLOCK))


def _laid_out_as(like: Tensor, value: Tensor) -> Tensor:
    """`value` with the strides of `like` and on its device: itself where it is so already."""
    if value.stride() == like.stride() and value.device == like.device:
        return value
    return torch.empty_like(like, dtype=value.dtype).copy_(value)


def _words_of(value: Tensor) -> Tensor:
    """The bits of fp32 values, as int64."""
    return value.view(torch.int32).to(torch.int64) & _WORD
