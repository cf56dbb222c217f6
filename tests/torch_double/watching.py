"""The card tells of what no wait orders: operators, memory and copies are all watched. For `make test-card` alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from driver_double import DriverDouble

from offload import _copy_lanes, _native
from offload._copy_lanes import CopyLanes, LandedBytes, open_lanes


@pytest.fixture
def lanes(device: torch.device) -> CopyLanes:
    return open_lanes(device, _native.CudaDevice(), budget=1 << 20, pin=True, poison=False)


@pytest.fixture
def double(lanes: CopyLanes) -> Iterator[DriverDouble]:
    """The one that the card runs on; both lanes are held, so that the host sees no copy end before it lets it."""
    double = DriverDouble(Path(os.environ["OFFLOAD_CUDA_DRIVER"]))
    for lane in ("to_host", "to_device"):
        double.hold(lane)
    yield double
    for lane in ("to_host", "to_device"):
        double.release(lane)


def races(double: DriverDouble) -> str:
    """Those since the last call, which do not fail the test; what was in flight then is seen no more."""
    _, texts = double.races()
    double.watch(True)
    return texts


def landed_bytes(lanes: CopyLanes, double: DriverDouble) -> LandedBytes:
    landed = lanes.send(torch.ones(1024), "activations", 0)
    double.release("to_host")
    landed.ticket.wait()
    return landed


def test_what_comes_is_not_read_before_compute_waits(lanes: CopyLanes, double: DriverDouble) -> None:
    landed, out = landed_bytes(lanes, double), torch.empty(1024)
    lanes.start_upload(landed, out)
    assert torch.empty_like(out.view(2, 512).t()).shape == (512, 2)
    assert races(double) == ""  # nobody has looked at its bytes
    out = torch.empty(1024)
    lanes.start_upload(landed, out)
    out[:1].add(1)
    assert "aten::add on the default stream reads 4 bytes" in races(double)


def test_what_came_is_read_once_compute_waits(lanes: CopyLanes, double: DriverDouble) -> None:
    landed, out = landed_bytes(lanes, double), torch.empty(1024)
    double.release("to_device")
    lanes.wait_upload(lanes.start_upload(landed, out))
    assert out.add(1).sum().item() == 2048
    assert races(double) == ""


def test_what_leaves_is_not_written_to(lanes: CopyLanes, double: DriverDouble) -> None:
    values = torch.ones(1024)
    lanes.send(values, "activations", 0)
    values.sum()
    assert races(double) == ""
    values = torch.ones(1024)
    lanes.send(values, "activations", 0)
    values.mul_(2)
    assert "aten::mul on the default stream writes 4096 bytes" in races(double)


def test_what_leaves_is_not_freed(lanes: CopyLanes, double: DriverDouble) -> None:
    values = torch.ones(1024)
    lanes.send(values, "activations", 0)
    values.untyped_storage().resize_(0)
    assert races(double) == ""  # as long as nothing is allocated
    values = torch.ones(1024)
    lanes.send(values, "activations", 0)
    values.untyped_storage().resize_(0)
    torch.empty(1)
    assert "memory that nobody refers to on the default stream frees 4096 bytes" in races(double)


def test_memory_that_the_ring_gives_up_is_behind_its_copy(lanes: CopyLanes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_copy_lanes, "_RING_BYTES", 4096)
    sent = [lanes.send(torch.full((1024,), float(number)), "gradients", 0) for number in range(8)]
    for number, landed in enumerate(sent):
        landed.ticket.wait()
        assert torch.frombuffer(landed.buffer, dtype=torch.float32)[:1024].unique().tolist() == [number]


def test_a_stream_does_not_read_what_another_one_has_yet_to_write(device: torch.device, double: DriverDouble) -> None:
    side, values = torch.cuda.Stream(device), torch.ones(1024)
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() == side
        values.add(1)
    assert "aten::add on stream " in races(double)
    values, recorded = torch.ones(1024), torch.cuda.Event()
    recorded.record()
    side.wait_event(recorded)
    with torch.cuda.stream(side):
        result = values.add(1)
    assert races(double) == ""
    with torch.cuda.stream(side):
        result.mul_(2)
    torch.cuda.current_stream().wait_stream(side)
    assert result.sum().item() == 4096
    assert races(double) == ""


def test_memory_that_another_stream_used_is_not_the_next_ones(device: torch.device, double: DriverDouble) -> None:
    side = torch.cuda.Stream(device)

    def use_aside(recorded: bool) -> None:
        values = torch.ones(1024)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            values.sum()
        if recorded:
            values.record_stream(side)

    use_aside(recorded=False)
    torch.empty(1)
    assert "memory that nobody refers to on the default stream frees 4096 bytes" in races(double)
    use_aside(recorded=True)
    torch.empty(1)
    assert races(double) == ""


def test_backward_is_in_order_with_the_streams_of_forward(device: torch.device, double: DriverDouble) -> None:
    """torch's autograd waits by events of its own, which the card knows."""
    weight = torch.ones(1024, requires_grad=True)
    main, side = torch.cuda.current_stream(), torch.cuda.Stream(device)
    doubled = weight.mul(2)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        aside = doubled.mul(3)
    main.wait_stream(side)
    (doubled + aside).sum().backward()
    assert weight.grad is not None and weight.grad.unique().tolist() == [8]
    assert races(double) == ""
