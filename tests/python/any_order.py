"""What a user does with a model and its optimizer, one function an action: for a plain pair and a wrapped one.

Each takes a `Side` and what was drawn for it, and returns what the user would see.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import offload
from any_order_looks import LOOKS, difference, gradients, logged, settled, states
from plain_pair import VOCABULARY, Model
from training import batches

__all__ = ["LOOKS", "difference", "logged", "states"]


class Side:
    """One of the pairs, and what its user keeps."""

    def __init__(self, model: Model, optimizer: Any, wrapped: bool) -> None:
        self.model = model
        self.optimizer = optimizer
        self.wrapped = wrapped
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        self.device_type = next(model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(self.device_type, init_scale=8.0, growth_interval=2)
        self.scaler.scale(torch.zeros(()))  # as a first loss does
        self.graphs: list[Tensor] = []
        self.casts: list[Tensor] = []
        self.average: list[Tensor] | None = None
        self.saved: tuple[Any, Any] | None = None
        self.files: Any = None
        self.held: Tensor | None = None
        self.number = 0
        self.handles: list[Any] = []  # of the user's hooks
        self.log: list[Tensor] = []  # what they saw
        self.grad_dtype: torch.dtype | None = None
        self.fixed: dict[str, Any] = {}  # of every placement of this side
        self.parameters = list(model.parameters())

    def set_grad_dtype(self, dtype: torch.dtype | None) -> None:
        """Of a plain pair, as the option of that name has it."""
        self.grad_dtype = dtype
        for p in (p for group in self.optimizer.param_groups for p in group["params"]):
            gradient, p.grad = p.grad, None
            p.grad_dtype = dtype or p.dtype
            p.grad = None if gradient is None else gradient.to(p.grad_dtype)

    @property
    def tag(self) -> str:
        return f"pair{self.number}{'fixed' if self.fixed else ''}"

    def full(self) -> Any:
        return offload.full_params(self.model) if self.wrapped else contextlib.nullcontext()


# --- what both sides are asked for --------------------------------------------------------------------------


def loss_of(side: Side, seed: int, autocast: bool = False) -> Tensor:
    tokens = next(batches(1, seed=seed, vocabulary=VOCABULARY, size=2, length=4))
    torch.manual_seed(seed)  # of dropout
    with torch.autocast(side.device_type, torch.bfloat16) if autocast else contextlib.nullcontext():
        logits = side.model(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def forward(side: Side, seed: int, autocast: bool = False) -> Any:
    loss = loss_of(side, seed, autocast)
    side.graphs.append(loss)
    if autocast:
        side.casts.append(loss)
    return loss.detach().clone()


def faulty(side: Side, seed: int, where: str) -> None:
    """The user catches what was raised, and goes on without zero_grad."""
    side.model.fault = where
    try:
        loss_of(side, seed).backward()
    finally:
        side.model.fault = ""


def backward(side: Side, which: int, retain: bool, scaled: bool) -> None:
    loss = side.graphs[which] if retain else side.graphs.pop(which)
    (side.scaler.scale(loss) if scaled else loss).backward(retain_graph=retain)


def evaluate(side: Side, seed: int, how: str) -> Any:
    side.model.eval()
    try:
        with {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}[how]():
            return loss_of(side, seed).detach().clone()
    finally:
        side.model.train()


def clip(side: Side, norm: float | None, kind: float) -> Any:
    if norm is None:
        return nn.utils.clip_grad_value_(side.model.parameters(), 0.01)
    return nn.utils.clip_grad_norm_(side.model.parameters(), norm, norm_type=kind).detach().clone()


def backward_of_some(side: Side, which: int, index: int) -> None:
    """`inputs=` alone get gradients."""
    chosen = [p for p in side.parameters[index % 5 :: 5] if p.requires_grad]
    loss = side.graphs.pop(which)
    if chosen:
        with side.full() if index % 2 else contextlib.nullcontext():
            loss.backward(inputs=chosen)


def derivative(side: Side, which: int, index: int) -> Any:
    chosen = [p for p in side.parameters[index % 5 :: 5] if p.requires_grad]
    loss = side.graphs.pop(which)
    if not chosen:
        return None
    with side.full() if index % 2 else contextlib.nullcontext():
        return [g if g is None else g.clone() for g in torch.autograd.grad(loss, chosen, allow_unused=True)]


def forward_in_full(side: Side, seed: int) -> Any:
    with side.full():
        return forward(side, seed)


def step(side: Side, grad_scale: float, keeps_graphs: bool) -> None:
    """Graphs that are kept are refused by torch in backward, where they need a weight.

    Not those of autocast: a streamed weight is refused where torch goes on with its cast.
    """
    side.graphs = [graph for graph in side.graphs if keeps_graphs and all(graph is not one for one in side.casts)]
    if grad_scale == 1.0:
        side.optimizer.step()
    else:
        side.optimizer.step(grad_scale=grad_scale)


def zero_grad(side: Side, to_none: bool) -> None:
    side.optimizer.zero_grad(set_to_none=to_none)


def closure_step(side: Side, seed: int) -> Any:
    side.graphs.clear()

    def closure() -> Tensor:
        side.optimizer.zero_grad()
        loss = loss_of(side, seed)
        loss.backward()
        return loss

    return side.optimizer.step(closure).detach().clone()


def scaled_step(side: Side, unscale: bool, norm: float | None, overflows: bool) -> Any:
    """As the documentation of torch.amp has it; a gradient that is not finite skips the step."""
    side.graphs.clear()
    gradients = [p.grad for group in side.optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return None  # torch asserts that there is one
    found: list[Any] = []
    try:
        if overflows:
            gradients[0].view(-1)[0] = torch.inf
        if unscale:
            side.scaler.unscale_(side.optimizer)
            if norm is not None:
                found.append(clip(side, norm, 2.0))
        side.scaler.step(side.optimizer)
        side.scaler.update()
    finally:
        if overflows:  # of NaN that came of it nobody promises the bits
            side.optimizer.zero_grad()
    return [*found, side.scaler.get_scale()]


def edit_gradient(side: Side, index: int, how: str) -> Any:
    p = side.parameters[index % len(side.parameters)]
    if how == "none":
        p.grad = None
    elif how == "assign":
        p.grad = torch.full_like(p, 0.125).detach() if not side.wrapped else torch.full(p.shape, 0.125, dtype=p.dtype)
    elif p.grad is None:
        return "no gradient"
    elif how == "mul":
        p.grad.mul_(0.5)
    elif how == "tensor":
        p.grad.mul_(torch.tensor(0.3))
    elif how == "div":
        p.grad.div_(3.0)
    elif how == "add":
        p.grad.add_(torch.full(p.shape, 0.01, dtype=p.grad.dtype))
    elif how == "row":
        p.grad[0] = 0.25
    elif how == "view":
        p.grad.view(-1)[1:3].mul_(2.0)
    elif how == "data":
        p.grad.data.add_(0.01)
    elif how == "replace":
        p.grad = p.grad * 2
    elif how == "clone":
        p.grad = p.grad.clone()
    elif how == "zero":
        p.grad.zero_()
    return None


@torch.no_grad()
def write_weight(side: Side, index: int, how: str) -> None:
    side.graphs.clear()
    p = side.parameters[index % len(side.parameters)]
    with side.full():
        if how == "mul":
            p.mul_(0.75)
        elif how == "copy":
            p.copy_(torch.linspace(-0.5, 0.5, p.numel()).view(p.shape))
        elif how == "row":
            p[0] = 0.1
        elif how == "data":
            p.data.add_(0.05)
    if how == "data" and hasattr(side.optimizer, "resync"):
        side.optimizer.resync()


@torch.no_grad()
def swap(side: Side) -> None:
    side.graphs.clear()
    with side.full():
        if side.average is None:
            side.average = [p.detach().clone().mul_(0.9) for p in side.parameters]
        for p, other in zip(side.parameters, side.average, strict=True):
            kept = p.detach().clone()
            p.copy_(other)
            other.copy_(kept)


def save(side: Side) -> None:
    side.saved = copy.deepcopy((side.model.state_dict(), side.optimizer.state_dict()))


def load(side: Side, what: str) -> None:
    weights, states = copy.deepcopy(side.saved)  # torch trains on in the very tensors of states that were loaded
    side.graphs.clear()
    if what in ("model", "both"):
        side.model.load_state_dict(weights)
    if what == "assigned":  # which copies, into a wrapped model
        side.model.load_state_dict(weights, assign=side.wrapped)
    if what in ("optimizer", "both", "reversed"):
        side.optimizer.load_state_dict(states)
    if what == "reversed":
        side.model.load_state_dict(weights)


def save_files(side: Side, directory: str, in_background: bool) -> None:
    """A directory on a wrapped side, written while training goes on; a deep copy on the other."""
    if not side.wrapped:
        side.files = copy.deepcopy((side.model.state_dict(), side.optimizer.state_dict()))
        return
    side.files = offload.save_checkpoint(directory, side.model, side.optimizer, tag=side.tag, async_save=in_background)


def load_files(side: Side, directory: str) -> None:
    side.graphs.clear()
    if side.wrapped:
        side.files.wait()
        offload.load_checkpoint(directory, side.model, side.optimizer, tag=side.tag)
    else:
        side.optimizer.load_state_dict(copy.deepcopy(side.files[1]))
        side.model.load_state_dict(side.files[0])


def hold_gradient(side: Side, index: int) -> None:
    side.held = side.parameters[index % len(side.parameters)].grad


def edit_state(side: Side, index: int, how: str) -> Any:
    p = side.parameters[index % len(side.parameters)]
    entries = side.optimizer.state.get(p)  # torch makes an empty one of what is asked for
    if not entries:
        return "no state"
    key = next((key for key in moments_of(entries) if entries[key].shape == p.shape), None)
    if key is None:
        return "none of its shape"
    if how == "assign":
        entries[key] = torch.full(p.shape, 1e-3)
    elif how == "pop":
        side.optimizer.state.pop(p)
        if hasattr(side.optimizer, "begin"):
            side.optimizer.begin([p])
    elif how == "scaled":
        entries[key] = entries[key] * 0.5
    elif how == "step" and "step" in entries:
        entries["step"] = torch.tensor(3.0)
    return settled(copy.deepcopy(dict(side.optimizer.state[p]))) if p in side.optimizer.state else {}


def add_group(side: Side) -> None:
    late = list(side.model.blocks[2].parameters())
    side.optimizer.add_param_group({"params": late, "lr": 5e-3})
    if side.grad_dtype is not None:
        side.set_grad_dtype(side.grad_dtype)


def toggle(side: Side, index: int) -> None:
    side.graphs.clear()
    for p in side.parameters[index % 5 :: 5]:
        p.requires_grad_(not p.requires_grad)


def copied(side: Side, seed: int, pickled: bool) -> Any:
    """A copy is plain, and trains by itself."""
    if pickled:
        file = io.BytesIO()
        torch.save(side.model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(side.model)
    pair = Side(other, torch.optim.SGD(other.parameters(), lr=0.1), wrapped=False)
    loss = loss_of(pair, seed)
    if loss.requires_grad:
        loss.backward()
    pair.optimizer.step()
    return [loss.detach(), list(other.parameters()), [p.requires_grad for p in other.parameters()], gradients(pair)]


def again(side: Side, placement: dict[str, Any]) -> Any:
    """Unwrapped, and wrapped under another placement: what a plain optimizer cannot hold of a state is gone."""
    side.graphs.clear()
    side.held = None  # from then on `p.grad` is another tensor, and that one keeps its value
    plain = side.optimizer
    if side.wrapped:
        side.model, plain = offload.unwrap(side.model, side.optimizer)
    else:
        for p, state in plain.state.items():
            if p.dtype != torch.float32:
                state.pop("master", None)
                for key in moments_of(state):
                    state[key] = state[key].to(p.dtype)
        for p in [p for p, state in plain.state.items() if not state]:
            del plain.state[p]
        if side.grad_dtype is not None:
            side.set_grad_dtype(None)
    seen = [copy.deepcopy(plain.state_dict()["state"]), [p.detach().clone() for p in side.parameters], gradients(side)]
    if side.wrapped:
        side.model, side.optimizer = offload.wrap(side.model, plain, **(placement | side.fixed))
    else:
        if placement.get("grad_dtype"):
            side.set_grad_dtype(torch.float32)
        for p, state in plain.state.items():
            if p.dtype != torch.float32:
                state["master"] = p.detach().float()
                for key in moments_of(state):
                    state[key] = state[key].float()
    return seen


def moments_of(state: Mapping[str, Any]) -> list[str]:
    """Not counters and factors, which have no dimensions."""
    return [key for key, value in state.items() if key != "master" and isinstance(value, Tensor) and value.dim() > 0]
