"""BackwardGuard: refuses gradients of a loss that the engine was to divide or to scale, and never saw."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

import offload

__all__ = ["BackwardGuard"]


class BackwardGuard:
    """Watches parameters for gradients, from the first reason to do so on.

    expected: gradients may come now: of a backward of the engine's, or of a loss that it has scaled.
    """

    def __init__(self) -> None:
        self.expected = False
        self._reason: str | None = None
        self._handles: list[Any] = []

    def require(self, reason: str | None, parameters: Iterable[nn.Parameter]) -> None:
        """From now on a loss has to pass through the engine, because of `reason`; None: it need not."""
        self._reason = reason
        if reason is not None and not self._handles:
            # The garbage collector does not look into hooks: they know the guard, which knows no parameter.
            check = functools.partial(_check, self)
            self._handles = [
                p.register_post_accumulate_grad_hook(check)  # type: ignore[no-untyped-call]
                for p in parameters
                if p.requires_grad
            ]

    def remove(self) -> None:
        """Ends it; no hook is left."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _check(guard: BackwardGuard, parameter: Tensor) -> None:
    if guard._reason is not None and not guard.expected:
        raise offload.StateError(
            f"backward() of a tensor, and {guard._reason}: call engine.backward(loss) or engine.scale(loss).backward()"
        )
