"""`deepspeed.ops.adagrad`: torch's Adagrad by DeepSpeed's name and arguments."""

from __future__ import annotations

from typing import Any

import torch

import offload

__all__ = ["DeepSpeedCPUAdagrad"]


class DeepSpeedCPUAdagrad:
    """Makes a `torch.optim.Adagrad`. Raises `InvalidArgument` for `amsgrad=True`, which Adagrad does not have."""

    def __new__(  # type: ignore[misc]
        cls,
        model_params: Any,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> torch.optim.Optimizer:
        if amsgrad or not fp32_optimizer_states:
            raise offload.InvalidArgument("amsgrad and fp32_optimizer_states=False are not supported: leave them out")
        return torch.optim.Adagrad(model_params, lr=lr, eps=eps, weight_decay=weight_decay)
