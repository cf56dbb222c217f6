"""`deepspeed.ops`: its optimizers by name."""

from __future__ import annotations

from . import adagrad as adagrad
from . import adam as adam

__all__ = ["adagrad", "adam"]
