"""CUDA graphs fix the addresses that they use: what comes and goes cannot be part of one."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from ._errors import StateError

__all__ = ["CompiledGraphs", "refuse_capture"]


def refuse_capture(option: str) -> None:
    """Raises `StateError` while the current CUDA stream is captured. option: what keeps memory away, and its remedy."""
    # A torch without CUDA has nothing to ask.
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if initialized and torch.cuda.is_current_stream_capturing():
        raise StateError(
            f"the model is captured into a CUDA graph (torch.cuda.graph), which would fix the addresses of {option} to "
            "use CUDA graphs"
        )


class CompiledGraphs:
    """Refuses modes of torch.compile that run what they compile as CUDA graphs, at a model's first forward.

    torch captures such graphs between our hooks, so no capture shows there. It would record a graph anew whenever a
    weight has come to another address, and a graph writes again to activations that are still on their way.
    `option` says what keeps memory away.
    """

    def __init__(self, model: nn.Module, option: str) -> None:
        self._model = weakref.ref(model)
        self._option = option
        self._is_checked = False

    def check(self) -> None:
        """Raises `StateError` naming the module."""
        if self._is_checked:
            return
        for name, compiled in self._compiled():
            # What torch.compile gives has it: the settings of inductor, None for another compiler.
            settings = getattr(compiled, "get_compiler_config", lambda: None)()
            if settings is not None and settings.get("triton.cudagraphs"):
                raise StateError(
                    f"{name} is compiled to run as CUDA graphs, which fix the addresses of {self._option}: compile it "
                    "with mode='default' or 'max-autotune-no-cudagraphs'"
                )
        self._is_checked = True

    def _compiled(self) -> Iterator[tuple[str, Any]]:
        """What may have been compiled: the modules, whatever of theirs is called, and what calls the model now."""
        model = self._model()
        assert model is not None
        for name, module in model.named_modules():
            for called in (module, module.__dict__.get("_compiled_call_impl"), module.__dict__.get("forward")):
                yield name or "the model", called
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            # Of no other frame: asking for its locals would keep them alive.
            if frame.f_code is nn.Module._call_impl.__code__:
                caller = frame.f_locals["self"]
                yield f"the {type(caller).__name__} around the model", caller
            frame = frame.f_back
