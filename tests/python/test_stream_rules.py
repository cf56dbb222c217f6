"""The stream rules of docs/design.md, section 5: one test or more each, named by its letter.

What needs the driver's own view of streams, (d), (h), (j) and (k), is in tests/csrc/cuda_device_test.cpp too.
"""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload import _copy_lanes, _gradient_lanes, _native
from training import HOST, batches, loss_of, make_model, same_bits, train, wrapped_run
from what_lives import open_files, thread_numbers

pytestmark = pytest.mark.usefixtures("device")


def wrapped(**options: Any) -> tuple[nn.Module, Any]:
    model = make_model()
    return offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **(HOST | options))


class Recording:
    """Stands before a native object, notes the calls of some of its methods, and does `first` before each."""

    def __init__(self, inner: Any, *methods: str, first: Callable[[], object] = lambda: None) -> None:
        self._inner = inner
        self._methods = methods
        self._first = first
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if name not in self._methods:
            return method

        def call(*args: Any, **options: Any) -> Any:
            self.calls.append((name, args))
            self._first()
            return method(*args, **options)

        return call


class Streams:
    """The compute stream as the lanes see it: the CPU has one, so the test gives each use a number of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        monkeypatch.setattr(_gradient_lanes.GradientLanes, "compute_stream", lambda _: self.current)


@pytest.mark.cpu_only
def test_a_and_c_a_copy_is_ordered_after_the_stream_that_the_caller_computes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """(a) An upload's destination is allocated on the caller's stream, (c) which is read before all else."""
    model, optimizer = wrapped()
    lanes = optimizer._engine.lanes
    loss_of(model, next(batches(1))).backward()
    streams = Streams(monkeypatch)
    recording = Recording(lanes._transfers, "submit_to_device", "submit_all_to_host", "wait_on_stream")
    lanes._transfers = lanes._departures._transfers = recording
    allocated: list[int] = []
    empty = torch.empty_strided

    def noting(*args: Any, **options: Any) -> Tensor:
        allocated.append(streams.current)
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty_strided", noting)
    streams.current = 7
    model.head.weight.grad.clone()
    uploads = [args for name, args in recording.calls if name == "submit_to_device"]
    waits = [args for name, args in recording.calls if name == "wait_on_stream"]
    assert allocated == [7] and [args[3] for args in uploads] == [7] and [args[0] for args in waits] == [7]
    streams.current = 8
    loss_of(model, next(batches(1))).backward()
    departures = [args for name, args in recording.calls if name == "submit_all_to_host"]
    assert departures and {args[1] for args in departures} == {8}
    lanes._transfers = lanes._departures._transfers = recording._inner


@pytest.mark.cpu_only
def test_b_the_source_of_a_departures_gradient_is_held_until_it_has_left() -> None:
    _, optimizer = wrapped()
    engine = optimizer._engine

    def held() -> list[int]:
        return [copy.tensor.data_ptr() for copy in engine.lanes._ring]

    engine.device.hold("to_host")
    source = torch.ones(1024)
    address = source.data_ptr()
    landed = engine.lanes.to_host(source)
    del source
    engine.lanes.to_host(torch.ones(1))
    assert held()[0] == address
    engine.device.release("to_host")
    landed.ticket.wait()
    engine.lanes.to_host(torch.ones(1)).ticket.wait()
    assert address not in held()


@pytest.mark.cpu_only
def test_b_a_tensor_is_held_before_its_copy_is_submitted() -> None:
    """Whatever is raised around the submission, a copy in flight never outlives the memory that it uses."""
    _, optimizer = wrapped()
    lanes = optimizer._engine.lanes
    transfers = lanes._transfers
    held: list[bool] = []

    class Watching:
        def submit_all_to_host(self, copies: list[Any], *rest: Any) -> Any:
            held.extend(source in [copy.tensor.data_ptr() for copy in lanes._ring] for _, source, *_ in copies)
            return transfers.submit_all_to_host(copies, *rest)

        def submit_to_device(self, destination: int, *rest: Any) -> Any:
            held.append(destination in [copy.tensor.data_ptr() for copy in lanes._ring])
            return transfers.submit_to_device(destination, *rest)

        def __getattr__(self, name: str) -> Any:
            return getattr(transfers, name)

    lanes._transfers = lanes._departures._transfers = Watching()
    landed = lanes.to_host(torch.ones(256))
    lanes.to_device(landed, torch.empty(256))
    lanes._transfers = lanes._departures._transfers = transfers
    assert held == [True, True]


@pytest.mark.cpu_only
def test_b_the_ring_is_bounded_and_the_stream_of_the_memory_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = wrapped()
    engine = optimizer._engine
    monkeypatch.setattr(_copy_lanes, "_RING_BYTES", 4096)
    streams = Streams(monkeypatch)
    engine.device.hold("to_host")
    release = functools.partial(engine.device.release, "to_host")
    recording = engine.lanes._transfers = Recording(engine.lanes._transfers, "wait_on_stream", first=release)
    streams.current = 5
    engine.lanes.to_host(torch.ones(600))  # 2,400 bytes
    assert recording.calls == []
    streams.current = 6
    engine.lanes.to_host(torch.ones(600))
    assert recording.calls[0][1][0] == 5, "the memory belongs to the stream that allocated it"
    assert sum(copy.tensor.nbytes for copy in engine.lanes._ring) <= 4096
    engine.lanes._transfers = recording._inner


@pytest.mark.cpu_only
def test_b_who_brings_room_waits_beyond_that_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations: what may be on its way grows with what may stay."""
    _, optimizer = wrapped()
    engine = optimizer._engine
    monkeypatch.setattr(_copy_lanes, "_RING_BYTES", 0)
    engine.device.hold("to_host")
    release = functools.partial(engine.device.release, "to_host")
    recording = engine.lanes._transfers = Recording(engine.lanes._transfers, "wait_on_stream", first=release)
    landed = [engine.lanes.send(torch.ones(256), "activations", 0, 2048) for _ in range(2)]
    engine.lanes.start_upload(landed[0], torch.empty(256), 3072)
    assert recording.calls == []
    engine.lanes.send(torch.ones(256), "activations", 0, 2048)
    assert [args[1] for _, args in recording.calls] == [landed[0].ticket, landed[1].ticket]
    engine.lanes._transfers = recording._inner


