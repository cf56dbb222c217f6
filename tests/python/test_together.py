"""Everything together: what is offloaded, in which dtype and in which loop changes no bit."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import offload
from offload import _activations
from training import RESIDENT, TinyLM, batches, loss_of, make_model, same_bits

pytestmark = pytest.mark.usefixtures("device")

PLACEMENTS: dict[str, dict[str, Any]] = {
    "optimizer": {"optimizer": "host"},
    "gradients": {"optimizer": "host", "gradients": "host"},
    "params": {"optimizer": "host", "gradients": "host", "params": "host"},
    "activations": {"optimizer": "host", "gradients": "host", "params": "host", "activations": "host"},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.float32}


class Checkpointed(TinyLM):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


LOOPS: dict[str, dict[str, Any]] = {
    "clip": {"clip": 0.3},
    "accumulate": {"micro_batches": 3},
    "checkpointing": {"checkpointed": True},
    "tied": {"tied": True},
    "frozen": {"frozen": True},
}


def run(
    placement: dict[str, Any],
    precision: str,
    *,
    clip: float | None = None,
    micro_batches: int = 1,
    checkpointed: bool = False,
    tied: bool = False,
    frozen: bool = False,
) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    model: nn.Module = make_model(DTYPES[precision], tied=tied)
    if checkpointed:
        model.__class__ = Checkpointed
    if frozen:
        for parameter in model.blocks[1].parameters():
            parameter.requires_grad_(False)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
    data, losses = batches(5 * micro_batches), []
    for _ in range(5):
        for _ in range(micro_batches):
            kind = torch.get_default_device().type
            autocast = torch.autocast(kind, torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()
            with autocast:
                loss = loss_of(model, next(data)) / micro_batches
            loss.backward()
            losses.append(loss.item())
        if clip is not None:
            losses.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        optimizer.zero_grad()
    stats = optimizer.stats()
    weights = {name: value.cpu() for name, value in copy.deepcopy(model.state_dict()).items()}
    return losses, weights, stats


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
def test_offloaded_equals_resident(
    placement: dict[str, Any], precision: str, loop: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_activations, "MIN_BYTES", 1)  # the model is small
    losses, weights, stats = run(placement, precision, **loop)
    expected, resident_weights, _ = run(RESIDENT, precision, **loop)
    assert losses == expected
    for name, weight in resident_weights.items():
        assert same_bits(weights[name], weight), name
    assert stats.host_bytes["moments"] > 0
    if "params" in placement:
        assert stats.peak_weight_bytes < sum(weight.nbytes for weight in weights.values())
    if "activations" in placement:
        assert stats.activations["offloaded_bytes"] > 0.5 * stats.activations["saved_bytes"] > 0
