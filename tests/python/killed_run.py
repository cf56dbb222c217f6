"""A training run that is killed at chosen moments and resumed in new processes, for `test_kill_and_resume.py`.

Each life runs in a process of its own, loads the last checkpoint, trains on and kills itself with SIGKILL where it is
told to. A checkpoint holds all that an ordinary loop saves: model, optimizer, scheduler, scaler, random state, losses.
"""

from __future__ import annotations

import io
import itertools
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import offload
from training import TinyLM, batches, loss_of

STEPS = 12
SAVE_EVERY = 2
MICRO_BATCHES = 2


@dataclass(frozen=True)
class Death:
    """Where a life ends. `moment` is a number of backward passes in the step, "stepped", or "saving"."""

    step: int
    moment: int | str
    saved_bytes: int = 0  # what "saving" has written by then


@dataclass(frozen=True)
class Life:
    placement: dict[str, Any]
    death: Death | None = None
    rewrap: bool = False  # unwrap and wrap again after resuming


@dataclass
class Progress:
    step: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


class DropoutLM(TinyLM):
    """TinyLM that draws random numbers in training."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(nn.functional.dropout(x, 0.1))
        return self.head(self.norm(x))


class KillingFile(io.FileIO):
    """Takes so many bytes, then the process dies in the middle of its write."""

    left = 0

    def write(self, data: Any) -> int:
        taken = memoryview(data)[: self.left]
        super().write(taken)
        self.left -= len(taken)
        if self.left == 0:
            die()
        return len(taken)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def live(folder: Path, dtype: torch.dtype, scaled: bool, life: Life) -> None:
    """One process's share of the run: from the last checkpoint to its death, or to the end."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DropoutLM(tied=True).to(dtype)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = offload.wrap(model, plain, **life.placement)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2, enabled=scaled)
    progress = Progress()
    path = folder / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True, mmap=True)
        # Either order is right: take turns.
        if saved["step"] % 4 == 0:
            model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if saved["step"] % 4 != 0:
            model.load_state_dict(saved["model"])
        scheduler.load_state_dict(saved["scheduler"])
        scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["random"])
        progress = Progress(saved["step"], saved["losses"], saved["norms"])
    if life.rewrap:
        model, optimizer = rewrapped(model, optimizer, life.placement)
        scheduler.optimizer = optimizer
    data = itertools.islice(batches(STEPS * MICRO_BATCHES), progress.step * MICRO_BATCHES, None)

    def checkpoint(death: Death | None) -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "scaler": scaler.state_dict(),
            "random": torch.get_rng_state(),
            "step": progress.step,
            "losses": progress.losses,
            "norms": progress.norms,
        }
        unfinished = path.with_suffix(".unfinished")
        if death is not None:
            with KillingFile(unfinished, "w") as file:
                file.left = death.saved_bytes
                torch.save(state, file)
        torch.save(state, unfinished)
        unfinished.replace(path)

    while progress.step < STEPS:
        death = life.death if life.death is not None and life.death.step == progress.step else None
        for micro_batch in range(MICRO_BATCHES):
            with torch.autocast("cpu", dtype=torch.float16, enabled=scaled):
                loss = loss_of(model, next(data)) / MICRO_BATCHES
            scaler.scale(loss).backward()
            progress.losses.append(loss.item())
            if death is not None and death.moment == micro_batch + 1:
                die()
        scaler.unscale_(optimizer)
        progress.norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        if death is not None and death.moment == "stepped":
            die()
        progress.step += 1
        saving = death is not None and death.moment == "saving"
        if progress.step % SAVE_EVERY == 0 or saving:
            checkpoint(death if saving else None)  # the update may still be running
    moments = optimizer.stats().host_bytes["moments"]
    assert (moments > 0) == (life.placement["optimizer"] == "host")


def rewrapped(
    model: nn.Module, optimizer: offload.OffloadOptimizer, placement: dict[str, Any]
) -> tuple[nn.Module, offload.OffloadOptimizer]:
    """Through a plain model and optimizer; the saved state carries the fp32 moments and masters of 16-bit models."""
    exact = optimizer.state_dict()
    model, plain = offload.unwrap(model, optimizer)
    model, optimizer = offload.wrap(model, plain, **placement)
    optimizer.load_state_dict(exact)
    return model, optimizer
