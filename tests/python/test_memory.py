"""Bytes: the device holds what the plan says, measured by live storages and not by our own counters."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import offload
from training import HOST, RESIDENT, batches, loss_of, make_model
from what_lives import all_gone, collect, threads


class Allocations:
    """What torch's own CPU allocator handed out and got back inside the context; the host pool does not use it."""

    def __enter__(self) -> Allocations:
        collect()  # what earlier tests left must not be freed inside and counted as ours
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        events = sorted(self._profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        changes = [event.nbytes() for event in events if event.name() == "[memory]"]
        self.left = sum(changes)
        self.peak = max(itertools.accumulate(changes), default=0)
        assert changes, "the profiler saw no allocation"


def bytes_left_by_training(placement: dict[str, str], dtype: torch.dtype) -> tuple[int, int]:
    """Device bytes that wrap, two steps and a last backward leave behind, and the number of parameters."""
    model = make_model(dtype)
    tokens = next(batches(1))
    with Allocations() as allocations:
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **placement)
        for _ in range(2):
            loss_of(model, tokens).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.synchronize()
        # A landed gradient leaves the ring when the next one enters it.
        for _ in range(2):
            optimizer._engine.lanes.to_host(torch.zeros(1)).ticket.wait()
    return allocations.left, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_and_states_are_off_the_device(dtype: torch.dtype) -> None:
    offloaded, count = bytes_left_by_training(HOST, dtype)
    assert offloaded < 0.05 * count * dtype.itemsize
    states = 8 if dtype == torch.float32 else 12
    resident, _ = bytes_left_by_training(RESIDENT, dtype)
    assert resident >= count * (dtype.itemsize + states)


@pytest.mark.parametrize(
    ("dtype", "options", "weights", "master"),
    [
        (torch.float32, {}, 0, 4),
        (torch.bfloat16, {}, 2, 2),
        (torch.bfloat16, {"master": "fp32"}, 2, 4),
        (torch.float16, {}, 2, 4),
    ],
)
def test_host_bytes_follow_the_formula(dtype: torch.dtype, options: dict[str, str], weights: int, master: int) -> None:
    model = make_model(dtype)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **HOST, **options)

    def blocks(itemsize: int) -> int:
        return sum(-(-p.numel() * itemsize // 256) * 256 for p in model.parameters())

    stats = optimizer.stats()
    expected = {"weights": blocks(weights), "master": blocks(master), "moments": 2 * blocks(4), "gradients": 0}
    assert {tag: stats.host_bytes[tag] for tag in expected} == expected
    mapped = stats.pool["mapped_bytes"]
    loss_of(model, next(batches(1))).backward()
    assert optimizer.stats().host_bytes["gradients"] == blocks(dtype.itemsize)
    assert optimizer.stats().pool["mapped_bytes"] == mapped, "pages were obtained inside a hook"
    optimizer.step()
    optimizer.zero_grad()
    optimizer.synchronize()
    assert optimizer.stats().host_bytes["gradients"] == 0
    assert optimizer.plan.host.total == sum(p.numel() for p in model.parameters()) * (
        weights + master + 8 + dtype.itemsize
    )


def test_gradients_are_given_back_without_the_garbage_collector() -> None:
    """Adding a micro-batch on the device borrows copies: nothing of that may keep a gradient in a reference cycle."""
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **HOST)
    gc.collect()
    gc.disable()
    try:
        for tokens in batches(2):
            loss_of(model, tokens).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0
        model.head.weight.grad.abs_()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.synchronize()
        assert optimizer.stats().host_bytes["gradients"] == 0
    finally:
        gc.enable()


def test_everything_returns_to_the_system_with_the_engine() -> None:
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **HOST)
    pool = optimizer._engine.pool
    loss_of(model, next(batches(1))).backward()
    optimizer.step()
    optimizer.synchronize()
    model, plain = offload.unwrap(model, optimizer)
    assert pool.stats()["live_count"] == 0
    pool.trim()
    assert pool.stats()["mapped_bytes"] == 0
    assert len(plain.state) == len(list(model.parameters()))


def test_unwrap_ends_the_threads_of_the_engine() -> None:
    lanes = "offload-to", "offload-step"
    collect()  # engines of other tests
    before = threads(*lanes)
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **HOST)
    loss_of(model, next(batches(1))).backward()
    optimizer.step()
    optimizer.synchronize()
    assert threads(*lanes) == sorted([*before, "offload-step", "offload-to_devi", "offload-to_host"])
    offload.unwrap(model, optimizer)
    assert threads(*lanes) == before
    with pytest.raises(offload.StateError, match="was unwrapped"):
        optimizer.step()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_dropping_the_model_frees_everything(steps: int) -> None:
    model = make_model()
    model, wrapped = offload.wrap(model, torch.optim.AdamW(model.parameters()), **HOST)
    for tokens in batches(steps):
        for _ in range(2):
            loss_of(model, tokens).backward()
        wrapped.step()  # the last one is in flight when the model goes
    left = [weakref.ref(p) for p in model.parameters()] + [weakref.ref(wrapped._engine)]
    del model, wrapped
    assert all_gone(left)
