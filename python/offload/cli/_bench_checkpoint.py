"""`offload bench checkpoint`: a save beside the disk's own speed, and what an asynchronous one costs the training.

The model is one that steps in native code with its states on the host. The disk's own speed is that of the same bytes
written by O_DIRECT and made durable, in as large pieces, by as many threads, without checksums; the two alternate.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

import offload

from ._bench_figures import Figure, figure
from ._bench_spread import summary
from ._device import compute_device
from ._progress import now_at
from ._table import Piece, format_bytes

__all__ = ["figures", "pieces", "run"]

_PIECE_BYTES = 8 << 20
_THREADS = 4
_SHARE_TARGET = 0.8
_STALL_TARGET = 0.05
# A bf16 weight, its int16 remainder joined to an fp32 master in the file, and two fp32 moments.
_BYTES_PER_PARAMETER = 2 + 4 + 8


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures; `quick` saves 64 MB instead of 1 GB. Plain dicts, ready for JSON."""
    rounds, state_bytes = (2, 64 * 10**6) if options.quick else (5, 10**9)
    width = 1024
    depth = max(1, round(state_bytes / _BYTES_PER_PARAMETER / width**2))
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth))).to(torch.bfloat16)
    device = compute_device(options.device)
    model.to(device)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-5)
    _, wrapped = offload.wrap(model, optim, optimizer="host", gradients="host", device=str(device))
    batch = torch.ones(256, width, dtype=torch.bfloat16, device=device)

    def steps(count: int) -> tuple[float, float]:
        """Seconds in all, and in the calls of `step()`, which only submit."""
        in_step_s = 0.0
        start = time.perf_counter()
        for _ in range(count):
            model(batch).square().mean().backward()
            in_step_s += _timed(wrapped.step)
            wrapped.zero_grad()
        wrapped.synchronize()
        return time.perf_counter() - start, in_step_s

    folder = Path(tempfile.mkdtemp(prefix="offload-bench-", dir=os.getcwd()))
    try:
        steps(2)
        offload.save_checkpoint(folder, model, wrapped, tag="bench")  # the first pays for pages and threads
        nbytes = sum(path.stat().st_size for path in (folder / "bench").iterdir())
        raw_s, save_s, calls_s, stalls_s, slower_s = [], [], [], [], []
        for number in range(rounds):  # removing a file takes a while too: both make a new one
            now_at(f"saves, round {number + 1} of {rounds}")
            raw_s.append(_timed(lambda: _write_raw(folder / "raw", nbytes)))
            (folder / "raw").unlink()
            shutil.rmtree(folder / "bench")
            save_s.append(_timed(lambda: offload.save_checkpoint(folder, model, wrapped, tag="bench")))
        step_s = summary([steps(1)[0] for _ in range(rounds)])["median"]
        # Steps until the writer is done, so that all of its cost is seen.
        count = max(2, round(2 * summary(save_s)["median"] / step_s))
        for number in range(rounds):
            now_at(f"steps beside a save, round {number + 1} of {rounds}")
            without_s, in_step_without_s = steps(count)
            start = time.perf_counter()
            save = offload.save_checkpoint(folder, model, wrapped, tag="bench", async_save=True)
            calls_s.append(time.perf_counter() - start)
            with_s, in_step_with_s = steps(count)
            save.wait()
            stalls_s.append(calls_s[-1] + in_step_with_s - in_step_without_s)
            slower_s.append(calls_s[-1] + with_s - without_s)
    finally:
        shutil.rmtree(folder)
    offload.unwrap(model, wrapped)
    saved, raw = summary(save_s), summary(raw_s)
    yield {
        "name": "checkpoint",
        "device": str(device),
        "bytes": nbytes,
        "disk_write_s": raw,
        "save_s": saved,
        "save_gb_per_s": nbytes / saved["median"] / 1e9,
        "share_of_disk": summary([r / s for r, s in zip(raw_s, save_s, strict=True)]) | {"target": _SHARE_TARGET},
        "step_s": step_s,
        "steps_beside_a_save": count,
        "async_call_s": summary(calls_s),
        # The call, and what the steps waited for copies of states.
        "async_stall_s": summary(stalls_s),
        # That, and what the writer takes of cores and memory: on a CPU device they are those that compute.
        "async_slower_s": summary(slower_s),
        "async_stall_share": summary([stall / saved["median"] for stall in stalls_s]) | {"target": _STALL_TARGET},
    }


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _write_raw(path: Path, nbytes: int) -> None:
    pages = mmap.mmap(-1, _PIECE_BYTES)
    pages.write(os.urandom(_PIECE_BYTES))  # zeros might be stored as nothing
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o666)
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            starts = range(0, nbytes // _PIECE_BYTES * _PIECE_BYTES + _PIECE_BYTES, _PIECE_BYTES)
            list(pool.map(lambda start: os.pwrite(descriptor, pages, start), starts))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """A save beside the disk, and what an asynchronous one costs the steps beside it."""
    disk = result["disk_write_s"]
    return [
        figure("save", "s", result["save_s"], ceiling=("the disk", disk["median"])),
        figure("raw write of the same bytes", "s", disk, side="ceiling"),
        figure("call of an asynchronous save", "s", result["async_call_s"]),
        figure("training waits in calls", "share of a save", result["async_stall_share"]),
        figure("steps beside a save are longer by", "s", result["async_slower_s"]),
    ]


def pieces(result: Mapping[str, Any]) -> list[Piece]:
    """How much was saved."""
    return [f"{format_bytes(result['bytes'])} a save, {result['save_gb_per_s']:.2f} GB/s"]
