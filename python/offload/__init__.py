"""Train PyTorch models far larger than the device's memory, exactly and hidden behind the model's own compute.

    model, optim = offload.wrap(model, optim)

Names are loaded on first use, so that `offload --help` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import unified
    from ._activation_region import offload_activations
    from ._adamw import AdamW
    from ._config import Config
    from ._environment import environment
    from ._errors import (
        DeviceError,
        InternalError,
        InvalidArgument,
        OffloadError,
        OutOfHostMemory,
        StateError,
        StorageError,
    )
    from ._export import describe_checkpoint, export_checkpoint
    from ._lion import Lion
    from ._loading import Checkpoint, load_checkpoint
    from ._optimizer import OffloadOptimizer
    from ._plan import Plan
    from ._saving import CheckpointSave, save_checkpoint
    from ._stats import Stats
    from ._trace_report import TraceReport
    from ._tracing import trace
    from ._wrap import estimate, full_params, unwrap, wrap
    from .deepspeed import add_config_arguments, initialize

__all__ = [
    "AdamW",
    "Checkpoint",
    "CheckpointSave",
    "Config",
    "DeviceError",
    "InternalError",
    "InvalidArgument",
    "Lion",
    "OffloadError",
    "OffloadOptimizer",
    "OutOfHostMemory",
    "Plan",
    "StateError",
    "Stats",
    "StorageError",
    "TraceReport",
    "__version__",
    "add_config_arguments",
    "describe_checkpoint",
    "environment",
    "estimate",
    "export_checkpoint",
    "full_params",
    "initialize",
    "load_checkpoint",
    "offload_activations",
    "save_checkpoint",
    "trace",
    "unified",
    "unwrap",
    "wrap",
]

_NAMESPACES = ("deepspeed", "unified")
_HOMES = {
    "AdamW": "_adamw",
    "Checkpoint": "_loading",
    "CheckpointSave": "_saving",
    "Config": "_config",
    "DeviceError": "_errors",
    "InternalError": "_errors",
    "InvalidArgument": "_errors",
    "Lion": "_lion",
    "OffloadError": "_errors",
    "OffloadOptimizer": "_optimizer",
    "OutOfHostMemory": "_errors",
    "Plan": "_plan",
    "StateError": "_errors",
    "Stats": "_stats",
    "StorageError": "_errors",
    "TraceReport": "_trace_report",
    "add_config_arguments": "deepspeed",
    "estimate": "_wrap",
    "describe_checkpoint": "_export",
    "export_checkpoint": "_export",
    "environment": "_environment",
    "full_params": "_wrap",
    "initialize": "deepspeed",
    "load_checkpoint": "_loading",
    "offload_activations": "_activation_region",
    "save_checkpoint": "_saving",
    "trace": "_tracing",
    "unwrap": "_wrap",
    "wrap": "_wrap",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("offload")
    elif name in _NAMESPACES:
        value = importlib.import_module("." + name, __name__)
    elif name in _HOMES:
        value = getattr(importlib.import_module("." + _HOMES[name], __name__), name)
    else:
        raise AttributeError(f"module 'offload' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
