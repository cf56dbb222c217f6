"""The model that `offload plan` is asked about, on the meta device: no weight is allocated, nothing is downloaded."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import offload

from ._model_shapes import ModelShape
from ._published_models import PUBLISHED, nearest_name, published_name

__all__ = ["decoder", "decoder_of_depth", "described", "model_of", "published"]

# Llama's proportions: a head of 128, four query heads to a key, a feed-forward of 3.5 and a depth of 1/128 the width.
_HEAD, _QUERIES_A_KEY, _FEED_FORWARD = 128, 4, 3.5
_VOCABULARY = 128_256


class _Undrawn:
    """Of the meta device: to draw weights gives none there and takes seconds, as torch imports its compiler for it."""

    def reset_parameters(self) -> None:
        pass


class _Matrix(_Undrawn, nn.Linear):
    pass


class _Embedding(_Undrawn, nn.Embedding):
    pass


class _Norm(nn.RMSNorm):
    """As those models have it: written out, it keeps its input in fp32 and what it scales."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scaled: torch.Tensor = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * scaled.to(x.dtype)


class _Gelu(nn.Module):
    """GPT-2's, which Hugging Face writes out: it keeps three times what it is given, beside that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


def model_of(options: argparse.Namespace) -> nn.Module:
    """What the options describe. Raises `InvalidArgument` with what is legal."""
    dtype = getattr(torch, options.dtype)
    numbers = {"--params": options.params, "--layers": options.layers, "--hidden": options.hidden}
    given = [name for name, value in numbers.items() if value is not None]
    if options.model is None:
        return _by_numbers(options, dtype)
    if given or options.vocabulary is not None:
        raise offload.InvalidArgument(f"{', '.join(given) or '--vocabulary'} beside MODEL: give the one or the other")
    path = Path(options.model)
    if path.exists():
        return _from_config(path, dtype)
    module, separator, function = options.model.partition(":")
    if separator and module and function.isidentifier():
        return _from_entry_point(module, function, dtype)
    name = published_name(options.model)
    if name is not None:
        return published(name, dtype)
    if options.model.startswith(("/", ".", "~")) or options.model.endswith(".json"):
        raise offload.InvalidArgument(
            f"MODEL {options.model!r}: there is no such file or directory; give a Hugging Face config.json or the "
            "directory that has one"
        )
    near = nearest_name(options.model)
    raise offload.InvalidArgument(
        f"MODEL {options.model!r} is no file or directory here, no Python function and no name that is known"
        f"{f': did you mean {near!r}?' if near else '.'} Nothing is downloaded: give a Hugging Face config.json, the "
        "directory that has one, package.module:function, --params, or one of " + ", ".join(PUBLISHED)
    )


def described(model: nn.Module) -> str:
    """Layers and widths, where the model says."""
    config = getattr(model, "config", None)
    names = {"num_hidden_layers": "layers", "hidden_size": "hidden", "vocab_size": "vocabulary"}
    found = [f"{word} {getattr(config, name):,}" for name, word in names.items() if hasattr(config, name)]
    return ", ".join([getattr(config, "title", type(model).__name__), *found])


def decoder(
    layers: int, hidden: int, *, vocabulary: int, dtype: torch.dtype, parameters: int | None = None
) -> nn.Module:
    """A decoder of Llama's proportions; with `parameters` the feed-forward is as wide as makes about so many.

    Raises `InvalidArgument` for sizes that do not go together.
    """
    heads = max(1, hidden // _HEAD)
    kv_heads = max(1, heads // _QUERIES_A_KEY)
    keys = kv_heads * (hidden // heads)
    feed_forward = round(_FEED_FORWARD * hidden)
    if parameters is not None:
        outside = 2 * vocabulary * hidden + hidden
        attention = 2 * hidden * hidden + 2 * hidden * keys + 2 * hidden
        feed_forward = round((parameters - outside - layers * attention) / (3 * layers * hidden))
        if feed_forward < 1:
            raise offload.InvalidArgument(
                f"{parameters:,} parameters are too few for {layers} layers of {hidden} and a vocabulary of "
                f"{vocabulary:,}: embedding and head alone take {outside:,}, attention {layers * attention:,}; give "
                "fewer --layers, a smaller --hidden or a smaller --vocabulary"
            )
    shape = ModelShape(vocabulary, hidden, layers, feed_forward, heads, kv_heads, hidden // heads)
    return _built(shape, "a Llama-shaped decoder", dtype)


def published(name: str, dtype: torch.dtype) -> nn.Module:
    """The model of that name in the table."""
    return _built(PUBLISHED[name], name, dtype)


def _built(shape: ModelShape, title: str, dtype: torch.dtype) -> nn.Module:
    """The model of that shape, without a forward."""
    place: dict[str, Any] = {"device": "meta", "dtype": dtype}
    is_gpt2, hidden = shape.positions > 0, shape.hidden
    query, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size

    def matrix(columns: int, rows: int, *, bias: bool = is_gpt2) -> nn.Linear:
        return _Matrix(columns, rows, bias=bias, **place)

    def norm(width: int = hidden) -> nn.Module:
        return nn.LayerNorm(width, **place) if is_gpt2 else _Norm(width, **place)

    def attention() -> list[nn.Module]:
        if is_gpt2:
            return [matrix(hidden, query + 2 * keys), matrix(query, hidden)]
        into = [matrix(hidden, rows, bias=shape.attention_bias) for rows in (query, keys, keys)]
        return [*into, *(norm(shape.head_size) for _ in range(2 * shape.query_key_norm)), matrix(query, hidden)]

    def feed_forward() -> list[nn.Module]:
        ways_in = [matrix(hidden, shape.intermediate) for _ in range(1 if is_gpt2 else 2)]
        return [*ways_in, *(_Gelu() for _ in range(is_gpt2)), matrix(shape.intermediate, hidden)]

    def block() -> nn.Sequential:
        parts = nn.Sequential(*(norm() for _ in range(shape.norms_per_layer)), *attention())
        if shape.experts:
            parts.append(matrix(hidden, shape.experts))
            parts.add_module("experts", nn.ModuleList(nn.Sequential(*feed_forward()) for _ in range(shape.experts)))
        else:
            parts.extend(feed_forward())
        return parts

    model = nn.Module()
    model.embedding = _Embedding(shape.vocabulary, hidden, **place)
    if is_gpt2:
        model.positions = _Embedding(shape.positions, hidden, **place)
    model.layers = nn.ModuleList(block() for _ in range(shape.layers))
    model.norm = norm()
    model.head = matrix(hidden, shape.vocabulary, bias=False)
    if shape.tied_head:
        model.head.weight = model.embedding.weight
    model.config = SimpleNamespace(  # type: ignore[assignment]
        title=title,
        num_hidden_layers=shape.layers,
        hidden_size=hidden,
        vocab_size=shape.vocabulary,
        num_attention_heads=shape.heads,
        head_dim=shape.head_size,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.experts_a_token,
    )
    return model


def decoder_of_depth(layers: int, vocabulary: int | None, dtype: torch.dtype) -> nn.Module:
    """The decoder of so many layers that is as wide as Llama's proportions make it."""
    return decoder(layers, _HEAD * layers, vocabulary=vocabulary or _VOCABULARY, dtype=dtype)


