"""What a user's own CUDA streams ask of us, with torch's part played where there is no card."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

import offload
from grad_store import HostStore
from offload import _durable_files, _gradient_lanes, _native, _snapshot
from offload._copy_lanes import CopyLanes
from offload._host_grad import GradCell
from offload._residency import Residency
from training import HOST, RESIDENT, Block, batches, loss_of, make_model, same_bits

STREAMED = {**HOST, "params": "host"}


def test_the_default_stream_is_entered_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch makes a new stream of the handle 0: work on that would be ordered with nothing."""
    device = torch.device("cuda", 1)
    current = SimpleNamespace(cuda_stream=64)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: current)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda of: ("default", of))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, of: ("external", handle, of))
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    native = _native.HostDevice()
    lanes = CopyLanes(device, _native.HostPool(native), _native.TransferQueue(native))
    with lanes.on_stream(0) as entered:
        assert entered == ("default", device)
    with lanes.on_stream(128) as entered:
        assert entered == ("external", 128, device)
    with lanes.on_stream(64) as entered:
        assert entered is None  # it is the current one


@pytest.mark.cpu_only
@pytest.mark.usefixtures("device")
def test_weights_stay_for_every_stream_that_computes_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else their memory would go back to the stream it came on, and be written to while another one still reads it."""
    current = 0
    used: list[tuple[str, int]] = []

    def switch(stream: int) -> None:
        nonlocal current
        current = stream

    model = make_model(depth=4)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = offload.wrap(model, adamw, **STREAMED, prefetch=1)
    name_of = optimizer._engine.name_of
    monkeypatch.setattr(_gradient_lanes.GradientLanes, "compute_stream", lambda _: current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    monkeypatch.setattr(Residency, "used_on", lambda self, stream: used.append((name_of(self.parameters[0]), stream)))
    model.blocks[2].register_forward_pre_hook(lambda *_: switch(9), prepend=True)
    model.blocks[2].register_forward_hook(lambda *_: switch(0), prepend=True)
    for tokens in batches(2):
        used.clear()
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    # The third block was sent for on the default stream, the fourth while the third computed on its own.
    assert [(name.split(".")[1], stream) for name, stream in used] == [("2", 9), ("3", 0)]


class WaitingStreams:
    """A compute stream for the test to choose, and which of them waited for an upload, which is held until then."""

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        self.waits: list[int] = []
        self._device, self._inner = engine.device, engine.transfers
        engine.transfers = self
        monkeypatch.setattr(_gradient_lanes.GradientLanes, "compute_stream", lambda _: self.current)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.current)
        monkeypatch.setattr(Residency, "used_on", lambda *_: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def wait_on_stream(self, stream: int, ticket: _native.Ticket) -> None:
        self.waits.append(stream)
        self._device.release("to_device")
        self._inner.wait_on_stream(0, ticket)


def streamed_engine() -> Any:
    model = make_model(depth=1)
    _, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **STREAMED)
    return optimizer._engine


@pytest.mark.cpu_only
@pytest.mark.usefixtures("device")
def test_every_stream_that_computes_with_weights_waits_for_their_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: that another one waits says nothing of this one, and they need not be in order with each other."""
    engine = streamed_engine()
    window, weights = engine.streaming.window, engine.streaming.residencies[:1]
    streams = WaitingStreams(engine, monkeypatch)
    for _ in range(2):
        streams.waits.clear()
        engine.device.hold("to_device")
        window.bring(weights)
        for streams.current in (9, 0, 9, 7, 0):
            window.make_ready(weights)
        assert streams.waits == [9, 0, 7]
        window.free_all_but(())


