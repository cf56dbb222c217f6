"""Small gradients of one backward leave together: what such a copy costs is its submission."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload import _copy_lanes
from training import HOST, RESIDENT, batches, loss_of, make_model, same_bits

AHEAD = HOST | {"speculate": "1MiB"}

pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.cpu_only]


class Submissions:
    """Stands before the queue: notes how many copies each submission to the host has, and refuses those asked for."""

    def __init__(self, optimizer: Any, *, refused: int = 0) -> None:
        self.lanes = optimizer._engine.lanes
        self.inner = self.lanes._transfers
        self.counts: list[int] = []
        self.refused = refused
        self.lanes._departures._transfers = self

    def submit_all_to_host(self, copies: list[Any], stream: int, trace_name: int) -> None:
        if self.refused:
            self.refused -= 1
            raise offload.DeviceError("refused on purpose")
        self.counts.append(len(copies))
        self.inner.submit_all_to_host(copies, stream, trace_name)


def wrapped(**options: Any) -> tuple[nn.Module, Any]:
    model = make_model()
    return offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **(HOST | options))


def test_they_share_submissions_and_have_left_at_the_end_of_backward() -> None:
    model, optimizer = wrapped()
    seen = Submissions(optimizer)
    loss_of(model, next(batches(1))).backward()
    count = len(list(model.parameters()))
    assert sum(seen.counts) == count and len(seen.counts) == math.ceil(count / 16)
    assert not seen.lanes._departures.copies


def test_a_large_one_takes_those_along_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = wrapped()
    largest = max(p.numel() for p in model.parameters()) * 4
    monkeypatch.setattr(_copy_lanes, "_SMALL_BYTES", largest - 1)
    seen = Submissions(optimizer)
    loss_of(model, next(batches(1))).backward()
    larger = sum(p.numel() * 4 == largest for p in model.parameters())
    assert sum(seen.counts) == len(list(model.parameters())) and larger <= len(seen.counts) <= larger + 3


def test_whoever_asks_for_one_within_backward_has_it() -> None:
    """A hook on an early unit reads a gradient that a late unit made, and that waits for others."""
    model, optimizer = wrapped()
    seen = Submissions(optimizer)
    read: list[Tensor] = []

    def look(_: Tensor) -> None:
        assert seen.lanes._departures.copies and not seen.counts
        read.append(model.norm.bias.grad.clone())

    handle = model.blocks[2].norm.weight.register_hook(look)
    loss_of(model, next(batches(1))).backward()
    handle.remove()  # torch's collector does not see through hooks: the model would live for good
    assert same_bits(read[0], model.norm.bias.grad.clone()) and read[0].any()


def test_earlier_sums_that_come_back_submit_nothing() -> None:
    """Only who asks for one that waits has it submitted: the sums of the micro-batch before have left long ago."""
    model, optimizer = wrapped()
    loss_of(model, next(batches(1))).backward()
    seen = Submissions(optimizer)
    loss_of(model, next(batches(1, seed=2))).backward()
    assert len(seen.counts) == math.ceil(len(list(model.parameters())) / 16)


@pytest.mark.parametrize("host", [HOST, AHEAD], ids=["at the step", "ahead"])
def test_what_waits_in_a_backward_that_raised_leaves_with_the_next(host: dict[str, str]) -> None:
    def run(placement: dict[str, str]) -> list[Tensor]:
        model = make_model()
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        fails = [False, True, True, False]

        def fail(_: Tensor) -> None:
            if fails[0]:
                raise ValueError("on purpose")

        model.blocks[2].norm.weight.register_hook(fail)
        for step, tokens in enumerate(batches(4)):
            try:
                loss_of(model, tokens).backward()
            except ValueError:
                if step == 1:
                    optimizer.zero_grad()  # dropped before their copies were submitted
            else:
                optimizer.step()
                optimizer.zero_grad()
            fails.pop(0)
        return [p.detach().clone() for p in model.parameters()]

    for one, other in zip(run(host), run(RESIDENT), strict=True):
        assert same_bits(one, other)


def fail_early(model: nn.Module) -> Any:
    """Backward raises with gradients of the last units waiting, until the handle is removed."""

    def fail(_: Tensor) -> None:
        raise ValueError("on purpose")

    handle = model.blocks[2].norm.weight.register_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        loss_of(model, next(batches(1))).backward()
    return handle


def test_what_waits_since_a_backward_that_raised_leaves_before_the_next_takes_memory() -> None:
    """Its blocks are nobody's after zero_grad(): a pool without a byte to spare must get them back."""
    model, optimizer = wrapped()
    handle, lanes, pool = fail_early(model), optimizer._engine.lanes, optimizer._engine.pool
    waiting = len(lanes._departures.copies)
    assert waiting > 1
    optimizer.zero_grad()
    handle.remove()
    seen = Submissions(optimizer)
    taken: list[int] = []

    class Watched:
        def acquire(self, *arguments: Any) -> Any:
            taken.append(len(seen.counts))
            return pool.acquire(*arguments)

    lanes._pool = Watched()
    loss_of(model, next(batches(1))).backward()
    lanes._pool = pool
    assert seen.counts[0] == waiting and taken[0] == 1


