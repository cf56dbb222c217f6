"""`run_ahead=`: a stream waits for the update of a streamed weight, and the training thread goes on."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from driver_double import DriverDouble
from torch import Tensor, nn

import offload
from offload import _engine, _native
from offload._weight_lane import WeightLane
from offload._weight_window import WeightWindow
from training import HOST, RESIDENT, batches, loss_of, make_model, same_bits

AHEAD = {**HOST, "params": "host", "run_ahead": True}
WAIT = "cuStreamWaitValue32_v2"


def train(placement: dict[str, Any], *, steps: int = 6, **model_options: Any) -> tuple[list[Tensor], Any]:
    """Losses, weights and states of a loop that accumulates, clips, evaluates, looks at weights and writes to them."""
    model = make_model(**model_options)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
    seen, data = [], batches(2 * steps)
    for step in range(steps):
        for _ in range(2):
            loss = loss_of(model, next(data)) / 2
            loss.backward()
            seen.append(loss.detach().cpu())
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            with torch.no_grad():
                seen.append(loss_of(model, next(batches(1, seed=7))).cpu())
        if step == 2:
            with offload.full_params(model), torch.no_grad():
                next(model.parameters()).mul_(0.5)
        if step == 3:
            seen += [value.cpu().clone() for value in model.state_dict().values()]
    seen += [value.cpu().clone() for value in model.state_dict().values()]
    states = optimizer.state_dict()["state"].values()
    return seen + [torch.as_tensor(value).cpu().clone() for state in states for value in state.values()], optimizer


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other) > 0
    for number, (value, expected) in enumerate(zip(one, other, strict=True)):
        assert same_bits(value, expected), number


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    "placement",
    [{}, {"gradients": "device"}, {"optimizer": 0.5}, {"prefetch": 3}, {"lazy": False}, {"activations": "host"}],
    ids=str,
)
def test_bits_are_those_of_resident_training(placement: dict[str, Any]) -> None:
    seen, optimizer = train(AHEAD | placement)
    assert_equal(seen, train(RESIDENT)[0])
    assert optimizer.stats().transfers["to_device_bytes"] > 0


@pytest.mark.parametrize(
    ("placement", "why"),
    [
        ({}, "its streams are threads of the host"),
        ({"params": "device"}, "weights are on the device, not on the host"),
        ({"optimizer": "disk", "disk_window": 0, "disk_block": 4096}, "states are on disk"),
    ],
    ids=["cpu", "resident", "disk"],
)
def test_stats_say_why_a_forward_waits(
    placement: dict[str, Any], why: str, device: torch.device, tmp_path: Path
) -> None:
    _, optimizer = train(AHEAD | {"disk_path": tmp_path} | placement, steps=1)
    told = [fallback for fallback in optimizer.stats().fallbacks if "run_ahead" in fallback]
    if device.type == "cuda" and not placement:
        assert told == []
    else:
        assert told == [f"a forward waits for updates, against run_ahead=: {why}"]


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_another_value_is_refused(value: Any) -> None:
    with pytest.raises(offload.InvalidArgument, match="run_ahead"):
        offload.Config(run_ahead=value)


# --- over the driver double, where streams do wait --------------------------------------------------------------

# Updates that take longer than the way to the upload.
LARGE = {"width": 256, "depth": 2}


@pytest.fixture
def card(driver_double: DriverDouble, monkeypatch: pytest.MonkeyPatch) -> DriverDouble:
    """Training on the CPU goes through the double, whose device memory is the host's."""
    monkeypatch.setattr(_engine, "open_device", lambda _: _native.CudaDevice(driver_path=driver_double.path))
    return driver_double


PINNED = {"pin": True, "device": "cpu"}


def test_streams_wait_and_no_bit_changes(card: DriverDouble) -> None:
    expected, _ = train(RESIDENT, **LARGE)
    for trainings in range(1, 50):  # the machine may be slower at coming to an upload than at the update
        seen, optimizer = train(AHEAD | PINNED, **LARGE)
        assert_equal(seen, expected)
        waits = card.calls(WAIT) - trainings  # each tries it once
        if waits > 0:
            break
    assert waits > 0
    assert not [fallback for fallback in optimizer.stats().fallbacks if "run_ahead" in fallback]
    assert card.misuses() == (0, "")


