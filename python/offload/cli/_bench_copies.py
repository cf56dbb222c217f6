"""Copies over the link to one device: our lanes and raw copies, between buffers of the same size.

The raw side is as little as the machine allows: on CUDA `cuMemcpyAsync` called through ctypes from page-locked memory,
one stream a direction; on the CPU `memmove` in one thread a direction, as the streams of the CPU device are threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import offload

from .. import _native
from .._kernels import load_copy_kernel
from ._bench_spread import summary

__all__ = ["MODES", "Copy", "Link", "Side", "busy_link", "raw_bytes_per_s"]

_MIB = 2**20
MODES: dict[str, tuple[_native.Lane, ...]] = {
    "to_host": ("to_host",),
    "to_device": ("to_device",),
    "both": ("to_host", "to_device"),
}
COPIES_AT_MOST = 256  # in flight: well under the depth at which a driver makes the submitting thread wait
_PASSES = 2  # over the buffers in a sample: waiting for its end must not be a part of it that counts
_BATCH = 16  # copies in one submission, as the step pipeline has it


class Copy(NamedTuple):
    lane: _native.Lane
    destination: int
    source: int
    nbytes: int


class Lanes:
    """Our side: the transfer queue. `submit` enqueues, `wait` returns when all copies have ended."""

    def __init__(self, device: _native.Device, compute_stream: int) -> None:
        self._queue = _native.TransferQueue(device)
        self._compute_stream = compute_stream
        self._last: dict[_native.Lane, _native.Ticket] = {}

    def submit(self, copies: Sequence[Copy]) -> None:
        submit_on = {"to_host": self._queue.submit_to_host, "to_device": self._queue.submit_to_device}
        for lane, destination, source, nbytes in copies:
            self._last[lane] = submit_on[lane](destination, source, nbytes, self._compute_stream)

    def wait(self) -> None:
        for ticket in self._last.values():  # a lane is ordered: its last ticket ends last
            ticket.wait()
        self._last.clear()


class Batches(Lanes):
    """Copies of a lane that follow one another share a submission; they must not share a byte."""

    def submit(self, copies: Sequence[Copy]) -> None:
        for lane in MODES["both"]:
            mine = [copy[1:] for copy in copies if copy.lane == lane]
            for first in range(0, len(mine), _BATCH):
                batch = mine[first : first + _BATCH]
                self._last[lane] = self._queue.submit_batch(lane, batch, self._compute_stream)


class RawCudaCopies:
    """`cuMemcpyAsync` on one stream a direction, nothing between the caller and the driver but ctypes."""

    def __init__(self, device: torch.device) -> None:
        self._copy = ctypes.CDLL("libcuda.so.1").cuMemcpyAsync
        self._copy.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
        self._streams = {lane: torch.cuda.Stream(device) for lane in MODES["both"]}  # type: ignore[no-untyped-call]

    def submit(self, copies: Sequence[Copy]) -> None:
        handles = {lane: stream.cuda_stream for lane, stream in self._streams.items()}
        for lane, destination, source, nbytes in copies:
            error = self._copy(destination, source, nbytes, handles[lane])
            if error != 0:
                raise offload.DeviceError(f"cuMemcpyAsync of {nbytes} bytes {lane} gave the CUDA error {error}")

    def wait(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()


class RawHostCopies:
    """`memmove` in one thread a direction; ctypes lets go of the interpreter's lock for the call."""

    def __init__(self) -> None:
        self._threads = {lane: ThreadPoolExecutor(max_workers=1) for lane in MODES["both"]}
        self._running: list[Any] = []

    def submit(self, copies: Sequence[Copy]) -> None:
        for lane, thread in self._threads.items():
            mine = [copy for copy in copies if copy.lane == lane]
            self._running.append(thread.submit(_move, mine))

    def wait(self) -> None:
        for future in self._running:
            future.result()
        self._running.clear()


def _move(copies: Sequence[Copy]) -> None:
    for _, destination, source, nbytes in copies:
        ctypes.memmove(destination, source, nbytes)


Copier = Lanes | RawCudaCopies | RawHostCopies


