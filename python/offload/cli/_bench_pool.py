"""`offload bench pool`: what a block costs, how fast pages arrive, and what the layout wastes.

Memory bandwidth and latency are measured; the overhead table is computed from published shapes and touches nothing.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from .. import _native
from ._bench_figures import Figure, figure
from ._bench_spread import summary
from ._model_shapes import MODELS, shapes
from ._progress import now_at

__all__ = ["figures", "run"]

_GIB = 2**30
_CACHED_BYTES = 1 << 20
# Weight, remainder, two moments and gradient of a bf16 parameter with split master.
_BYTES_PER_PARAMETER = (2, 2, 4, 4, 2)
_ACQUIRE_TARGET_NS = 2000


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures and computes; `quick` maps 256 MiB instead of 2 GiB and repeats less. Plain dicts, ready for JSON."""
    rounds, mapped_bytes = (5, 256 << 20) if options.quick else (21, 2 << 30)
    sides = {"offload": _acquire_release_ns}
    absent = {}
    if torch.cuda.is_available():
        sides["torch pinned allocator"] = _torch_pinned_ns
    else:
        absent["torch pinned allocator"] = "it pins for a CUDA device, and there is none"
    nanoseconds = _in_turns(sides, rounds)
    acquire = nanoseconds["offload"]
    now_at("mapping and first touch")
    yield {
        "name": "pool",
        "peers_acquire_release_ns": {name: one for name, one in nanoseconds.items() if name != "offload"},
        "absent_peers": absent,
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


def _in_turns(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, Any]]:
    """By side; the sides take turns, and the first round pays for pages, threads and caches."""
    samples = [{name: measure() for name, measure in sides.items()} for _ in range(rounds + 1)][1:]
    return {name: summary([one[name] for one in samples]) for name in sides}


def _torch_pinned_ns() -> float:
    """A pinned tensor of the same size from torch's caching allocator, made and dropped."""
    count = 10_000
    torch.empty(_CACHED_BYTES, dtype=torch.uint8, pin_memory=True)
    start_ns = time.perf_counter_ns()
    for _ in range(count):
        torch.empty(_CACHED_BYTES, dtype=torch.uint8, pin_memory=True)
    return (time.perf_counter_ns() - start_ns) / count


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


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """A cached block, and pages as they are mapped."""
    peers = result["peers_acquire_release_ns"]
    return [
        figure("acquire and release a cached block", "ns", result["acquire_release_ns"], peers=peers),
        *(figure(f"{name}, the same", "ns", one, side="peer") for name, one in peers.items()),
        *(
            figure(f"map and touch, {pages.replace('_', ' ')}", "GB/s", rate, better="higher")
            for pages, rate in result["map_and_first_touch_gb_per_s"].items()
        ),
    ]
