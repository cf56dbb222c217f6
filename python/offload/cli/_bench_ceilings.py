"""What the machine itself reaches: the denominators of a step's bound, measured before any model takes its memory."""

from __future__ import annotations

import torch

from ._bench_adamw import streaming_bytes_per_s
from ._bench_copies import Link, busy_link, raw_bytes_per_s
from ._bench_run import release

__all__ = ["ceilings"]

_MIB = 2**20
_FORMAT = "split"  # of the masters of bf16 weights: what is read and written decides what memory gives


def ceilings(device: torch.device, *, quick: bool) -> dict[str, float]:
    """Bytes a second, medians: raw copies `to_host` and `to_device`, each alone; streaming over `host_memory` by all
    threads, alone and `host_memory_while_copying` in both directions at once, as the host update of a step does."""
    elements, rounds = ((1 if quick else 64) * _MIB, 3 if quick else 9)
    rates = raw_bytes_per_s(device, quick)
    rates["host_memory"] = streaming_bytes_per_s(_FORMAT, elements, rounds)
    nbytes = (4 if quick else 64) * _MIB
    with busy_link(Link(device, nbytes).sides["raw"], "both", nbytes):
        rates["host_memory_while_copying"] = streaming_bytes_per_s(_FORMAT, elements, rounds)
    release(device)
    return rates
