"""Streamed weights and offloaded activations at once, under every order of copies that a link could have.

The host and the device of a copy are the same memory here, and what must not be read is poisoned or rewritten: a wait
that is missing, or comes too late, changes the loss.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import offload
from copy_schedule import CopySchedule
from offload import _activations, _copy_lanes, _engine, _engine_step, _native, _plan
from test_disk_weights import weights_on_disk
from training import HOST, RESIDENT, Run, TinyLM, assert_same_bits, batches, loss_of

pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.cpu_only]

ALL = {**HOST, "params": "host", "activations": "host"}
# Weights and states on the device: the update runs where the weights are brought to.
NO_HOST_UPDATE = {**RESIDENT, "params": "host", "activations": "host"}


class Fault(Exception):
    pass


class Trap(torch.autograd.Function):
    """The identity, until it is armed for forward or backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, armed: str) -> Tensor:
        if armed == "forward":
            raise Fault
        ctx.armed = armed
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.armed == "backward":
            raise Fault
        return gradient, None


class Trapped(TinyLM):
    """With a trap in its middle. `order` is that of the blocks; `reentrant` says how they are checkpointed."""

    armed = ""
    reentrant: bool | None = None
    order = (0, 1, 2, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for position, index in enumerate(self.order):
            block = self.blocks[index]
            keeps = self.reentrant is None or not torch.is_grad_enabled()
            x = block(x) if keeps else checkpoint(block, x, use_reentrant=self.reentrant)
            if position == 1:
                x = Trap.apply(x, self.armed)
        return self.head(self.norm(x))


def plain() -> Trapped:
    return Trapped(depth=4)


def tied_and_frozen() -> Trapped:
    model = Trapped(depth=4, tied=True)
    model.blocks[1].requires_grad_(False)
    return model


def checkpointed(reentrant: bool) -> Trapped:
    model = Trapped(depth=4)
    model.reentrant = reentrant
    return model


MODELS: dict[str, Callable[[], Trapped]] = {
    "plain": plain,
    "tied and frozen": tied_and_frozen,
    "checkpointed": lambda: checkpointed(False),
    "checkpointed reentrant": lambda: checkpointed(True),
}


def training(
    build: Callable[[], Trapped], placement: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any
) -> Run:
    """Accumulation, clipping, evaluation between micro-batches, another order of blocks, and errors on the way."""
    torch.manual_seed(0)
    model = build().to(dtype)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement, **options)
    data, seen = batches(64), Run([], [], {}, optimizer, model)

    def fail(where: str) -> None:
        model.armed = where
        with pytest.raises(Fault):
            loss_of(model, next(data)).backward()
        model.armed = ""

    for step in range(5):
        if step == 2:
            fail("forward")
            fail("backward")
            optimizer.zero_grad()
        model.order = (0, 1, 3, 2) if step == 3 else Trapped.order
        for micro_batch in range(3):
            loss = loss_of(model, next(data)) / 3
            loss.backward()
            seen.losses.append(loss.item())
            if step == 1 and micro_batch == 1:
                with torch.no_grad():
                    seen.losses.append(loss_of(model.eval(), next(data)).item())
                model.train()
        seen.norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.3).item())
        optimizer.step()
        optimizer.zero_grad()
        if step == 3:
            seen.weights |= {f"{name} in between": value.clone() for name, value in model.state_dict().items()}
    seen.weights |= {name: value.clone() for name, value in model.state_dict().items()}
    return seen


@functools.cache
def resident(name: str, dtype: torch.dtype = torch.float32) -> Run:
    run = training(MODELS[name], RESIDENT, dtype)
    run.model = run.optimizer = None  # its engine would outlive the module's tests
    return run


def assert_streamed_exactly(run: Run, expected: Run) -> None:
    assert_same_bits(run, expected)
    stats = run.optimizer.stats()
    assert stats.activations["offloaded_bytes"] > 0.5 * stats.activations["saved_bytes"] > 0
    assert stats.peak_weight_bytes < stats.host_bytes["weights"]


@pytest.fixture(autouse=True)
def small_leave(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_activations, "MIN_BYTES", 1)
    yield
    gc.collect()  # engines in tracebacks, whose threads other tests count


