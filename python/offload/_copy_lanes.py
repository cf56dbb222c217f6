"""Copies between the device and the host pool, with the device memory that they use held until they have ended.

`CopyLanes` owns a bounded ring of device tensors whose copies, in either direction, are in flight. What travels, and in
which order, is decided by who uses it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native, _trace
from ._activation_order import RING_BYTES
from ._errors import OffloadError
from ._host_grad import HostBytes

# Device memory that tensors on their way may keep alive; beyond it the compute stream waits for the lane.
_RING_BYTES = RING_BYTES
# A copy of so many bytes takes about as long as two submissions: up to there several share one, as the weights do on
# their way back (WeightUploads of csrc/pipeline).
_SMALL_BYTES = 256 << 10
_MOST_TOGETHER = 16


class _Copy(NamedTuple):
    """A copy in flight, the device tensor that it reads or writes, its bytes and the compute stream it belongs to.

    leaves: it reads the tensor, which nobody else needs.
    """

    ticket: _native.Ticket
    tensor: Tensor
    nbytes: int
    stream: int
    leaves: bool


class _Departures:
    """Copies to the host that were asked for and are not submitted yet: small ones wait for each other.

    Those of a submission have one ticket. While they wait it has nothing to wait for: who is to see it calls
    submit_with() first.
    """

    def __init__(self, transfers: _native.TransferQueue) -> None:
        self._transfers = transfers
        self.ticket = _native.Ticket()  # theirs
        self.stream = 0  # that all of them were made on
        self._trace_name = 0  # of the unit that made the latest
        self.copies: list[tuple[int, int, int, _native.Ticket, _native.HostBuffer]] = []  # the oldest first

    def ticket_on(self, stream: int) -> _native.Ticket:
        """That of the next copy, which is made on `stream`. Raises what refuses those of another stream before it."""
        if stream != self.stream:
            self.submit()
            self.stream = stream
        if not self.copies:
            self.ticket = _native.Ticket()
        return self.ticket

    def note_name(self) -> None:
        """Whoever submits them may compute another unit by then, or none."""
        self._trace_name, _ = _native.trace_label()

    def submit(self) -> None:
        """None waits afterwards. Raises what refuses them: they go on waiting then."""
        if self.copies:
            self._transfers.submit_all_to_host(self.copies, self.stream, self._trace_name)

    def submit_with(self, ticket: _native.Ticket) -> None:
        """As submit(), if a copy of this ticket waits."""
        if any(waiting is ticket for *_, waiting, _ in self.copies):
            self.submit()

    def begin_with(self, ticket: _native.Ticket) -> bool:
        """Whether the oldest that waits is a copy of this ticket."""
        return bool(self.copies) and self.copies[0][3] is ticket

    def forget(self, buffer: _native.HostBuffer) -> None:
        """The copy to this buffer, the latest one, is not wanted any more."""
        if self.copies and self.copies[-1][4] is buffer:
            self.copies.pop()


class LandedBytes(NamedTuple):
    """A host copy on its way or landed: `address` is valid once `ticket` ended; the buffer lives as long as this."""

    buffer: _native.HostBuffer
    address: int
    kept_ticket: _native.Ticket
    departures: _Departures

    @property
    def ticket(self) -> _native.Ticket:
        """Of the copy, which is submitted for whoever asks: raises what refuses it."""
        self.departures.submit_with(self.kept_ticket)
        return self.kept_ticket


# From a tuple of the fields: a call of the class would run Python, for every gradient.
_new_copy = functools.partial(tuple.__new__, _Copy)
_new_landing = functools.partial(tuple.__new__, LandedBytes)


class CopyLanes:
    """See the module's text. One compute thread at a time, as autograd gives it."""

    def __init__(self, device: torch.device, pool: _native.HostPool, transfers: _native.TransferQueue) -> None:
        self.device = device
        self._is_cpu = device.type == "cpu"
        self._pool = pool
        self._transfers = transfers
        self._ring: deque[_Copy] = deque()
        self._ring_bytes = 0
        self.peak_ring_bytes = 0
        self._departures = _Departures(transfers)
        weakref.finalize(self, _drain, transfers, self._departures, self._ring)

    def compute_stream(self) -> int:
        """torch's handle of this thread's current stream; 0 on the CPU, where computing is synchronous."""
        if self._is_cpu:
            return 0
        return torch.cuda.current_stream(self.device).cuda_stream

    def on_stream(self, stream: int) -> contextlib.AbstractContextManager[Any]:
        """Inside, this thread computes on the stream of that handle."""
        if self._is_cpu or stream == self.compute_stream():
            return contextlib.nullcontext()
        if stream == 0:  # the default one: torch takes an ExternalStream of 0 for a new stream
            return torch.cuda.stream(torch.cuda.default_stream(self.device))
        return torch.cuda.stream(torch.cuda.ExternalStream(stream, self.device))  # type: ignore[no-untyped-call]

    def send(
        self, tensor: Tensor, tag: _native.Tag, stream: int, room: int | None = None, *, may_wait: bool = False
    ) -> LandedBytes:
        """Starts the copy of a dense tensor's bytes in storage order; keeps the tensor until they have landed.

        stream: the compute stream that the tensor was made on. room: bytes that may then be on their way. may_wait: a
        small copy may start with later ones, or when its ticket is asked for.
        Raises `OutOfHostMemory`; nothing was started then.
        """
        nbytes = tensor.nbytes
        departures = self._departures
        copies = departures.copies
        buffer = self._pool.acquire(nbytes, tag)
        ticket = departures.ticket if copies and stream == departures.stream else departures.ticket_on(stream)
        address = buffer.address
        landing: LandedBytes = _new_landing((buffer, address, ticket, departures))
        self._keep(ticket, tensor, nbytes, stream, leaves=True)
        try:
            if _trace.active() is not None:
                departures.note_name()
            copies.append((address, tensor.data_ptr(), nbytes, ticket, buffer))
            if not may_wait or nbytes > _SMALL_BYTES or len(copies) >= _MOST_TOGETHER:
                departures.submit()
        except BaseException:
            departures.forget(buffer)
            raise
        if room is None:
            room = _RING_BYTES
        if self._ring_bytes > room:
            self._wait_for_room(room)
        return landing

    def start_upload(self, held: HostBytes, out: Tensor, room: int = 0) -> _native.Ticket:
        """Starts filling `out` and keeps it alive until that ended; nothing waits before wait_upload().

        room: bytes that may then be on their way, where that is more than is usual.
        """
        assert isinstance(held, LandedBytes)
        nbytes = out.numel() * out.element_size()
        copy = self._keep(_native.Ticket(), out, nbytes, self.compute_stream(), leaves=False)
        self._transfers.submit_to_device(
            out.data_ptr(), held.address, nbytes, copy.stream, held.ticket, copy.ticket, held.buffer
        )
        self._wait_for_room(max(room, _RING_BYTES))
        return copy.ticket

    def wait_upload(self, ticket: _native.Ticket, lock: contextlib.AbstractContextManager[Any] | None = None) -> None:
        """The compute stream waits until what start_upload() returned has ended.

        lock: that of who uses the lanes from several threads, which this one does not have: the wait is outside of it.
        """
        stream = self.compute_stream()
        self._transfers.wait_on_stream(stream, ticket)
        if lock is None:
            self._let_go(ticket, stream)
        else:
            with lock:
                self._let_go(ticket, stream)

    def _let_go(self, ticket: _native.Ticket, stream: int) -> None:
        # What follows on that stream comes after the copy, so that nothing has to keep the tensor any more; and a sum
        # of gradients that came back to be added to could not leave again while something does.
        for position, copy in enumerate(self._ring):
            if copy.ticket is ticket and copy.stream == stream:
                del self._ring[position]
                self._forget_bytes(copy.nbytes)
                break

    def pool_stats(self) -> dict[str, Any]:
        """The counters of the host pool."""
        return self._pool.stats()

    def trace_sample(self) -> None:
        """A trace that runs shows what the host pool holds now."""
        self._pool.trace_sample()

    def reserve(self, nbytes: int) -> None:
        """Obtains host pages now where fewer than `nbytes` are free. Raises `OutOfHostMemory`."""
        pool = self.pool_stats()
        free = pool["mapped_bytes"] - pool["used_bytes"] - pool["waiting_bytes"]
        if nbytes > free:
            self._pool.reserve(nbytes - free)

    def in_ring(self, *, leaving_only: bool = False) -> dict[int, int]:
        """Bytes by address of the device memory that copies keep, ended or not."""
        copies = [copy for copy in tuple(self._ring) if copy.leaves or not leaving_only]
        return {copy.tensor.data_ptr(): copy.nbytes for copy in copies}

    def in_flight(self) -> list[_native.Ticket]:
        """The tickets of copies that may not have ended."""
        return [copy.ticket for copy in self._ring]

    def _keep(self, ticket: _native.Ticket, tensor: Tensor, nbytes: int, stream: int, *, leaves: bool) -> _Copy:
        """Puts a tensor into the ring, before its copy is submitted: one in flight that nothing keeps alive would touch
        memory of others, whatever goes wrong in between. The submission gives the ticket its copy."""
        ring = self._ring
        while ring and (oldest := ring[0].ticket) is not ticket and self._has_ended(oldest):
            gone = 0
            while ring and ring[0].ticket is oldest:
                gone += ring.popleft().nbytes
            self._forget_bytes(gone)
        copy: _Copy = _new_copy((ticket, tensor, nbytes, stream, leaves))
        ring.append(copy)
        self._ring_bytes += nbytes
        if self._ring_bytes > self.peak_ring_bytes:
            self.peak_ring_bytes = self._ring_bytes
        return copy

    def _has_ended(self, oldest: _native.Ticket) -> bool:
        return oldest.done and not self._departures.begin_with(oldest)

    def _drop_oldest(self) -> None:
        self._forget_bytes(self._ring.popleft().nbytes)

    def _forget_bytes(self, nbytes: int) -> None:
        # Zero whenever the ring is empty: Ctrl-C between a change of it and of its bytes is made up for here.
        self._ring_bytes = self._ring_bytes - nbytes if self._ring else 0

    def _wait_for_room(self, room: int) -> None:
        if self._ring_bytes > room:
            self._departures.submit()
        while self._ring_bytes > room:
            oldest = self._ring[0]
            # The memory goes back to torch's allocator, which gives it to later work of the same stream: that work,
            # and not the host, waits for the copy. Who uses a failed copy is told, not who comes next.
            with contextlib.suppress(OffloadError):
                self._transfers.wait_on_stream(oldest.stream, oldest.ticket)
            self._drop_oldest()


