"""What the DeepSpeed engine costs over `offload.wrap`: the same model, data and step in both, block after block."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import offload

from ._bench_figures import Figure, figure
from ._bench_spread import summary
from ._bench_step import wait_for_compute
from ._corpus import VOCABULARY
from ._device import compute_device
from ._progress import now_at
from ._training import build_model

__all__ = ["figures", "run"]

_TARGET = 0.02
_BATCH = 4
_RATE, _CLIP_NORM = 1e-4, 1.0
# dtype of the model and the norm that gradients are clipped to.
_CASES = (("float32", 0.0), ("float32", _CLIP_NORM), ("bfloat16", _CLIP_NORM))
# The two round a clipped gradient at other places: losses drift apart by the dtype's last bits.
_LOSS_TOLERANCE = 1e-2

# One step on a batch of tokens; returns the loss.
Step = Callable[[Tensor], Tensor]


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows by dtype and clipping; seconds a step, and the engine's share over wrap's, block by block."""
    device = compute_device(options.device)
    blocks, steps = (4, 1) if options.quick else (24, 10)
    size, length = (100_000, 16) if options.quick else (2_000_000, 128)
    result: dict[str, Any] = {"name": "engine", "device": str(device), "blocks": blocks, "steps": steps, "rows": []}
    for dtype, clip_norm in _CASES:
        shape = argparse.Namespace(hidden=None, size=size, layers=4, length=length, seed=0, dtype=dtype)
        result["rows"].append(_measure(shape, clip_norm, blocks, steps, device))
        yield result


def _measure(
    shape: argparse.Namespace, clip_norm: float, blocks: int, steps: int, device: torch.device
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    wrapped, end_wrapped = _wrapped(shape, clip_norm, device)
    engine, end_engine = _engine(shape, clip_norm, device)
    seconds: dict[str, list[float]] = {"wrap": [], "engine": []}
    losses: dict[str, list[float]] = {"wrap": [], "engine": []}
    for block in range(blocks):
        now_at(f"{shape.dtype}, block {block + 1} of {blocks}")
        tokens = [
            torch.randint(VOCABULARY, (_BATCH, shape.length), generator=generator).to(device) for _ in range(steps + 1)
        ]
        runs = [("wrap", wrapped), ("engine", engine)]
        for name, step in runs if block % 2 else reversed(runs):
            elapsed, loss = _timed(step, tokens, device)
            seconds[name].append(elapsed / steps)
            losses[name].append(loss)
    end_wrapped()
    end_engine()
    for ours, theirs in zip(losses["wrap"], losses["engine"], strict=True):
        assert abs(ours - theirs) <= _LOSS_TOLERANCE * abs(ours), f"losses differ, so the steps do: {ours}, {theirs}"
    # Without the first block: pages, threads and the recording of the first step.
    pairs = list(zip(seconds["wrap"], seconds["engine"], strict=True))[1:]
    return {
        "dtype": shape.dtype,
        "clip_norm": clip_norm,
        "parameters": shape.size,
        "wrap_step_s": summary([wrap for wrap, _ in pairs]),
        "engine_step_s": summary([engine for _, engine in pairs]),
        "overhead": summary([engine / wrap - 1.0 for wrap, engine in pairs]) | {"target": _TARGET},
        "last_loss": {name: values[-1] for name, values in losses.items()},
    }


def _timed(step: Step, tokens: list[Tensor], device: torch.device) -> tuple[float, float]:
    """Seconds of all steps but the first, which takes what the other run has left to hide behind it."""
    step(tokens[0])
    wait_for_compute(device)
    start = time.perf_counter()
    for batch in tokens[1:]:
        loss = step(batch)
    wait_for_compute(device)
    return time.perf_counter() - start, loss.item()


def _wrapped(shape: argparse.Namespace, clip_norm: float, device: torch.device) -> tuple[Step, Callable[[], None]]:
    model = build_model(shape)
    plain = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.0)
    model, optimizer = offload.wrap(model, plain, optimizer="host", gradients="host", device=str(device))

    def step(tokens: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        loss.backward()  # type: ignore[no-untyped-call]
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def end() -> None:
        offload.unwrap(model, optimizer)

    return step, end


def _engine(shape: argparse.Namespace, clip_norm: float, device: torch.device) -> tuple[Step, Callable[[], None]]:
    os.environ["DS_ACCELERATOR"] = device.type  # which the engine takes its device from
    config = {
        "train_micro_batch_size_per_gpu": _BATCH,
        "gradient_clipping": clip_norm,
        "optimizer": {"type": "AdamW", "params": {"lr": _RATE, "weight_decay": 0.0}},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": shape.dtype == "bfloat16"},
    }
    engine, *_ = offload.initialize(model=build_model(shape), config=config)

    def step(tokens: Tensor) -> Tensor:
        loss: Tensor = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step, engine.destroy


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """By model: a step of the engine, one of wrap, and what the engine adds."""
    found = []
    for row in result["rows"]:
        case = f"{row['dtype']}{', clipped' if row['clip_norm'] else ''}"
        wrap = row["wrap_step_s"]
        found += [
            figure(f"engine, {case}", "s a step", row["engine_step_s"], ceiling=("a step of wrap", wrap["median"])),
            figure(f"wrap, {case}", "s a step", wrap),
            figure(f"overhead, {case}", "share of a step", row["overhead"]),
        ]
    return found
