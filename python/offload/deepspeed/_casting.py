"""What `fp16`, `bf16` and `data_types` make of a model, and of inputs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ._settings import Precision

__all__ = ["TORCH_DTYPES", "cast", "cast_model"]

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in nested tuples, lists and dicts, in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        items = [cast(item, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {name: cast(item, dtype) for name, item in value.items()}
    return value


def cast_model(model: nn.Module, precision: Precision) -> None:
    """Cast as DeepSpeed casts: parameters by `fp16` and `bf16`, buffers (rotary frequencies, say) only if asked to.

    Torch wants running statistics in the dtype of their weights, so those of norms follow theirs. Buffers that are to
    be kept in fp32 are so afterwards.
    """
    is_16bit = precision.dtype != "fp32"
    if is_16bit:
        for parameter in model.parameters():
            parameter.data = cast(parameter.data, TORCH_DTYPES[precision.dtype])
    kept = list(_kept_patterns(model, precision)) if is_16bit else []
    for name, module in model.named_modules():
        dtype = precision.buffer_dtype
        if dtype is None and is_16bit and isinstance(module, nn.modules.batchnorm._NormBase):
            dtype = precision.dtype
        for own, buffer in module.named_buffers(recurse=False):
            full = f"{name}.{own}" if name else own
            wanted = "fp32" if any(pattern.search(full) for pattern in kept) else dtype
            if wanted is not None:
                buffer.data = cast(buffer.data, TORCH_DTYPES[wanted])


def _kept_patterns(model: nn.Module, precision: Precision) -> Iterator[re.Pattern[str]]:
    """What the full name of a buffer that stays in fp32 contains; `*` stands for any characters.

    Models of transformers name such modules in two attributes, the second for fp16 alone.
    """
    if precision.keep_in_fp32 is not None:
        yield from (re.compile(_glob(pattern)) for pattern in precision.keep_in_fp32)
        return
    attributes = ["_keep_in_fp32_modules_strict"] + ["_keep_in_fp32_modules"] * (precision.dtype == "fp16")
    for name, module in model.named_modules():
        for attribute in attributes:
            for pattern in getattr(module, attribute, None) or ():
                inside = rf"^{re.escape(name)}\..*" if name else ""
                yield re.compile(inside + _glob(pattern))


def _glob(pattern: str) -> str:
    return ".*".join(re.escape(part) for part in pattern.split("*"))
