"""EngineOptimizer: what `initialize` returns as the optimizer: unscales, checks, clips and steps in one go."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import offload

from ._backward_guard import BackwardGuard
from ._loss_scale import DynamicLossScale, StaticLossScale

__all__ = ["EngineOptimizer"]

# As in torch.nn.utils.clip_grad_norm_.
_CLIP_EPS = 1e-6


class EngineOptimizer(torch.optim.Optimizer):
    """A face of the `OffloadOptimizer` with the loss scale and the clipping of the config.

    `step()` reads gradients of the scaled loss. loss_scale, cur_scale: the scale of the next backward.
    overflow: whether the last step was skipped for inf or NaN. Everything else is the wrapped optimizer's.
    """

    def __init__(
        self,
        wrapped: offload.OffloadOptimizer,
        loss_scale: StaticLossScale | DynamicLossScale,
        *,
        clip_norm: float,
        skip_bad_steps: bool,
        takes_norm: bool,
    ) -> None:
        # No call of super().__init__(): groups, states and hooks are those of `wrapped`, found by __getattr__.
        self.optimizer = wrapped
        self.loss_scaler = loss_scale
        self.overflow = False
        self.guard = BackwardGuard()
        self._clip_norm = clip_norm
        self._skip_bad_steps = skip_bad_steps
        self._takes_norm = takes_norm or skip_bad_steps or clip_norm > 0
        self._norm: Tensor | float | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not made yet: no endless search
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    @property
    def loss_scale(self) -> float:
        return self.loss_scaler.scale

    cur_scale = loss_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        return self.loss_scaler.dynamic

    @property
    def global_grad_norm(self) -> float | None:
        """L2 norm of the last step's gradients, unscaled, before clipping: inf after a step that was skipped, None
        before the first and where the config asks for none.
        """
        if isinstance(self._norm, Tensor):
            self._norm = self._norm.item()
        return self._norm

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Backward of the scaled loss."""
        before, self.guard.expected = self.guard.expected, True
        try:
            self._scaled(loss).backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        finally:
            self.guard.expected = before

    def scale(self, loss: Tensor) -> Tensor:
        """The scaled loss, for a caller who runs its backward before the engine's next `step()`."""
        self.guard.expected = True
        return self._scaled(loss)

    def _scaled(self, loss: Tensor) -> Tensor:
        """A 16-bit loss is widened first, so that its scale cannot overflow it."""
        return loss.float() * self.loss_scale if self.loss_scale != 1.0 or self.dynamic_loss_scale else loss

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update, unless `overflow`. Reads gradients of the loss times `loss_scale`; leaves `p.grad` as it is."""
        if closure is not None:
            raise offload.InvalidArgument("step(closure) is not supported under a loss scale: call backward() yourself")
        self.overflow = False
        if not self._takes_norm:
            self._update(1.0)
            return
        norm = self.optimizer.grad_norm()
        scale = self.loss_scale
        if scale != 1.0:
            norm = norm / scale
        coefficient = torch.clamp(self._clip_norm / (norm + _CLIP_EPS), max=1.0) if self._clip_norm > 0 else None
        if not self._skip_bad_steps:  # and the scale is 1
            # Nothing is waited for: the update reads the coefficient when it is there, and who asks reads the norm.
            self._norm = norm
            self._update(1.0 if coefficient is None else coefficient)
            return
        # Whether to step is decided here, so backward is waited for, once, as torch's GradScaler does.
        self._norm, by = torch.stack((norm, torch.ones_like(norm) if coefficient is None else coefficient)).tolist()
        self.overflow = not math.isfinite(self._norm)
        if self.overflow:
            self._norm = math.inf
            self.loss_scaler.update(True)
        else:
            self._update(by / scale)

    def _update(self, grad_scale: float | Tensor) -> None:
        """Steps. The loss scale follows an update that was made, whatever is raised behind it."""
        before = self.optimizer.steps_made, self.steps_over
        try:
            try:
                self.optimizer.step(grad_scale=grad_scale)
            finally:
                self._follow(*before)
        finally:  # again: Ctrl-C may have come before that began
            self._follow(*before)

    def _follow(self, steps_made: int, steps_over: int) -> None:
        if self.optimizer.steps_made != steps_made and self.steps_over == steps_over:
            self.loss_scaler.update(False)

    @property
    def steps_over(self) -> int:
        """Steps that were made or skipped."""
        return self.loss_scaler.step

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def __repr__(self) -> str:
        return repr(self.optimizer)
