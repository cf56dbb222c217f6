"""What stays on the device of a model with streamed weights shows in `stats()`, with its reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import offload
from training import HOST, RESIDENT, make_model

pytestmark = pytest.mark.usefixtures("device")

WIDTH = 16


class Marked(nn.Parameter):
    """As quantization libraries have them."""


class Mixed(nn.Module):
    """A model whose root holds weights of its own, with one of each kind that does not come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.marked = nn.ParameterList([Marked(torch.ones(WIDTH), requires_grad=False)])
        self.spread = nn.ParameterList([nn.Parameter(torch.ones(WIDTH, 2)[:, 0], requires_grad=False)])
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) * self.scale * self.marked[0] + self.spread[0]
        return x @ self.head.weight


def test_stats_tell_what_stays_and_why() -> None:
    model = Mixed()
    model, optimizer = offload.wrap(
        model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), **HOST, params="host"
    )
    model(torch.ones(2, WIDTH)).sum().backward()
    stats = optimizer.stats()
    stays = {weight.name: weight for weight in stats.resident_weights}
    buffers = {name for name, _ in model.named_buffers()}
    assert stays.keys() == {"scale", "marked.0", "spread.0", "head.weight", "head.bias"} | buffers
    assert "Parameter subclass (Marked)" in stays["marked.0"].reason
    assert "do not fill one stretch" in stays["spread.0"].reason
    assert "around those of others" in stays["scale"].reason
    assert "from outside" in stays["head.weight"].reason
    assert "buffer" in stays["blocks.0.1.running_mean"].reason
    assert (stays["head.weight"].nbytes, stays["scale"].nbytes) == (4 * WIDTH * WIDTH, 4 * WIDTH)
    assert stats.to_dict()["resident_weights"][0] == dataclasses.asdict(stats.resident_weights[0])
    assert "of these resident" in str(stats) and "blocks.0.1.running_mean, ..." in str(stats)
    resident = make_model()
    _, optimizer = offload.wrap(resident, torch.optim.AdamW(resident.parameters()), **RESIDENT)
    assert optimizer.stats().resident_weights == ()
