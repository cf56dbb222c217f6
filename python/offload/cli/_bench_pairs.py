"""Two forms of a step in turns, compared pair by pair: what else the machine does falls on both of a pair."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._bench_spread import median_interval, summary
from ._bench_step import wait_for_compute

__all__ = ["added_share", "in_turn", "share_between", "timed_block"]


def in_turn(number: int, names: tuple[str, str]) -> tuple[str, str]:
    """Who goes first alternates."""
    return names if number % 2 else (names[1], names[0])


def timed_block(step: Callable[[], object], steps: int, device: torch.device) -> tuple[float, float]:
    """Seconds a step of the wall clock, and of the process's own work, of so many steps after an untimed one.

    That one takes what was left to hide behind it.
    """
    step()
    wait_for_compute(device)
    start, worked = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    wait_for_compute(device)
    return (time.perf_counter() - start) / steps, (time.process_time() - worked) / steps


def added_share(base: Sequence[float], other: Sequence[float], target: float) -> dict[str, Any]:
    """What `other` takes more than `base`, as shares of it, pair by pair, and the 95 % interval of their median.

    Without the first: pages, threads and the recording of the first step.
    """
    ratios = [longer / shorter - 1.0 for shorter, longer in zip(base, other, strict=True)][1:]
    return summary(ratios) | {"target": target, "median_between": median_interval(ratios)}


def share_between(share: dict[str, Any]) -> str:
    """A median and its interval as text."""
    low, high = share["median_between"]
    return f"{share['median']:.2%} ({low:.2%} to {high:.2%})"
