"""Trains a small offloaded model for very many steps and fails when memory, threads, files or objects grow.

    python tests/soak.py [steps]

The loop does what long runs do: accumulates, clips, skips steps, evaluates, saves and loads, is interrupted by
exceptions, unwraps and wraps again. Each of these happens before the first measurement, so that what is measured later
can only be growth.
"""

from __future__ import annotations

import gc
import io
import os
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "python"))

import offload
from training import HOST, TinyLM, batches, loss_of
from what_lives import open_files, thread_numbers

WARM_UP_STEPS = 100
REWRAP_EVERY = 50
# Between the two measurements memory outside the pool may move by what the allocators of C and Python keep: the caches
# of a few arenas. One leaked gradient a step of this model (28 KiB) would be 270 MiB after 10,000 steps.
OUTSIDE_SLACK_BYTES = 8 << 20
# The pool maps one more slab (of up to 64 MiB) when an exception drops gradients whose copies have not landed and the
# next pass needs blocks at once: a matter of timing, which may come after the first measurement.
RESIDENT_SLACK_BYTES = OUTSIDE_SLACK_BYTES + (64 << 20)
OBJECT_SLACK = 200


class Interruption(Exception):
    """Raised in the middle of a forward or backward pass."""


@dataclass(frozen=True)
class Usage:
    """What a process holds: the highest so far of bytes, the present numbers of the rest."""

    peak_resident_bytes: int
    peak_outside_pool_bytes: int
    peak_pool_bytes: int
    threads: int
    files: int
    objects: int


class Soak:
    def __init__(self) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        model = TinyLM(depth=1).bfloat16()
        self.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        self.data = batches(1 << 62)
        self.peak_resident_bytes = 0
        self.peak_outside_pool_bytes = 0
        self.peak_pool_bytes = 0
        self.losses: list[float] = []

    def wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = offload.wrap(model, optimizer, **HOST)

    def step(self, step: int) -> None:
        if step % REWRAP_EVERY == REWRAP_EVERY - 1:
            self.peak_pool_bytes = max(self.peak_pool_bytes, self.pool_bytes("peak_used_bytes"))
            exact = self.optimizer.state_dict()
            model, optimizer = offload.unwrap(self.model, self.optimizer)
            self.wrap(model, optimizer)
            self.optimizer.load_state_dict(exact)
        if step % 20 == 19:
            self.save_and_load()
        if step % 10 == 9:
            with torch.no_grad():
                loss_of(self.model, next(self.data))
        if step % 17 == 16:
            self.interrupted("forward" if step % 2 else "backward")
        for _ in range(1 + step % 3):
            loss = loss_of(self.model, next(self.data))
            loss.backward()
        self.losses[:] = [loss.item()]
        if step % 7 == 6:
            return  # the step is skipped: the next one has these gradients, too
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=step % 4 != 3)

    def save_and_load(self) -> None:
        file = io.BytesIO()
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])

    def interrupted(self, where: str) -> None:
        def fail(*_: Any) -> None:
            raise Interruption

        norm = self.model.norm
        handle = (norm.register_forward_hook if where == "forward" else norm.register_full_backward_hook)(fail)
        try:
            loss_of(self.model, next(self.data)).backward()
        except Interruption:
            self.optimizer.zero_grad()
        finally:
            handle.remove()

    def pool_bytes(self, counter: str) -> int:
        return self.optimizer.stats().pool[counter]

    def measure(self) -> Usage:
        self.optimizer.synchronize()
        gc.collect()
        self.sample()
        return Usage(
            self.peak_resident_bytes,
            self.peak_outside_pool_bytes,
            max(self.peak_pool_bytes, self.pool_bytes("peak_used_bytes")),
            len(thread_numbers()),
            len(open_files()),
            len(gc.get_objects()),
        )

    def sample(self) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident = pages * os.sysconf("SC_PAGE_SIZE")
        outside = resident - self.pool_bytes("mapped_bytes")
        self.peak_resident_bytes = max(self.peak_resident_bytes, resident)
        self.peak_outside_pool_bytes = max(self.peak_outside_pool_bytes, outside)


def main(steps: int) -> int:
    if steps <= WARM_UP_STEPS:
        print(f"{steps} steps: give more than the {WARM_UP_STEPS} of the warm-up", file=sys.stderr)
        return 2
    soak = Soak()
    start = time.perf_counter()
    for step in range(steps):
        soak.step(step)
        if step % REWRAP_EVERY != REWRAP_EVERY - 1:  # for a moment the old pool may still be there
            soak.sample()
        if step + 1 == WARM_UP_STEPS:
            first = soak.measure()
    last = soak.measure()
    print(f"{steps} steps in {time.perf_counter() - start:.0f} s, last loss {soak.losses[0]:.4f}")
    print(f"{'':24}{f'step {WARM_UP_STEPS}':>14}{f'step {steps}':>14}")
    for field in fields(Usage):
        print(f"{field.name:24}{getattr(first, field.name):14,}{getattr(last, field.name):14,}")
    slack = {
        "peak_resident_bytes": RESIDENT_SLACK_BYTES,
        "peak_outside_pool_bytes": OUTSIDE_SLACK_BYTES,
        "objects": OBJECT_SLACK,
    }
    grown = [
        field.name
        for field in fields(Usage)
        if getattr(last, field.name) > getattr(first, field.name) + slack.get(field.name, 0)
    ]
    if grown:
        print(f"grew by more than is allowed: {', '.join(grown)}", file=sys.stderr)
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000))