# At exit, work that has not ended by then was held or lost its device: the exit goes on without it. All waits together.
_EXIT_SECONDS = 5.0
# A drop that waits as long tells why the program stands still.
_PATIENCE_SECONDS = 30.0

_exit_began_s: float | None = None  # when it first waited


def end_work(transfers: _native.TransferQueue, tickets: Iterable[_native.Ticket]) -> bool:
    """Waits for work in flight on memory that is about to go; False when that was given up, at exit.

    Before, it takes as long as it takes. Either wait is told of when it is long; Ctrl-C ends it. What was given up has
    ended or failed all the same, and `transfers` takes no more: the memory will be somebody else's.
    """
    ended = False
    try:
        ended = _wait_to_end(tickets)
    finally:
        if not ended:
            transfers.end()
    return ended


def _wait_to_end(tickets: Iterable[_native.Ticket]) -> bool:
    exiting = not threading.main_thread().is_alive()
    limit = _left_at_exit() if exiting else _PATIENCE_SECONDS
    for ticket in tickets:
        with contextlib.suppress(OffloadError):  # nobody is left to be told
            if ticket.wait(limit):
                continue
            if exiting:
                if limit > 0:
                    _report(f"copies that had not ended {_EXIT_SECONDS:g} s after the program were given up")
                return False
            _report(f"the end of a model has waited {_PATIENCE_SECONDS:g} s for its copies; Ctrl-C gives them up")
            limit = math.inf
            ticket.wait()
    return True


