"""What passes through a bounded window in the simulated pipeline: streamed weights, states on disk, activations."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ._simulated_lanes import BEGIN, Piece, Ring, latest
from ._step_work import UnitWork

if TYPE_CHECKING:
    from ._simulator import Pipeline

__all__ = [
    "SimulatedActivationWindow", "SimulatedStateWindow", "SimulatedWeightWindow", "uncached_share", "window_schedule",
]  # fmt: skip


def window_schedule(count: int, prefetch: int) -> list[list[int]]:
    """Which of `count` streamed units each touch of one micro-batch sends for; see [Note: touches].

    Touches are the units' forwards and then, backwards, their backwards; the first finds nothing on the device.
    """
    touches = [*range(count), *reversed(range(count))]
    schedule = []
    present: set[int] = set()
    for position, unit in enumerate(touches):
        ahead: dict[int, None] = {}
        for other in touches[position + 1 :]:
            if len(ahead) == prefetch:
                break
            if other != unit:
                ahead[other] = None
        window = [unit, *ahead]
        schedule.append([other for other in window if other not in present])
        present = set(window)
    return schedule


class SimulatedWeightWindow:
    """Streamed weights. Of those on disk, the cache always has its share of each unit, and the rest is read."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        units, settings = pipeline.units, pipeline.settings
        self._streamed = [number for number, unit in enumerate(units) if unit.weight_bytes]
        self._schedule = window_schedule(len(self._streamed), settings.prefetch)
        self._touches = iter(self._schedule)
        self._arrivals: dict[int, Piece] = {}
        self._sent_first = False
        self.uncached = uncached_share(units, settings.cache_bytes)
        largest = max((unit.stored_bytes for unit in units), default=0)
        # Reads go so many units ahead of the uploads.
        depth = max(1 + settings.prefetch, settings.cache_bytes // largest if largest else 0)
        self._uploads: deque[Piece] = deque([BEGIN] * depth, maxlen=depth)
        self._written = [BEGIN] * len(units)

    def touch(self, number: int) -> None:
        if not self._pipeline.units[number].weight_bytes:
            return
        for sent in next(self._touches):
            if not self._sent_first:
                self._send(self._streamed[sent])
        self._sent_first = False
        self._pipeline.compute.wait(self._arrivals[number])

    def empty(self) -> None:
        """A micro-batch ended."""
        self._touches = iter(self._schedule)

    def map_pieces(self, of: Callable[[Piece], Piece]) -> None:
        self._arrivals = {number: of(piece) for number, piece in self._arrivals.items()}
        self._uploads = deque(map(of, self._uploads), maxlen=self._uploads.maxlen)

    def send_first(self) -> None:
        """The step is submitted: what the next forward begins with comes behind its updates."""
        for sent in self._schedule[0] if self._schedule else ():
            self._send(self._streamed[sent])
        self._sent_first = bool(self._schedule)

    def _send(self, number: int) -> None:
        pipeline, unit = self._pipeline, self._pipeline.units[number]
        stored = unit.stored_bytes * self.uncached
        read = pipeline.run("disk_read", stored, self._uploads[0], pipeline.updated[number])
        after = (pipeline.compute.last, pipeline.updated[number], read)
        self._arrivals[number] = pipeline.run("to_device", unit.weight_bytes, *after)
        self._uploads.append(self._arrivals[number])

    def read_for_update(self, number: int, submitted: Piece) -> Piece:
        stored = self._pipeline.units[number].stored_bytes * self.uncached
        if not stored:
            return BEGIN
        return self._pipeline.run("disk_read", stored, submitted, self._written[number])

    def write_updated(self, number: int, updated: Piece) -> None:
        self._written[number] = self._pipeline.run("disk_write", self._pipeline.units[number].stored_bytes, updated)


def uncached_share(units: Sequence[UnitWork], cache_bytes: int) -> float:
    """Of weights on disk, what is not in a cache of so many bytes when it is needed."""
    stored = sum(unit.stored_bytes for unit in units)
    return max(0.0, 1.0 - cache_bytes / stored) if stored else 0.0


class SimulatedStateWindow:
    """States on disk pass through host memory: what is still there is not read, and a frame is free once written."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._capacity = pipeline.settings.window_bytes
        self._frames: dict[tuple[int, int], Piece] = {}  # the oldest first, and what they are written by
        self._bytes = 0.0

    def read(self, number: int, part: int, submitted: Piece) -> Piece:
        unit = self._pipeline.units[number]
        if not unit.disk_read_bytes:
            return BEGIN
        if (number, part) in self._frames and self._bytes <= self._capacity:
            self._bytes -= unit.disk_read_bytes / unit.parts
            return self._frames.pop((number, part))
        freed = submitted
        while self._frames and self._bytes + unit.disk_read_bytes / unit.parts > self._capacity:
            oldest = next(iter(self._frames))
            freed = latest((freed, self._frames.pop(oldest)))
            other = self._pipeline.units[oldest[0]]
            self._bytes -= other.disk_read_bytes / other.parts
        return self._pipeline.run("disk_read", unit.disk_read_bytes / unit.parts, freed)

    def write(self, number: int, part: int, update: Piece) -> None:
        unit = self._pipeline.units[number]
        if not unit.disk_read_bytes:
            return
        written = self._pipeline.run("disk_write", unit.disk_write_bytes / unit.parts, update)
        self._frames[number, part] = written
        self._bytes += unit.disk_read_bytes / unit.parts


class SimulatedActivationWindow:
    """What forward saves: the newest stay, the others leave and come back before backward needs them."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        saved = [(number, part) for number, unit in enumerate(pipeline.units) for part in range(len(unit.saved_bytes))]
        self._numbers = {place: number for number, place in enumerate(saved)}
        sizes = [nbytes for unit in pipeline.units for nbytes in unit.saved_bytes]
        self._sent = [nbytes for unit in pipeline.units for nbytes in unit.sent_bytes]
        # Of compute, that packs a range, or unpacks it.
        self._converting = [
            pipeline.machine.seconds("device_update", nbytes + way) if nbytes != way else 0.0
            for nbytes, way in zip(sizes, self._sent, strict=True)
        ]
        self._order = pipeline.settings.order_of(pipeline.units)
        room = 2 * self._order.room_bytes  # what comes back has as much as what leaves
        self._ring = Ring(pipeline.compute, max(pipeline.settings.ring_bytes, room))
        self._left: dict[int, Piece] = {}
        self._arrivals: dict[int, Piece] = {}

    def save(self, unit: int, part: int) -> None:
        number = self._numbers.get((unit, part))
        for other in () if number is None else self._order.departures[number]:
            nbytes = self._sent[other]
            self._pipeline.compute.run(self._converting[other])
            self._left[other] = self._pipeline.run("to_host", nbytes, self._pipeline.compute.last)
            self._ring.add(self._left[other], nbytes, self._order.room_bytes)

    def bring(self, unit: int, part: int) -> None:
        """Backward comes to what it saved, and sends for what comes next."""
        number = self._numbers.get((unit, part))
        if number is None:
            return
        for other in self._order.returns[-1 - number]:
            nbytes = self._sent[other]
            self._arrivals[other] = self._pipeline.run(
                "to_device", nbytes, self._pipeline.compute.last, self._left.pop(other)
            )
            self._ring.add(self._arrivals[other], nbytes)
        if number in self._arrivals:
            self._pipeline.compute.wait(self._arrivals.pop(number))
            self._pipeline.compute.run(self._converting[number])

    def map_pieces(self, of: Callable[[Piece], Piece]) -> None:
        """Backward has brought back all that forward had sent."""
        self._ring.map_pieces(of)
