"""A training step in named phases, and its lines, for tests that interrupt or break one and look at what is left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import offload
from training import loss_of, make_model, same_bits

PACKAGE = str(Path(offload.__file__).parent)


@contextmanager
def each_line(call: Callable[[str], None], of: str = PACKAGE) -> Iterator[None]:
    """Calls with "path:line" before every line of the package, or of one file of it, that runs in this thread."""

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            call(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return local

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(of) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


class Trainer:
    """One model under one placement, stepping through the same data as its twin."""

    PHASES = ("forward", "backward", "clip", "step", "wait", "state_dict", "zero_grad")

    def __init__(self, placement: dict[str, Any], dtype: torch.dtype, scaled: bool) -> None:
        model = make_model(dtype, width=8, depth=2, vocabulary=11, tied=True)
        self.model, self.optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        self.streams = placement.get("params") in ("host", "disk")
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
        self.loss: Any = None

    def phases(self, tokens: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
        def forward() -> None:
            self.loss = self.scaler.scale(loss_of(self.model, tokens))

        def backward() -> None:
            self.loss.backward()

        def clip() -> None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)

        for _ in range(2):  # micro-batches
            yield "forward", forward
            yield "backward", backward
        yield "clip", clip
        yield "step", lambda: self.scaler.step(self.optimizer)
        # A weight that is away answers with an error.
        yield "wait", self.optimizer.synchronize if self.streams else self.model.blocks[1].up.weight.clone
        yield "state_dict", lambda: (self.model.state_dict(), self.optimizer.state_dict())
        yield "zero_grad", lambda: self.optimizer.zero_grad(set_to_none=False)

    def step(self, tokens: Tensor) -> None:
        for _, run in self.phases(tokens):
            run()
        self.begin_again()

    def begin_again(self) -> None:
        self.loss = None
        self.optimizer.zero_grad()
        self.scaler.update(8.0)  # forgets that it unscaled

    def gradients(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]

    def values(self) -> dict[str, Tensor]:
        """All that a step changes."""
        values = {name: value.clone() for name, value in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            values |= {f"{index} {name}": value.clone() for name, value in state.items()}
        return values


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)
