"""`offload bench pool`: what a block costs, how fast pages arrive, and what the layout wastes.

Memory bandwidth and latency are measured; the overhead table is computed from published shapes and touches nothing.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .. import _native
from ._bench import summary
from ._model_shapes import MODELS, shapes

__all__ = ["run"]

_GIB = 2**30
_CACHED_BYTES = 1 << 20
# Weight, remainder, two moments and gradient of a bf16 parameter with split master.
_BYTES_PER_PARAMETER = (2, 2, 4, 4, 2)
_ACQUIRE_TARGET_NS = 2000


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures and computes; `quick` maps 256 MiB instead of 2 GiB and repeats less. Plain dicts, ready for JSON."""
    rounds, mapped_bytes = (5, 256 << 20) if options.quick else (21, 2 << 30)
    acquire = _measured(_acquire_release_ns, rounds)
    yield {
        "name": "pool",
        "acquire_release_ns": acquire | {"target": _ACQUIRE_TARGET_NS, "block_bytes": _CACHED_BYTES},
        "map_and_first_touch_gb_per_s": {
            pages: _measured(partial(_mapping_gb_per_s, mapped_bytes, huge), rounds // 4 + 1)
            | {"mapped_bytes": mapped_bytes, "threads": _native.shared_thread_count()}
            for pages, huge in (("huge_pages", True), ("small_pages", False))
        },
        "overhead": [_overhead(name) for name in MODELS],
    }


def _measured(measure: Callable[[], float], rounds: int) -> dict[str, Any]:
    measure()  # the first round pays for pages, threads and caches
    return summary([measure() for _ in range(rounds)])


def _acquire_release_ns() -> float:
    """One acquire and one release of a block that is already mapped, from Python."""
    count = 10_000
    pool = _native.HostPool(slab_bytes=2 * _CACHED_BYTES)
    acquire = pool.acquire
    acquire(_CACHED_BYTES, "staging")
    start_ns = time.perf_counter_ns()
    for _ in range(count):
        acquire(_CACHED_BYTES, "staging")  # released at once: nobody keeps it
    return (time.perf_counter_ns() - start_ns) / count


def _mapping_gb_per_s(nbytes: int, huge_pages: bool) -> float:
    """Mapping and first touch by all workers, as `wrap` does it; returning the pages is not counted."""
    pool = _native.HostPool(huge_pages=huge_pages)
    start_ns = time.perf_counter_ns()
    pool.reserve(nbytes)
    return nbytes / (time.perf_counter_ns() - start_ns)


def _overhead(name: str) -> dict[str, Any]:
    """Bytes of all states of a model in the pool, beside pinning each of them rounded up to a power of two."""
    counts = [math.prod(shape) for shape in shapes(MODELS[name])]
    sizes = [count * width for count in counts for width in _BYTES_PER_PARAMETER]
    layout = _native.pool_layout(sizes)
    requested: int = layout["requested_bytes"]
    power_of_two = sum(1 << (size - 1).bit_length() for size in sizes)
    return {
        "model": name,
        "requested_gib": requested / _GIB,
        "pool_gib": layout["mapped_bytes"] / _GIB,
        "pool_overhead": layout["mapped_bytes"] / requested - 1,
        "power_of_two_gib": power_of_two / _GIB,
        "power_of_two_overhead": power_of_two / requested - 1,
    }
