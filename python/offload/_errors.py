"""The error set. Each error carries the facts needed to act and says what to do next.

The native core raises the same classes (csrc/bindings/bind_errors.cpp looks them up here by name).
"""

from __future__ import annotations

__all__ = [
    "DeviceError",
    "InternalError",
    "InvalidArgument",
    "OffloadError",
    "OutOfHostMemory",
    "StateError",
    "StorageError",
]


class OffloadError(Exception):
    """Base of every error that offload raises on purpose."""


class InvalidArgument(OffloadError, ValueError):
    """A value the caller passed is not legal; nothing was changed."""


class OutOfHostMemory(OffloadError, MemoryError):
    """The host budget, or the host, cannot hold what was asked for."""


class DeviceError(OffloadError, RuntimeError):
    """The compute device refused or failed an operation."""


class StorageError(OffloadError, OSError):
    """The disk tier failed to read, write or reserve."""


class StateError(OffloadError, RuntimeError):
    """The call is legal, but not in the present state of model, optimizer or engine."""


class InternalError(OffloadError, RuntimeError):
    """A broken promise inside offload itself: please report it."""
