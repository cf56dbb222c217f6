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
    from ._export import checkpoint_weights, describe_checkpoint, export_checkpoint
    from ._forecast import StepForecast, forecast
    from ._hardware import Hardware
    from ._lion import Lion
    from ._loading import Checkpoint, load_checkpoint
    from ._memory import MemorySummary
    from ._optimizer import OffloadOptimizer
    from ._parameter_size import ParameterSize
    from ._plan import Plan
    from ._predict import estimate, measure_hardware, predict
    from ._predicted_step import StepPrediction
    from ._prediction import PlacedBytes, Prediction
    from ._running_save import CheckpointSave
    from ._saving import save_checkpoint
    from ._stats import Stats
    from ._step_work import Machine, UnitWork, transformer_compute, unit_works
    from ._trace_report import TraceReport
    from ._tracing import trace
    from ._wrap import full_params, unwrap, wrap
    from .deepspeed import add_config_arguments, initialize

__all__ = [
    "AdamW",
    "Checkpoint",
    "CheckpointSave",
    "Config",
    "DeviceError",
    "Hardware",
    "InternalError",
    "InvalidArgument",
    "Lion",
    "Machine",
    "MemorySummary",
    "OffloadError",
    "OffloadOptimizer",
    "OutOfHostMemory",
    "ParameterSize",
    "PlacedBytes",
    "Plan",
    "Prediction",
    "StateError",
    "Stats",
    "StepForecast",
    "StepPrediction",
    "StorageError",
    "TraceReport",
    "UnitWork",
    "__version__",
    "add_config_arguments",
    "checkpoint_weights",
    "describe_checkpoint",
    "environment",
    "estimate",
    "export_checkpoint",
    "forecast",
    "full_params",
    "initialize",
    "load_checkpoint",
    "measure_hardware",
    "offload_activations",
    "predict",
    "save_checkpoint",
    "trace",
    "transformer_compute",
    "unified",
    "unit_works",
    "unwrap",
    "wrap",
]

_NAMESPACES = ("deepspeed", "unified")
_HOMES = {
    "AdamW": "_adamw",
    "Checkpoint": "_loading",
    "CheckpointSave": "_running_save",
    "Config": "_config",
    "DeviceError": "_errors",
    "Hardware": "_hardware",
    "InternalError": "_errors",
    "InvalidArgument": "_errors",
    "Lion": "_lion",
    "Machine": "_step_work",
    "MemorySummary": "_memory",
    "OffloadError": "_errors",
    "OffloadOptimizer": "_optimizer",
    "OutOfHostMemory": "_errors",
    "ParameterSize": "_parameter_size",
    "PlacedBytes": "_prediction",
    "Plan": "_plan",
    "Prediction": "_prediction",
    "StateError": "_errors",
    "Stats": "_stats",
    "StepForecast": "_forecast",
    "StepPrediction": "_predicted_step",
    "StorageError": "_errors",
    "UnitWork": "_step_work",
    "TraceReport": "_trace_report",
    "add_config_arguments": "deepspeed",
    "checkpoint_weights": "_export",
    "estimate": "_predict",
    "describe_checkpoint": "_export",
    "export_checkpoint": "_export",
    "environment": "_environment",
    "forecast": "_forecast",
    "full_params": "_wrap",
    "initialize": "deepspeed",
    "load_checkpoint": "_loading",
    "measure_hardware": "_predict",
    "offload_activations": "_activation_region",
    "predict": "_predict",
    "save_checkpoint": "_saving",
    "transformer_compute": "_step_work",
    "unit_works": "_step_work",
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
