"""Any order of what users do, whatever copies, updates and disks do meanwhile, gives the bits of a plain pair.

`test_any_order.py` lets the threads run as they will. Here they are late, overtake one another, are slow, or fail.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test

import any_order
import any_order_looks
import offload
from any_order import LOOKS, Side
from copy_schedule import CopySchedule
from offload import _activations, _copy_lanes, _engine, _native
from test_any_order import PHASES, SEEDS, AnyOrder, attempt, kind_of
from training import HOST, RESIDENT, batches, loss_of, make_model, same_bits

pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.cpu_only]

LANES = st.sampled_from(["to_host", "to_device"])
RATES = st.sampled_from([0.0, 1e6, 1e7])
PROGRESS = st.sampled_from([0.0, 0.1, 0.5, 0.9])
# What changes weights or states by hand may have done half of it when it fails.
BY_HAND = (
    *("load", "load_files", "again", "write_weight", "write_between", "swap", "edit_state", "write_state"),
    *("begin_anew", "add_group", "inside", "step_in_backward", "looked"),
)
NEVER = 1 << 40
TOLD = ("asked for by fail_copy", os.strerror(errno.EIO))

# As OFFLOAD_ANY_ORDER of test_any_order.py. Operations fail in these programs alone: when a failure is told depends on
# threads, and with it what can follow, which hypothesis takes for a flaky program where it tries one again.
RANDOM_PROGRAMS = int(os.environ.get("OFFLOAD_ANY_ORDER", "0"))
FAULT_RATES = [0.0, 0.05, 0.3] if RANDOM_PROGRAMS else [0.0]


class AnyOrderOfCopies(AnyOrder):
    """Each program has a `CopySchedule`, or links that are slow; then operations fail, which is told.

    disk_calls: those of every disk tier.
    """

    disk_calls: Any = None

    def make_pair(self, data: Any) -> None:
        if not self.pairs:
            self.begin_copies(data)
        super().make_pair(data)

    def begin_copies(self, data: Any) -> None:
        self.patches = pytest.MonkeyPatch()
        self.schedule: CopySchedule | None = None
        self.armed = self.recovered = False  # armed: from the first fault on, anything may fail
        self.faults = random.Random(data.draw(SEEDS, label="faults"))
        self.fault_rate = data.draw(st.sampled_from(FAULT_RATES), label="of actions")
        ring = data.draw(st.sampled_from([_copy_lanes._RING_BYTES, 2 << 10, 0]), label="ring bytes")
        self.patches.setattr(_copy_lanes, "_RING_BYTES", ring)
        progress = data.draw(st.one_of(PROGRESS, PROGRESS, st.none()), label="progress")
        if progress is not None:
            self.schedule = CopySchedule(self.patches, seed=data.draw(SEEDS, label="seed"), progress=progress)
            return
        rates = {f"{lane}_bytes_per_s": data.draw(RATES, label=lane) for lane in ("to_host", "to_device")}
        self.patches.setattr(_engine, "open_device", lambda _: _native.HostDevice(**rates))

    def placement(self, data: Any) -> dict[str, Any]:
        self.disarm()  # a `wrap` that fails leaves a plain pair, which no action is for
        return super().placement(data)

    # --- what happens meanwhile -----------------------------------------------------------------------------

    @precondition(lambda self: self.schedule is not None)
    @rule(progress=PROGRESS, finish=st.booleans())
    def go_on(self, progress: float, finish: bool) -> None:
        assert self.schedule is not None
        if finish:
            self.schedule.finish()
        self.schedule.progress = progress

    @precondition(lambda self: self.schedule is None)
    @rule(lane=LANES, rate=RATES)
    def limit(self, lane: str, rate: float) -> None:
        self.own.optimizer._engine.device.limit(lane, rate)

    @rule(seed=SEEDS, count=st.integers(2, 5), clipped=st.integers(0, 9))
    def train_and_clip_rarely(self, seed: int, count: int, clipped: int) -> None:
        """As updates ahead of the step are for: most are kept."""
        for number in range(count):
            self.both(any_order.forward, seed + number)
            self.both(any_order.backward, -1, False, False)
            self.both(any_order.clip, 0.1 if number == clipped else 1e9, 2.0)
            self.both(any_order.step, 1.0, False)
            self.both(any_order.zero_grad, True)

    def arm(self) -> None:
        """One of the next copies, reads or writes fails."""
        self.armed = True
        what, nth = self.faults.choice(["to_host", "to_device", "read", "write"]), self.faults.randint(1, 15)
        if what in ("read", "write"):
            for name in (f"p{what}", f"uring_{what}"):
                self.disk_calls.fail(name, nth, errno.EIO)
        else:
            self.own.optimizer._engine.device.fail_copy(what, nth)

    def disarm(self) -> None:
        for _, own in self.pairs:
            for lane in ("to_host", "to_device"):
                own.optimizer._engine.device.fail_copy(lane, 0)
        for name in ("pread", "pwrite", "uring_read", "uring_write"):
            self.disk_calls.fail(name, NEVER, errno.EIO)

    # --- what comes of it -----------------------------------------------------------------------------------

    def both(self, action: Any, *args: Any, **options: Any) -> None:
        if self.recovered:  # the rest of the rule has lost what it was about
            return
        if self.faults.random() < self.fault_rate and action is not any_order.again:
            self.arm()
        if not self.armed:
            super().both(action, *args, **options)
            return
        self.failed = True
        looks = LOOKS.values() if self.watchful else ()
        self.recovered = not (self.went_on(action, *args, **options) and all(self.went_on(look) for look in looks))
        self.failed = False

    @invariant()
    def end_rule(self) -> None:
        self.recovered = False

    def went_on(self, action: Any, *args: Any, **options: Any) -> bool:
        """As `AnyOrder.both`; False where the wrapped pair told of a fault, and both have begun anew since."""
        before = [copy.deepcopy(any_order_looks.weights_read(self.plain)), any_order_looks.states(self.plain)]
        expected, error = attempt(action, self.plain, *args, **options)
        try:
            found, other = attempt(action, self.own, *args, **options)
        except offload.OffloadError as failure:  # of a disk
            found, other = None, failure
        if self.tells_of_fault(other):
            self.recover(
                before, [any_order_looks.weights_read(self.plain), any_order_looks.states(self.plain)], action.__name__
            )
            return False
        if kind_of(error) != kind_of(other):
            raise AssertionError(f"{error!r} and {other!r}") from other or error
        difference = any_order.difference(expected, found, action.__name__)
        assert difference is None, difference
        return True

    def tells_of_fault(self, error: Exception | None) -> bool:
        refused = isinstance(error, offload.StateError) and self.own.optimizer._engine.has_failed
        if not refused and not isinstance(error, (offload.DeviceError, offload.StorageError)):
            return False
        assert any(cause in str(error) for cause in TOLD), str(error)
        return True

    def recover(self, before: Any, after: Any, action: str) -> None:
        """Nothing is lost, or all is refused until the pair is plain; then both begin with what the plain one has."""
        self.disarm()
        for side in (self.plain, self.own):
            side.graphs.clear()
            side.held = None
        found = self.read_again()
        own = self.own
        if found is not None:
            assert action in BY_HAND or not all(any_order.difference(one, found, action) for one in (before, after)), (
                any_order.difference(before, found, action),
                any_order.difference(after, found, action),
            )
            model, optimizer = own.model, own.optimizer
        else:
            model, optimizer = offload.unwrap(own.model, own.optimizer)
            assert not optimizer.state
            model, optimizer = offload.wrap(model, optimizer, **HOST)
        for one in (self.plain.model, model):
            one.zero_grad()
        number, plain = own.number, self.plain
        self.plain, self.own = pair = (
            Side(plain.model, plain.optimizer, wrapped=False),
            Side(model, optimizer, wrapped=True),
        )
        # As the wrapped pair has it now: the action that failed may have been to change it.
        wide = None if optimizer._engine.config.grad_dtype is None else torch.float32
        if self.plain.parameters[0].dtype != torch.float32 and hasattr(torch.Tensor, "grad_dtype"):
            self.plain.set_grad_dtype(wide)
        self.pairs[number], self.own.number = pair, number
        any_order.save(self.plain)
        self.own.saved = self.plain.saved
        for side in pair:
            any_order.load(side, "both")
        self.look_at_all()

    def read_again(self) -> Any:
        """The wrapped pair's weights and states; None where they are refused for good."""
        for _ in range(4):  # each failed read of a disk is told once
            with contextlib.suppress(offload.DeviceError, offload.StorageError, offload.StateError):
                return [any_order_looks.weights_read(self.own), any_order_looks.states(self.own)]
            if self.own.optimizer._engine.has_failed:
                with pytest.raises(offload.StateError, match="an earlier update failed"):
                    any_order.loss_of(self.own, 0)
                return None
        raise AssertionError("neither readable nor refused")

    # These do not go through `both`.

    @precondition(lambda self: not self.armed)
    @rule(data=st.data())
    def resume(self, data: Any) -> None:
        super().resume(data)

    @precondition(lambda self: not self.armed)
    @rule()
    def step_inside(self) -> None:
        super().step_inside()

    def teardown(self) -> None:
        try:
            if getattr(self, "armed", False):
                self.disarm()
                self.fault_rate = 0.0
                for pair in () if self.failed else tuple(self.pairs):
                    self.plain, self.own = pair
                    self.recovered = False
                    for look in LOOKS.values():
                        self.both(look)
            super().teardown()
        finally:
            if hasattr(self, "patches"):
                if self.schedule is not None:
                    self.schedule.finish()
                self.patches.undo()


