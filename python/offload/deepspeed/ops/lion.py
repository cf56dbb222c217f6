"""`deepspeed.ops.lion`: `offload.Lion` by DeepSpeed's names and arguments."""

from __future__ import annotations

from typing import Any

import offload

__all__ = ["DeepSpeedCPULion", "FusedLion"]


class DeepSpeedCPULion:
    """Makes an `offload.Lion`. Raises `InvalidArgument` for `fp32_optimizer_states=False`."""

    def __new__(  # type: ignore[misc]
        cls,
        model_params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
    ) -> offload.Lion:
        if not fp32_optimizer_states:
            raise offload.InvalidArgument("fp32_optimizer_states=False: the moment is fp32 in this release")
        return offload.Lion(model_params, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay)


class FusedLion:
    """As `DeepSpeedCPULion`. Where its states are is the config's choice."""

    def __new__(  # type: ignore[misc]
        cls,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> offload.Lion:
        return offload.Lion(params, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay)