def _left_at_exit() -> float:
    global _exit_began_s
    now_s = time.monotonic()
    if _exit_began_s is None:
        _exit_began_s = now_s
    return max(0.0, _exit_began_s + _EXIT_SECONDS - now_s)


def _report(what: str) -> None:
    """A finalizer can neither raise nor warn."""
    print(f"offload: {what}: a lane is held, or the device does not answer any more", file=sys.stderr)


def ticket_of(work: Future[None]) -> _native.Ticket:
    """For native work to wait for; `work` does not fail."""
    ticket = _native.Ticket.pending()
    work.add_done_callback(lambda _: ticket.complete())
    return ticket


def open_lanes(device: torch.device, native: _native.Device, *, budget: int, pin: bool, poison: bool) -> CopyLanes:
    """Lanes of their own, with a pool of `budget` bytes; all of it ends with the last that refers to the lanes."""
    pool = _native.HostPool(native, budget_bytes=budget, pin=pin, poison=poison)
    return CopyLanes(device, pool, _native.TransferQueue(native))


def _drain(transfers: _native.TransferQueue, departures: _Departures, ring: deque[_Copy]) -> None:
    """Ends the copies in flight on memory that is about to go, and forgets those that wait."""
    departures.copies.clear()
    end_work(transfers, (copy.ticket for copy in ring))
