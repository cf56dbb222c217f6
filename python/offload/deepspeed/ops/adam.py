"""`deepspeed.ops.adam`: torch's Adam and AdamW by DeepSpeed's names and arguments; `wrap` runs them in native code."""

from __future__ import annotations

from typing import Any

import torch

import offload

__all__ = ["DeepSpeedCPUAdam", "FusedAdam"]


class DeepSpeedCPUAdam:
    """Makes a `torch.optim.AdamW`, or with `adamw_mode=False` a `torch.optim.Adam`.

    Unlike torch's AdamW it decays no weights unless told to. amsgrad is honoured. Raises `InvalidArgument` for
    `bias_correction=False` and `fp32_optimizer_states=False`.
    """

    def __new__(  # type: ignore[misc]
        cls,
        model_params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> torch.optim.Optimizer:
        if not fp32_optimizer_states:
            raise offload.InvalidArgument("fp32_optimizer_states=False: moments are fp32 in this release")
        return _adam(model_params, lr, bias_correction, betas, eps, weight_decay, amsgrad, adamw_mode)


class FusedAdam:
    """As `DeepSpeedCPUAdam`. Where its states are is the config's choice."""

    def __new__(  # type: ignore[misc]
        cls,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> torch.optim.Optimizer:
        return _adam(params, lr, bias_correction, betas, eps, weight_decay, amsgrad, adam_w_mode)


def _adam(
    params: Any,
    lr: float,
    bias_correction: bool,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    decoupled: bool,
) -> torch.optim.Optimizer:
    if not bias_correction:
        raise offload.InvalidArgument("bias_correction=False: torch's Adam always corrects; leave it out")
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    betas = (betas[0], betas[1])  # a list, as JSON has it
    return kind(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)
