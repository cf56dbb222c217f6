"""Training by the real engine on a clock that a test moves: a step takes what its copies and its compute take.

Copies, reads and writes take their bytes over the rate of their lane, compute takes what `EngineClock.compute` is told,
and updates take no time, or what `EngineClock` is told. The hand moves only when every thread of the engine sleeps, so
each run gives the same figures.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offload import _engine, _native, _state_store
from offload._disk import DiskStore
from what_lives import all_sleep

_NS = 1_000_000_000
_EXT4 = 0xEF53
_wait = _native.Ticket.wait


@dataclass(eq=False)
class _Update:
    """after: what it waits for. gate: what the native one waits for until it is to end; seconds: that it takes; ahead:
    it begins before its step."""

    ticket: _native.Ticket
    after: list[_native.Ticket]
    gate: _native.Ticket
    slot: int
    seconds: float
    ahead: bool = False
    end_ns: int | None = None  # once it has begun


@dataclass(eq=False)
class _Transfer:
    """A read or write of a block at `offset` of the file, which is held until its lane has taken its time for it."""

    offset: int
    nbytes: int
    end_ns: int | None = None  # once it has begun


class EngineClock:
    """Every engine made while the test runs has this clock. Rates of the lanes are in bytes a second. At the end of
    `with` nothing is left that waits for the hand.

    update_s: of each update on the host; ahead_s: of one that begins before its step, with its backup. The step that
    comes to such an update is expected to take it up, in no time. disk_read, disk_write: of a disk that gives each its
    own time; the queue depth has to be of all that is under way.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        to_host: float,
        to_device: float,
        update_s: float = 0.0,
        ahead_s: float = 0.0,
        disk_read: float = float("inf"),
        disk_write: float = float("inf"),
    ) -> None:
        self._update_s, self._ahead_s = update_s, ahead_s
        self._begun_ahead: set[int] = set()  # slots, since the last step
        self._clock = _native.ManualClock()
        self._device = _native.HostDevice(
            clock=self._clock, to_host_bytes_per_s=to_host, to_device_bytes_per_s=to_device
        )
        self._updates: deque[_Update] = deque()
        self._transfers: dict[bool, deque[_Transfer]] = {False: deque(), True: deque()}  # by whether it is a write
        # Of offsets on disk: when somebody last asked for what is there. Threads take up what is asked for in one
        # instant in any order; the disk is given it in this one.
        self._asked: dict[int, int] = {}
        self._offsets: dict[int, int] = {}  # by slot
        self._disk_rates = {False: disk_read, True: disk_write}
        self._disk_calls = _native.FailingSystemCalls()
        self._disk_calls.pretend_file_system(_EXT4)
        monkeypatch.setattr(_state_store, "DiskStore", self._open_disk)
        monkeypatch.setattr(_engine, "open_device", lambda _: self._device)
        monkeypatch.setattr(_native.TransferQueue, "wait_on_stream", self._waiting_on_stream())
        monkeypatch.setattr(_native.StepPipeline, "add_slot", self._adding())
        monkeypatch.setattr(_native.StepPipeline, "submit", self._updating())
        monkeypatch.setattr(_native.StepPipeline, "speculate", self._updating_ahead())
        monkeypatch.setattr(_native.StepPipeline, "wait", self._waiting_for_updates())
        for call in ("submit_read_after", "submit_write_after"):
            monkeypatch.setattr(_native.BlockFile, call, self._transferring(call))
        clock = self

        def wait(ticket: _native.Ticket, timeout_s: float | None = None) -> bool:
            clock._reach(ticket)
            return _wait(ticket, timeout_s)

        monkeypatch.setattr(_native.Ticket, "wait", wait)

    @property
    def seconds(self) -> float:
        return self._clock.now_ns() / _NS

    def compute(self, seconds: float) -> None:
        """The training thread computes for so long, while everything else goes on."""
        end = self._clock.now_ns() + round(seconds * _NS)
        while (deadline := self._settle()) is not None and deadline <= end:
            self._move_to(deadline)
        self._move_to(end)
        self._settle()

    def _open_disk(self, *given: Any, **options: Any) -> DiskStore:
        """It tries reads and writes as it opens, in no time."""
        store = DiskStore(*given, **options, calls=self._disk_calls, backend="threads")
        self._disk_calls.hold_transfers()
        return store

    def __enter__(self) -> EngineClock:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends all that waits for the hand: who lets go of an engine that failed waits for it."""
        for lane in ("to_host", "to_device"):
            self._device.limit(lane, 0)
        for update in self._updates:
            update.gate.complete()
        self._disk_calls.release_transfers()
        while any(self._device.pending_count(lane) for lane in ("to_host", "to_device")):
            self._clock.advance(_NS)
            os.sched_yield()  # one may have begun at a rate, and read the clock only now

    # --- what stands in for the native methods --------------------------------------------------------------

    def _waiting_on_stream(self) -> Any:
        wait = _native.TransferQueue.wait_on_stream

        def call(queue: Any, stream: int, ticket: _native.Ticket) -> None:
            self._reach(ticket)
            wait(queue, stream, ticket)

        return call

    def _adding(self) -> Any:
        add = _native.StepPipeline.add_slot

        def call(pipeline: Any, **slot: Any) -> int:
            number: int = add(pipeline, **slot)
            if slot.get("layout") is not None:
                self._offsets[number] = slot["disk_offset"]
            return number

        return call

    def _updating(self) -> Any:
        submit = _native.StepPipeline.submit

        def call(pipeline: Any, jobs: Any, stream: int = 0, **options: Any) -> list[_native.Ticket]:
            self._settle()
            gates = [_native.Ticket.pending() for _ in jobs]
            gated = [(*job[:3], [*job[3], gate], *job[4:]) for job, gate in zip(jobs, gates, strict=True)]
            for job in jobs:
                self._ask(self._offsets.get(job[0]))
            tickets: list[_native.Ticket] = submit(pipeline, gated, stream, **options)
            # Without those that were discarded. The others begin: the step's own updates wait for the clock.
            self._updates = deque(update for update in self._updates if not update.ticket.done)
            self._begun_ahead |= {update.slot for update in self._updates if update.ahead}
            for job, gate, ticket in zip(jobs, gates, tickets, strict=True):
                seconds = 0.0 if job[0] in self._begun_ahead else self._update_s
                self._updates.append(_Update(ticket, list(job[3]), gate, job[0], seconds))
            self._begun_ahead.clear()
            self._settle()
            return tickets

        return call

    def _updating_ahead(self) -> Any:
        speculate = _native.StepPipeline.speculate

        def call(pipeline: Any, job: Any, backup: int) -> _native.Ticket:
            self._settle()
            gate = _native.Ticket.pending()
            ticket = speculate(pipeline, (*job[:3], [*job[3], gate], *job[4:]), backup)
            self._updates.append(_Update(ticket, list(job[3]), gate, job[0], self._ahead_s, ahead=True))
            self._settle()
            return ticket

        return call

    def _waiting_for_updates(self) -> Any:
        wait = _native.StepPipeline.wait

        def call(pipeline: Any, tickets: Any) -> None:
            for ticket in tickets:
                self._reach(ticket)
            wait(pipeline, tickets)

        return call

    def _transferring(self, name: str) -> Any:
        submit = getattr(_native.BlockFile, name)

        def call(file: Any, after: Any, offset: int, *given: Any) -> _native.Ticket:
            self._ask(offset)
            ticket: _native.Ticket = submit(file, after, offset, *given)
            return ticket

        return call

    def _ask(self, offset: int | None) -> None:
        if offset is not None:
            self._asked[offset] = 1 + max(self._asked.values(), default=0)

    # --- the hand -------------------------------------------------------------------------------------------

    def _reach(self, ticket: _native.Ticket) -> None:
        """Moves the hand to the end of `ticket`, and no further."""
        while not ticket.done:
            deadline = self._settle()
            if ticket.done:
                return
            assert deadline is not None, "nothing that is left could end what is waited for"
            self._move_to(deadline)
        self._settle()

    def _move_to(self, time_ns: int) -> None:
        self._clock.advance(time_ns - self._clock.now_ns())

    def _settle(self) -> int | None:
        """Returns when whatever can run without the hand has run; when the next copy, update, read or write ends, None
        without one."""
        while True:
            self._let_threads_run()
            now = self._clock.now_ns()
            self._take_up_transfers()
            if self._updates and self._can_run(self._updates[0]):
                update = self._updates[0]
                if update.end_ns is None:
                    update.end_ns = now + round(update.seconds * _NS)
                if update.end_ns <= now:
                    self._note(self._updates.popleft())
                    continue
            if self._end_transfers(now):
                continue
            deadlines = [deadline for deadline in self._clock.deadlines_ns() if deadline > now]
            begun = [*self._updates, *self._transfers[False], *self._transfers[True]]
            deadlines += [work.end_ns for work in begun if work.end_ns is not None]
            return min(deadlines, default=None)

    def _can_run(self, update: _Update) -> bool:
        offset = self._offsets.get(update.slot)
        is_read = all(read.offset != offset for read in self._transfers[False])
        return is_read and all(ticket.done for ticket in update.after)

    def _let_threads_run(self) -> None:
        while not all_sleep("offload"):
            os.sched_yield()

    def _take_up_transfers(self) -> None:
        """Each lane gets what is held since the last time."""
        known = {(is_write, one.offset) for is_write, lane in self._transfers.items() for one in lane}
        held = [one for one in self._disk_calls.held_transfers() if one[:2] not in known]
        for is_write, offset, nbytes in sorted(held, key=lambda one: self._asked.get(one[1], 0)):
            self._transfers[is_write].append(_Transfer(offset, nbytes))

    def _end_transfers(self, now: int) -> bool:
        """Whether one has ended. The first of each lane begins."""
        for is_write, lane in self._transfers.items():
            if lane and lane[0].end_ns is None:
                lane[0].end_ns = now + round(lane[0].nbytes / self._disk_rates[is_write] * _NS)
            if lane and lane[0].end_ns is not None and lane[0].end_ns <= now:
                self._disk_calls.let_go(is_write, lane.popleft().offset)
                return True
        return False

    def _note(self, update: _Update) -> None:
        """An update has run."""
        update.gate.complete()
        if update.ahead:
            self._begun_ahead.add(update.slot)


class Block(nn.Module):
    """A unit of equal bf16 weights that takes so many seconds of the clock, in equal shares a weight.

    saved_bytes: that each weight's share of the forward saves for backward.
    """

    def __init__(
        self,
        clock: EngineClock,
        forward_s: float,
        backward_s: float,
        count: int,
        elements: int,
        saved_bytes: int = 0,
    ) -> None:
        super().__init__()
        self.clock, self.shares_s, self.saved_bytes = clock, (forward_s / count, backward_s / count), saved_bytes
        self.weights = nn.ParameterList(torch.zeros(elements, dtype=torch.bfloat16) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = _Use.apply(x, weight, self.clock, self.shares_s, self.saved_bytes)
        return x


class CheckpointedBlock(Block):
    """Its backward repeats its forward; what it keeps is its input."""

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(super().__call__, x, use_reentrant=False)
        return out


class _Use(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, clock: EngineClock, shares_s: tuple[float, float], saved_bytes: int
    ) -> Tensor:
        ctx.clock, ctx.seconds, ctx.shape = clock, shares_s[1], weight.shape
        clock.compute(shares_s[0])
        ctx.save_for_backward(torch.zeros(saved_bytes, dtype=torch.uint8))
        return x + weight[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018  # which brings them
        ctx.clock.compute(ctx.seconds)
        # Expanded, so autograd copies it: what it takes over, torch 2.6 lets go of only after the hooks.
        return gradient, torch.full((), 0.01, dtype=torch.bfloat16).expand(ctx.shape), None, None, None