def _by_numbers(options: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    vocabulary = options.vocabulary or _VOCABULARY
    layers, hidden = options.layers, options.hidden
    if options.params is None and (layers is None or hidden is None):
        raise offload.InvalidArgument(
            "no model: give a name such as Llama-3.1-8B, a Hugging Face config.json or its directory, "
            "package.module:function, or numbers such as "
            "--params 8e9 --layers 32 --hidden 4096"
        )
    if layers is None and hidden is None:
        layers = 1
        while _count(layers + 1, _HEAD * (layers + 1), vocabulary) <= options.params:
            layers += 1
    if hidden is None:
        hidden = _HEAD * layers
    elif layers is None:
        layers = max(1, hidden // _HEAD)
    return decoder(layers, hidden, vocabulary=vocabulary, dtype=dtype, parameters=options.params)


def _count(layers: int, hidden: int, vocabulary: int) -> int:
    """Parameters of a decoder of Llama's proportions, about."""
    a_layer = (2 + 2 / _QUERIES_A_KEY + 3 * _FEED_FORWARD) * hidden**2
    return round(2 * vocabulary * hidden + layers * a_layer)


def _from_config(path: Path, dtype: torch.dtype) -> nn.Module:
    file = path / "config.json" if path.is_dir() else path
    try:
        written = json.loads(file.read_bytes())
    except OSError as error:
        raise offload.InvalidArgument(
            f"{file} cannot be read: {error.strerror}; give a Hugging Face config.json or the directory that has one"
        ) from error
    except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets
        raise offload.InvalidArgument(f"{file} is no Hugging Face config: {error}") from error
    kind = written.get("model_type") if isinstance(written, dict) else None
    if not isinstance(kind, str):
        raise offload.InvalidArgument(
            f"{file} is no Hugging Face config: it is no JSON object that names a 'model_type'"
        )
    try:
        import transformers
    except ModuleNotFoundError:
        raise offload.InvalidArgument(
            f"{file}: building a {kind!r} model takes transformers, which is not installed; pip install transformers, "
            "or give --params, --layers and --hidden"
        ) from None
    try:
        config = transformers.AutoConfig.from_pretrained(str(file))
        (name, *_) = getattr(config, "architectures", None) or [""]
        kind_of_model = getattr(transformers, name, None) if name else None
        build = kind_of_model or transformers.AutoModelForCausalLM.from_config
        with torch.device("meta"):
            model: nn.Module = build(config)
    except Exception as error:  # whatever transformers, or the model's own code, meets in a config that it trusts
        # Of several lines the others are lists of all that it has.
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise offload.InvalidArgument(
            f"{file}: transformers {transformers.__version__} refuses it: {reason}; give the config of a language "
            "model that it knows, a function as package.module:function, or --params, --layers and --hidden"
        ) from error
    return model.to(dtype)


def _from_entry_point(module: str, function: str, dtype: torch.dtype) -> nn.Module:
    if "" not in sys.path:
        sys.path.insert(0, "")  # a console script does not look into the directory it is called in
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise offload.InvalidArgument(f"MODEL '{module}:{function}' cannot be imported: {error}") from error
    try:
        with torch.device("meta"):
            model = build()
    except Exception as error:  # it is the user's, and may fail in any way
        raise offload.InvalidArgument(
            f"MODEL '{module}:{function}' failed with {type(error).__name__}: {error}: it takes no arguments and "
            "returns a torch.nn.Module"
        ) from error
    if not isinstance(model, nn.Module):
        raise offload.InvalidArgument(
            f"MODEL '{module}:{function}' returned a {type(model).__name__}: it takes no arguments and returns a "
            "torch.nn.Module"
        )
    return model.to(dtype)
