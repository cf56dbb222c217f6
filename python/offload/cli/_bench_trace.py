"""What a trace costs: the same steps with and without one in turns, and what its hooks take of tiny units."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping
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
_UNITS = 32
_PARAMETERS = 2  # of a unit

Step = Callable[[], None]


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds a step with and without a trace; microseconds that a trace adds to a unit of nothing else."""
    device = compute_device(options.device)
    blocks, steps = (4, 1) if options.quick else (144, 2)
    size, length, repeats = (100_000, 16, 5) if options.quick else (5_000_000, 128, 40)
    step, end, units = _model_step(size, length, device)
    wall, cpu = _in_turns(step, blocks, steps, device)
    end()
    tiny_step, end_tiny = _tiny_step(device)
    tiny, _ = _in_turns(tiny_step, repeats, 1, device)
    end_tiny()
    added_us = [(on - off) / _UNITS * 1e6 for off, on in zip(tiny["off"], tiny["on"], strict=True)][1:]
    off, added = summary(wall["off"][1:]), summary(added_us)
    yield {
        "name": "trace",
        "device": str(device),
        "parameters": size,
        "units": units,
        "off_step_s": off,
        "on_step_s": summary(wall["on"][1:]),
        "overhead": added_share(wall["off"], wall["on"], _TARGET),
        "cpu_overhead": added_share(cpu["off"], cpu["on"], _TARGET),
        "added_us_per_unit": added,
        # What the hooks take of that step where they can be told from what steps differ by.
        "reckoned_overhead": added["median"] * 1e-6 * units / off["median"],
    }


def _in_turns(
    step: Step, blocks: int, steps: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds a step of each block, "off" and "on", by the clock and of the process's own work."""
    wall: dict[str, list[float]] = {"off": [], "on": []}
    cpu: dict[str, list[float]] = {"off": [], "on": []}
    for block in range(blocks):
        now_at(f"block {block + 1} of {blocks}")
        for name in in_turn(block, ("off", "on")):
            with offload.trace() if name == "on" else contextlib.nullcontext():
                elapsed, worked = timed_block(step, steps, device)
            wall[name].append(elapsed)
            cpu[name].append(worked)
    return wall, cpu


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


def _tiny_step(device: torch.device) -> tuple[Step, Callable[[], None]]:
    model: nn.Module = nn.Sequential(*(ManyParameters(_PARAMETERS) for _ in range(_UNITS))).to(device)
    plain = torch.optim.AdamW(model.parameters())
    model, optimizer = offload.wrap(model, plain, optimizer="host", gradients="host", device=str(device))
    x = torch.ones(64, device=device)

    def step() -> None:
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def end() -> None:
        offload.unwrap(model, optimizer)

    return step, end


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """A step with and without a trace, and what a trace adds to a unit of nothing else."""
    off = result["off_step_s"]
    return [
        figure("step without a trace", "ms", off, side="ceiling", scale=1e3),
        figure("step with one", "ms", result["on_step_s"], scale=1e3, ceiling=("one without", off["median"])),
        figure("overhead", "share of a step", result["overhead"]),
        figure("overhead in CPU time", "share of a step", result["cpu_overhead"]),
        figure("added to a unit", "us", result["added_us_per_unit"]),
    ]


def pieces(result: Mapping[str, Any]) -> list[Piece]:
    """What a trace costs, beside what was asked for."""
    wall, cpu = share_between(result["overhead"]), share_between(result["cpu_overhead"])
    return [
        f"a trace adds {wall} to a step, {cpu} to its CPU time; by what it adds to a unit "
        f"({result['added_us_per_unit']['median']:.1f} us, {result['units']} times) it would be "
        f"{result['reckoned_overhead']:.2%}",
        f"(medians with their 95 % intervals; asked for: at most {_TARGET:.0%})",
    ]
