"""What the machine itself reaches: the denominators of a step's bound, measured before any model takes its memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from ._bench_adamw import streaming_bytes_per_s
from ._bench_link import Link, raw_bytes_per_s
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
    with _busy_link(device, (4 if quick else 64) * _MIB):
        rates["host_memory_while_copying"] = streaming_bytes_per_s(_FORMAT, elements, rounds)
    release(device)
    return rates


@contextlib.contextmanager
def _busy_link(device: torch.device, nbytes: int) -> Iterator[None]:
    """Copies of `nbytes` run in both directions, from page-locked memory, for as long as the context lasts."""
    raw = Link(device, nbytes).sides["raw"]
    copies = raw.copies("both", nbytes, 1)
    over = threading.Event()

    def copy() -> None:
        # The driver's calls need a context that is current in this thread; torch's first call makes it so.
        torch.zeros(1, device=device)
        while not over.is_set():
            raw.seconds(copies)

    with ThreadPoolExecutor(max_workers=1) as thread:
        copying = thread.submit(copy)
        try:
            yield
        finally:
            over.set()
            copying.result()
