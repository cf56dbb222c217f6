"""The Llama-shaped models of `offload bench train`: random bf16 weights, the same bits wherever they are made; and what
the forecast of a step has to know of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from offload import ParameterSize

from ._model_shapes import ModelShape

__all__ = ["build", "sizes_of"]

_DEVIATION = 0.02


class _WithoutInitialization(TorchFunctionMode):
    """Leaves memory as it comes: filling billions of weights on the CPU takes minutes."""

    _FILLS = (Tensor.normal_, Tensor.uniform_)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        return arguments[0] if function in self._FILLS else function(*arguments, **(options or {}))


def build(
    shape: ModelShape, sequence: int, home: torch.device, compute: torch.device, *, checkpointing: bool
) -> nn.Module:
    """The model in training mode, its weights on `home` and drawn on `compute`: the same bits at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=sequence,
        tie_word_embeddings=shape.tied_head,
        use_cache=False,
    )
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with home, _WithoutInitialization():
            model: nn.Module = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(dtype)
    if home.type != "meta":
        _draw(model, compute)
    if checkpointing:
        # By its new name in transformers, where it has one: the old one warns.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # type: ignore[operator]
    return model.train()


def sizes_of(model: nn.Module) -> list[ParameterSize]:
    """Its parameters, all trained, by unit: an element of a list of layers, or a module outside of those."""
    return [
        ParameterSize(
            name,
            parameter.numel(),
            parameter.element_size(),
            str(parameter.dtype).removeprefix("torch."),
            unit=_unit_of(name),
        )
        for name, parameter in model.named_parameters()
    ]


def _unit_of(name: str) -> str:
    modules = name.split(".")[:-1]
    element = next((position for position, module in enumerate(modules) if module.isdigit()), len(modules))
    return ".".join(modules[: element + 1])


@torch.no_grad()
def _draw(model: nn.Module, compute: torch.device) -> None:
    """Normal weights for every matrix; the scales of norms stay the ones that they are made with."""
    generator = torch.Generator(compute).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device=compute)
            parameter.copy_(drawn.normal_(0.0, _DEVIATION, generator=generator))
