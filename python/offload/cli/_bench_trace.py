"""What a trace costs: the same steps with and without one in turns, and what its hooks take of a unit."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import offload

from ._bench_figures import Figure, figure
from ._bench_pairs import added_share, in_turn, share_between, timed_block
from ._bench_spread import summary
from ._bench_step import ManyParameters
from ._corpus import VOCABULARY
from ._device import compute_device
from ._progress import now_at
from ._table import Piece
from ._training import build_model

__all__ = ["figures", "pieces", "run"]

_TARGET = 0.01
_BATCH = 4
_UNITS = 16
_PARAMETERS = 2  # of a unit
_SWEPT_BYTES = 32 << 20  # read and written between two units, as compute does that drives all else out of the caches

Step = Callable[[], None]


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds a step with and without a trace; microseconds that a trace adds to a unit of nothing else."""
    device = compute_device(options.device)
    blocks, steps = (4, 1) if options.quick else (128, 2)
    size, length, repeats = (100_000, 16, 5) if options.quick else (5_000_000, 128, 40)
    step, end, units = _model_step(size, length, device)
    wall, cpu, recording = _in_turns(step, blocks, steps, device)
    end()
    off, added = summary(wall["off"][1:]), summary(_added_us(repeats, device))
    yield {
        "name": "trace",
        "device": str(device),
        "parameters": size,
        "units": units,
        "off_step_s": off,
        "on_step_s": summary(wall["on"][1:]),
        "overhead": added_share(wall["off"], wall["on"], _TARGET),
        "cpu_overhead": added_share(cpu["off"], cpu["on"], _TARGET),
        # Of the same steps, by the trace's own clock: what they differ by does not touch it.
        "recording_share": summary(recording[1:]),
        "added_us_per_unit": added,
        # What the hooks take of that step where they can be told from what steps differ by.
        "reckoned_overhead": added["median"] * 1e-6 * units / off["median"],
    }


def _in_turns(
    step: Step, blocks: int, steps: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]], list[float]]:
    """Seconds a step of each block, "off" and "on", by the clock and of the process's own work; of those with a trace,
    the share that its own hooks took."""
    wall: dict[str, list[float]] = {"off": [], "on": []}
    cpu: dict[str, list[float]] = {"off": [], "on": []}
    recording = []
    for block in range(blocks):
        now_at(f"block {block + 1} of {blocks}")
        for name in in_turn(block, ("off", "on")):
            with offload.trace() if name == "on" else contextlib.nullcontext() as trace:
                elapsed, worked = timed_block(step, steps, device)
            wall[name].append(elapsed)
            cpu[name].append(worked)
            if trace is not None:
                recording.append(trace.report.recording_s / elapsed)
    return wall, cpu, recording


def _model_step(size: int, length: int, device: torch.device) -> tuple[Step, Callable[[], None], int]:
    shape = argparse.Namespace(hidden=None, size=size, layers=6, length=length, seed=0, dtype="bfloat16")
    model = build_model(shape)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer = offload.wrap(model, plain, optimizer="host", gradients="host", device=str(device))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (_BATCH, length), generator=generator).to(device)

    def step() -> None:
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    def end() -> None:
        offload.unwrap(model, optimizer)

    return step, end, shape.layers + 3  # beside the blocks: embedding, norm and head


class _Stopwatch:
    """Laps from start() to stop(); each start() finds the caches full of other things."""

    def __init__(self) -> None:
        self._laps: list[float] = []
        self._since: float | None = None
        self._swept = torch.zeros(_SWEPT_BYTES, dtype=torch.uint8)

    def start(self) -> None:
        self._swept.add_(1)
        self._since = time.perf_counter()

    def stop(self) -> None:
        if self._since is not None:
            self._laps.append(time.perf_counter() - self._since)
        self._since = None

    def take(self) -> float:
        """The median of the laps since the last call: whoever lost the core in one of them does not count."""
        laps, self._laps = self._laps, []
        return median(laps)


class _Between(torch.autograd.Function):
    """Nothing, but in backward one unit has ended there and the next begins."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, watch: _Stopwatch) -> Tensor:
        ctx.watch = watch
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.watch.stop()
        ctx.watch.start()
        return grad, None


class _TimedUnits(nn.Module):
    """Units of nothing but hooks: only they are timed, not what empties the caches between them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ManyParameters(_PARAMETERS) for _ in range(_UNITS)])
        self.watch = _Stopwatch()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = _Between.apply(x, self.watch)  # type: ignore[no-untyped-call]
            self.watch.start()
            x = block(x)
            self.watch.stop()
        return _Between.apply(x, self.watch)  # type: ignore[no-any-return, no-untyped-call]


def _added_us(repeats: int, device: torch.device) -> list[float]:
    """Microseconds of forward and backward that a trace adds to a unit, one sample a pair of steps."""
    units = _TimedUnits().to(device)
    watch = units.watch
    plain = torch.optim.AdamW(units.parameters())
    model, optimizer = offload.wrap(units, plain, optimizer="host", gradients="host", device=str(device))
    x = torch.ones(64, device=device, requires_grad=True)

    def timed() -> float:
        out = model(x)
        forward = watch.take()
        out.sum().backward()
        backward = watch.take()
        optimizer.step()
        optimizer.zero_grad()
        return (forward + backward) * 1e6

    taken: dict[str, list[float]] = {"off": [], "on": []}
    for number in range(repeats):
        now_at(f"what a trace adds to a unit, pair {number + 1} of {repeats}")
        for name in in_turn(number, ("off", "on")):
            with offload.trace() if name == "on" else contextlib.nullcontext():
                timed()
                taken[name].append(timed())
    offload.unwrap(model, optimizer)
    return [on - off for off, on in zip(taken["off"], taken["on"], strict=True)][1:]


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """A step with and without a trace, and what a trace adds to a unit of nothing else."""
    off, own = result["off_step_s"], result.get("recording_share")  # files of before have none
    return [
        figure("step without a trace", "ms", off, side="ceiling", scale=1e3),
        figure("step with one", "ms", result["on_step_s"], scale=1e3, ceiling=("one without", off["median"])),
        figure("overhead", "share of a step", result["overhead"]),
        figure("overhead in CPU time", "share of a step", result["cpu_overhead"]),
        *([figure("in its own hooks", "share of a step", own)] if own is not None else []),
        figure("added to a unit", "us", result["added_us_per_unit"]),
    ]


def pieces(result: Mapping[str, Any]) -> list[Piece]:
    """What a trace costs, beside what was asked for."""
    wall, cpu = share_between(result["overhead"]), share_between(result["cpu_overhead"])
    own = result.get("recording_share")
    hooks = f"its own hooks took {own['median']:.2%} of these steps; " if own is not None else ""
    return [
        f"a trace adds {wall} to a step, {cpu} to its CPU time; {hooks}by what it adds to a unit alone "
        f"({result['added_us_per_unit']['median']:.1f} us, {result['units']} times) it would be "
        f"{result['reckoned_overhead']:.2%}",
        f"(medians with their 95 % intervals; asked for: at most {_TARGET:.0%})",
    ]
