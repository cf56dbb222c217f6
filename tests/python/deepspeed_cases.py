"""Short ways to write DeepSpeed configs and to read what is said about them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from offload import InvalidArgument
from offload.deepspeed._config import load
from offload.deepspeed._settings import Settings

CONFIGS = Path(__file__).parent / "deepspeed_configs"
BATCH = {"train_batch_size": 8}


def quiet(config: Any, **options: Any) -> Settings:
    """The settings of a config that nothing is to be said against."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(config, strict=True, **options)


def zero(**keys: Any) -> dict[str, Any]:
    return {**BATCH, "zero_optimization": {"stage": 3, **keys}}


def adam(**params: Any) -> dict[str, Any]:
    return {**BATCH, "optimizer": {"type": "AdamW", "params": params}}


def schedule(name: str, **params: Any) -> dict[str, Any]:
    return {**BATCH, "scheduler": {"type": name, "params": params}}


def refusal(config: Any, **options: Any) -> str:
    with warnings.catch_warnings(), pytest.raises(InvalidArgument) as error:
        warnings.simplefilter("ignore")
        load(config, **options)
    return str(error.value)
