"""Training on CudaDevice over the driver double has the bits of HostDevice and of everything resident."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from driver_double import DriverDouble

import offload
from offload import _copy_lanes, _engine, _native
from offload._pending import PendingParameter
from training import (
    HOST,
    RESIDENT,
    assert_offloaded,
    assert_same_bits,
    batches,
    loss_of,
    make_model,
    train,
    wrapped_run,
)
from what_lives import collect

# The engine computes in torch on the CPU, which is the double's "device".
PINNED: dict[str, Any] = {**HOST, "pin": True}


@pytest.fixture(params=["discrete", "hmm", "ats", "integrated"])
def double(
    request: pytest.FixtureRequest, driver_double: DriverDouble, monkeypatch: pytest.MonkeyPatch
) -> DriverDouble:
    driver_double.set_kind(request.param)
    monkeypatch.setattr(_engine, "open_device", lambda _: _native.CudaDevice(driver_path=driver_double.path))
    return driver_double


def on_older(monkeypatch: pytest.MonkeyPatch, double: DriverDouble) -> None:
    """From now on the driver takes no batches."""
    monkeypatch.setattr(
        _engine, "open_device", lambda _: _native.CudaDevice(driver_path=double.path, takes_batches=False)
    )


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, from then on all gradients of a step are there when its first update runs: uploads do not go early."""
    submit = _native.StepPipeline.submit

    def gathering(pipeline: Any, jobs: Any, *rest: Any, **options: Any) -> list[_native.Ticket]:
        pipeline.hold()
        tickets: list[_native.Ticket] = submit(pipeline, jobs, *rest, **options)
        for job in jobs:
            for ticket in job[3]:
                ticket.wait()
        pipeline.release()
        return tickets

    return lambda: monkeypatch.setattr(_native.StepPipeline, "submit", gathering)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "loop", [{"clip": None}, {"clip": 0.1}, {"micro_batches": 3}], ids=["plain", "clipped", "accumulated"]
)
def test_bits_equal_host_device_and_resident(
    double: DriverDouble,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    loop: dict[str, Any],
    gathered: Callable[[], None],
) -> None:
    model = make_model(dtype, depth=1)
    with monkeypatch.context() as one_by_one:
        one_by_one.setattr(_copy_lanes, "_SMALL_BYTES", 0)  # gradients
        on_double = wrapped_run(model, PINNED, steps=3, **loop)
    assert_offloaded(on_double.optimizer)
    assert on_double.optimizer.stats().pinned
    assert double.calls("cuMemcpyDtoHAsync_v2") > 0
    gathered()
    assert_same_bits(on_double, wrapped_run(model, PINNED, steps=3, **loop))
    assert double.calls("cuMemcpyBatchAsync") > 0
    assert double.misuses() == (0, "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_engine, "open_device", lambda _: _native.HostDevice())
        on_host = wrapped_run(model, HOST, steps=3, **loop)
        resident = wrapped_run(model, RESIDENT, steps=3, **loop)
    assert_same_bits(on_double, on_host)
    assert_same_bits(on_double, resident)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("share", ["host", 0.5])
def test_streamed_weights_have_the_same_bits(double: DriverDouble, dtype: torch.dtype, share: str | float) -> None:
    model = make_model(dtype)
    on_double = wrapped_run(model, PINNED | {"params": "host", "optimizer": share}, micro_batches=2)
    assert on_double.optimizer.stats().device_bytes["weights"] < on_double.optimizer.stats().host_bytes["weights"]
    assert double.misuses() == (0, "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_engine, "open_device", lambda _: _native.HostDevice())
        resident = wrapped_run(model, RESIDENT, micro_batches=2)
    assert_same_bits(on_double, resident)


@pytest.mark.parametrize("lane", ["to_host", "to_device"])
def test_step_does_not_wait_for_a_held_lane(double: DriverDouble, lane: str) -> None:
    expected = wrapped_run(make_model(depth=1), HOST, steps=2, clip=None)
    model = make_model(depth=1)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **PINNED)
    losses = []
    for tokens in batches(2):
        loss = loss_of(model, tokens)
        losses.append(loss.item())
        double.hold(lane)
        loss.backward()
        optimizer.step()
        assert isinstance(model.head.weight, PendingParameter)
        double.release(lane)
        optimizer.zero_grad()
    assert losses == expected.losses
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.weights[name]), name


def test_pageable_memory_trains_with_the_same_bits(double: DriverDouble) -> None:
    model = make_model(depth=1)
    pinned = wrapped_run(model, PINNED, steps=2)
    double.fail("cuMemHostRegister_v2", 1, 2, lasting=True)
    with pytest.warns(UserWarning, match="pageable.*ulimit -l"):
        pageable = wrapped_run(model, PINNED, steps=2)
    assert not pageable.optimizer.stats().pinned
    assert_same_bits(pinned, pageable)


def test_small_gradients_go_in_batches_where_the_driver_takes_them(double: DriverDouble) -> None:
    """Those of ten parameters, and ten copies where the driver refused the batch."""
    gradients = []
    for copies_count in (0, 10):
        model = make_model(depth=1)
        model, _ = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **PINNED)
        before = [double.calls(name) for name in ("cuMemcpyBatchAsync", "cuMemcpyDtoHAsync_v2")]
        loss_of(model, next(batches(1))).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        after = [double.calls(name) for name in ("cuMemcpyBatchAsync", "cuMemcpyDtoHAsync_v2")]
        assert [b - a for a, b in zip(before, after, strict=True)] == [1, copies_count]
        double.fail("cuMemcpyBatchAsync", 1, 801, lasting=True)  # CUDA_ERROR_NOT_SUPPORTED
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert double.misuses() == (0, "")


