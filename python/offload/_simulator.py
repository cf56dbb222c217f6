"""The pipeline of a step, played over seconds instead of bytes.

[Note: the simulated pipeline] Every lane works off what it is given in the order in which it is given, and the program
that gives it is the same in every step: so when each piece ends follows from the ends of those before it, in one pass
over the program and without a queue of events. Micro-batches that would only repeat those before them are passed
over. Compute is a lane too; where it waits, the chain of what it waits for
says which lane kept it. A step is measured from the end of its first forward to that of the next one's: by then every
update has ended, since each unit's forward waits for its own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

from ._activation_order import ActivationOrder, activation_order
from ._simulated_lanes import BEGIN, Compute, Lane, Piece, Repeats, Ring, latest
from ._simulated_windows import SimulatedActivationWindow, SimulatedStateWindow, SimulatedWeightWindow
from ._step_work import LANES, Machine, UnitWork, backups_of

__all__ = ["Settings", "Simulated", "simulate"]

# Steps before the measured ones, which find the lanes as every later step does; of those one goes forwards through
# states on disk and one backwards.
_FIRST_STEPS, _MEASURED_STEPS = 2, 2
# Bytes in memory that copying a byte there reads and writes.
_COPY = 2
# Micro-batches that are played one by one: to look for what repeats pays beyond them.
_FEW = 32


@dataclasses.dataclass(frozen=True)
class Settings:
    """See `forecast`."""

    micro_batches: int
    prefetch: int
    clips: bool
    lazy: bool
    kept_activations: float
    activation_host_bytes: int | None
    window_bytes: int
    cache_bytes: int
    ring_bytes: int
    in_flight_bytes: int
    speculate_bytes: int = 0
    throws_away: bool = False  # what began in backward

    def order_of(self, units: Sequence[UnitWork]) -> ActivationOrder:
        """What of a micro-batch's activations leaves and comes back, and when."""
        sizes = [nbytes for unit in units for nbytes in unit.saved_bytes]
        sent = [nbytes for unit in units for nbytes in unit.sent_bytes]
        return activation_order(sizes, self.kept_activations, self.activation_host_bytes, self.in_flight_bytes, sent)


@dataclasses.dataclass(frozen=True)
class Simulated:
    """Seconds of a step, what each lane did in it, what compute waited for, and what was backed up."""

    seconds: float
    busy: dict[str, float]
    exposed: dict[str, float]
    backup_bytes: int


def simulate(units: Sequence[UnitWork], machine: Machine, settings: Settings) -> Simulated:
    """One of many equal steps; see [Note: the simulated pipeline]."""
    pipeline = Pipeline(units, machine, settings)
    marks = [pipeline.step(backwards=number % 2 == 1) for number in range(_FIRST_STEPS + _MEASURED_STEPS + 1)]
    start, end = marks[_FIRST_STEPS], marks[-1]
    return Simulated(
        (end.seconds - start.seconds) / _MEASURED_STEPS,
        {lane: (end.busy[lane] - start.busy[lane]) / _MEASURED_STEPS for lane in LANES},
        {lane: (end.exposed[lane] - start.exposed[lane]) / _MEASURED_STEPS for lane in LANES[1:]},
        pipeline.backup_bytes,
    )


@dataclasses.dataclass(frozen=True)
class _Mark:
    seconds: float
    busy: dict[str, float]
    exposed: dict[str, float]


