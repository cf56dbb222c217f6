"""What the DeepSpeed engine costs over `offload.wrap`: the same model, data and step in both.

Twice: pair by pair of short blocks of whole steps, and as what it adds to each call over a model of next to nothing,
whose time is Python's own.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import offload

from ._bench_figures import Figure, figure
from ._bench_pairs import added_share, in_turn, share_between, timed_block
from ._bench_spread import median_interval, summary
from ._bench_step import ManyParameters
from ._corpus import VOCABULARY
from ._device import compute_device
from ._progress import now_at
from ._table import Piece
from ._training import build_model

__all__ = ["figures", "pieces", "run"]

_TARGET = 0.02
_BATCH = 4
_RATE, _CLIP_NORM = 1e-4, 1.0
# dtype of the model and the norm that gradients are clipped to.
_CASES = (("float32", 0.0), ("float32", _CLIP_NORM), ("bfloat16", _CLIP_NORM))
# The two round a clipped gradient at other places: losses drift apart by the dtype's last bits.
_LOSS_TOLERANCE = 1e-2
_PARTS = ("forward", "backward", "step")
_NAMES = ("wrap", "engine")


class Side(NamedTuple):
    """One of the two that are compared: the calls of a step, the loss of a batch first."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], object]
    step: Callable[[], object]
    end: Callable[[], object]


class _Steps:
    """The steps of a side, one a call and batch; `loss` is the last one's."""

    def __init__(self, side: Side, batches: Iterable[Tensor]) -> None:
        self._side = side
        self._batches = iter(batches)

    def __call__(self) -> None:
        loss = self._side.forward(next(self._batches))
        self._side.backward(loss)
        self._side.step()
        self.loss = loss.detach()