def test_small_weights_go_in_batches_where_the_driver_takes_them(
    double: DriverDouble, gathered: Callable[[], None]
) -> None:
    gathered()
    model = make_model(depth=1)
    together = wrapped_run(model, PINNED, steps=2)
    assert together.optimizer.stats().fallbacks == ()
    assert double.calls("cuMemcpyBatchAsync") > 0
    uploads = double.calls("cuMemcpyHtoDAsync_v2")
    double.fail("cuMemcpyBatchAsync", 1, 801, lasting=True)  # CUDA_ERROR_NOT_SUPPORTED
    one_by_one = wrapped_run(model, PINNED, steps=2)
    assert "one by one" in one_by_one.optimizer.stats().fallbacks[0]
    assert double.calls("cuMemcpyHtoDAsync_v2") > 2 * uploads
    assert_same_bits(together, one_by_one)
    assert double.misuses() == (0, "")


@pytest.mark.parametrize("clip", [None, 0.1], ids=["plain", "clipped"])
def test_small_copies_go_by_a_kernel_where_the_driver_takes_no_batches(
    double: DriverDouble, monkeypatch: pytest.MonkeyPatch, nvrtc: None, gathered: Callable[[], None], clip: float | None
) -> None:
    gathered()
    model = make_model(depth=1)
    together = wrapped_run(model, PINNED, steps=2, clip=clip)
    engine_calls = ("cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2")
    sent = [double.calls(name) for name in engine_calls]
    batches_sent = double.calls("cuMemcpyBatchAsync")
    assert batches_sent > 0

    on_older(monkeypatch, double)
    by_kernel = wrapped_run(model, PINNED, steps=2, clip=clip)
    assert by_kernel.optimizer.stats().fallbacks == ()
    # As many submissions as batches, and no copy more one by one.
    assert double.calls("cuLaunchKernel") == batches_sent == double.calls("cuMemcpyBatchAsync")
    assert [double.calls(name) for name in engine_calls] == [2 * count for count in sent]
    assert_same_bits(together, by_kernel)
    double.fail("cuLaunchKernel", 3, 701)  # CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
    refused = wrapped_run(model, PINNED, steps=2, clip=clip)
    assert refused.optimizer.stats().fallbacks == ("small copies go one by one: the driver refused to take several",)
    assert_same_bits(together, refused)
    assert double.misuses() == (0, "")


def test_without_batches_and_without_the_kernel_stats_say_why(
    double: DriverDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_older(monkeypatch, double)
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    model = make_model(depth=1)
    one_by_one = wrapped_run(model, PINNED, steps=1)
    (said,) = one_by_one.optimizer.stats().fallbacks
    assert said.startswith("small copies go one by one: several at once need a driver for CUDA 12.8, or a kernel (")
    assert "pip install 'offload[cuda]' 'cuda-bindings<13'" in said
    assert double.calls("cuLaunchKernel") == double.calls("cuMemcpyBatchAsync") == 0
    assert_same_bits(one_by_one, wrapped_run(model, RESIDENT, steps=1))


def test_everything_is_given_back(double: DriverDouble) -> None:
    collect()  # of other tests
    kinds = ("contexts", "streams", "events", "registrations", "modules", "pending_copies")
    before = {kind: double.live(kind) for kind in kinds}
    model = make_model(depth=1)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **PINNED)
    train(model, optimizer, steps=2)
    assert double.live("registered_bytes") >= optimizer.stats().pool["pinned_bytes"] > 0
    offload.unwrap(model, optimizer)
    del optimizer
    assert {kind: double.live(kind) for kind in kinds} == before
    assert double.misuses() == (0, "")


@pytest.mark.parametrize("refused", [False, True], ids=["timed", "refused"])
def test_a_trace_times_copies_by_the_devices_own_events(double: DriverDouble, refused: bool) -> None:
    model = make_model(depth=1)
    streamed = PINNED | {"params": "host"}
    plain = wrapped_run(model, streamed, steps=2)
    assert double.calls("cuEventElapsedTime") == 0
    if refused:
        double.fail("cuEventElapsedTime", 1, 999, lasting=True)  # CUDA_ERROR_UNKNOWN
    with offload.trace() as trace:
        traced = wrapped_run(model, streamed, steps=2)
        traced.optimizer.synchronize()
        for upload in traced.optimizer._engine.streaming.window.last_upload.values():
            upload.wait()  # of the weights that the next forward begins with
    assert_same_bits(plain, traced)
    transfers = traced.optimizer.stats().transfers
    copies = {lane: trace.data.lane(lane) for lane in ("to_host", "to_device")}
    for lane, spans in copies.items():
        assert sum(span.nbytes for span in spans) == transfers[f"{lane}_bytes"]
        # A driver that does not say how long it took: each is a point, at its end.
        assert refused == all(span.begin_ns == span.end_ns for span in spans)
    assert double.calls("cuEventElapsedTime") == sum(map(len, copies.values()))
    assert double.misuses() == (0, "")