class Pipeline:
    """What one training thread, two copy lanes, the host's optimizer and the disk do in the steps of a training."""

    def __init__(self, units: Sequence[UnitWork], machine: Machine, settings: Settings) -> None:
        self.units, self.machine, self.settings = units, machine, settings
        self.compute = Compute()
        self.lanes = {"compute": self.compute} | {name: Lane(name) for name in LANES if name != "compute"}
        self.gradient_ring = Ring(self.compute, settings.ring_bytes)
        self.weights = SimulatedWeightWindow(self)
        self.activations = SimulatedActivationWindow(self)
        self.states = SimulatedStateWindow(self)
        # What the next forward of a unit waits for.
        self.updated = [BEGIN] * len(units)
        # The copies of its gradients that left last, by part.
        self.landed = [[BEGIN] * unit.parts for unit in units]
        self.backups = backups_of(units, settings.speculate_bytes)
        self.backup_bytes = 0  # of the last step
        self._host_update_bytes = sum(unit.host_update_bytes for unit in units)
        # What the device reads and writes on the host meanwhile slows all updates there alike.
        crossing = sum(unit.crossing_bytes for unit in units)
        self._slower = 1 + crossing / self._host_update_bytes if self._host_update_bytes else 1.0

    def run(self, lane: str, nbytes: float, *after: Piece) -> Piece:
        """`nbytes` at the rate of the lane; no bytes take no time, and no rate."""
        return self.lanes[lane].run(self.machine.seconds(lane, nbytes), *after) if nbytes else latest(after)

    def step(self, *, backwards: bool) -> _Mark:
        """One step; the mark of its first forward's end."""
        mark = self._forward()
        self._backward(first=True)
        left = self.settings.micro_batches - 1
        repeats = Repeats(self) if left > _FEW else None
        while left:
            self._forward()
            self._backward(first=False)
            left -= 1
            if repeats is not None:
                left -= repeats.passed_over(left)
        self._update(backwards)
        return mark

    def map_pieces(self, of: Callable[[Piece], Piece]) -> None:
        """Of those that a micro-batch leaves to the next; to what has been updated it does nothing."""
        for lane in self.lanes.values():
            lane.last = of(lane.last)
        self.landed = [[of(piece) for piece in parts] for parts in self.landed]
        self.gradient_ring.map_pieces(of)
        self.weights.map_pieces(of)
        self.activations.map_pieces(of)

    def _forward(self) -> _Mark:
        for number, unit in enumerate(self.units):
            if unit.checkpointed:
                self.activations.save(number, 0)
            self.compute.wait(self.updated[number])
            self.weights.touch(number)
            for part in range(unit.parts):
                self.compute.run(unit.forward_seconds / unit.parts)
                if not unit.checkpointed:
                    self.activations.save(number, part)
        busy = {name: lane.busy for name, lane in self.lanes.items()}
        return _Mark(self.compute.last.end, busy, dict(self.compute.exposed))

    def _backward(self, *, first: bool) -> None:
        earlier = None  # the sum of the micro-batches before, on its way to the next part
        parts = [(number, part) for number, unit in enumerate(self.units) for part in range(unit.parts)][::-1]
        leaving = [place for place in parts if self.units[place[0]].gradient_bytes]
        following = dict(itertools.pairwise(leaving))
        for number, part in parts:
            unit = self.units[number]
            if part == unit.parts - 1:
                self.weights.touch(number)
                if unit.checkpointed:
                    self.activations.bring(number, 0)
                    self.compute.run(unit.repeated_seconds)
            if not unit.checkpointed:
                self.activations.bring(number, part)
            self.compute.run((unit.backward_seconds - unit.repeated_seconds) / unit.parts)
            if unit.gradient_bytes:
                if not first:
                    earlier = earlier or self._send_back(number, part)
                    self.compute.wait(earlier)
                    self.gradient_ring.remove(earlier)
                gradient = unit.gradient_bytes / unit.parts
                self.landed[number][part] = self.run("to_host", gradient, self.compute.last)
                self.gradient_ring.add(self.landed[number][part], gradient)
                if not first and (number, part) in following:
                    earlier = self._send_back(*following[number, part])
        self.weights.empty()

    def _send_back(self, number: int, part: int) -> Piece:
        """A gradient comes back, to be added to."""
        unit = self.units[number]
        gradient = unit.gradient_bytes / unit.parts
        copy = self.run("to_device", gradient, self.compute.last, self.landed[number][part])
        self.gradient_ring.add(copy, gradient)
        return copy

    def _update(self, backwards: bool) -> None:
        numbers = [number for number, unit in enumerate(self.units) if unit.host_update_bytes]
        backwards = backwards and any(unit.disk_read_bytes for unit in self.units)
        if backwards:
            numbers.reverse()
        for number in numbers:
            kept = self.units[number].step_to_host_bytes
            if kept:  # the gradient is on the device until now
                parts = self.units[number].parts
                self.landed[number] = [self.run("to_host", kept / parts, self.compute.last) for _ in range(parts)]
        plain = [self.landed[number][-1] for number in numbers if self.units[number].step_to_host_bytes]
        self.compute.wait(latest(plain))
        submitted = self.compute.last
        # A factor leaves when the norms of all gradients are known, behind the gradients that left.
        left = [self.landed[number][0] for number, unit in enumerate(self.units) if unit.gradient_bytes]
        norm = latest(left) if self.settings.clips else BEGIN
        first = latest(self.landed[number][0] for number in numbers[:1])
        ahead = self._updates_ahead(latest((submitted, norm, first)))
        # The device first: what it reads and writes over the link is not behind uploads that wait for the host's work.
        for number, unit in enumerate(self.units):
            if unit.device_update_bytes:
                self._update_on_device(number)
        self.weights.expect_updates(numbers)
        for number in numbers:
            pieces = self.states.pieces_of(number)
            self._update_on_host(number, pieces[::-1] if backwards else pieces, submitted, norm, ahead)
        if not self.settings.lazy:
            self.compute.wait(latest(self.updated))
        self.weights.send_first()

    def _updates_ahead(self, ready: Piece) -> dict[tuple[int, int], Piece]:
        """Those that began in backward, in the order in which their gradients left: whatever can begin before the
        step's first update is `ready`."""
        ahead = {}
        self.backup_bytes = 0
        for (number, part), backup in self.backups.items():
            if max(self.lanes["host_update"].last.end, self.landed[number][part].end) >= ready.end:
                break
            unit = self.units[number]
            nbytes = unit.host_update_bytes / unit.parts + _COPY * backup
            ahead[number, part] = self.run("host_update", nbytes, self.landed[number][part])
            self.backup_bytes += backup
        return ahead

    def _update_on_host(
        self, number: int, pieces: Sequence[int], submitted: Piece, norm: Piece, ahead: Mapping[tuple[int, int], Piece]
    ) -> None:
        """pieces: of its parts, in the order of their updates. A part whose update begins ahead is a piece."""
        unit, count = self.units[number], len(pieces)
        weights = self.weights.use_for_update(number)
        for piece in pieces:
            part = piece * unit.parts // count
            states = self.states.read(number, piece, submitted)
            known = submitted if self.machine.synchronous else BEGIN
            ready = (known, norm, self.landed[number][part], states, weights)
            begun = ahead.get((number, part))
            if begun is None:
                update = self.run("host_update", self._slower * unit.host_update_bytes / count, *ready)
            elif self.settings.throws_away:
                again = _COPY * self.backups[number, part] + unit.host_update_bytes / unit.parts
                update = self.run("host_update", again, begun, *ready)
            else:
                update = self.lanes["host_update"].pass_by(begun, *ready)
            self.states.write(number, piece, update)  # which no forward waits for
            upload = self.run("to_device", unit.upload_bytes / count, update, submitted)
            self.updated[number] = latest((update, upload))
        self.weights.updated(number, self.updated[number])

    def _update_on_device(self, number: int) -> None:
        """Inside `step()`, one unit after another, nothing sent ahead."""
        unit = self.units[number]
        self.compute.wait(self.run("to_device", unit.step_to_device_bytes, self.compute.last, *self.landed[number]))
        crossing = [
            self.run("to_device", unit.crossing_to_device_bytes, self.compute.last),
            self.run("to_host", unit.crossing_to_host_bytes, self.compute.last),
        ]
        if not self._host_update_bytes:  # else it is shared with those updates
            crossing.append(self.run("host_update", unit.crossing_bytes, self.compute.last))
        self.compute.run(self.machine.seconds("device_update", unit.device_update_bytes))
        self.compute.wait(latest(crossing))
        if not unit.host_update_bytes:  # else they are gradients, which have left
            self.compute.wait(self.run("to_host", unit.step_to_host_bytes, self.compute.last))