def test_any_order_of_copies_gives_the_bits_of_a_plain_pair(
    monkeypatch: pytest.MonkeyPatch, disk_calls: Any, disk_path: str, tmp_path: Path
) -> None:
    monkeypatch.setattr(_activations, "MIN_BYTES", 1)
    monkeypatch.setattr(AnyOrderOfCopies, "disk_path", disk_path)
    monkeypatch.setattr(AnyOrderOfCopies, "directory", tmp_path / "checkpoints")
    monkeypatch.setattr(AnyOrderOfCopies, "disk_calls", disk_calls)
    run_state_machine_as_test(
        AnyOrderOfCopies,
        settings=settings(
            max_examples=RANDOM_PROGRAMS or 16,
            stateful_step_count=30,
            derandomize=not RANDOM_PROGRAMS,
            database=None,
            deadline=None,
            phases=PHASES,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_copies_that_a_weight_goes_behind_are_let_go_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever waits for the update would wait for ever: its upload is in their lane."""
    seen = []
    for placement in (RESIDENT, HOST):
        model = make_model()
        schedule = CopySchedule(monkeypatch, seed=0, progress=0.0)
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        loss_of(model, next(batches(1))).backward()
        optimizer.step()
        if placement is HOST:
            for p in model.parameters():
                p.grad.cell.prefetch()  # for a micro-batch that does not come
        optimizer.synchronize()
        assert placement is RESIDENT or schedule.awaited_count > 0
        seen.append([p.detach().clone() for p in model.parameters()])
        schedule.finish()
        monkeypatch.undo()
        offload.unwrap(model, optimizer)
    assert all(map(same_bits, *seen))


def test_a_copy_that_fails_among_others_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else gradients of another step, or none, would count."""
    model = make_model()
    loss_of(model, next(batches(1))).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    told = 0
    for nth in range(1, 8):
        model = make_model()
        schedule = CopySchedule(monkeypatch, seed=nth, progress=0.0)
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
        optimizer._engine.device.fail_copy("to_host", nth)
        loss_of(model, next(batches(1))).backward()
        for p, value in zip(model.parameters(), expected, strict=True):
            assert p.grad is not None
            try:
                assert same_bits(p.grad.clone(), value)
            except offload.DeviceError as error:
                assert "asked for by fail_copy" in str(error)
                told += 1
        optimizer.zero_grad()
        schedule.finish()
        monkeypatch.undo()
        offload.unwrap(model, optimizer)
    assert told > 0


def test_a_mark_behind_held_copies_lets_them_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unified states end with one: whoever reads them would wait for ever for gradients of another optimizer."""
    monkeypatch.setattr(_copy_lanes, "_SMALL_BYTES", 0)  # each gradient leaves alone
    model = make_model()
    schedule = CopySchedule(monkeypatch, seed=0, progress=0.0)
    optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in (model.head, model.embedding)]
    model, (first, second) = offload.wrap(model, optimizers, optimizer="unified", gradients="host", params="device")
    loss_of(model, next(batches(1))).backward()
    first.step()
    assert first.state[model.head.weight]["step"] == 1.0 and schedule.awaited_count > 1
    schedule.finish()
    offload.unwrap(model, (first, second))
