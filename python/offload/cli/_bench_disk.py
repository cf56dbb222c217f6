"""`offload bench disk`: files of the disk tier beside raw reads and writes of the same disk, in one run.

The raw side is as little as the machine allows: O_DIRECT `preadv` and `pwritev` of 1 MiB from several threads, without
checksums, over a file that is reserved and written once, to and from the same huge pages (with small pages a transfer
falls into more pieces: half the speed on a virtual disk). The back-ends of the tier and the raw side take turns, round
after round, over files of the same size; no side syncs, each ends with its last read or write, and where the tier must
go through the page cache the raw side does too. `fio` does the same once, where it is installed. Last, states on disk
are updated, and a model trains whose weights are on disk.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import offload

from .. import _native
from ._bench_disk_peers import DeepSpeedSide, deepspeed_refusal
from ._bench_disk_update import measure_update
from ._bench_disk_weights import measure_weights
from ._bench_figures import Figure, figure
from ._bench_figures import Side as Owner
from ._bench_spread import summary
from ._progress import now_at
from ._table import Piece, format_bytes

__all__ = ["figures", "pieces", "run"]

_MIB = 2**20
_BLOCK = _MIB
_WINDOW = 32  # blocks of host memory that a direction streams through
_CHUNK = 8  # blocks of one read or write
_RAW_THREADS = 8
_UPDATE_WINDOW_BYTES = 256 * _MIB  # a quarter of the states: what it keeps from one update to the next is not read
_MODES = ("read", "write", "both")
_VERBS = {"read": ("read",), "write": ("write",), "both": ("read", "write")}


class Side(Protocol):
    """Who reads and writes. `blocks` are (first, end); the directions of "both" share no block."""

    def seconds(self, spans: dict[str, tuple[int, int]]) -> float: ...


class TierSide:
    """The disk tier, streaming each direction through a window of host buffers."""

    def __init__(self, path: str, block_count: int, backend: _native.DiskBackend, pool: _native.HostPool) -> None:
        self._file = _native.BlockFile([path], block_bytes=_BLOCK, backend=backend)
        self.facts = self._file.facts()[0]
        self._offset = self._file.allocate(block_count * _BLOCK)
        nbytes = _CHUNK * _BLOCK
        self._buffers = {
            verb: [pool.acquire(nbytes, "staging", _native.DISK_ALIGNMENT) for _ in range(_WINDOW // _CHUNK)]
            for verb in _VERBS["both"]
        }
        for number, buffer in enumerate(self._buffers["write"]):
            memoryview(buffer)[:] = bytes([number + 1]) * nbytes
        self.seconds({"write": (0, block_count)})

    def seconds(self, spans: dict[str, tuple[int, int]]) -> float:
        start = time.perf_counter()
        submit = {"read": self._file.submit_read, "write": self._file.submit_write}
        running: dict[str, deque[_native.Ticket]] = {verb: deque() for verb in spans}
        chunks = max(-(-(end - first) // _CHUNK) for first, end in spans.values())
        for number in range(chunks):
            for verb, (first, end) in spans.items():
                block = first + number * _CHUNK
                if block >= end:
                    continue
                buffers = self._buffers[verb]
                if len(running[verb]) == len(buffers):
                    running[verb].popleft().wait()
                nbytes = min(_CHUNK, end - block) * _BLOCK
                address = buffers[number % len(buffers)].address
                running[verb].append(submit[verb](self._offset + block * _BLOCK, address, nbytes))
        for tickets in running.values():
            for ticket in tickets:
                ticket.wait()
        return time.perf_counter() - start

    def check(self) -> None:
        """A figure for bytes that did not move would be the best of all."""
        source, target = self._buffers["write"][1], self._buffers["read"][0]
        memoryview(target)[:] = bytes(target.nbytes)
        self._file.submit_write(self._offset, source.address, source.nbytes).wait()
        self._file.submit_read(self._offset, target.address, target.nbytes).wait()
        if bytes(memoryview(target)) != bytes(memoryview(source)):
            raise AssertionError("the disk tier gave other bytes than were written")


class RawSide:
    """Threads that read and write single blocks, nothing between them and the kernel but `os`."""

    def __init__(self, path: str, block_count: int, direct: bool, pool: _native.HostPool) -> None:
        self._file, name = tempfile.mkstemp(dir=path)
        os.unlink(name)
        if direct:
            fcntl.fcntl(self._file, fcntl.F_SETFL, os.O_RDWR | os.O_DIRECT)
        os.posix_fallocate(self._file, 0, block_count * _BLOCK)
        self._threads = ThreadPoolExecutor(_RAW_THREADS)
        buffers = [pool.acquire(_BLOCK, "staging", _native.DISK_ALIGNMENT) for _ in range(_RAW_THREADS)]
        self._memory = [memoryview(buffer) for buffer in buffers]
        for memory in self._memory:
            memory[:] = b"\1" * _BLOCK
        self.seconds({"write": (0, block_count)})

    def seconds(self, spans: dict[str, tuple[int, int]]) -> float:
        start = time.perf_counter()
        count = _RAW_THREADS // len(spans)
        running = [
            self._threads.submit(
                self._transfer, verb, range(first + index, end, count), self._memory[index + count * at]
            )
            for at, (verb, (first, end)) in enumerate(spans.items())
            for index in range(count)
        ]
        for future in running:
            future.result()
        return time.perf_counter() - start

    def _transfer(self, verb: str, blocks: range, memory: memoryview) -> None:
        move: Callable[[int, list[memoryview], int], int] = os.preadv if verb == "read" else os.pwritev
        for block in blocks:
            moved = move(self._file, [memory], block * _BLOCK)
            if moved != _BLOCK:
                raise offload.StorageError(f"a raw {verb} moved {moved} of {_BLOCK} bytes")

    def close(self) -> None:
        self._threads.shutdown()
        os.close(self._file)


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times reads, writes and both at once. Bandwidths are GB/s (1e9 bytes), of both directions together.

    Yields a JSON-able dict: `rows`, each with `mode`, by side a summary of samples, and `share_of_raw` of each
    back-end; `facts` of the directory by back-end; `window_bytes` of host memory a direction; `update` as
    `measure_update` gives it, and `weights` as `measure_weights` does.
    """
    path: str = options.disk_path
    block_count, rounds = (32, 3) if options.quick else (options.gib * 1024, 5)
    pool = _native.HostPool()
    tiers = {"io_uring": TierSide(path, block_count, "auto", pool)}
    if tiers["io_uring"].facts["backend"] == "threads":
        tiers = {"threads": tiers["io_uring"]}
    else:
        tiers["threads"] = TierSide(path, block_count, "threads", pool)
    for tier in tiers.values():
        tier.check()
    raw = RawSide(path, block_count, all(tier.facts["direct"] for tier in tiers.values()), pool)
    sides: dict[str, Side] = {**tiers, "raw": raw}
    refusal = deepspeed_refusal()
    if refusal is None:
        now_at("deepspeed: loading, or building at its first use")
        sides["deepspeed"] = peer = DeepSpeedSide(path, block_count, block=_BLOCK, chunk=_CHUNK, window=_WINDOW)
        peer.check()
    rows = []
    for mode in _MODES:
        now_at(mode)
        rates = _measure(sides, mode, block_count, rounds)
        row: dict[str, Any] = {"mode": mode, "gb_per_s": {name: summary(samples) for name, samples in rates.items()}}
        if (fio := shutil.which("fio")) is not None:
            row["gb_per_s"]["fio"] = summary([_fio_gb_per_s(fio, path, mode, block_count)])
        raw_median = row["gb_per_s"]["raw"]["median"]
        row["share_of_raw"] = {name: row["gb_per_s"][name]["median"] / raw_median for name in tiers}
        rows.append(row)

    if refusal is None:
        peer.close()

    def raw_gb_per_s(mode: str) -> float:
        return block_count * _BLOCK / raw.seconds(_spans(mode, block_count)) / 1e9

    window_bytes = min(_UPDATE_WINDOW_BYTES, block_count * _BLOCK // 4)
    now_at("the update of states on disk")
    update = measure_update(path, block_count * _BLOCK, window_bytes, rounds, raw_gb_per_s)
    now_at("steps of a model whose weights are on disk")
    weights = measure_weights(path, block_count * _BLOCK // 4, rounds, raw_gb_per_s)
    raw.close()
    yield {
        "name": "disk",
        "bytes": block_count * _BLOCK,
        "block_bytes": _BLOCK,
        "window_bytes": _WINDOW * _BLOCK,
        "raw_threads": _RAW_THREADS,
        "facts": {name: tier.facts for name, tier in tiers.items()},
        "rows": rows,
        "absent_peers": {} if refusal is None else {"deepspeed async I/O": refusal},
        "update": update,
        "weights": weights,
    }


def _measure(sides: dict[str, Side], mode: str, block_count: int, rounds: int) -> dict[str, list[float]]:
    spans = _spans(mode, block_count)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            seconds = side.seconds(spans)
            if number > 0:  # the first pays for clocks and caches
                rates[name].append(block_count * _BLOCK / seconds / 1e9)
    return rates


def _spans(mode: str, block_count: int) -> dict[str, tuple[int, int]]:
    half = block_count // 2
    return {"read": (0, half), "write": (half, block_count)} if mode == "both" else {mode: (0, block_count)}


def _fio_gb_per_s(fio: str, path: str, mode: str, block_count: int) -> float:
    """One run of fio with the raw side's block, O_DIRECT and as many threads; "both" is a job a direction."""
    command = [fio, "--output-format=json", f"--directory={path}", f"--bs={_BLOCK}", "--direct=1", "--thread"]
    command += ["--ioengine=psync", "--unlink=1", "--group_reporting=0", "--allow_file_create=1"]
    verbs = _VERBS[mode]
    threads = _RAW_THREADS // len(verbs)
    nbytes = block_count * _BLOCK // (len(verbs) * threads)
    for verb in verbs:
        command += [f"--name={verb}", f"--rw={verb}", f"--numjobs={threads}", f"--size={nbytes}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise offload.StorageError(f"fio ended with code {result.returncode}: {result.stderr.strip()}")
    jobs: list[dict[str, Any]] = json.loads(result.stdout)["jobs"]
    return float(sum(job[verb]["bw_bytes"] for job in jobs for verb in _VERBS["both"]) / 1e9)


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """Bandwidths of the back-ends beside raw ones, and the update of states on disk."""
    found = []
    for row in result["rows"]:
        peers = {name: rate for name, rate in row["gb_per_s"].items() if name == "deepspeed"}
        for name, rate in row["gb_per_s"].items():
            label = f"{row['mode']}, {name}"
            if name in result["facts"]:
                ceiling = "raw", row["gb_per_s"]["raw"]["median"]
                found.append(figure(label, "GB/s", rate, better="higher", ceiling=ceiling, peers=peers))
            else:
                side: Owner = "peer" if name in peers else "ceiling"
                found.append(figure(label, "GB/s", rate, side=side, better="higher"))
    update = result["update"]
    ceiling = "the larger of a raw read and write", update["larger_s"]["median"]
    found.append(figure("update of states on disk", "s", update["update_s"], ceiling=ceiling))
    weights = result["weights"]
    ceiling = "the largest of read, write and step in memory", weights["larger_s"]["median"]
    found.append(figure("step, weights on disk", "s", weights["step_s"], ceiling=ceiling))
    found.append(figure("step, weights on the host", "s", weights["on_host_s"]))
    found.append(figure("step, weights in memory", "s", weights["in_memory_s"], side="ceiling"))
    return found


def pieces(result: Mapping[str, Any]) -> list[Piece]:
    """Which disk it was, and how much of the states went through."""
    facts = next(iter(result["facts"].values()))
    direct = "O_DIRECT" if facts["direct"] else f"buffered ({facts['direct_refusal']})"
    update, weights = result["update"], result["weights"]
    on_disk, cached = format_bytes(weights["weight_bytes"]), format_bytes(weights["cache_bytes"])
    return [
        f"{facts['directory']}, {facts['file_system']}, {direct}",
        f"update of states on disk: {format_bytes(update['read_bytes'])} read, "
        f"{format_bytes(update['written_bytes'])} written, "
        f"{update['share_of_both']['median']:.3f} of a raw read and write at once",
        f"step with {on_disk} of weights on disk, {cached} cached: "
        f"{format_bytes(weights['read_bytes'])} read, {format_bytes(weights['written_bytes'])} written, "
        f"{weights['share_of_both']['median']:.3f} of both at once or the step in memory",
    ]
