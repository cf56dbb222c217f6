"""What an optimizer's class can do beside a step: its methods run over the masters, and the weights follow them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from over_masters import OverMasters, assert_states_equal, tier_of
from training import HOST, RESIDENT, batches, loss_of, make_model

pytestmark = pytest.mark.usefixtures("device")

STREAMED = HOST | {"params": "host"}
PLACEMENTS = {"host": HOST, "params": STREAMED, "device": RESIDENT}


class ScheduleFree(torch.optim.Optimizer):
    """Trains in one point and is evaluated in another, as schedule-free optimizers are; it moves between them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "training": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert group["training"], "not in train mode"
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    z.sub_(p.grad, alpha=group["lr"])
                    p.lerp_(z, 0.3)

    @torch.no_grad()
    def eval(self) -> None:
        self._move(1 - 1 / 0.9, False)

    @torch.no_grad()
    def train(self) -> None:
        self._move(0.1, True)

    def _move(self, weight: float, training: bool) -> None:
        for group in self.param_groups:
            for p in group["params"] if group["training"] != training else ():
                if p in self.state:
                    p.data.lerp_(self.state[p]["z"], weight)  # no version shows it
            group["training"] = training

    def climb(self, by: float, *, drop: bool = False) -> Tensor:
        """The first half of a sharpness-aware step; its gradients are used up."""
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in self.param_groups[0]["params"] if p.grad is not None]).norm()
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=by)
        if drop:
            self.zero_grad()
        return norm

    def fails_after_one(self) -> None:
        with torch.no_grad():
            self.param_groups[0]["params"][0].zero_()
        raise ArithmeticError("in the middle")

    @contextmanager
    def swapped(self) -> Iterator[None]:
        yield

    def _private(self) -> None: ...


class Over(OverMasters):
    """Calls the methods of a plain one, as `step()` is called."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self._call(getattr(self.inner, name), *args, **kwargs)

    @torch.no_grad()
    def _call(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        step = self.inner.step
        given: list[Any] = []
        self.inner.step = lambda: given.append(method(*args, **kwargs))  # type: ignore[method-assign]
        try:
            self.step()
        finally:
            self.inner.step = step  # type: ignore[method-assign]
        if kwargs.get("drop"):
            self.zero_grad()
        return given[0]


def program(model: nn.Module, optimizer: Any) -> list[Any]:
    seen: list[Any] = []
    for index, tokens in enumerate(batches(5)):
        loss_of(model, tokens).backward()
        if index == 1:
            seen.append(optimizer.climb(0.05, drop=True).cpu())
            loss_of(model, tokens).backward()
        seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).cpu())
        optimizer.step()
        optimizer.zero_grad()
        if index % 2 == 0:
            optimizer.eval()
            optimizer.eval()  # does nothing
            with torch.no_grad():
                seen.append(loss_of(model, tokens).cpu())
            seen += [value.cpu().clone() for value in model.state_dict().values()]
            optimizer.train()
        if index == 3:
            with pytest.raises(ArithmeticError, match="^in the middle$"):
                optimizer.fails_after_one()
            loss_of(model, tokens).backward()  # and what was done stays
    return [*seen, *(value.cpu().clone() for value in model.state_dict().values())]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_the_class_in_plain_torch(dtype: torch.dtype, placement: str) -> None:
    model, where = make_model(dtype, depth=2), PLACEMENTS[placement]
    plain = copy.deepcopy(model)
    reference = Over(plain, lambda model: ScheduleFree(model.parameters()), tier_of(where, plain))
    expected = program(plain, reference)
    wrapped, optimizer = offload.wrap(model, ScheduleFree(model.parameters()), **where)
    assert_states_equal(program(wrapped, optimizer), expected)
    stats = optimizer.stats()
    assert stats.steps == 5, "methods are none"
    if where is not RESIDENT:
        assert stats.host_bytes["torch_states"] > 0 and not stats.device_bytes.get("torch_states")
        assert stats.transfers["to_host_bytes"] > 0 and stats.transfers["to_device_bytes"] > 0


def test_a_run_that_was_saved_where_it_is_evaluated_goes_on() -> None:
    model = make_model(torch.bfloat16, depth=1)
    other = copy.deepcopy(model)
    model, optimizer = offload.wrap(model, ScheduleFree(model.parameters()), **STREAMED)
    for tokens in batches(2):
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()
    weights, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    other, again = offload.wrap(other, ScheduleFree(other.parameters()), **STREAMED)
    other.load_state_dict(weights)
    again.load_state_dict(states)
    assert not again.param_groups[0]["training"]
    for one in (optimizer, again):
        one.train()
    assert_states_equal(program(other, again), program(model, optimizer))


def test_what_a_wrapped_optimizer_has() -> None:
    """Frameworks ask with hasattr(); private names, and what would run later, are not there."""
    wrapped, optimizer = offload.wrap(model := make_model(depth=1), ScheduleFree(model.parameters()), **HOST)
    assert all(hasattr(optimizer, name) for name in ("train", "eval", "climb"))
    assert not any(hasattr(optimizer, name) for name in ("_private", "swapped", "nowhere"))
    with pytest.raises(AttributeError, match="'OffloadOptimizer' object has no attribute 'nowhere'"):
        _ = optimizer.nowhere
    offload.unwrap(wrapped, optimizer)
    assert not hasattr(optimizer, "train")
    _, native = offload.wrap(model := make_model(depth=1), torch.optim.AdamW(model.parameters()), **HOST)
    assert not hasattr(native, "train")


def test_methods_wait_for_the_end_of_full_params() -> None:
    model, optimizer = offload.wrap(model := make_model(depth=1), ScheduleFree(model.parameters()), **STREAMED)
    with offload.full_params(model), pytest.raises(offload.StateError, match="leave the context first"):
        optimizer.eval()
    assert optimizer.param_groups[0]["training"]
