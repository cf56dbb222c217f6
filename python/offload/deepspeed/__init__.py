"""Drop-in for scripts written for DeepSpeed: `import offload.deepspeed as deepspeed`.

One process, no launcher: the model trains under `offload.wrap`, placed as the DeepSpeed config says. What is not here
raises an `AttributeError` that names what to use.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from ._submodules import ROOTS, Finder, instead_of

if TYPE_CHECKING:
    from . import accelerator, checkpointing, comm, ops, zero
    from ._engine import Engine as DeepSpeedEngine
    from ._initialize import add_config_arguments, initialize
    from ._log import logger
    from ._schedulers import LRRangeTest, OneCycle, WarmupCosineLR, WarmupDecayLR, WarmupLR
    from ._trainer import wrap_options
    from .accelerator import get_accelerator
    from .comm import init_distributed

__all__ = [
    "DeepSpeedEngine",
    "LRRangeTest",
    "OneCycle",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "accelerator",
    "add_config_arguments",
    "checkpointing",
    "comm",
    "get_accelerator",
    "init_distributed",
    "initialize",
    "logger",
    "ops",
    "wrap_options",
    "zero",
]

# Of the DeepSpeed whose configs and names these are: scripts compare it.
__version__ = "0.19.8"

sys.meta_path.append(Finder())

# Loaded on first use: `offload config` reads configs without torch.
_MODULES = ("accelerator", "checkpointing", "comm", "ops", "zero", *ROOTS)
_HOMES = {
    "DeepSpeedEngine": ("_engine", "Engine"),
    "add_config_arguments": ("_initialize", "add_config_arguments"),
    "get_accelerator": ("accelerator", "get_accelerator"),
    "init_distributed": ("comm", "init_distributed"),
    "initialize": ("_initialize", "initialize"),
    "logger": ("_log", "logger"),
    "wrap_options": ("_trainer", "wrap_options"),
    **{
        name: ("_schedulers", name)
        for name in ("LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR")
    },
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module("." + name, __name__)
    if name not in _HOMES:
        instead = instead_of(name) or f"it has {', '.join(__all__)}"
        raise AttributeError(f"offload.deepspeed has no {name!r}: {instead}")
    home, attribute = _HOMES[name]
    value = getattr(importlib.import_module("." + home, __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
