"""Models by their published names: their shapes, without a network and without transformers.

Source: the config.json that each was published with. Their numbers of parameters are published too, and a test counts
them anew.
"""

from __future__ import annotations

import difflib

from ._model_shapes import MODELS, ModelShape

__all__ = ["PUBLISHED", "nearest_name", "published_name"]

PUBLISHED: dict[str, ModelShape] = {
    **MODELS,
    "Llama-2-7B": ModelShape(32000, 4096, 32, 11008, 32, 32),
    "Llama-2-70B": ModelShape(32000, 8192, 80, 28672, 64, 8),
    "Llama-3-8B": MODELS["Llama-3.1-8B"],
    "Llama-3-70B": MODELS["Llama-3.1-70B"],
    "Llama-3.1-405B": ModelShape(128256, 16384, 126, 53248, 128, 8),
    "Llama-3.2-3B": ModelShape(128256, 3072, 28, 8192, 24, 8, tied_head=True),
    "Llama-3.3-70B": MODELS["Llama-3.1-70B"],
    "TinyLlama-1.1B": ModelShape(32000, 2048, 22, 5632, 32, 4, head_size=64),
    "SmolLM2-135M": ModelShape(49152, 576, 30, 1536, 9, 3, head_size=64, tied_head=True),
    "SmolLM2-360M": ModelShape(49152, 960, 32, 2560, 15, 5, head_size=64, tied_head=True),
    "SmolLM2-1.7B": ModelShape(49152, 2048, 24, 8192, 32, 32, head_size=64, tied_head=True),
    "Mistral-7B-v0.3": ModelShape(32768, 4096, 32, 14336, 32, 8),
    "Mixtral-8x7B": ModelShape(32000, 4096, 32, 14336, 32, 8, experts=8, experts_a_token=2),
    "Qwen2.5-0.5B": ModelShape(151936, 896, 24, 4864, 14, 2, head_size=64, tied_head=True, attention_bias=True),
    "Qwen2.5-1.5B": ModelShape(151936, 1536, 28, 8960, 12, 2, tied_head=True, attention_bias=True),
    "Qwen2.5-3B": ModelShape(151936, 2048, 36, 11008, 16, 2, tied_head=True, attention_bias=True),
    "Qwen2.5-32B": ModelShape(152064, 5120, 64, 27648, 40, 8, attention_bias=True),
    "Qwen2.5-72B": ModelShape(152064, 8192, 80, 29568, 64, 8, attention_bias=True),
    "Qwen3-0.6B": ModelShape(151936, 1024, 28, 3072, 16, 8, tied_head=True, query_key_norm=True),
    "Qwen3-4B": ModelShape(151936, 2560, 36, 9728, 32, 8, tied_head=True, query_key_norm=True),
    "Qwen3-14B": ModelShape(151936, 5120, 40, 17408, 40, 8, query_key_norm=True),
    "Qwen3-32B": ModelShape(151936, 5120, 64, 25600, 64, 8, query_key_norm=True),
    "Gemma-2-2B": ModelShape(256000, 2304, 26, 9216, 8, 4, head_size=256, tied_head=True, norms_per_layer=4),
    "Gemma-2-27B": ModelShape(256000, 4608, 46, 36864, 32, 16, tied_head=True, norms_per_layer=4),
    "GPT-2": ModelShape(50257, 768, 12, 3072, 12, 12, head_size=64, tied_head=True, positions=1024),
    "GPT-2-medium": ModelShape(50257, 1024, 24, 4096, 16, 16, head_size=64, tied_head=True, positions=1024),
    "GPT-2-large": ModelShape(50257, 1280, 36, 5120, 20, 20, head_size=64, tied_head=True, positions=1024),
    "GPT-2-XL": ModelShape(50257, 1600, 48, 6400, 25, 25, head_size=64, tied_head=True, positions=1024),
}
# Words of names for weights of the same shapes.
_TUNED = {"instruct", "it", "chat", "base", "hf"}
_SAME_SHAPES = ("-v0.1", "-v0.2")
_OTHER_SPELLINGS = {"meta-llama": "llama", "gpt2": "gpt-2"}


def published_name(name: str) -> str | None:
    """The name in the table that is meant: of whatever organization and in whatever case, tuned or not."""
    known = {_plain(one): one for one in PUBLISHED}
    plain = _plain(name)
    for ending in _SAME_SHAPES:
        plain = plain if plain in known else plain.removesuffix(ending)
    return known.get(plain)


def nearest_name(name: str) -> str | None:
    """The name in the table that is most like it, if any is."""
    known = {_plain(one): one for one in PUBLISHED}
    near = difflib.get_close_matches(_plain(name), known, n=1)
    return known[near[0]] if near else None


def _plain(name: str) -> str:
    words = name.rpartition("/")[2].lower().replace("_", "-").split("-")
    plain = "-".join(word for word in words if word not in _TUNED)
    for spelling, other in _OTHER_SPELLINGS.items():
        if plain.startswith(spelling):
            plain = other + plain.removeprefix(spelling)
    return plain