def test_an_engine_that_ends_forgets_what_waits() -> None:
    model, optimizer = wrapped()
    fail_early(model)
    departures, pool = optimizer._engine.lanes._departures, optimizer._engine.pool
    assert departures.copies
    optimizer.zero_grad()
    del model, optimizer
    gc.collect()
    assert not departures.copies and pool.stats()["tag_bytes"]["gradients"] == 0


@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
def test_refused_ones_lose_nothing(monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
    """What was refused stays on the device or goes on waiting; the next submission takes it."""
    if not together:
        monkeypatch.setattr(_copy_lanes, "_SMALL_BYTES", 0)
    expected, _ = wrapped()
    loss_of(expected, next(batches(1))).backward()
    model, optimizer = wrapped()
    seen = Submissions(optimizer, refused=1)
    with pytest.raises(offload.DeviceError, match="refused on purpose"):
        loss_of(model, next(batches(1))).backward()
    made = [(p.grad, q.grad) for p, q in zip(model.parameters(), expected.parameters(), strict=True)]
    there = [(one, other) for one, other in made if one is not None]
    assert there and all(same_bits(one.clone(), other.clone()) for one, other in there)
    optimizer.zero_grad()
    loss_of(model, next(batches(1))).backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert same_bits(p.grad.clone(), q.grad.clone())
    assert not seen.lanes._departures.copies


def test_one_submission_is_for_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = wrapped()
    lanes = optimizer._engine.lanes
    streams: list[int] = []

    class Watching(Submissions):
        def submit_all_to_host(self, copies: list[Any], stream: int, _: int) -> None:
            streams.append(stream)
            self.counts.append(len(copies))
            self.inner.submit_all_to_host(copies, 0)

    seen = Watching(optimizer)
    sources = [torch.full((64,), float(n)) for n in range(5)]
    landed = [
        lanes.send(source, "gradients", stream, may_wait=True)
        for source, stream in zip(sources, (1, 1, 2, 2, 1), strict=True)
    ]
    assert (streams, seen.counts) == ([1, 2], [2, 2])
    for each, source in zip(landed, sources, strict=True):
        each.ticket.wait()
        assert same_bits(torch.frombuffer(each.buffer, dtype=torch.float32)[:64], source)
    assert (streams, seen.counts) == ([1, 2, 1], [2, 2, 1])


def test_memory_of_a_waiting_copy_is_kept() -> None:
    """Neither its source nor its block of the pool is given to others before it has run."""
    _, optimizer = wrapped()
    lanes = optimizer._engine.lanes
    source = torch.full((64,), 7.0)
    first = lanes.send(source, "gradients", 0, may_wait=True)
    address, target = source.data_ptr(), first.address
    del source
    lanes.send(torch.ones(64), "gradients", 0, may_wait=True)
    assert address in lanes.in_ring()
    del first
    other = optimizer._engine.pool.acquire(256, "gradients")
    assert other.address != target
    lanes._departures.submit()
    for ticket in lanes.in_flight():
        ticket.wait()


def test_copies_that_fail_together_leave_their_masters_as_they_were() -> None:
    model, optimizer = wrapped()
    device, states = optimizer._engine.device, list(optimizer._engine.states.values())
    masters = {state.name: state.master_value().clone() for state in states}
    device.hold("to_host")  # so that the failure is found by the update
    device.fail_copy("to_host", 2)
    seen = Submissions(optimizer)
    loss_of(model, next(batches(1))).backward()
    device.release("to_host")
    optimizer.step()
    with pytest.raises(offload.DeviceError, match="did not arrive"):
        optimizer.synchronize()
    same = sum(same_bits(state.master_value(), masters[state.name]) for state in states)
    assert same >= seen.counts[1]
    with pytest.raises(offload.StateError, match="an earlier update failed"):
        loss_of(model, next(batches(1)))


# --- with updates ahead -------------------------------------------------------------------------------------


def trained(placement: dict[str, str]) -> tuple[nn.Module, Any]:
    """After two steps: with `speculate`, every update of the next one begins in backward."""
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
    for tokens in batches(2):
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def moments_of(optimizer: Any) -> list[Tensor]:
    """As they lie in memory, whether or not an update has begun."""
    return [state.moments["exp_avg"].value().clone() for state in optimizer._engine.states.values()]


def test_they_share_submissions_where_updates_begin_in_backward() -> None:
    """Their updates begin when their submission has gone, and are kept."""
    (model, optimizer), (twin, twin_optimizer) = trained(AHEAD), trained(HOST)
    optimizer.synchronize()
    before, speculation, device = moments_of(optimizer), optimizer._engine.speculation, optimizer._engine.device
    kept = optimizer.stats().speculation["kept"]
    seen = Submissions(optimizer)
    tokens, count = next(batches(1, seed=2)), len(list(model.parameters()))
    begun: list[tuple[int, int]] = []
    handle = model.blocks[0].norm.weight.register_hook(
        lambda _: begun.append((len(speculation._ahead), sum(seen.counts)))
    )
    device.hold("to_host")
    loss_of(model, tokens).backward()
    handle.remove()
    assert sum(seen.counts) == count and len(seen.counts) == math.ceil(count / 16)
    ((at_once, sent),) = begun
    assert at_once == sent > 0
    assert len(speculation._ahead) == count
    assert all(same_bits(one, other) for one, other in zip(moments_of(optimizer), before, strict=True))
    device.release("to_host")
    speculation.latest[0].wait()
    assert not any(same_bits(one, other) for one, other in zip(moments_of(optimizer), before, strict=True))
    loss_of(twin, tokens).backward()
    for its in (optimizer, twin_optimizer):
        its.step()
        its.synchronize()
    assert optimizer.stats().speculation["kept"] == kept + count
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert same_bits(one.detach(), other.detach())


@pytest.mark.parametrize("dropped", [True, False], ids=["dropped", "used"])
@pytest.mark.parametrize("which", [1, 2], ids=["in backward", "at its end"])
def test_a_refused_submission_begins_no_update(which: int, dropped: bool) -> None:
    """Its gradients go on waiting, and count."""
    (model, optimizer), (twin, twin_optimizer) = trained(AHEAD), trained(RESIDENT)
    seen, speculation, count = Submissions(optimizer), optimizer._engine.speculation, len(list(model.parameters()))
    assert math.ceil(count / 16) == 2

    def refuse() -> None:
        seen.refused = 1

    first, second = batches(2, seed=2)
    handle = model.norm.weight.register_hook(lambda _: refuse() if which == 1 else None)
    at_end = model.embedding.weight.register_hook(lambda _: refuse() if which == 2 else None)
    with pytest.raises(offload.DeviceError, match="refused on purpose"):
        loss_of(model, first).backward()
    handle.remove()
    at_end.remove()
    assert len(speculation._ahead) == sum(seen.counts) == (0 if which == 1 else 16)
    if dropped:
        optimizer.zero_grad()
    elif which == 1:  # what backward has not come to has no gradient
        there = [p.grad is not None for p in model.parameters()]
        loss_of(twin, first).backward()
        for parameter, has_one in zip(twin.parameters(), there, strict=True):
            parameter.grad = parameter.grad if has_one else None
    else:
        loss_of(twin, first).backward()
    for each in (model, twin):
        loss_of(each, second).backward()
    for its in (optimizer, twin_optimizer):
        its.step()
        its.synchronize()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert same_bits(one.detach(), other.detach())