def test_d_streams_are_persistent() -> None:
    """No thread and no file is made by a step after the first ones; those of other tests may end meanwhile."""
    model, optimizer = wrapped()
    seen = []

    def note(step: int, *_: Any) -> None:
        if step >= 2:
            seen.append((thread_numbers(), open_files()))

    train(model, optimizer, steps=12, each_step=note)
    threads, files = seen[0]
    for later_threads, later_files in seen[1:]:
        assert later_threads <= threads and later_files <= files


@pytest.mark.cpu_only
def test_e_a_buffer_given_back_is_reused_only_after_its_ticket() -> None:
    _, optimizer = wrapped()
    engine = optimizer._engine
    engine.device.hold("to_device")
    landed = engine.lanes.to_host(torch.ones(256))
    landed.ticket.wait()
    address = landed.address
    upload = engine.lanes.start_upload(landed, torch.empty(256))
    del landed
    others = [engine.pool.acquire(1024, "gradients") for _ in range(8)]
    assert address not in [other.address for other in others]
    engine.device.release("to_device")
    upload.wait()
    del others
    assert address in [buffer.address for buffer in [engine.pool.acquire(1024, "gradients") for _ in range(9)]]


@pytest.mark.cpu_only
def test_f_nothing_but_the_next_use_waits_on_the_host() -> None:
    """With both lanes held, backward, clipping and step() return; only the next forward would wait."""
    model, optimizer = wrapped(poison=False)
    loss_of(model, next(batches(1))).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)  # from now on norms are taken on the way out
    optimizer.zero_grad()
    engine = optimizer._engine
    engine.device.hold("to_host")
    engine.device.hold("to_device")
    loss_of(model, next(batches(1))).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    assert engine.device.pending_count("to_host") > 0
    assert not any(ticket.done for ticket in engine._tickets.values())
    engine.device.release("to_host")
    engine.device.release("to_device")
    optimizer.synchronize()


