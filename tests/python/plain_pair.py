"""A pair of model and optimizer in plain torch that a wrapped pair must equal to the bit, whatever is done to both.

Only the update is not torch's own: it is the package's sequence in torch operations, over fp32 masters beside 16-bit
weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offload._adamw import AdamWHyper, adamw_step_, round_to_weight

VOCABULARY = 11
DEPTH = 3


class Fault(Exception):
    """What the user's own code raises."""


class _Trap(torch.autograd.Function):
    """The identity; its backward raises when armed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, armed: bool) -> Tensor:
        ctx.armed = armed
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.armed:
            raise Fault
        return gradient, None


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """A few kinds of parameters and a buffer; what a forward does is drawn anew for each."""

    def __init__(self, tied: bool, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(DEPTH))
        self.scale = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.register_buffer("seen", torch.zeros(()))
        if tied:
            self.head.weight = self.embedding.weight
        self.skipped: int | None = None
        self.checkpointed = False
        self.fault = ""

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        x = self.embedding(tokens)
        for index, block in enumerate(self.blocks):
            if index == self.skipped:
                continue
            if index == 1 and self.fault == "forward":
                raise Fault
            if index == 1:
                x = _Trap.apply(x, self.fault == "backward")
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x * self.scale)


class Reference(torch.optim.Optimizer):
    """Over one of torch's classes: its step is the package's sequence in torch operations."""

    decoupled = True

    @torch.no_grad()
    def step(self, closure: Any = None, *, grad_scale: float | Tensor = 1.0) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            hyper = AdamWHyper.of_group(group, decoupled=self.decoupled)
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, hyper, grad_scale)
        return loss

    def _update(self, p: Tensor, hyper: AdamWHyper, grad_scale: float | Tensor) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        state["step"] += 1
        master = p.detach() if p.dtype == torch.float32 else self._master(p)
        gradient = p.grad if grad_scale == 1.0 else p.grad.float() * grad_scale
        adamw_step_(master, state["exp_avg"], state["exp_avg_sq"], gradient, hyper.scalars(int(state["step"])))
        p.copy_(round_to_weight(master, p.dtype))

    def _master(self, p: Tensor) -> Tensor:
        """Where the weight is no more its rounded value, the weight counts."""
        state = self.state[p]
        if "master" not in state:
            state["master"] = p.detach().float()
        master = state["master"]
        written = round_to_weight(master, p.dtype).view(torch.int16) != p.detach().view(torch.int16)
        master.copy_(torch.where(written, p.detach().float(), master))
        return master

    def resync(self) -> None:
        for p, state in self.state.items():
            if "master" in state:
                self._master(p)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(ids, mine, strict=True):
            saved = state_dict["state"].get(index)
            if saved:
                self.state[p] = {key: value.detach().clone() for key, value in saved.items()}
                if p.dtype != torch.float32 and "master" not in saved:
                    self.state[p]["master"] = p.detach().float()


class ReferenceAdamW(Reference, torch.optim.AdamW):
    pass


class ReferenceAdam(Reference, torch.optim.Adam):
    """The decay is part of the gradient."""

    decoupled = False


# By name: the plain class, torch's or ours that is wrapped, and its arguments.
OPTIMIZERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "AdamW": (ReferenceAdamW, torch.optim.AdamW, {"lr": 1e-2}),
    "Adam": (ReferenceAdam, torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    "SGD": (torch.optim.SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    "NAdam": (torch.optim.NAdam, torch.optim.NAdam, {"lr": 1e-2}),
}
AS_ITSELF = ("SGD", "NAdam")
