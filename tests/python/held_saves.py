"""A writer of checkpoints that is held, for the fixture `held`, and what a user does while it is."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch

import offload
from offload import _durable_files
from test_checkpoints import steps
from test_save_checkpoint import wrapped
from training import HOST, TinyLM


class HeldWriter:
    """Writers stop before their first byte until `release()`; small chunks leave most of a file untaken then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._gate = threading.Event()
        self.release, self.hold = self._gate.set, self._gate.clear
        real = _durable_files._write_all

        def write_all(*arguments: Any) -> None:
            assert self._gate.wait(60)
            real(*arguments)

        monkeypatch.setattr(_durable_files, "_write_all", write_all)
        monkeypatch.setattr(_durable_files, "CHUNK_BYTES", 4096)


def train_on(model: TinyLM, optimizer: offload.OffloadOptimizer) -> None:
    steps(model, optimizer, seed=3)


def load_other_states(model: TinyLM, optimizer: offload.OffloadOptimizer) -> None:
    other, its_optimizer = wrapped(torch.bfloat16, HOST, seed=8)
    steps(other, its_optimizer, seed=8)
    optimizer.load_state_dict(copy.deepcopy(its_optimizer.state_dict()))
    model.load_state_dict(copy.deepcopy(other.state_dict()))


def write_weights_alone(model: TinyLM, optimizer: offload.OffloadOptimizer) -> None:
    model.load_state_dict(copy.deepcopy(wrapped(torch.bfloat16, HOST, seed=8)[0].state_dict()))
    model.state_dict()  # what was written to streamed weights goes to the host


@torch.no_grad()
def write_weights(model: TinyLM, optimizer: offload.OffloadOptimizer) -> None:
    with offload.full_params(model):
        for parameter in model.parameters():
            parameter.mul_(0.5)
    optimizer.resync()


def leave(model: TinyLM, optimizer: offload.OffloadOptimizer) -> None:
    plain, stock = offload.unwrap(model, optimizer)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert isinstance(stock, torch.optim.AdamW)


CHANGES = [train_on, load_other_states, write_weights_alone, write_weights, leave]
