"""Writes to what was saved, exceptions, failing copies and full budgets: `offload_activations` says so, or goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from activation_models import Watch, assert_equal_runs, assert_nothing_left, pool_of, region_of, small, train
from offload import _activation_region, _native
from training import same_bits

pytestmark = pytest.mark.usefixtures("device")


# --- what somebody writes to --------------------------------------------------------------------------------


def _write_result(x: Tensor) -> Tensor:
    y = x.exp()
    loss = y.sum()
    with torch.no_grad():
        y.add_(1)
    return loss


def _write_through_a_view(x: Tensor) -> Tensor:
    y = x.exp()
    view, loss = y.view(-1), y.sin().sum()
    del y
    with torch.no_grad():
        view[3] = 7.0
    return loss


def _write_before_saving(x: Tensor) -> Tensor:
    y = x * 2
    y.add_(1)
    return y.sin().sum()


def _write_between_two_savings(x: Tensor) -> Tensor:
    y = x * 2
    first = y.sum() * 1
    y.mul_(3)
    return y.sin().sum() + first


def _save_write_save(x: Tensor) -> Tensor:
    y = x * 2
    first = y.sin()
    y.mul_(3)
    return y.sin().sum() + first.sum()


def _inplace_activation(x: Tensor) -> Tensor:
    return torch.relu_(x * 2).sum() + torch.sigmoid_(x.exp() * 1).sum()


def _write_a_sibling(x: Tensor) -> Tensor:
    y = x * 2
    _, second = y.detach().chunk(2)
    loss = (y.sin()).sum()
    second.zero_()
    return loss


def _write_a_leaf(x: Tensor) -> Tensor:
    loss = (x.sin() * x).sum()
    with torch.no_grad():
        x.add_(1)
    return loss


WRITES = [
    _write_result, _write_through_a_view, _write_before_saving, _write_between_two_savings, _save_write_save,
    _inplace_activation, _write_a_sibling, _write_a_leaf,
]  # fmt: skip


@pytest.mark.parametrize("keep", [0, 1 << 30], ids=["gone", "kept"])
@pytest.mark.parametrize("case", WRITES, ids=lambda case: case.__name__.strip("_"))
def test_writing_to_what_was_saved_is_the_error_that_torch_raises(
    device: torch.device, case: Callable[[Tensor], Tensor], keep: int
) -> None:
    outcomes: list[Any] = []
    for context in (region_of(device, keep=keep), nullcontext()):
        x = torch.linspace(0.1, 1, 512).requires_grad_()
        with context:
            loss = case(x)
        try:
            loss.backward()
            outcomes.append(x.grad)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            outcomes.append(None)
    assert (outcomes[0] is None) == (outcomes[1] is None)
    assert outcomes[0] is None or same_bits(*outcomes)


def test_a_backward_that_writes_to_what_it_saved_is_found_as_by_torch(device: torch.device) -> None:
    class Spoiler(Watch):
        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            ctx.saved_tensors[0].detach().mul_(2)
            return gradient, None

    for context in (region_of(device), nullcontext()):
        with context:
            y = torch.ones(512, requires_grad=True) * 2
            loss = y.sin() + Spoiler.apply(y, [])  # the spoiler's backward runs first
        del y
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()


# --- faults -------------------------------------------------------------------------------------------------


class Fault(Exception):
    pass


@pytest.mark.parametrize("kind", [Fault, KeyboardInterrupt, MemoryError])
def test_an_exception_in_forward_leaves_nothing(device: torch.device, kind: type[BaseException]) -> None:
    region = region_of(device, keep=0.5)

    def fail() -> None:
        with region:
            y = torch.ones(512, requires_grad=True).sin().cos().sin().cos()
            assert pool_of(region).stats()["live_count"] > 0 and y is not None
            raise kind

    with pytest.raises(kind):
        fail()
    assert_nothing_left(region)
    y = torch.ones((), requires_grad=True).exp()
    y.grad_fn._raw_saved_result.register_hooks(lambda t: t, lambda t: t)  # raises where others are active
    assert_equal_runs(train("tiny", region), train("tiny", nullcontext()))


def test_an_exception_in_backward_leaves_nothing(device: torch.device) -> None:
    region = region_of(device)

    def fail(_: Tensor) -> None:
        raise Fault

    def run() -> None:
        with region:
            y = torch.ones(512, requires_grad=True).sin().exp()
            y.register_hook(fail)
            loss = y.sin().exp().sum()
        loss.backward()

    with pytest.raises(Fault):
        run()
    assert_nothing_left(region)
    assert_equal_runs(train("tiny", region), train("tiny", nullcontext()))


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> _native.HostDevice:
    """The device of every region of the test."""
    made = _native.HostDevice()
    monkeypatch.setattr(_activation_region, "open_device", lambda _: made)
    return made


@pytest.mark.cpu_only
@pytest.mark.parametrize("lane", ["to_host", "to_device"])
@pytest.mark.parametrize("nth", [1, 3])
def test_a_copy_that_fails_is_told_in_backward(device: torch.device, native: Any, lane: Any, nth: int) -> None:
    region = region_of(device)
    native.fail_copy(lane, nth)

    def run() -> None:
        loss = small(region, torch.ones(512, requires_grad=True))
        loss.backward()

    with pytest.raises(offload.DeviceError, match=r"activation of shape \(512,\)"):
        run()
    assert_nothing_left(region)
    assert_equal_runs(train("tiny", region), train("tiny", nullcontext()))


def test_over_the_host_budget_an_activation_stays(device: torch.device) -> None:
    region = region_of(device, budget=8192)
    run = train("tiny", region)
    stats = region.stats()
    assert 0 < stats["offloaded_bytes"] <= 8192 and stats["refused_bytes"] > 0
    assert stats["refused_bytes"] + stats["offloaded_bytes"] == stats["saved_bytes"]
    assert pool_of(region).stats()["peak_used_bytes"] <= 8192
    assert_equal_runs(run, train("tiny", nullcontext()))
    assert_nothing_left(region)


def test_no_python_runs_as_a_graph_gives_up_what_it_saved(device: torch.device) -> None:
    """A signal's handler would run there, and Python drops what is raised in a `__del__` or in a callback: Ctrl-C was
    lost, and the bytes of the range counted for ever. What has ended is counted out by whoever counts next.
    """
    region = region_of(device)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)), torch.ones(4, 16, requires_grad=True)
    with region:
        read, unread = model(x).sum(), model(x).sum()
    entered: list[str] = []
    before = sys.gettrace()
    sys.settrace(lambda frame, *_: entered.append(frame.f_code.co_name))
    try:
        unread = None
    finally:
        sys.settrace(before)
    assert unread is None and entered == []
    counted = region._activations._live_bytes
    region._activations.settle()
    assert 0 < region._activations._live_bytes < counted
    read.backward()
    del read
    assert_nothing_left(region)
