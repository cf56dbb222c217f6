"""`deepspeed.ops`: its optimizers by name."""

from __future__ import annotations

from . import adagrad as adagrad
from . import adam as adam
from . import lion as lion

__all__ = ["adagrad", "adam", "lion"]