@pytest.mark.cpu_only
@pytest.mark.usefixtures("device")
def test_the_stream_that_memory_goes_back_to_waits_for_an_upload_nobody_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its later work gets that memory, whichever stream is the current one when the weights are given up."""
    engine = streamed_engine()
    window, weights = engine.streaming.window, engine.streaming.residencies[:1]
    streams = WaitingStreams(engine, monkeypatch)
    engine.device.hold("to_device")
    streams.current = 5
    window.bring(weights)
    streams.current = 9
    window.free_all_but(())
    assert streams.waits == [5]


@pytest.mark.parametrize("stream", [0, 9])
def test_a_gradient_that_was_sent_for_is_used_on_the_stream_it_came_on(stream: int) -> None:
    """On another one it is sent for anew: memory of a stream goes back to that stream, which would not wait."""
    store = HostStore()
    cell = GradCell("weight", torch.arange(4.0), store)
    cell.settle()
    cell.prefetch()
    store.stream = stream
    assert cell.materialize().tolist() == [0.0, 1.0, 2.0, 3.0]
    cell.prefetch()  # what was sent for is not kept beside it
    assert (store.prefetch_count, store.to_device_count) == (2, 1)
    assert store.awaited_count == (stream == 0)


class Branches(nn.Module):
    """Four blocks, of which the third computes on a stream of its own on a card, far behind the others."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](x))
        if x.device.type == "cpu":
            return self.blocks[2](x) + self.blocks[3](x)
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            late = self.blocks[2](x)
        early = self.blocks[3](x)
        main.wait_stream(side)
        return late + early


@pytest.mark.usefixtures("device")
def test_a_branch_on_a_stream_of_its_own_has_the_same_bits() -> None:
    def run(placement: dict[str, Any]) -> list[float]:
        torch.manual_seed(0)
        model: nn.Module = Branches()
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        losses = []
        for _ in range(4):
            loss = model(torch.ones(4, 16)).square().mean()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return losses

    # With one block sent for ahead, blocks use weights that came on the other stream and go back to it.
    assert run({**STREAMED, "prefetch": 1}) == run(STREAMED) == run(RESIDENT)


@pytest.mark.usefixtures("device")
def test_weights_have_landed_for_every_stream_when_a_unit_computes() -> None:
    """Plain torch lets any stream that is behind `step()` read them, and nothing tells us of one that does."""
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
    weight_of = optimizer._engine.pipeline.weight
    tickets: dict[int, Any] = {}
    landed: list[bool] = []
    for block in model.blocks:
        block.register_forward_pre_hook(
            lambda block, _: landed.extend(weight_of(tickets[id(p)]).done for p in block.parameters() if tickets)
        )
    for tokens in batches(3):
        loss_of(model, tokens).backward()
        optimizer.step()
        tickets = dict(optimizer._engine._tickets)
        optimizer.zero_grad()
    assert len(landed) == 2 * sum(len([*block.parameters()]) for block in model.blocks) and all(landed)


def test_a_checkpoint_has_what_its_stream_has_not_computed_yet(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads write it, and they have streams of their own."""
    monkeypatch.setattr(_durable_files, "CHUNK_BYTES", 4096)
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **RESIDENT)
    loss_of(model, next(batches(1))).backward()
    side = contextlib.nullcontext() if device.type == "cpu" else torch.cuda.stream(torch.cuda.Stream(device))
    with side:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda._sleep(50_000_000)
        optimizer.step()
        offload.save_checkpoint(tmp_path, model, optimizer, tag="now")
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        loaded = make_model(seed=1)
        offload.load_checkpoint(tmp_path, loaded)
        assert all(same_bits(value, expected[name]) for name, value in loaded.state_dict().items())


def test_what_is_saved_waits_once_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []

    def stream_of(device: torch.device) -> Any:
        return SimpleNamespace(synchronize=lambda: waited.append(device))

    monkeypatch.setattr(torch.cuda, "current_stream", stream_of)
    one, other = torch.device("cuda", 0), torch.device("cuda", 1)
    of = [Mock(spec=Tensor, device=device) for device in (one, other, one, torch.device("cpu"))]
    _snapshot._end_compute([*of[:3], _snapshot.Cast(of[0], torch.float32), of[3]])
    assert sorted(waited, key=str) == [one, other]
