"""More of what a user does: inside `full_params`, to graphs that are kept, to clips and states, and looks in between.

Actions as in `any_order`, and the rules that draw them.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import nn

import any_order
import offload
from any_order import Side, loss_of, moments_of
from any_order_looks import settled
from offload._adamw import round_to_weight
from plain_optimizers import AS_ITSELF
from plain_pair import Fault

SEEDS = st.integers(0, 5)
INDICES = st.integers(0, 15)


def inside(side: Side, seed: int, index: int, how: str) -> Any:
    p = side.parameters[index % len(side.parameters)]
    if how in ("some", "load", "fault"):
        side.graphs.clear()
    of_one = offload.full_params(side.model, p) if side.wrapped else contextlib.nullcontext()
    with side.full():
        if how == "train":
            loss_of(side, seed).backward()
            return nn.utils.clip_grad_norm_(side.parameters, 0.1).detach().clone()
        if how == "penalty":
            return _penalty(side, seed)
        if how == "gradient":  # of the very weight
            p.grad = p.detach() * 0.01
            return None
        if how == "load" and side.saved is not None:
            side.model.load_state_dict(side.saved[0])
        with of_one, torch.no_grad():
            if how != "seen":
                p.mul_(0.9)
            if how == "fault":
                raise Fault
        with torch.no_grad():
            seen = loss_of(side, seed).clone()
        return [seen, {name: value.clone() for name, value in side.model.state_dict().items()}]


def _penalty(side: Side, seed: int) -> Any:
    """A gradient of a gradient."""
    trained = [p for p in side.parameters if p.requires_grad]
    if not trained:
        return None
    first = torch.autograd.grad(loss_of(side, seed), trained, create_graph=True, allow_unused=True)
    loss = torch.stack([g.float().square().sum() for g in first if g is not None]).sum()
    loss.backward()
    return loss.detach().clone()


@torch.no_grad()
def write_between(side: Side, index: int) -> None:
    """Between a forward and its backward, which torch refuses where it needs the weight."""
    side.graphs = [graph for graph in side.graphs if all(graph is not one for one in side.casts)]
    with side.full():
        side.parameters[index % len(side.parameters)].mul_(0.75)


def toggle_between(side: Side, index: int) -> None:
    for p in side.parameters[index % 5 :: 5]:
        p.requires_grad_(not p.requires_grad)


def clip_some(side: Side, index: int, norm: float, foreach: bool | None, how: str) -> Any:
    chosen = side.parameters[index % 5 :: 5]
    found = [p.grad for p in chosen if p.grad is not None]
    if how == "value":
        return nn.utils.clip_grad_value_(chosen, norm * 0.1, foreach=foreach)
    if how == "parts":
        total = nn.utils.get_total_norm(found, foreach=foreach)
        nn.utils.clip_grads_with_norm_(chosen, norm, total, foreach=foreach)
        return total.detach().clone()
    strict = how == "strict"
    return nn.utils.clip_grad_norm_(chosen, norm, error_if_nonfinite=strict, foreach=foreach).detach().clone()


def begin_anew(side: Side) -> None:
    if side.wrapped:
        side.optimizer.state = {}
        return
    had = list(side.optimizer.state)
    side.optimizer.state.clear()
    if hasattr(side.optimizer, "begin"):
        side.optimizer.begin(had)


@torch.no_grad()
def write_state(side: Side, index: int, which: int) -> Any:
    """The master, or another entry of its shape."""
    p = side.parameters[index % len(side.parameters)]
    entries = side.optimizer.state.get(p)
    if not entries:
        return "no state"
    side.graphs.clear()
    key = ["master", *(key for key in moments_of(entries) if entries[key].shape == p.shape)]
    key = key[which % len(key)]
    value = torch.linspace(1e-4, 1e-2, p.numel()).view(p.shape)
    if side.wrapped:
        side.optimizer.write_state(p, {key: value})
    elif key != "master":
        entries[key] = value
    else:
        p.copy_(round_to_weight(value, p.dtype))
        if p.dtype != torch.float32:
            entries["master"] = value
    return settled(copy.deepcopy(dict(side.optimizer.state[p])))


def looked(side: Side, how: str) -> None:
    """Changes nothing, but that `resync` makes masters of weights that were written, which the next step would do."""
    if how == "collect":
        gc.collect()
    elif how == "resync" and hasattr(side.optimizer, "resync"):
        side.optimizer.resync()
    elif side.wrapped and how == "stats":
        side.optimizer.stats()
        side.optimizer.memory_summary()
    elif side.wrapped and how == "norm":
        side.optimizer.grad_norm()
    elif side.wrapped:
        side.optimizer.synchronize()


def step_in_backward(side: Side, seed: int, index: int, anew: bool) -> Any:
    """Once this gradient is there: weights that backward still needs are refused by torch."""
    side.graphs.clear()
    if anew:
        side.optimizer.zero_grad()
    p = side.parameters[index % len(side.parameters)]
    handle = p.register_post_accumulate_grad_hook(lambda _: side.optimizer.step())
    try:
        loss = loss_of(side, seed)
        loss.backward()
        return loss.detach().clone()
    finally:
        handle.remove()


def traced(side: Side, seed: int) -> Any:
    with offload.trace() if side.wrapped else contextlib.nullcontext():
        any_order.forward(side, seed)
        any_order.backward(side, -1, False, False)
        any_order.step(side, 1.0, False)


class MoreRules:
    """Rules of `test_any_order.AnyOrder`."""

    both: Any
    kind: str
    plain: Side

    @rule(seed=SEEDS, index=INDICES, how=st.sampled_from(
        ["train", "penalty", "gradient", "load", "some", "seen", "fault"]
    ))  # fmt: skip
    def inside(self, seed: int, index: int, how: str) -> None:
        self.both(inside, seed, index, how)

    @precondition(lambda self: self.plain.graphs)
    @rule(index=INDICES)
    def write_between(self, index: int) -> None:
        self.both(write_between, index)

    @precondition(lambda self: self.plain.graphs)
    @rule(index=INDICES)
    def toggle_between(self, index: int) -> None:
        self.both(toggle_between, index)

    @rule(index=INDICES, norm=st.sampled_from([0.1, 1e9]), foreach=st.sampled_from([None, True, False]),
          how=st.sampled_from(["norm", "value", "parts", "strict"]))  # fmt: skip
    def clip_some(self, index: int, norm: float, foreach: bool | None, how: str) -> None:
        self.both(clip_some, index, norm, foreach, how)

    @rule()
    def begin_anew(self) -> None:
        self.both(begin_anew)

    @rule(index=INDICES, which=st.integers(0, 3))
    def write_state(self, index: int, which: int) -> None:
        self.both(write_state, index, which)

    @rule(value=st.sampled_from([1e-3, 2e-2]))
    def rate_is_a_tensor(self, value: float) -> None:
        if self.kind not in AS_ITSELF:  # of others few take one
            self.both(lambda side: side.optimizer.param_groups[0].__setitem__("lr", torch.tensor(value)))

    @rule(value=st.sampled_from([1.0, 0.125]), whole=st.booleans())
    def step_with_a_tensor(self, value: float, whole: bool) -> None:
        if self.kind not in AS_ITSELF:
            self.both(any_order.step, torch.full(() if whole else (1,), value), False)

    @rule(how=st.sampled_from(["collect", "stats", "norm", "resync", "synchronize"]))
    def looked(self, how: str) -> None:
        self.both(looked, how)

    @rule(seed=SEEDS, index=INDICES, anew=st.booleans())
    def step_in_backward(self, seed: int, index: int, anew: bool) -> None:
        self.both(step_in_backward, seed, index, anew)

    @rule(seed=SEEDS)
    def traced(self, seed: int) -> None:
        self.both(traced, seed)
