"""Plain torch over fp32 masters: what an optimizer that runs as its own class must equal bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import offload
from offload._adamw import round_to_weight
from training import HOST, Run, same_bits, train

Make = Callable[[nn.Module], torch.optim.Optimizer]


def tier_of(placement: dict[str, str], model: nn.Module) -> torch.device:
    """Where the class computes under a placement: a host and a device round each in their own way."""
    return torch.device("cpu") if placement["optimizer"] == "host" else next(model.parameters()).device


def is_refused(name: str, placement: dict[str, str]) -> bool:
    """A fused kernel of an accelerator has no equal on the host, so its states cannot be there."""
    return "fused" in name and placement["optimizer"] == "host" and torch.get_default_device().type != "cpu"


class OverMasters:
    """`make(model)` in plain torch: over the model itself if that is fp32 on `tier`, else over fp32 masters there."""

    def __init__(self, model: nn.Module, make: Make, tier: torch.device) -> None:
        first = next(model.parameters())
        is_its_own = first.dtype == torch.float32 and first.device == tier
        over = model if is_its_own else copy.deepcopy(model).to(tier, torch.float32)
        self.inner = make(over)
        self.pairs = [] if is_its_own else list(zip(model.parameters(), over.parameters(), strict=True))
        self.param_groups = self.inner.param_groups

    @torch.no_grad()
    def step(self) -> None:
        for p, master in self.pairs:
            master.grad = None if p.grad is None else p.grad.to(master.device, torch.float32)
        try:
            self.inner.step()
        finally:  # a step that raises has updated what it came to
            for p, master in self.pairs:
                p.copy_(round_to_weight(master, p.dtype))

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)
        for p, _ in self.pairs:
            if set_to_none or p.grad is None:
                p.grad = None
            else:
                p.grad.zero_()


def plain_run(model: nn.Module, make: Make, placement: dict[str, str] = HOST, **loop: Any) -> Run:
    model = copy.deepcopy(model)
    return train(model, OverMasters(model, make, tier_of(placement, model)), **loop)


def wrapped_run(model: nn.Module, make: Make, placement: dict[str, str], **loop: Any) -> Run:
    model = copy.deepcopy(model)
    model, optimizer = offload.wrap(model, make(model), **placement)
    return train(model, optimizer, **loop)


def assert_states_equal(one: Any, other: Any) -> None:
    """Of two nested states: the same keys, dtypes, numbers and bits."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.shape == other.shape and same_bits(one.detach().cpu(), other.detach().cpu())
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_states_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_states_equal(left, right)
    else:
        assert one == other