class Side(NamedTuple):
    """Who copies, and between which tensors: (device, host) by lane, so that the directions share no byte."""

    copier: Copier
    pairs: dict[_native.Lane, tuple[Tensor, Tensor]]

    def copies(self, mode: str, nbytes: int, count: int) -> list[Copy]:
        """`count` copies a lane, the lanes in turn, each to the next place of the buffers."""
        places = itertools.cycle(range(0, self.pairs["to_host"][0].nbytes - nbytes + 1, nbytes))
        copies = []
        for offset in itertools.islice(places, count):
            for lane in MODES[mode]:
                device, host = (tensor.data_ptr() + offset for tensor in self.pairs[lane])
                ends = (host, device) if lane == "to_host" else (device, host)
                copies.append(Copy(lane, *ends, nbytes))
        return copies

    def seconds(self, copies: Sequence[Copy]) -> float:
        """From the first submission until the last byte is in place."""
        start = time.perf_counter()
        self.copier.submit(copies)
        self.copier.wait()
        return time.perf_counter() - start

    def submission_us(self, copies: Sequence[Copy]) -> float:
        """Microseconds that the submitting thread spends on each copy."""
        start = time.perf_counter()
        self.copier.submit(copies)
        elapsed = time.perf_counter() - start
        self.copier.wait()
        return elapsed / len(copies) * 1e6

    def check(self) -> None:
        """A figure for bytes that did not move would be the best of all."""
        for lane, (device, host) in self.pairs.items():
            source, destination = (device, host) if lane == "to_host" else (host, device)
            source.fill_(165)
            destination.zero_()
            if source.is_cuda or destination.is_cuda:
                torch.cuda.synchronize()
            self.seconds(self.copies(lane, source.nbytes, 1))
            if not torch.equal(source.cpu(), destination.cpu()):
                raise AssertionError(f"{type(self.copier).__name__} left bytes of the lane {lane} behind")


class Link:
    """The link to one device: buffers, and the sides that take turns on it."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.device = device
        on_cuda = device.type == "cuda"
        native: _native.Device
        self.facts: dict[str, Any] = {}
        if on_cuda:
            native = cuda = _native.CudaDevice(device.index)
            load_copy_kernel(cuda)
            self.facts = cuda.facts()
        else:
            native = _native.HostDevice()
        self.native = native
        compute_stream = torch.cuda.current_stream(device).cuda_stream if on_cuda else 0
        on_device = {lane: torch.zeros(nbytes, dtype=torch.uint8, device=device) for lane in MODES["both"]}

        def side(copier: Copier, host: Callable[[], Tensor]) -> Side:
            return Side(copier, {lane: (on_device[lane], host()) for lane in on_device})

        def pooled(pool: _native.HostPool) -> Tensor:
            return torch.frombuffer(pool.acquire(nbytes, "staging"), dtype=torch.uint8)

        lanes = Lanes(native, compute_stream)
        raw = RawCudaCopies(device) if on_cuda else RawHostCopies()
        pinned_pool = _native.HostPool(native, pin=True)
        self.sides = {
            "lanes": side(lanes, partial(pooled, pinned_pool)),
            "raw": side(raw, lambda: torch.zeros(nbytes, dtype=torch.uint8, pin_memory=on_cuda)),
        }
        self.sides["batches"] = Side(Batches(native, compute_stream), self.sides["lanes"].pairs)
        self.pin_refusal: str = pinned_pool.stats()["pin_refusal"]
        if on_cuda:  # the CPU has no such difference
            self.sides["lanes, pageable"] = side(lanes, partial(pooled, _native.HostPool(native)))
            older = _native.CudaDevice(device.index, takes_batches=False)
            if load_copy_kernel(older) is None:
                registered = _native.HostPool(older, pin=True)
                self.sides["kernel"] = side(Batches(older, compute_stream), partial(pooled, registered))
            torch.cuda.synchronize()  # the zeros above are written on the compute stream, raw copies on another

    def measure(self, names: Sequence[str], mode: str, nbytes: int, rounds: int) -> dict[str, list[float]]:
        """Bytes a second (of both directions together) by side, one sample a round; the sides take turns."""
        capacity = self.sides["raw"].pairs["to_host"][0].nbytes
        count = min(COPIES_AT_MOST, _PASSES * capacity // nbytes)
        copies = {name: self.sides[name].copies(mode, nbytes, count) for name in names}
        rates: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds + 1):
            for name in names:
                seconds = self.sides[name].seconds(copies[name])
                if number > 0:  # the first pays for pages and clocks
                    rates[name].append(nbytes * len(copies[name]) / seconds)
        return rates


def raw_bytes_per_s(device: torch.device, quick: bool) -> dict[str, float]:
    """The median raw bandwidth of each direction alone, with large copies: the link's part in a step's bound."""
    nbytes = (4 if quick else 64) * _MIB
    link = Link(device, 4 * nbytes)
    return {
        lane: summary(link.measure(["raw"], lane, nbytes, 3 if quick else 9)["raw"])["median"] for lane in MODES["both"]
    }


@contextlib.contextmanager
def busy_link(side: Side, mode: str, nbytes: int) -> Iterator[list[float]]:
    """Copies of `nbytes` run while the context lasts; the list has their bytes a second, a sample a pass."""
    copies = side.copies(mode, nbytes, 1)
    over = threading.Event()
    rates: list[float] = []

    def copy() -> None:
        # The driver's calls need a context that is current in this thread; torch's first call makes it so.
        torch.zeros(1, device=side.pairs["to_host"][0].device)
        rates.append(nbytes * len(copies) / side.seconds(copies))
        while not over.is_set():
            rates.append(nbytes * len(copies) / side.seconds(copies))

    with ThreadPoolExecutor(max_workers=1) as thread:
        copying = thread.submit(copy)
        try:
            yield rates
        finally:
            over.set()
            copying.result()
