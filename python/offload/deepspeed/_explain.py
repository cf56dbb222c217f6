"""What a DeepSpeed config means here, for people: its keys one by one, and where tensors will live."""

from __future__ import annotations

import json
from typing import Any

from ._check import Report
from ._settings import Settings

__all__ = ["key_rows", "placement_rows"]

_STANDINGS = {"honoured": "honoured", "accepted": "no effect", "refused": "refused"}
_VALUE_WIDTH = 24
_WEIGHTS = {
    "device": "device",
    "host": "host, on the device while in use",
    "disk": "disk, through a cache in host memory, on the device while in use",
}


def key_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """Key, value, class and reason of each key of the config, under a header."""
    rows = [("key", "value", "class", "here")]
    rows += [(entry.path, _short(entry.value), _STANDINGS[entry.standing], entry.text) for entry in report.entries]
    return rows


def placement_rows(settings: Settings, report: Report) -> list[tuple[str, str]]:
    """What the config resolves to, under a header."""
    batch, precision, place = settings.batch, settings.precision, settings.placement
    waiting = any(path.startswith("zero_optimization.offload_") for path in report.unfilled)
    optimizer: str = place.optimizer
    if optimizer == "host" and place.optimizer_ratio < 1.0:
        optimizer = (
            f"{place.optimizer_ratio:.0%} on the host, the rest on the device" if place.optimizer_ratio else "device"
        )
    batch_text = f"{batch.train} = {batch.micro} a micro-batch x {batch.accumulation}"
    if any("batch_size" in path or "accumulation" in path for path in report.unfilled):
        batch_text = "filled in by the Trainer"
    rows = [
        ("resolved", ""),
        ("optimizer states, master weights", optimizer),
        ("gradients", place.gradients),
        ("weights", _WEIGHTS[place.params]),
        ("checkpointed activations", place.activations),
        *([("files", ", ".join(place.disk_path))] if place.disk_path else []),
        ("host memory", "page-locked" if place.pin_memory else "pageable"),
        ("precision", _precision_text(settings, report)),
        ("samples a step", batch_text),
        ("gradient clipping", _clipping_text(settings, report)),
        ("optimizer", _named(settings.optimizer, "given in code")),
        ("schedule", _named(settings.scheduler, "none, or given in code")),
    ]
    if waiting:
        rows.insert(1, ("", "devices that say auto: as Accelerate is told"))
    if precision.loss_scale is not None:
        scale = precision.loss_scale
        adapts = f"from 2^{scale.initial_scale_power}, doubled after {scale.window} good steps"
        rows.append(("loss scale", adapts if scale.static is None else f"{scale.static:g}, fixed"))
    return rows


def _precision_text(settings: Settings, report: Report) -> str:
    if report.unfilled & {"fp16.enabled", "bf16.enabled"}:
        return "as the Trainer is told"
    cast = settings.precision.autocast
    return settings.precision.dtype if cast is None else f"{settings.precision.dtype}, autocast to {cast.dtype}"


def _clipping_text(settings: Settings, report: Report) -> str:
    if "gradient_clipping" in report.unfilled:
        return "as the Trainer is told"
    return f"norm {settings.gradient_clipping:g}" if settings.gradient_clipping else "none"


def _named(choice: Any, otherwise: str) -> str:
    if choice is None:
        return otherwise
    return choice.name if not getattr(choice, "torch_adam", False) else f"{choice.name}, torch's class"


def _short(value: Any) -> str:
    try:
        text = f"{value:g}" if isinstance(value, float) else json.dumps(value)
    except TypeError:
        text = repr(value)
    return text if len(text) <= _VALUE_WIDTH else text[: _VALUE_WIDTH - 3] + "..."
