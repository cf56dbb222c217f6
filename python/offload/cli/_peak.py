"""The most device memory that steps of training take: weights, gradients, states and activations, measured."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import os
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Peak", "measured_peak"]


@dataclasses.dataclass
class Peak:
    """`nbytes`: the peak, 0 before it is known. `source`: what measured it."""

    nbytes: int = 0
    source: str = ""


@contextlib.contextmanager
def measured_peak(device: torch.device, live_bytes: int) -> Iterator[Peak]:
    """Measures what runs inside the context. Not our own counters: torch's allocators are asked.

    live_bytes: what is on the device at the beginning. The CUDA allocator knows it; that of the CPU tells changes only.
    """
    peak = Peak()
    if device.type == "cuda":
        gc.collect()  # models of earlier runs, which die in cycles, are not this one's
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.source = "torch.cuda.max_memory_allocated"
        peak.nbytes = torch.cuda.max_memory_allocated(device)
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells on stderr when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield peak
    assert profiled.profiler is not None
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = (event.nbytes() for event in events if event.name() == "[memory]")
    peak.source = "torch.profiler"
    peak.nbytes = live_bytes + max(itertools.accumulate(changes, initial=0))