# Makes a fresh model, and the loss of one on a batch.
Make = Callable[[], nn.Module]
LossOf = Callable[[nn.Module, Tensor], Tensor]


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows by dtype and clipping: seconds a step, the engine's share over wrap's pair by pair, microseconds a call."""
    device = compute_device(options.device)
    blocks, steps, calls = (4, 1, 10) if options.quick else (96, 2, 400)
    size, length = (100_000, 16) if options.quick else (2_000_000, 128)
    result: dict[str, Any] = {
        "name": "engine", "device": str(device), "blocks": blocks, "steps": steps, "calls": calls, "rows": [],
    }  # fmt: skip
    os.environ["DS_ACCELERATOR"] = device.type  # which the engine takes its device from
    for dtype, clip_norm in _CASES:
        shape = argparse.Namespace(hidden=None, size=size, layers=4, length=length, seed=0, dtype=dtype)
        row = _measure(shape, clip_norm, blocks, steps, device)
        row["own_us"] = own = _own_us(dtype, row["tensors"], clip_norm, calls, device)
        row["own_share"] = sum(own[part]["median"] for part in _PARTS) * 1e-6 / row["wrap_step_s"]["median"]
        result["rows"].append(row)
        yield result


def _measure(
    shape: argparse.Namespace, clip_norm: float, blocks: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """Blocks of few steps in turns, so that what else the machine does falls on both of a pair."""
    generator = torch.Generator().manual_seed(0)

    def make() -> nn.Module:
        return build_model(shape)

    def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        return loss

    sides = _sides(make, loss_of, shape.dtype, clip_norm, device)
    wall: dict[str, list[float]] = {"wrap": [], "engine": []}
    cpu: dict[str, list[float]] = {"wrap": [], "engine": []}
    losses: dict[str, list[float]] = {"wrap": [], "engine": []}
    for block in range(blocks):
        now_at(f"{shape.dtype}, block {block + 1} of {blocks}")
        tokens = [
            torch.randint(VOCABULARY, (_BATCH, shape.length), generator=generator).to(device) for _ in range(steps + 1)
        ]
        for name in in_turn(block, _NAMES):
            steps_of = _Steps(sides[name], tokens)
            elapsed, worked = timed_block(steps_of, steps, device)
            wall[name].append(elapsed)
            cpu[name].append(worked)
            losses[name].append(steps_of.loss.item())
    for side in sides.values():
        side.end()
    for ours, theirs in zip(losses["wrap"], losses["engine"], strict=True):
        assert abs(ours - theirs) <= _LOSS_TOLERANCE * abs(ours), f"losses differ, so the steps do: {ours}, {theirs}"
    return {
        "dtype": shape.dtype,
        "clip_norm": clip_norm,
        "parameters": shape.size,
        "tensors": sum(1 for _ in make().parameters()),
        "wrap_step_s": summary(wall["wrap"][1:]),
        "engine_step_s": summary(wall["engine"][1:]),
        "overhead": added_share(wall["wrap"], wall["engine"], _TARGET),
        "cpu_overhead": added_share(cpu["wrap"], cpu["engine"], _TARGET),
        "last_loss": {name: values[-1] for name, values in losses.items()},
    }


def _own_us(dtype: str, tensors: int, clip_norm: float, calls: int, device: torch.device) -> dict[str, Any]:
    """Microseconds that the engine adds to each call, of a model of as many parameters as the other, all tiny.

    They are of this thread's work, which others on the machine do not lengthen as they do the wall clock's time. On
    CUDA autograd calls back from a thread of its own, so what is done there (a norm, where nothing clips) is not in it.
    """
    now_at(f"{dtype}, calls")

    def make() -> nn.Module:
        return ManyParameters(tensors).to(getattr(torch, dtype))

    def loss_of(model: nn.Module, x: Tensor) -> Tensor:
        loss: Tensor = model(x).sum()
        return loss

    x = torch.ones(64, dtype=getattr(torch, dtype), device=device)
    sides = _sides(make, loss_of, dtype, clip_norm, device)
    added: dict[str, list[float]] = {part: [] for part in _PARTS}
    for call in range(calls + 1):
        spent = {name: _thread_us(sides[name], x) for name in in_turn(call, _NAMES)}
        for part in _PARTS if call else ():  # the first records the order of the units
            added[part].append(spent["engine"][part] - spent["wrap"][part])
    for side in sides.values():
        side.end()
    return {part: summary(values) | {"median_between": median_interval(values)} for part, values in added.items()}


def _thread_us(side: Side, x: Tensor) -> dict[str, float]:
    """Microseconds that this thread works in each call of a step."""
    times = [time.thread_time_ns()]
    loss = side.forward(x)
    times.append(time.thread_time_ns())
    side.backward(loss)
    times.append(time.thread_time_ns())
    side.step()
    times.append(time.thread_time_ns())
    return {part: (times[at + 1] - times[at]) / 1e3 for at, part in enumerate(_PARTS)}


def _sides(make: Make, loss_of: LossOf, dtype: str, clip_norm: float, device: torch.device) -> dict[str, Side]:
    return {"wrap": _wrapped(make(), loss_of, clip_norm, device), "engine": _engine(make(), loss_of, dtype, clip_norm)}


def _wrapped(model: nn.Module, loss_of: LossOf, clip_norm: float, device: torch.device) -> Side:
    plain = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.0)
    model, optimizer = offload.wrap(model, plain, optimizer="host", gradients="host", device=str(device))

    def step() -> None:
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return Side(
        forward=lambda batch: loss_of(model, batch),
        backward=lambda loss: loss.backward(),  # type: ignore[no-untyped-call]
        step=step,
        end=lambda: offload.unwrap(model, optimizer),
    )


def _engine(model: nn.Module, loss_of: LossOf, dtype: str, clip_norm: float) -> Side:
    config = {
        "train_micro_batch_size_per_gpu": _BATCH,
        "gradient_clipping": clip_norm,
        "optimizer": {"type": "AdamW", "params": {"lr": _RATE, "weight_decay": 0.0}},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": dtype == "bfloat16"},
    }
    with _unlogged():
        engine, *_ = offload.initialize(model=model, config=config)
    return Side(lambda batch: loss_of(engine, batch), engine.backward, engine.step, engine.destroy)


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Without the door's log, which goes to stdout: results are there."""
    log = logging.getLogger("offload.deepspeed")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _case(row: Mapping[str, Any]) -> str:
    return f"{row['dtype']}{', clipped' if row['clip_norm'] else ''}"


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """By model: a step of the engine, one of wrap, and what the engine adds to it and to each call."""
    found = []
    for row in result["rows"]:
        case, wrap = _case(row), row["wrap_step_s"]
        found += [
            figure(f"engine, {case}", "s a step", row["engine_step_s"], ceiling=("a step of wrap", wrap["median"])),
            figure(f"wrap, {case}", "s a step", wrap),
            figure(f"overhead, {case}", "share of a step", row["overhead"]),
            figure(f"overhead in CPU time, {case}", "share of a step", row["cpu_overhead"]),
            *(figure(f"added to {part}, {case}", "us", row["own_us"][part]) for part in _PARTS),
        ]
    return found


def pieces(result: Mapping[str, Any]) -> list[Piece]:
    """What the engine adds to a step, beside what was asked for."""
    lines: list[Piece] = []
    for row in result["rows"]:
        wall, cpu = share_between(row["overhead"]), share_between(row["cpu_overhead"])
        own = ", ".join(f"{row['own_us'][part]['median']:.0f} us a {part}" for part in _PARTS)
        lines.append(
            f"{_case(row)}: the engine adds {wall} to a step of wrap, {cpu} of its CPU time; by what it adds to calls "
            f"over {row['tensors']} tiny parameters ({own}) it would be {row['own_share']:.2%}"
        )
    return [*lines, f"(medians with their 95 % intervals; asked for: at most {_TARGET:.0%})"]
