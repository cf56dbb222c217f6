"""The oracle of the engine: the same training written in plain torch, over fp32 masters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import offload
from offload._adamw import adamw_step_, round_to_weight
from training import batches, loss_of, make_model

ADAMW = {"type": "AdamW", "params": {"lr": 1e-2}}
STAGES: dict[str, dict[str, Any]] = {
    "stage 0": {},
    "stage 1": {"stage": 1},
    "stage 1, optimizer on the host": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
    "stage 2": {"stage": 2},
    "stage 2, optimizer on the host": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "stage 3": {"stage": 3},
    "stage 3, all on the host": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    },
}


def config_of(*, zero: dict[str, Any] | None = None, accumulation: int = 1, **keys: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "optimizer": ADAMW,
        **keys,
    }
    return config if zero is None else {**config, "zero_optimization": zero}


@dataclass
class Trained:
    """losses of micro-batches; norms, rates, scales and whether a step was applied, of optimizer steps."""

    weights: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    applied: list[bool] = field(default_factory=list)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.to("cpu", copy=True) for name, weight in model.state_dict().items()}


def engine_run(config: dict[str, Any], *, steps: int = 4, model: nn.Module | None = None, **given: Any) -> Trained:
    """A loop as scripts for DeepSpeed have it."""
    model = make_model() if model is None else model
    engine, *_ = offload.initialize(model=model, config=config, **given)
    run = Trained({})
    for tokens in batches(steps * engine.gradient_accumulation_steps()):
        loss = loss_of(engine, tokens)
        engine.backward(loss)
        is_boundary = engine.is_gradient_accumulation_boundary()
        engine.step()
        run.losses.append(loss.item())
        if is_boundary:
            run.norms.append(engine.get_global_grad_norm())
            run.rates.append(engine.get_lr()[0])
            run.scales.append(engine.optimizer.cur_scale)
            run.applied.append(engine.was_step_applied())
    engine.optimizer.synchronize()
    run.weights = weights_of(engine.module)
    engine.destroy()
    return run


class HostAdamW:
    """AdamW over fp32 masters in the native core's order of operations, in torch operations."""

    def __init__(self, masters: list[Tensor], lr: float, weight_decay: float = 0.0) -> None:
        self.lr, self.weight_decay, self.steps = lr, weight_decay, 0
        self.masters = masters
        self.moments = [(torch.zeros_like(master), torch.zeros_like(master)) for master in masters]

    def step(self) -> None:
        from offload._adamw import AdamWHyper

        self.steps += 1
        group = {
            **torch.optim.AdamW([torch.zeros(1)], lr=self.lr, weight_decay=self.weight_decay).param_groups[0],
        }
        scalars = AdamWHyper.of_group(group, decoupled=True).scalars(self.steps)
        for master, (first, second) in zip(self.masters, self.moments, strict=True):
            adamw_step_(master, first, second, master.grad, scalars)


def plain_run(
    dtype: torch.dtype = torch.float32,
    *,
    steps: int = 4,
    accumulation: int = 1,
    clip: float = 0.0,
    scale: Any = None,
    rate: Callable[[int], float] | None = None,
    make: Callable[[list[Tensor]], Any] = lambda masters: HostAdamW(masters, lr=1e-2),
    model: nn.Module | None = None,
    loss_of: Callable[[nn.Module, Tensor], Tensor] = loss_of,
) -> Trained:
    """The training in plain torch. scale: an object with `scale` and `update(overflow)`; rate: of the n-th update."""
    model = (make_model() if model is None else model).to(dtype)
    parameters = list(model.parameters())
    masters = [p.detach().float().clone() for p in parameters]
    optimizer = make(masters)
    data, run, updates = batches(steps * accumulation), Trained({}), 0
    for _ in range(steps):
        loss_scale = 1.0 if scale is None else scale.scale
        for _ in range(accumulation):
            loss = loss_of(model, next(data))
            run.losses.append(loss.item())
            ((loss / accumulation).float() * loss_scale).backward()
        if rate is not None:
            optimizer.lr = rate(updates)
        norm = torch.stack([p.grad.float().norm() for p in parameters]).norm() / loss_scale
        factor = torch.clamp(clip / (norm + 1e-6), max=1.0).item() / loss_scale if clip else 1.0 / loss_scale
        good = dtype == torch.float32 or bool(norm.isfinite())
        if good:
            run.norms.append(norm.item())
            for p, master in zip(parameters, masters, strict=True):
                master.grad = p.grad.float() * factor
            optimizer.step()
            updates += 1
            with torch.no_grad():
                for p, master in zip(parameters, masters, strict=True):
                    p.copy_(round_to_weight(master, dtype))
        else:
            run.norms.append(float("inf"))
        for p in parameters:
            p.grad = None
        if scale is not None:
            scale.update(not good)
        run.applied.append(good)
        run.scales.append(1.0 if scale is None else scale.scale)
    run.weights = weights_of(model)
    return run
