"""Training by the real engine on a clock that a test moves: a step takes what its copies and its compute take.

Copies take their bytes over the rate of their lane, compute takes what `EngineClock.compute` is told, and updates take
no time, or what `EngineClock` is told. The hand moves only when everything that can run has run, so each run gives the
same figures.
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

from offload import _engine, _native

_NS = 1_000_000_000
_wait = _native.Ticket.wait


@dataclass(eq=False)
class _Work:
    """A copy or an update. after: what it waits for. Of an update, gate: what the native one waits for until it is to
    end; seconds: that it takes; ahead: it begins before its step; uploads: a copy follows that ends it."""

    ticket: _native.Ticket
    after: list[_native.Ticket]
    gate: _native.Ticket | None = None
    slot: int = -1
    seconds: float = 0.0
    ahead: bool = False
    uploads: bool = False
    end_ns: int | None = None  # once it has begun

    @property
    def can_run(self) -> bool:
        return all(ticket.done for ticket in self.after)


class EngineClock:
    """Every engine made while the test runs has this clock. Rates of the lanes are in bytes a second. At the end of
    `with` nothing is left that waits for the hand.

    update_s: of each update on the host; ahead_s: of one that begins before its step, with its backup. The step that
    comes to such an update is expected to take it up, in no time.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        to_host: float,
        to_device: float,
        update_s: float = 0.0,
        ahead_s: float = 0.0,
    ) -> None:
        self._update_s, self._ahead_s = update_s, ahead_s
        self._begun_ahead: set[int] = set()  # slots, since the last step
        self._clock = _native.ManualClock()
        self._device = _native.HostDevice(
            clock=self._clock, to_host_bytes_per_s=to_host, to_device_bytes_per_s=to_device
        )
        self._lanes: dict[str, deque[_Work]] = {"to_host": deque(), "to_device": deque()}
        self._updates: deque[_Work] = deque()
        self._uploading: dict[int, bool] = {}  # by slot: whether its weight is uploaded
        monkeypatch.setattr(_engine, "open_device", lambda _: self._device)
        for lane in self._lanes:
            monkeypatch.setattr(_native.TransferQueue, f"submit_{lane}", self._submitting(lane))
        monkeypatch.setattr(_native.TransferQueue, "submit_all_to_host", self._submitting_all())
        monkeypatch.setattr(_native.TransferQueue, "wait_on_stream", self._waiting_on_stream())
        monkeypatch.setattr(_native.StepPipeline, "add_slot", self._adding())
        monkeypatch.setattr(_native.StepPipeline, "submit", self._updating())
        monkeypatch.setattr(_native.StepPipeline, "speculate", self._updating_ahead())
        monkeypatch.setattr(_native.StepPipeline, "wait", self._waiting_for_updates())
        clock = self

        def wait(ticket: _native.Ticket, timeout_s: float | None = None) -> bool:
            clock._reach(ticket)
            return _wait(ticket, timeout_s)

        monkeypatch.setattr(_native.Ticket, "wait", wait)

    @property
    def seconds(self) -> float:
        return self._clock.now_ns() / _NS

    def compute(self, seconds: float) -> None:
        """The training thread computes for so long, while copies go on."""
        end = self._clock.now_ns() + round(seconds * _NS)
        while (deadline := self._settle()) is not None and deadline <= end:
            self._move_to(deadline)
        self._move_to(end)
        self._settle()

    def __enter__(self) -> EngineClock:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends every copy and update that waits for the hand: who lets go of an engine that failed waits for them."""
        for lane in self._lanes:
            self._device.limit(lane, 0)
        for update in self._updates:
            if update.gate is not None:
                update.gate.complete()
        while any(self._device.pending_count(lane) for lane in self._lanes):
            self._clock.advance(_NS)
            os.sched_yield()  # one may have begun at a rate, and read the clock only now

    # --- what stands in for the native methods --------------------------------------------------------------

    def _submitting(self, lane: str) -> Any:
        submit = getattr(_native.TransferQueue, f"submit_{lane}")

        def call(
            queue: Any, destination: int, source: int, nbytes: int, stream: int = 0, after: Any = None, *given: Any
        ) -> _native.Ticket:
            self._settle()
            ticket: _native.Ticket = submit(queue, destination, source, nbytes, stream, after, *given)
            self._lanes[lane].append(_Work(ticket, [] if after is None else [after]))
            self._settle()
            return ticket

        return call

    def _submitting_all(self) -> Any:
        submit = _native.TransferQueue.submit_all_to_host

        def call(queue: Any, copies: list[Any], *given: Any) -> None:
            *_, (*_, ticket, _) = copies  # of all of them
            self._settle()
            submit(queue, copies, *given)
            self._lanes["to_host"].append(_Work(ticket, []))
            self._settle()

        return call

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
            self._uploading[number] = bool(slot.get("device_weight"))
            return number

        return call

    def _updating(self) -> Any:
        submit = _native.StepPipeline.submit

        def call(pipeline: Any, jobs: Any, stream: int = 0, **options: Any) -> list[_native.Ticket]:
            self._settle()
            gates = [_native.Ticket.pending() for _ in jobs]
            gated = [(*job[:3], [*job[3], gate], *job[4:]) for job, gate in zip(jobs, gates, strict=True)]
            tickets: list[_native.Ticket] = submit(pipeline, gated, stream, **options)
            # Without those that were discarded. The others begin: the step's own updates wait for the clock.
            self._updates = deque(update for update in self._updates if not update.ticket.done)
            self._begun_ahead |= {update.slot for update in self._updates if update.ahead}
            for job, gate, ticket in zip(jobs, gates, tickets, strict=True):
                seconds = 0.0 if job[0] in self._begun_ahead else self._update_s
                after, uploads = list(job[3]), self._uploading[job[0]]
                # The ticket of its weight ends last, states being in memory: who reaches for either finds it ended.
                weight = pipeline.weight(ticket)
                self._updates.append(_Work(weight, after, gate, job[0], seconds, uploads=uploads))
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
            self._updates.append(_Work(ticket, list(job[3]), gate, job[0], self._ahead_s, ahead=True))
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
        """Returns when whatever can run without the hand has run; when the next copy, or the update that runs, ends,
        None without one."""
        while True:
            self._forget_ended()
            now = self._clock.now_ns()
            if self._updates and self._updates[0].can_run:
                update = self._updates[0]
                if update.end_ns is None:
                    update.end_ns = now + round(update.seconds * _NS)
                if update.end_ns <= now:
                    self._note(self._updates.popleft())
                    continue
            sleeping = sum(bool(lane) and lane[0].can_run for lane in self._lanes.values())
            deadlines = [deadline for deadline in self._clock.deadlines_ns() if deadline > now]
            if len(deadlines) == sleeping:
                if self._updates and self._updates[0].end_ns is not None:
                    deadlines.append(self._updates[0].end_ns)
                return min(deadlines, default=None)
            os.sched_yield()  # a lane's thread is between two copies

    def _forget_ended(self) -> None:
        for lane in self._lanes.values():
            while lane and lane[0].ticket.done:
                lane.popleft()

    def _note(self, update: _Work) -> None:
        """Returns when an update has run: its upload is in the lane then, if it has one."""
        assert update.gate is not None
        update.gate.complete()
        if update.ahead:
            self._begun_ahead.add(update.slot)
        if not update.uploads:
            _wait(update.ticket)
            return
        lane = self._lanes["to_device"]
        while self._device.pending_count("to_device") <= len(lane):
            self._forget_ended()
            os.sched_yield()
        lane.append(_Work(update.ticket, []))


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