@pytest.mark.cpu_only
def test_g_an_upload_into_a_weight_waits_for_the_stream_at_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compute stream may still read the weight when step() is called, so step() says where it was."""
    model, optimizer = wrapped()
    loss_of(model, next(batches(1))).backward()
    streams = Streams(monkeypatch)
    engine = optimizer._engine
    recording = engine.pipeline = Recording(engine.pipeline, "submit")
    streams.current = 9
    optimizer.step()
    assert [stream for _, (_, stream) in recording.calls] == [9]
    engine.pipeline = recording._inner
    optimizer.synchronize()


def test_g_uploads_do_not_overtake_a_slow_compute_stream() -> None:
    """Compute that is far behind the host reads the old weight, poisoned where it should not be read any more."""
    slow, fast = (wrapped_run(make_model(), HOST, each_step=_delay if late else None) for late in (True, False))
    assert slow.losses == fast.losses
    for name, weight in slow.weights.items():
        assert same_bits(weight, fast.weights[name])


def _delay(*_: Any) -> None:
    if torch.get_default_device().type == "cuda":
        torch.cuda._sleep(50_000_000)  # about 25 ms, far longer than the copies of the small model


def test_h_our_streams_do_not_join_the_legacy_stream(device: torch.device) -> None:
    """A copy ordered after an idle stream ends while the legacy stream, where torch computes, is busy."""
    if device.type == "cpu":  # the calling thread is the compute stream: it is here, and the copy ends
        _, optimizer = wrapped()
        assert optimizer._engine.lanes.to_host(torch.ones(256)).ticket.wait(30)
        return
    _, optimizer = wrapped()
    source, idle = torch.ones(256), torch.cuda.Stream()
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(4_000_000_000)  # about 2 s
    busy.record()
    with torch.cuda.stream(idle):
        landed = optimizer._engine.lanes.to_host(source)
    assert landed.ticket.wait(30) and not busy.query()
    busy.synchronize()


def test_i_gradients_of_a_submitted_step_do_not_change() -> None:
    """The loop writes to gradients, new and old, while the update that reads them has not begun."""

    def weights(edit: bool) -> list[Tensor]:
        model, optimizer = wrapped()
        engine = optimizer._engine
        loss_of(model, next(batches(1))).backward()
        kept = [p.grad for p in model.parameters()]
        engine.pipeline.hold()
        optimizer.step()
        if edit:
            optimizer.zero_grad(set_to_none=False)
            for gradient in kept:
                gradient.fill_(1e3)
        engine.pipeline.release()
        return [p.detach().clone() for p in model.parameters()]

    for one, other in zip(weights(True), weights(False), strict=True):
        assert same_bits(one, other)


@pytest.mark.cpu_only
def test_j_no_stream_waits_for_the_host_when_the_engine_goes() -> None:
    """Work behind a ticket that will never end is given up, so dropping the engine does not hang."""
    model, optimizer = wrapped()
    engine = optimizer._engine
    never = _native.Ticket.pending()
    buffer = engine.pool.acquire(1024, "gradients")
    target = torch.zeros(256)
    upload = engine.transfers.submit_to_device(target.data_ptr(), buffer.address, 1024, 0, never)
    del model, optimizer, engine, buffer
    gc.collect()
    with pytest.raises(offload.DeviceError, match="cancelled"):
        upload.wait(30)
    assert not target.any()


def test_k_any_thread_may_copy() -> None:
    """A thread that never touched the device submits copies to it: each call sets the device's own context."""
    _, optimizer = wrapped()
    lanes = optimizer._engine.lanes
    source = torch.arange(256, dtype=torch.float32)
    results: list[Tensor] = []

    def work() -> None:
        landed = lanes.to_host(source.clone())
        out = torch.empty(256, device=source.device)
        lanes.to_device(landed, out)
        results.append(out)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert len(results) == 1 and torch.equal(results[0], source)
