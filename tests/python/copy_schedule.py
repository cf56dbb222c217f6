"""When copies and updates run, decided by a seed: the training thread lets them go, and no clock or sleep has a say.

Computing on the CPU is synchronous, so all that can race with it are copies and updates, and what matters of each is
where in the program it runs, between its submission and the first wait for it. Each is submitted behind a gate, which
opens because somebody waits for what is behind it, or, by chance, at any call into the lanes.

What is behind a gate is never waited for but through here: not by whoever wants memory of the pool, and not by an
update whose weight goes into a lane of gated copies. Those of several engines have nothing to do with each other.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

import pytest

import offload
from offload import _native

_wait = _native.Ticket.wait


@dataclass(eq=False)
class _Gated:
    """A copy or an update, and what it waits for beside its gate.

    ticket: who asks for this work asks for this object. end: ends with it; a copy's `ticket` may become a later one's.
    before: copies that its upload goes behind, in the order of the lane.
    """

    gate: _native.Ticket
    ticket: _native.Ticket
    end: _native.Ticket
    after: list[_Gated | _native.Ticket]
    before: deque[_Gated] = field(default_factory=deque)


class CopySchedule:
    """Takes over every transfer queue of the process while the test runs.

    progress: how far work goes on by itself at a call, as the chance of one piece more; 0.0: all is as late as can be.
    Copies of a lane keep their order, and so do updates, as is promised; the three overtake one another.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, seed: int, progress: float) -> None:
        self._random = random.Random(seed)
        self.progress = progress
        # By transfer queue and lane, and by pipeline; ids of those that have ended may come again, with nothing left.
        self._queues: defaultdict[tuple[int, str], deque[_Gated]] = defaultdict(deque)
        # By pipeline: the lane that its uploads go into, and the slots that have one.
        self._uploads: dict[int, tuple[deque[_Gated], set[int]]] = {}
        # Reads and writes of weights on disk, and what begins them: they run by themselves then.
        self._chained: dict[int, tuple[Any, list[_Gated | _native.Ticket]]] = {}
        self.awaited_count = 0
        self.early_count = 0
        monkeypatch.setattr(_native.TransferQueue, "submit_all_to_host", self._submitting_all())
        monkeypatch.setattr(_native.TransferQueue, "submit_batch", self._submitting_batch())
        for lane in ("to_host", "to_device"):
            monkeypatch.setattr(_native.TransferQueue, f"submit_{lane}", self._submitting(lane))
        monkeypatch.setattr(_native.TransferQueue, "wait_on_stream", self._waiting_on_stream())
        monkeypatch.setattr(_native.HostPool, "acquire", self._acquiring())
        monkeypatch.setattr(_native.StepPipeline, "__init__", self._opening())
        monkeypatch.setattr(_native.StepPipeline, "add_slot", self._adding())
        monkeypatch.setattr(_native.StepPipeline, "submit", self._updating())
        monkeypatch.setattr(_native.StepPipeline, "speculate", self._speculating())
        monkeypatch.setattr(_native.StepPipeline, "discard", self._discarding())
        monkeypatch.setattr(_native.StepPipeline, "wait", self._waiting_for_updates())
        monkeypatch.setattr(_native.StepPipeline, "weight", self._asking_for_the_weight())
        for name in ("submit_read_after", "submit_write_after"):
            monkeypatch.setattr(_native.BlockFile, name, self._chaining(name))
        monkeypatch.setattr(_native.Ticket, "end_with", self._ending())
        schedule = self

        def wait(ticket: _native.Ticket, timeout_s: float | None = None) -> bool:
            schedule._reach(ticket)
            return _wait(ticket, timeout_s)

        monkeypatch.setattr(_native.Ticket, "wait", wait)

    def finish(self) -> None:
        """Lets everything go."""
        while self._open_any():
            pass

    # --- what stands in for the native methods --------------------------------------------------------------

    def _submitting(self, lane: str) -> Any:
        submit = getattr(_native.TransferQueue, f"submit_{lane}")

        def call(
            queue: Any, destination: int, source: int, nbytes: int, stream: int = 0, after: Any = None, *given: Any
        ) -> _native.Ticket:
            needs = self._needs_of([] if after is None else [after])
            gate = _native.Ticket.pending()
            submit(queue, 0, 0, 0, 0, gate)  # no bytes: what follows in the lane waits behind it
            ticket: _native.Ticket = submit(queue, destination, source, nbytes, stream, after, *given)
            end = submit(queue, 0, 0, 0, 0)
            self._queues[id(queue), lane].append(_Gated(gate, ticket, end, needs))
            self._go_on()
            return ticket

        return call

    def _submitting_all(self) -> Any:
        """Copies of one submission run in any order, and have one ticket: it tells of each that fails."""
        submit_all, submit = _native.TransferQueue.submit_all_to_host, _native.TransferQueue.submit_to_host

        def call(queue: Any, copies: list[Any], stream: int = 0, trace_name: int = 0) -> None:
            if not copies:
                return
            taken = self._random.sample(copies, len(copies))
            copies.clear()
            for destination, _, nbytes, *_ in taken:
                ctypes.memset(destination, 0xFF, nbytes)  # NaN until it has run
            (ticket,) = {id(ticket): ticket for *_, ticket, _ in taken}.values()
            gate = _native.Ticket.pending()
            submit(queue, 0, 0, 0, 0, gate)
            submit_all(queue, taken, stream, trace_name)
            end = submit(queue, 0, 0, 0, 0)
            self._queues[id(queue), "to_host"].append(_Gated(gate, ticket, end, []))
            self._go_on()

        return call

    def _submitting_batch(self) -> Any:
        """A mark in a lane, of no bytes, is behind what is gated there: who waits for it lets that go."""
        queue_type = _native.TransferQueue
        submit_batch = queue_type.submit_batch
        submits = {"to_host": queue_type.submit_to_host, "to_device": queue_type.submit_to_device}

        def call(queue: Any, lane: str, copies: list[Any], stream: int = 0) -> _native.Ticket:
            gate = _native.Ticket.pending()
            submits[lane](queue, 0, 0, 0, 0, gate)
            ticket: _native.Ticket = submit_batch(queue, lane, copies, stream)
            end = submits[lane](queue, 0, 0, 0, 0)
            self._queues[id(queue), lane].append(_Gated(gate, ticket, end, []))
            self._go_on()
            return ticket

        return call

    def _waiting_on_stream(self) -> Any:
        wait = _native.TransferQueue.wait_on_stream

        def call(queue: Any, stream: int, ticket: _native.Ticket) -> None:
            self._go_on()
            self._reach(ticket)
            wait(queue, stream, ticket)

        return call

    def _acquiring(self) -> Any:
        acquire = _native.HostPool.acquire

        def call(pool: Any, nbytes: int, tag: Any, alignment: int = 1) -> _native.HostBuffer:
            while (stats := pool.stats())["waiting_bytes"] and stats["mapped_bytes"] + nbytes > stats["budget_bytes"]:
                if not self._open_any():
                    break
                self.awaited_count += 1
            return acquire(pool, nbytes, tag, alignment)

        return call

    def _opening(self) -> Any:
        open_pipeline = _native.StepPipeline.__init__

        def call(pipeline: Any, transfers: Any, **options: Any) -> None:
            open_pipeline(pipeline, transfers, **options)
            self._uploads[id(pipeline)] = self._queues[id(transfers), "to_device"], set()

        return call

    def _adding(self) -> Any:
        add_slot = _native.StepPipeline.add_slot

        def call(pipeline: Any, **slot: Any) -> int:
            number: int = add_slot(pipeline, **slot)
            if slot["device_weight"]:
                self._uploads[id(pipeline)][1].add(number)
            return number

        return call

    def _updating(self) -> Any:
        submit = _native.StepPipeline.submit

        def call(pipeline: Any, jobs: Any, stream: int = 0, **options: Any) -> list[_native.Ticket]:
            gates = [_native.Ticket.pending() for _ in jobs]
            needs = [self._needs_of(job[3]) for job in jobs]
            gated = [(*job[:3], [*job[3], gate], *job[4:]) for job, gate in zip(jobs, gates, strict=True)]
            tickets: list[_native.Ticket] = submit(pipeline, gated, stream, **options)
            lane, uploaded = self._uploads[id(pipeline)]
            for job, need, gate, ticket in zip(gated, needs, gates, tickets, strict=True):
                before = lane if job[0] in uploaded else deque()
                self._queues[id(pipeline), "updates"].append(_Gated(gate, ticket, ticket, need, before))
            # None goes on here: of weights on disk one may need what the caller chains to another's end.
            return tickets

        return call

    def _speculating(self) -> Any:
        speculate = _native.StepPipeline.speculate

        def call(pipeline: Any, job: Any, backup: int) -> _native.Ticket:
            gate, need = _native.Ticket.pending(), self._needs_of(job[3])
            ticket: _native.Ticket = speculate(pipeline, (*job[:3], [*job[3], gate], *job[4:]), backup)
            self._queues[id(pipeline), "updates"].append(_Gated(gate, ticket, ticket, need))
            self._go_on()
            return ticket

        return call

    def _discarding(self) -> Any:
        discard = _native.StepPipeline.discard

        def call(pipeline: Any, slots: Any) -> _native.Ticket:
            ticket: _native.Ticket = discard(pipeline, slots)
            in_order = _Gated(_native.Ticket.pending(), ticket, ticket, [])
            self._queues[id(pipeline), "updates"].append(in_order)
            self._go_on()
            return ticket

        return call

    def _waiting_for_updates(self) -> Any:
        wait = _native.StepPipeline.wait

        def call(pipeline: Any, tickets: Any) -> None:
            for ticket in tickets:
                self._reach(ticket)
            wait(pipeline, tickets)

        return call

    def _asking_for_the_weight(self) -> Any:
        weight_of = _native.StepPipeline.weight

        def call(_: Any, ticket: _native.Ticket) -> _native.Ticket:
            weight: _native.Ticket = weight_of(ticket)
            self._chained[id(weight)] = (weight, self._needs_of([ticket]))
            return weight

        return call

    def _chaining(self, name: str) -> Any:
        submit = getattr(_native.BlockFile, name)

        def call(file: Any, after: Any, offset: int, address: int, nbytes: int) -> _native.Ticket:
            needs = self._needs_of([after] if isinstance(after, _native.Ticket) else after)
            ticket: _native.Ticket = submit(file, after, offset, address, nbytes)
            self._chained[id(ticket)] = (ticket, needs)
            self._go_on()
            return ticket

        return call

    def _ending(self) -> Any:
        end_with = _native.Ticket.end_with

        def call(ticket: _native.Ticket, other: _native.Ticket) -> None:
            end_with(ticket, other)
            self._chained[id(ticket)] = (ticket, self._needs_of([other]))

        return call

    # --- gates ----------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        while self._random.random() < self.progress and self._open_any():
            self.early_count += 1

    def _open_any(self) -> bool:
        """Lets the next of any queue go; False where there is none."""
        waiting = [queue for queue in self._queues.values() if queue]
        if waiting:
            self._open(self._random.choice(waiting))
        return bool(waiting)

    def _reach(self, ticket: _native.Ticket) -> None:
        """Lets go what `ticket` needs, and no more."""
        self._release(self._needs_of([ticket]))

    def _release(self, needs: list[_Gated | _native.Ticket]) -> None:
        for need in needs:
            for queue in tuple(self._queues.values()):
                while need in queue:
                    self._open(queue)
                    self.awaited_count += 1
            self._release(self._chained.pop(id(need), (None, []))[1])

    def _needs_of(self, tickets: Any) -> list[_Gated | _native.Ticket]:
        """What they are the tickets of now, else themselves: a copy's ticket may become a later one's."""
        needs: list[_Gated | _native.Ticket] = []
        for ticket in tickets:
            works = [work for queue in tuple(self._queues.values()) for work in tuple(queue) if work.ticket is ticket]
            needs += works or [ticket]
        return needs

    def _open(self, queue: deque[_Gated]) -> None:
        """Lets the next of `queue` go, after what it needs, and waits until it has run.

        It leaves the queue first: threads that write a checkpoint wait, too, and each lets go what it waits for.
        """
        try:
            work = queue.popleft()
        except IndexError:  # another thread has let it go
            return
        self._release(self._random.sample(work.after, len(work.after)))
        while work.before:
            self._open(work.before)
        work.gate.complete()
        with contextlib.suppress(offload.OffloadError):  # whoever asks for it is told
            _wait(work.end)
