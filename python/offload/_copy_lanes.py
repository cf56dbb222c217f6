"""Copies between the device and the host pool, with the device memory that they use held until they have ended.

`CopyLanes` owns a bounded ring of device tensors whose copies, in either direction, are in flight. What travels, and in
which order, is decided by who uses it.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._errors import OffloadError
from ._host_grad import HostBytes

# Device memory that tensors on their way may keep alive; beyond it the compute stream waits for the lane.
_RING_BYTES = 256 << 20


class LandedBytes:
    """A host copy on its way or landed: `address` is valid once `ticket` ended; the buffer lives as long as this."""

    __slots__ = ("address", "buffer", "ticket")

    def __init__(self, buffer: _native.HostBuffer, ticket: _native.Ticket) -> None:
        self.buffer = buffer
        self.address = buffer.address
        self.ticket = ticket


@dataclass(eq=False, slots=True)
class _Copy:
    """A copy in flight, the device tensor that it reads or writes, its bytes and the compute stream it belongs to.

    leaves: it reads the tensor, which nobody else needs.
    """

    ticket: _native.Ticket
    tensor: Tensor
    nbytes: int
    stream: int
    leaves: bool


class CopyLanes:
    """See the module's text. One compute thread at a time, as autograd gives it."""

    def __init__(self, device: torch.device, pool: _native.HostPool, transfers: _native.TransferQueue) -> None:
        self.device = device
        self._pool = pool
        self._transfers = transfers
        self._ring: deque[_Copy] = deque()
        self._ring_bytes = 0
        self.peak_ring_bytes = 0
        weakref.finalize(self, _drain, transfers, self._ring)

    def compute_stream(self) -> int:
        """torch's handle of this thread's current stream; 0 on the CPU, where computing is synchronous."""
        if self.device.type == "cpu":
            return 0
        return torch.cuda.current_stream(self.device).cuda_stream

    def on_stream(self, stream: int) -> contextlib.AbstractContextManager[Any]:
        """Inside, this thread computes on the stream of that handle."""
        if self.device.type == "cpu" or stream == self.compute_stream():
            return contextlib.nullcontext()
        if stream == 0:  # the default one: torch takes an ExternalStream of 0 for a new stream
            return torch.cuda.stream(torch.cuda.default_stream(self.device))
        return torch.cuda.stream(torch.cuda.ExternalStream(stream, self.device))  # type: ignore[no-untyped-call]

    def send(self, tensor: Tensor, tag: _native.Tag, stream: int, room: int | None = None) -> LandedBytes:
        """Starts the copy of a dense tensor's bytes in storage order; keeps the tensor until they have landed.

        stream: the compute stream that the tensor was made on. room: bytes that may then be on their way.
        Raises `OutOfHostMemory`; nothing was started then.
        """
        nbytes = tensor.numel() * tensor.element_size()
        buffer = self._pool.acquire(nbytes, tag)
        copy = self._keep(tensor, nbytes, stream, leaves=True)
        landed = LandedBytes(buffer, copy.ticket)
        self._transfers.submit_to_host(landed.address, tensor.data_ptr(), nbytes, stream, None, copy.ticket, buffer)
        self._wait_for_room(room)
        return landed

    def start_upload(self, held: HostBytes, out: Tensor) -> _native.Ticket:
        """Starts filling `out` and keeps it alive until that ended; nothing waits before wait_upload()."""
        assert isinstance(held, LandedBytes)
        nbytes = out.numel() * out.element_size()
        copy = self._keep(out, nbytes, self.compute_stream(), leaves=False)
        self._transfers.submit_to_device(
            out.data_ptr(), held.address, nbytes, copy.stream, held.ticket, copy.ticket, held.buffer
        )
        self._wait_for_room()
        return copy.ticket

    def wait_upload(self, ticket: _native.Ticket) -> None:
        """The compute stream waits until what start_upload() returned has ended."""
        stream = self.compute_stream()
        self._transfers.wait_on_stream(stream, ticket)
        # What follows on that stream comes after the copy, so that nothing has to keep the tensor any more; and a sum
        # of gradients that came back to be added to could not leave again while something does.
        for position, copy in enumerate(self._ring):
            if copy.ticket is ticket and copy.stream == stream:
                del self._ring[position]
                self._forget_bytes(copy)
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

    def _keep(self, tensor: Tensor, nbytes: int, stream: int, *, leaves: bool) -> _Copy:
        """Puts a tensor into the ring, before its copy is submitted: one in flight that nothing keeps alive would touch
        memory of others, whatever goes wrong in between. The submission gives the ticket its copy."""
        ring = self._ring
        while ring and ring[0].ticket.done:
            self._drop_oldest()
        copy = _Copy(_native.Ticket(), tensor, nbytes, stream, leaves)
        ring.append(copy)
        self._ring_bytes += nbytes
        self.peak_ring_bytes = max(self.peak_ring_bytes, self._ring_bytes)
        return copy

    def _drop_oldest(self) -> None:
        self._forget_bytes(self._ring.popleft())

    def _forget_bytes(self, copy: _Copy) -> None:
        # Zero whenever the ring is empty: Ctrl-C between a change of it and of its bytes is made up for here.
        self._ring_bytes = self._ring_bytes - copy.nbytes if self._ring else 0

    def _wait_for_room(self, room: int | None = None) -> None:
        limit = _RING_BYTES if room is None else min(room, _RING_BYTES)
        while self._ring_bytes > limit:
            oldest = self._ring[0]
            # The memory goes back to torch's allocator, which gives it to later work of the same stream: that work,
            # and not the host, waits for the copy. Who uses a failed copy is told, not who comes next.
            with contextlib.suppress(OffloadError):
                self._transfers.wait_on_stream(oldest.stream, oldest.ticket)
            self._drop_oldest()


# At exit, work that has not ended by then was held or lost its device: the exit goes on without it.
_EXIT_SECONDS = 5.0


def wait_to_end(tickets: Iterable[_native.Ticket]) -> bool:
    """Waits for work in flight on memory that is about to go; False when that was given up, at exit.

    Before, it takes as long as it takes: what a copy still writes to would be somebody else's memory by then.
    """
    limit = None if threading.main_thread().is_alive() else _EXIT_SECONDS
    for ticket in tickets:
        with contextlib.suppress(OffloadError):  # nobody is left to be told
            if not ticket.wait(limit):
                return False
    return True


def ticket_of(work: Future[None]) -> _native.Ticket:
    """For native work to wait for; `work` does not fail."""
    ticket = _native.Ticket.pending()
    work.add_done_callback(lambda _: ticket.complete())
    return ticket


def open_lanes(device: torch.device, native: _native.Device, *, budget: int, pin: bool, poison: bool) -> CopyLanes:
    """Lanes of their own, with a pool of `budget` bytes; all of it ends with the last that refers to the lanes."""
    pool = _native.HostPool(native, budget_bytes=budget, pin=pin, poison=poison)
    return CopyLanes(device, pool, _native.TransferQueue(native))


def _drain(transfers: _native.TransferQueue, ring: deque[_Copy]) -> None:
    """Ends the copies in flight on memory that is about to go. `transfers` is kept until then."""
    wait_to_end(copy.ticket for copy in ring)