@pytest.mark.parametrize("placement", [ALL, NO_HOST_UPDATE], ids=["all on the host", "states on the device"])
@pytest.mark.parametrize("name", MODELS)
def test_copies_as_late_as_can_be(name: str, placement: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both lanes stand still: compute is ahead of them by all that it does not wait for."""
    expected = resident(name)
    schedule = CopySchedule(monkeypatch, seed=0, progress=0.0)
    assert_streamed_exactly(training(MODELS[name], placement), expected)
    assert schedule.awaited_count > 100 and schedule.early_count == 0
    schedule.finish()


@pytest.mark.parametrize(("progress", "prefetch", "room"), [(0.2, 1, None), (0.5, 3, 8 << 10), (0.9, 2, 2 << 10)])
@pytest.mark.parametrize("name", MODELS)
def test_lanes_that_overtake_each_other(
    name: str, progress: float, prefetch: int, room: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little room for copies on their way, memory is waited for and used again at once."""
    expected = resident(name, torch.bfloat16)
    if room is not None:
        monkeypatch.setattr(_copy_lanes, "_RING_BYTES", room)
        monkeypatch.setattr(_activations.Activations, "_room", lambda saved: min(room, saved._allowance()))
    schedule = CopySchedule(monkeypatch, seed=prefetch, progress=progress)
    assert_streamed_exactly(training(MODELS[name], ALL, torch.bfloat16, prefetch=prefetch), expected)
    assert schedule.awaited_count > 0 and schedule.early_count > 0
    schedule.finish()


@pytest.mark.usefixtures("disk_calls")
@pytest.mark.parametrize(("progress", "prefetch", "optimizer"), [(0.0, 2, "host"), (0.3, 1, "disk"), (0.7, 3, "host")])
@pytest.mark.parametrize("name", MODELS)
def test_weights_on_disk_whatever_goes_first(
    name: str, progress: float, prefetch: int, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache holds two of the units: every place changes hands while copies and updates of others are put off."""
    expected = resident(name, torch.bfloat16)
    monkeypatch.setattr(_plan, "_CACHE_SHARE", 0.0)  # memory for gradients is not waited for: gates would not open
    placement = weights_on_disk(tmp_path, optimizer=optimizer, prefetch=prefetch)
    schedule = CopySchedule(monkeypatch, seed=prefetch, progress=progress)
    run = training(MODELS[name], placement, torch.bfloat16)
    assert_same_bits(run, expected)
    assert run.optimizer.stats().disk["weights_read_bytes"] > 10 * run.optimizer.plan.disk.working
    assert schedule.awaited_count > 0
    schedule.finish()


@pytest.mark.parametrize("slow", ["to_host", "to_device", "both"])
def test_a_link_that_is_slower_than_compute(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy takes its time, and moves its bytes at the end of it; other threads run meanwhile."""
    expected = resident("plain")
    rates = {f"{lane}_bytes_per_s": 2e7 if slow in (lane, "both") else 0.0 for lane in ("to_host", "to_device")}
    monkeypatch.setattr(_engine, "open_device", lambda _: _native.HostDevice(**rates))
    assert_streamed_exactly(training(plain, ALL), expected)


def _no_wait(*_: Any) -> None: ...


def _without_after(queue: Any, *copy: Any, submit: Any = _native.TransferQueue.submit_to_device) -> Any:
    return submit(queue, *copy[:4], None, *copy[5:])


def _without_tickets(step: Any, jobs: Any, states: Any, submit: Any = _engine_step.EngineStep._submit) -> Any:
    return submit(step, [(*job[:3], (), *job[4:]) for job in jobs], states)


@pytest.mark.parametrize(
    ("owner", "name", "without", "progress"),
    [
        (_engine.Engine, "latest_update", _no_wait, 0.5),
        (_copy_lanes.CopyLanes, "wait_upload", _no_wait, 0.0),
        (_native.TransferQueue, "submit_to_device", _without_after, 0.5),
        (_engine_step.EngineStep, "_submit", _without_tickets, 0.0),
    ],
    ids=["a weight comes before its update", "an activation is read before it came", "an upload overtakes its source",
         "an update comes before its gradient"],
)  # fmt: skip
def test_a_wait_that_is_missing_shows(
    owner: Any, name: str, without: Any, progress: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test of the tests above: each of these waits taken out changes what is seen."""
    expected = resident("plain")
    monkeypatch.setattr(owner, name, without)
    schedule = CopySchedule(monkeypatch, seed=0, progress=progress)
    with pytest.raises(AssertionError):
        assert_same_bits(training(plain, ALL), expected)
    schedule.finish()
