"""What `fp16`, `bf16` and `data_types` make of parameters and buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import offload
from deepspeed_training import config_of

pytestmark = pytest.mark.usefixtures("device")


def test_parameters_are_cast_and_buffers_only_if_asked_to() -> None:
    class Rotary(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("frequencies", torch.ones(3))
            self.register_buffer("ids", torch.arange(3))

    def dtypes(**keys: Any) -> list[torch.dtype]:
        model = nn.Sequential(Rotary(), nn.BatchNorm1d(4))
        offload.initialize(model=model, config=config_of(bf16={"enabled": True}, **keys))
        assert model[0].weight.dtype == model[1].weight.dtype == torch.bfloat16 and model[0].ids.dtype == torch.int64
        return [model[0].frequencies.dtype, model[1].running_mean.dtype]

    # Torch refuses running statistics in another dtype than their weights.
    assert dtypes() == [torch.float32, torch.bfloat16]
    assert dtypes(data_types={"buffer_dtype": "fp16"}) == [torch.float16] * 2


class Router(nn.Linear):
    """Names a buffer as models of transformers do."""

    _keep_in_fp32_modules_strict = ("*.correction",)
    _keep_in_fp32_modules = ("scale",)

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.inner = nn.Module()
        self.inner.register_buffer("correction", torch.full((2,), 5.001))
        self.register_buffer("scale", torch.full((2,), 0.5).bfloat16())
        self.register_buffer("other", torch.ones(2).bfloat16())
        self.register_buffer("count", torch.arange(2))


@pytest.mark.parametrize(
    ("dtype", "keep", "kept"),
    [
        ("bf16", {}, {"inner.correction"}),
        ("bf16", {"keep_in_fp32_modules": "auto"}, {"inner.correction"}),
        ("fp16", {}, {"inner.correction", "scale"}),
        ("fp16", {"keep_in_fp32_modules": []}, set()),
        ("bf16", {"keep_in_fp32_modules": ["0.oth*", "inn*ion"]}, {"other", "inner.correction"}),
        ("bf16", {"keep_in_fp32_modules": ["0.weight", "count"]}, set()),
    ],
)
def test_buffers_that_are_kept_in_fp32(dtype: str, keep: dict[str, Any], kept: set[str]) -> None:
    """Whatever `buffer_dtype` says of the others; `correction` would lose its last digits."""
    model = nn.Sequential(Router())
    config = config_of(**{dtype: {"enabled": True}}, data_types={"buffer_dtype": dtype, **keep})
    offload.initialize(model=model, config=config)
    lower = torch.bfloat16 if dtype == "bf16" else torch.float16
    assert model[0].weight.dtype == lower and model[0].count.dtype == torch.int64
    for name in ("inner.correction", "scale", "other"):
        assert model.get_buffer(f"0.{name}").dtype == (torch.float32 if name in kept else lower), name
    if "inner.correction" in kept:
        assert torch.equal(model[0].inner.correction.cpu(), torch.full((2,), 5.001, device="cpu"))


def test_nothing_is_kept_apart_in_an_fp32_model() -> None:
    model = nn.Sequential(Router())
    offload.initialize(model=model, config=config_of())
    assert model[0].scale.dtype == torch.bfloat16
