"""CUDA graphs fix the addresses that they use: what comes and goes cannot be part of one."""

from __future__ import annotations

import torch

from ._errors import StateError

__all__ = ["refuse_capture"]


def refuse_capture(option: str) -> None:
    """Raises `StateError` while the current CUDA stream is captured. option: what keeps memory away, and its remedy."""
    # A torch without CUDA has nothing to ask.
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if initialized and torch.cuda.is_current_stream_capturing():
        raise StateError(
            "the model is captured into a CUDA graph (torch.cuda.graph, or mode='reduce-overhead' of torch.compile), "
            f"which would fix the addresses of {option} to use CUDA graphs"
        )
