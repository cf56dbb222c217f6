"""What passes through a bounded window in the simulated pipeline: streamed weights, states on disk, activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ._disk_window import WANTED_FRAMES
from ._simulated_cache import SimulatedWeightCache
from ._simulated_lanes import BEGIN, Piece, Ring, latest
from ._step_work import UnitWork

if TYPE_CHECKING:
    from ._simulator import Pipeline

__all__ = [
    "SimulatedActivationWindow", "SimulatedStateWindow", "SimulatedWeightWindow", "window_schedule",
]  # fmt: skip


# Of a part: beyond them a window is smaller than any that is chosen.
_MOST_PIECES = 64
# Of sums of bytes.
_ROUNDING = 1e-9


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
    """Streamed weights on the device. Those on disk come there from the cache."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._streamed = [number for number, unit in enumerate(pipeline.units) if unit.weight_bytes]
        self._pass = [*self._streamed, *reversed(self._streamed)]
        self._schedule = window_schedule(len(self._streamed), pipeline.settings.prefetch)
        self._touched = 0  # in this pass
        self._arrivals: dict[int, Piece] = {}
        self._sent_first = False
        self._cache = SimulatedWeightCache(pipeline)

    def touch(self, number: int) -> None:
        if not self._pipeline.units[number].weight_bytes:
            return
        sent = () if self._sent_first else self._schedule[self._touched]
        self._touched += 1
        self._send(sent, (*self._pass[self._touched :], *self._pass))
        self._sent_first = False
        self._pipeline.compute.wait(self._arrivals[number])

    def empty(self) -> None:
        """A micro-batch ended."""
        self._touched = 0

    def map_pieces(self, of: Callable[[Piece], Piece]) -> None:
        self._arrivals = {number: of(piece) for number, piece in self._arrivals.items()}
        self._cache.map_pieces(of)

    def send_first(self) -> None:
        """The step is submitted: what the next forward begins with comes behind its updates."""
        if self._schedule:
            self._send(self._schedule[0], self._pass)
        self._sent_first = bool(self._schedule)

    def _send(self, sent: Iterable[int], coming: Sequence[int]) -> None:
        """coming: units in the order in which they are needed next."""
        pipeline = self._pipeline
        self._cache.expect(coming)
        for number in map(self._streamed.__getitem__, sent):
            after = (pipeline.compute.last, pipeline.updated[number], self._cache.use(number))
            upload = pipeline.run("to_device", pipeline.units[number].weight_bytes, *after)
            self._arrivals[number] = upload
            self._cache.uploaded(number, upload)
        self._cache.read_ahead()

    def expect_updates(self, numbers: Sequence[int]) -> None:
        """Of these units in this order; the next pass follows."""
        self._cache.expect((*numbers, *self._pass))

    def use_for_update(self, number: int) -> Piece:
        """When the update may write to the weights."""
        return self._cache.use_for_update(number)

    def updated(self, number: int, updated: Piece) -> None:
        self._cache.updated(number, updated)


class SimulatedStateWindow:
    """States on disk pass through host memory: what is still there is not read, and a frame is free once written."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._capacity = pipeline.settings.window_bytes * (1 + _ROUNDING)
        self._pieces = [self._cut(unit) for unit in pipeline.units]
        self._frames: dict[tuple[int, int], Piece] = {}  # the oldest first, and what they are written by
        self._bytes = 0.0

    def pieces_of(self, number: int) -> range:
        """A unit's parts; larger ones in as many pieces as pass through the window one after another."""
        return self._pieces[number]

    def _cut(self, unit: UnitWork) -> range:
        most = self._capacity / WANTED_FRAMES
        each = math.ceil(unit.disk_read_bytes / unit.parts / most) if most else 1
        return range(unit.parts * min(max(1, each), _MOST_PIECES))

    def read(self, number: int, piece: int, submitted: Piece) -> Piece:
        unit = self._pipeline.units[number]
        if not unit.disk_read_bytes:
            return BEGIN
        nbytes = self._bytes_of(number)
        if (number, piece) in self._frames and self._bytes <= self._capacity:
            self._bytes -= nbytes
            return self._frames.pop((number, piece))
        freed = submitted
        while self._frames and self._bytes + nbytes > self._capacity:
            oldest = next(iter(self._frames))
            freed = latest((freed, self._frames.pop(oldest)))
            self._bytes -= self._bytes_of(oldest[0])
        return self._pipeline.run("disk_read", nbytes, freed)

    def write(self, number: int, piece: int, update: Piece) -> None:
        unit = self._pipeline.units[number]
        if not unit.disk_read_bytes:
            return
        written = self._pipeline.run("disk_write", unit.disk_write_bytes / len(self.pieces_of(number)), update)
        self._frames[number, piece] = written
        self._bytes += self._bytes_of(number)

    def _bytes_of(self, number: int) -> float:
        """Of a piece."""
        return self._pipeline.units[number].disk_read_bytes / len(self.pieces_of(number))


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
