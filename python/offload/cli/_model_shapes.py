"""Parameter shapes of published decoder models, from their configurations: what a pool must hold for each."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MODELS", "TINY", "ModelShape", "shapes"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a Llama-like model's configuration file.

    experts: feed-forwards beside each other, of which a token passes experts_a_token. positions: learned ones, as GPT-2
    has them, and with them norms and matrices with biases and a feed-forward without a gate.
    """

    vocabulary: int
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int = 128
    tied_head: bool = False
    attention_bias: bool = False
    query_key_norm: bool = False
    norms_per_layer: int = 2
    experts: int = 0
    experts_a_token: int = 0
    positions: int = 0


MODELS: dict[str, ModelShape] = {
    "Llama-3.1-8B": ModelShape(128256, 4096, 32, 14336, 32, 8),
    "Llama-3.2-1B": ModelShape(128256, 2048, 16, 8192, 32, 8, head_size=64, tied_head=True),
    "Mistral-7B": ModelShape(32000, 4096, 32, 14336, 32, 8),
    "Llama-3.1-70B": ModelShape(128256, 8192, 80, 28672, 64, 8),
    "Gemma-2-9B": ModelShape(256000, 3584, 42, 14336, 16, 8, head_size=256, tied_head=True, norms_per_layer=4),
    "Qwen3-8B": ModelShape(151936, 4096, 36, 12288, 32, 8, query_key_norm=True),
    "Llama-2-13B": ModelShape(32000, 5120, 40, 13824, 40, 40),
    "Qwen2.5-14B": ModelShape(152064, 5120, 48, 13824, 40, 8, attention_bias=True),
    "Qwen2.5-7B": ModelShape(152064, 3584, 28, 18944, 28, 4, attention_bias=True),
}

# No published model: small enough to train anywhere in seconds.
TINY = ModelShape(256, 64, 2, 176, 4, 2, head_size=16)


def shapes(model: ModelShape) -> list[Shape]:
    """The shape of every parameter of a Llama-like model with neither experts nor learned positions, in the order of
    `model.parameters()`; a tied head is listed once."""
    query, key_value = model.heads * model.head_size, model.kv_heads * model.head_size
    layer: list[Shape] = []
    for rows in (query, key_value, key_value):
        layer.append((rows, model.hidden))
        if model.attention_bias:
            layer.append((rows,))
    layer.append((model.hidden, query))
    if model.query_key_norm:
        layer += [(model.head_size,)] * 2
    layer += [(model.intermediate, model.hidden)] * 2 + [(model.hidden, model.intermediate)]
    layer += [(model.hidden,)] * model.norms_per_layer
    embedding = (model.vocabulary, model.hidden)
    return [embedding, *layer * model.layers, (model.hidden,), *([] if model.tied_head else [embedding])]
