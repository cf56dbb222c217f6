"""What streaming sends for and when: the recorded order, weights ahead of their use, updates that are still running."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import offload
from offload._pending import PendingParameter
from offload._touch_order import TouchOrder
from training import HOST, RESIDENT, batches, loss_of, make_model, wrapped_run

ALL = {**HOST, "params": "host"}


def recorded(*passes: list[int]) -> TouchOrder:
    order = TouchOrder()
    for units in passes:
        order.begin()
        for unit in units:
            order.record((unit, False))
    order.begin()
    return order


def test_the_last_pass_predicts_the_next() -> None:
    order = recorded([0, 1, 2, 3])
    assert order.first(2) == [0, 1]
    order.record((0, False))
    assert order.upcoming(2) == [1, 2]
    assert order.upcoming(2, but={1}) == [2, 3]
    order.record((1, False))
    assert order.upcoming(9) == [2, 3]


def test_a_pass_that_departs_goes_on_after_the_next_equal_touch() -> None:
    order = recorded([0, 1, 2, 3, 4])
    for unit in (0, 3):
        order.record((unit, False))
    assert order.upcoming(2) == [4]
    order.record((1, False))  # back again
    assert order.upcoming(2) == [2, 3]
    order.record((7, False))  # unknown: nothing is learned from it
    assert order.upcoming(2) == [2, 3]
    order.begin()
    assert order.first(9) == [0, 3, 1, 7]


def test_forward_and_backward_of_a_unit_are_two_touches() -> None:
    order = TouchOrder()
    for touch in ((0, False), (1, False), (1, True), (0, True)):
        order.record(touch)
    order.begin()
    order.record((1, True))
    assert order.upcoming(3) == [0]


@given(st.lists(st.integers(0, 4), max_size=12), st.lists(st.integers(0, 4), max_size=12), st.integers(1, 4))
def test_predictions_are_of_the_last_pass(last: list[int], now: list[int], count: int) -> None:
    order = recorded(last)
    for unit in now:
        order.record((unit, False))
        ahead = order.upcoming(count, but={unit})
        assert len(ahead) <= count and len(set(ahead)) == len(ahead) and unit not in ahead
        assert set(ahead) <= set(last)


@pytest.mark.parametrize("prefetch", [1, 2])
def test_weights_are_sent_for_ahead_of_forward_and_backward(prefetch: int) -> None:
    model = make_model(depth=6)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **ALL, prefetch=prefetch)
    needed: list[Any] = []
    ahead: list[bool] = []
    window = optimizer._engine.streaming.window
    bring = window.bring

    def look(residencies: Any) -> None:
        needed.append([residency in window for residency in residencies])
        bring(residencies)

    for tokens in batches(3):
        window.bring = look
        needed.clear()
        loss_of(model, tokens).backward()
        # A touch brings what it needs, then what comes next.
        ahead = [all(present) for present in needed[::2]]
        window.bring = bring
        optimizer.step()
        optimizer.zero_grad()
    assert len(ahead) == 2 * 9 and all(ahead), ahead


@pytest.mark.cpu_only
def test_a_step_returns_before_its_update_and_the_next_forward_waits_for_it() -> None:
    expected = wrapped_run(make_model(), RESIDENT, steps=3, clip=None)
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **ALL)
    losses = []
    for tokens in batches(3):
        loss = loss_of(model, tokens)
        losses.append(loss.item())
        loss.backward()
        optimizer._engine.pipeline.hold()
        optimizer.step()
        assert not any(ticket.done for ticket in optimizer._engine._tickets.values())
        assert all(isinstance(p, PendingParameter) for p in model.parameters())
        optimizer.zero_grad()
        optimizer._engine.pipeline.release()
    assert losses == expected.losses
    assert all(torch.equal(value, expected.weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("steps", [2, 3])
def test_steps_without_a_forward_between_them(steps: int) -> None:
    """Weights that were sent for behind one update are sent for again behind the next."""

    def run(placement: dict[str, str]) -> dict[str, torch.Tensor]:
        model = make_model(torch.bfloat16)
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        for tokens in batches(2):
            loss_of(model, tokens).backward()
            for _ in range(steps):
                optimizer.step()
        with torch.no_grad():
            loss_of(model, tokens)
        return {name: value.clone() for name, value in model.state_dict().items()}

    one, other = run(ALL), run(RESIDENT)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_weight_used_from_outside_stays_for_its_pass_only() -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model(depth=3)
            self.head = nn.Linear(40, 40)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.inner(tokens) @ self.head.weight

    model = Outside()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **ALL)
    for tokens in batches(2):
        loss = loss_of(model, tokens)
        assert type(model.head.weight) is nn.Parameter
        loss.backward()
        assert type(model.head.weight) is PendingParameter
        optimizer.step()
        optimizer.zero_grad()
