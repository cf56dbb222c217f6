"""The loss scale of fp16, step by step as DeepSpeed moves it.

[Note: two rules of the dynamic scale] Under ZeRO (stages 1 to 3) overflows are first taken from a hysteresis, only
then halve the scale, and are an error once it is at its minimum. Without ZeRO (stage 0) every overflow halves the
scale, down to its minimum. In both the good step after an overflow, and the very first, do not count for the window.
"""

from __future__ import annotations

import copy

import offload

from ._settings import LossScale, Settings

__all__ = ["DynamicLossScale", "StaticLossScale", "make_loss_scale"]

_FACTOR = 2.0


class _Named:
    """The scale by the names of DeepSpeed's loss scalers too. step: how often `update()` was called."""

    scale: float
    step: int

    @property
    def loss_scale(self) -> float:
        return self.scale

    cur_scale = loss_scale


class StaticLossScale(_Named):
    """A scale that never changes: a step that overflows is skipped, and that is all."""

    dynamic = False

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.step = 0

    def update(self, overflow: bool) -> None:
        """Called after every step."""
        self.step += 1

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """A static scale is the config's, whatever was saved."""


class DynamicLossScale(_Named):
    """A scale that follows the overflows; see [Note: two rules of the dynamic scale]."""

    dynamic = True

    def __init__(self, settings: LossScale, *, under_zero: bool, uncounted: int = 1) -> None:
        """uncounted: good steps after an overflow that do not count for the window."""
        self.scale = settings.initial
        self._settings = settings
        self._under_zero = under_zero
        self._uncounted = uncounted
        self.step = 0
        self._last_overflow = -1
        self._hysteresis = settings.hysteresis

    def update(self, overflow: bool) -> None:
        """Called after every step, skipped ones too. Raises `StateError` when the scale cannot fall any further.

        It is done at once: Ctrl-C comes before it or after it.
        """
        after = copy.copy(self)
        if overflow:
            after._fall()
            after._last_overflow = self.step
        else:
            after._rise()
        after.step += 1
        self.__dict__.update(after.__dict__)

    def _fall(self) -> None:
        lowest = self._settings.min_scale
        if self._under_zero and self._hysteresis > 1:
            self._hysteresis -= 1
            return
        if self._under_zero and self.scale == lowest:
            raise offload.StateError(
                f"the loss scale is at its minimum of {lowest:g} and gradients still overflow: training has diverged; "
                "lower the learning rate, use bf16, or lower fp16.min_loss_scale"
            )
        self.scale = max(self.scale / _FACTOR, lowest)

    def _rise(self) -> None:
        settings = self._settings
        if settings.consecutive_hysteresis:
            self._hysteresis = settings.hysteresis
        good = self.step - self._last_overflow - self._uncounted
        if good > 0 and good % settings.window == 0:
            self._hysteresis = settings.hysteresis
            self.scale *= _FACTOR

    def state_dict(self) -> dict[str, float]:
        return {
            "scale": self.scale,
            "step": self.step,
            "last_overflow": self._last_overflow,
            "hysteresis": self._hysteresis,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from there. A run whose scale was static says nothing of a dynamic one: that begins anew."""
        if "last_overflow" not in state:
            return
        self.scale = float(state["scale"])
        self.step = int(state["step"])
        self._last_overflow = int(state["last_overflow"])
        # Without ZeRO, DeepSpeed's own checkpoints have none, as that rule has no use for it.
        self._hysteresis = int(state.get("hysteresis", self._settings.hysteresis))


# What torch.amp.GradScaler does by default, in the terms of the rule under ZeRO: DeepSpeed uses it under autocast.
_GRAD_SCALER = LossScale(initial_scale_power=16, window=2000, hysteresis=1, min_scale=0.0)


def make_loss_scale(settings: Settings) -> StaticLossScale | DynamicLossScale:
    """The scale that a config describes: 1, where nothing computes in fp16."""
    precision = settings.precision
    if precision.loss_scale is None:
        return StaticLossScale()
    if precision.dtype != "fp16":
        return DynamicLossScale(_GRAD_SCALER, under_zero=True, uncounted=0)
    if precision.loss_scale.static is not None:
        return StaticLossScale(precision.loss_scale.static)
    return DynamicLossScale(precision.loss_scale, under_zero=settings.placement.stage > 0)
