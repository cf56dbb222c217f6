"""What a user's own CUDA streams ask of us, with torch's part played where there is no card."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import offload
from offload import _gradient_lanes, _native
from offload._copy_lanes import CopyLanes
from offload._residency import Residency
from training import HOST, RESIDENT, Block, batches, loss_of, make_model

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


class Branches(nn.Module):
    """Four blocks, of which the third computes on a stream of its own on a card, far behind the others."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](x))
        if not x.is_cuda:
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
    def run(placement: dict[str, str]) -> list[float]:
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

    assert run(STREAMED) == run(RESIDENT)