@pytest.mark.parametrize("placement", [{"run_ahead": False}, {"params": "device"}], ids=str)
def test_without_it_no_stream_waits(card: DriverDouble, placement: dict[str, Any]) -> None:
    seen, _ = train(AHEAD | PINNED | placement, **LARGE)
    assert_equal(seen, train(RESIDENT, **LARGE)[0])
    assert card.calls(WAIT) == 0


@pytest.mark.parametrize(
    ("control", "why"),
    [
        (lambda card: card.fail(WAIT, 1, 801), "cuStreamWaitValue32 failed: CUDA_ERROR_NOT_SUPPORTED"),
        (lambda card: card.fail("cuMemHostRegister_v2", 1, 2, lasting=True), "host memory is not page-locked"),
    ],
    ids=["not supported", "pageable"],
)
@pytest.mark.filterwarnings("ignore:offload trains on pageable")
def test_where_the_driver_does_not_the_forward_waits(card: DriverDouble, control: Any, why: str) -> None:
    control(card)
    seen, optimizer = train(AHEAD | PINNED)
    assert_equal(seen, train(RESIDENT)[0])
    assert any(why in fallback for fallback in optimizer.stats().fallbacks if "run_ahead" in fallback)


def test_a_wait_that_is_refused_later_fails_one_forward(card: DriverDouble) -> None:
    """What it interrupted is done again, as after every error of a forward."""
    model = make_model(**LARGE)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **AHEAD, **PINNED)
    told = []
    for tokens in itertools.islice(batches(200), 200):
        try:
            loss_of(model, tokens).backward()
        except offload.DeviceError as error:
            told.append(str(error))
            optimizer.zero_grad()
            loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        if told:
            break
        card.fail(WAIT, 1, 999)
    assert told and all("cuStreamWaitValue32 failed" in text for text in told)
    plain = make_model(**LARGE)
    plain, other = offload.wrap(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), **RESIDENT)
    for tokens in itertools.islice(batches(200), optimizer.stats().steps):
        loss_of(plain, tokens).backward()
        other.step()
        other.zero_grad()
    assert_equal(list(model.state_dict().values()), list(plain.state_dict().values()))


def test_an_update_that_fails_before_a_stream_waits_for_it_is_told_once(
    card: DriverDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the upload behind it, which the forward waits for: as an update's, after which unwrap gives up the states."""
    model = make_model(**LARGE)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **AHEAD, **PINNED)
    data = batches(2)
    loss = loss_of(model, next(data))
    card.hold("to_host")
    card.fail("cuMemcpyBatchAsync", 1, 801)
    card.fail("cuMemcpyDtoHAsync_v2", 2, 999, lasting=True)
    loss.backward()
    optimizer.step()
    wait = WeightLane.wait_weights

    def landing(lane: WeightLane, residency: Any, upload: Any) -> None:
        card.release("to_host")
        wait(lane, residency, upload)

    monkeypatch.setattr(WeightLane, "wait_weights", landing)
    with pytest.raises(offload.DeviceError, match="its gradient did not arrive"):
        model(next(data))
    with pytest.raises(offload.StateError, match="an earlier update failed"):
        optimizer.step()
    offload.unwrap(model, optimizer)


def test_what_is_written_to_a_weight_comes_home_behind_its_update() -> None:
    """The update may run still when the weight is on the device: it would write over what comes home."""
    store, residency = Mock(), Mock()
    window = WeightWindow(store, poison=False)
    calls = Mock()
    calls.attach_mock(store.settle_updates, "settle")
    calls.attach_mock(residency.take_home, "take_home")
    calls.attach_mock(store.weight_written, "written")
    weight = nn.Parameter(torch.ones(2))
    window.write_back(residency, [weight])
    names = [made[0] for made in calls.mock_calls]
    assert names == ["settle", "take_home", "written"]
    assert calls.mock_calls[0] == call.settle(residency.parameters)
