"""The model that `offload plan` is asked about, on the meta device: no weight is allocated, nothing is downloaded."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import offload

__all__ = ["decoder", "decoder_of_depth", "described", "model_of"]

# Llama's proportions: a head of 128, four query heads to a key, a feed-forward of 3.5 and a depth of 1/128 the width.
_HEAD, _QUERIES_A_KEY, _FEED_FORWARD = 128, 4, 3.5
_VOCABULARY = 128_256


class _Matrix(nn.Linear):
    """Of the meta device, where drawing weights takes time and gives none."""

    def reset_parameters(self) -> None:
        pass


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
    raise offload.InvalidArgument(
        f"MODEL {options.model!r} is no file or directory here and no Python function; nothing is downloaded: give a "
        "Hugging Face config.json, the directory that has one, package.module:function, or --params"
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
    keys = max(1, heads // _QUERIES_A_KEY) * (hidden // heads)
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
    place: dict[str, Any] = {"device": "meta", "dtype": dtype}

    def matrix(columns: int, rows: int) -> nn.Linear:
        return _Matrix(columns, rows, bias=False, **place)

    def block() -> nn.Sequential:
        attention = [matrix(hidden, hidden), matrix(hidden, keys), matrix(hidden, keys), matrix(hidden, hidden)]
        gated = [matrix(hidden, feed_forward), matrix(hidden, feed_forward), matrix(feed_forward, hidden)]
        return nn.Sequential(nn.RMSNorm(hidden, **place), *attention, nn.RMSNorm(hidden, **place), *gated)

    model = nn.Module()
    model.embedding = nn.Embedding(vocabulary, hidden, **place)
    model.layers = nn.ModuleList(block() for _ in range(layers))
    model.norm = nn.RMSNorm(hidden, **place)
    model.head = matrix(hidden, vocabulary)
    model.config = SimpleNamespace(  # type: ignore[assignment]
        title="a Llama-shaped decoder",
        num_hidden_layers=layers,
        hidden_size=hidden,
        vocab_size=vocabulary,
        num_attention_heads=heads,
        head_dim=hidden // heads,
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
            "no model: give a Hugging Face config.json or its directory, package.module:function, or numbers such as "
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
        kind = json.loads(file.read_text()).get("model_type")
    except OSError as error:
        raise offload.InvalidArgument(
            f"{file} cannot be read: {error.strerror}; give a Hugging Face config.json or the directory that has one"
        ) from error
    except (ValueError, AttributeError) as error:
        raise offload.InvalidArgument(f"{file} is no Hugging Face config: {error}") from error
    if kind is None:
        raise offload.InvalidArgument(f"{file} is no Hugging Face config: it has no 'model_type'")
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
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise offload.InvalidArgument(f"{file}: transformers {transformers.__version__} refuses it: {error}") from error
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
