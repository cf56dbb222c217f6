"""The forecast of a step: small pipelines worked out by hand, and what holds for every one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import offload
from offload import Machine, UnitWork, _simulator, forecast
from offload._activation_order import activation_order
from offload._forecast import StepForecast
from offload._simulated_windows import window_schedule
from offload._touch_order import TouchOrder

# A second a byte, so that bytes are seconds.
ONE = Machine(1.0, 1.0, host_update=1.0, device_update=1.0, disk_read=1.0, disk_write=1.0)
# A unit of optimizer and gradients on the host: each of its ways takes a second.
UNIT = UnitWork("u", 1.0, 1.0, gradient_bytes=1, host_update_bytes=1, upload_bytes=1)


def streamed(**more: Any) -> UnitWork:
    return dataclasses.replace(UNIT, upload_bytes=0, weight_bytes=1, **more)


# --- by hand ------------------------------------------------------------------------------------------------


def test_nothing_offloaded_is_compute() -> None:
    units = [UnitWork("a", 1.0, 2.0, device_update_bytes=3), UnitWork("b", 4.0, 5.0)]
    step = forecast(units, ONE, micro_batches=2)
    assert step.seconds == step.bound_seconds == step.busy["compute"] == 27.0
    assert step.bound_by == "compute" and not any(step.exposed.values())


def test_one_unit_hides_nothing() -> None:
    unit = UnitWork("a", 1.0, 2.0, gradient_bytes=10, host_update_bytes=20, upload_bytes=5)
    step = forecast([unit], Machine(10.0, 5.0, host_update=10.0))
    assert step.seconds == 1 + 2 + 1 + 2 + 1
    assert (step.bound_seconds, step.bound_by) == (3.0, "compute")
    assert step.exposed == {"to_host": 1.0, "host_update": 2.0, "to_device": 1.0, "disk_read": 0, "disk_write": 0}


# By hand, from the end of a forward (2) on: backward of b 2-3 and of a 3-4; gradients 3-4 and 4-5. Then as stated.
CASES: list[tuple[str, Sequence[UnitWork], dict[str, Any], float]] = [
    # a is updated 5-6 and back 6-7, b 6-7 and 7-8; forward of a 7-8, of b 8-9
    ("the update hides behind forward", [UNIT] * 2, {}, 7.0),
    # the update of b waits for that of a, which waits for the gradient that leaves last: clipping changes nothing
    ("without clipping", [UNIT] * 2, {"clips": False}, 7.0),
    # forward begins at 8, when b is back
    ("not lazy", [UNIT] * 2, {"lazy": False}, 8.0),
    # two units of a ring of one byte: compute waits for the second gradient, 5, and that is when step() begins
    ("a ring of one gradient", [UNIT] * 2, {"ring_bytes": 1}, 7.0),
    # second micro-batch: forward 4-6, backward of b 6-7, its sum comes 7-8 and leaves 8-9, that of a comes 8-9, its
    # backward 8-9, it leaves 9-10, is updated 10-11, back 11-12; forward of a 12-13, of b 13-14
    ("two micro-batches", [UNIT] * 2, {"micro_batches": 2}, 12.0),
    # both updated 5-6 and 6-7; a comes 6-7 behind its update; forward of a 7-8. b comes 7-8; forward of b 8-9. Both
    # are still there for backward: 9-11
    ("streamed, all in the window", [streamed()] * 2, {"prefetch": 1}, 7.0),
    # gradients leave in step(): 4-5 and 5-6, so uploads begin at 6: a is back at 7, b at 8
    (
        "gradients stay until the step",
        [dataclasses.replace(UNIT, gradient_bytes=0, step_to_host_bytes=1)] * 2,
        {},
        7.0,
    ),
    # gradients come back in step(): that of a, which left 4-5, 5-6, updated 6-7; of b 7-8, 8-9; forward 9-11
    (
        "states on the device",
        [UnitWork("u", 1.0, 1.0, gradient_bytes=1, step_to_device_bytes=1, device_update_bytes=1)] * 2,
        {},
        9.0,
    ),
    # what a saved leaves 2-3, pushed out by what b saved, and comes back 3-4, beside backward of b 2-3; that of a 4-5
    ("activations", [UnitWork("u", 1.0, 1.0, activation_bytes=1)] * 2, {"kept_activations": 0.5}, 5.0),
    # a leaves 2-3 and b 3-4. b comes back 4-5, behind its own way out, then its backward 5-6; with it a 5-6, then 6-7
    ("activations of three units", [UnitWork("u", 1.0, 1.0, activation_bytes=1)] * 3, {"kept_activations": 0.4}, 7.0),
    # b finds no place on the host, which has one block, and stays: a leaves 2-3 and comes back 3-4, as the first
    # backward begins at 3
    (
        "host memory for one",
        [UnitWork("u", 1.0, 1.0, activation_bytes=1)] * 3,
        {"kept_activations": 0.4, "activation_host_bytes": 256},
        6.0,
    ),
    # a is saved at 0 and pushed out at 1, as b begins. It comes back 2-3, while b runs again; a runs again 4-5
    (
        "checkpoints",
        [UnitWork("u", 1.0, 2.0, activation_bytes=1, checkpointed=True)] * 2,
        {"kept_activations": 0.5},
        6.0,
    ),
    # a is packed 2-3, leaves 3-4, comes back 4-5 and is unpacked 5-6; backward 6-7, forward 7-9, and packed 9-10
    (
        "activations packed",
        [UnitWork("u", 1.0, 1.0, activation_bytes=2, sent_activation_bytes=1)] * 2,
        {"kept_activations": 0.5, "machine": dataclasses.replace(ONE, device_update=3.0)},
        7.0,
    ),
    # in halves: of four, two stay. The first leaves 1.5-2 and the second 2-2.5; both are back for backward 3-4
    (
        "activations in parts",
        [UnitWork("u", 1.0, 1.0, activation_bytes=2, parts=2)] * 2,
        {"kept_activations": 0.5, "machine": dataclasses.replace(ONE, to_host=2.0, to_device=2.0)},
        4.0,
    ),
]


@pytest.mark.parametrize(("units", "options", "seconds"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_by_hand(units: Sequence[UnitWork], options: dict[str, Any], seconds: float) -> None:
    assert forecast(units, **{"machine": ONE} | options).seconds == pytest.approx(seconds)


def test_the_training_thread_of_a_cpu_submits_updates_when_the_gradients_have_left() -> None:
    unit = dataclasses.replace(UNIT, gradient_bytes=0, step_to_host_bytes=1)
    # Gradients 4-5 and 5-6, updates 6-7 and 7-8, back at 8 and 9; forward of a 8-9, of b 9-10.
    assert forecast([unit] * 2, dataclasses.replace(ONE, synchronous=True)).seconds == pytest.approx(8.0)


def test_states_on_disk_are_read_ahead_and_every_other_step_goes_backwards() -> None:
    unit = dataclasses.replace(UNIT, upload_bytes=0, disk_read_bytes=1, disk_write_bytes=1)
    fast = dataclasses.replace(ONE, to_host=1e9, disk_read=1e9, disk_write=1e9)
    # Forwards: a is updated 4-5, b 5-6: forward of a 5-6, of b 6-7. Backwards: b first, so a 5-6 and forward 6-8.
    assert forecast([unit] * 2, fast, window_bytes=2).seconds == pytest.approx((5 + 6) / 2)
    # One of the two is still in the window.
    assert forecast([unit] * 2, ONE, window_bytes=1).busy["disk_read"] == pytest.approx(1.0)


# From the end of a forward (2) on: backward of b 2-6, of a 6-10; gradients 6-7 and 10-11; step() at 10.
AHEAD = UnitWork("u", 1.0, 4.0, gradient_bytes=1, host_update_bytes=1, backup_bytes=1)


@pytest.mark.parametrize(
    ("units", "room", "seconds", "clipped_seconds", "backup_bytes"),
    [
        # a is updated 11-12, b 12-13; forward 13-15
        ([AHEAD] * 2, 0, 13, 13, 0),
        # the backup of b takes 7-9 and its update 9-10; that of a 11-12; forward 12-14. If that of b is undone 12-14
        # and done again 14-15, forward 15-17
        ([AHEAD] * 2, 1, 12, 15, 1),
        # that of a could not begin before the step's own
        ([AHEAD] * 2, 2, 12, 15, 1),
        # nor where there is no room for that of b
        ([AHEAD, dataclasses.replace(AHEAD, backup_bytes=3)], 2, 13, 13, 0),
        ([AHEAD, dataclasses.replace(AHEAD, backup_bytes=0)], 2, 13, 13, 0),
        # gradients of c 6-7, b 10-12 (two parts), a 14-15; backups and updates of c 7-10, of b 11-14 and, while a
        # leaves, 14-17; that of a 17-18; forward 18-21. Undone, c 18-20 and 20-21, b 21-23, 23-24, 24-26 and 26-27
        (
            [AHEAD, dataclasses.replace(AHEAD, parts=2, gradient_bytes=2, host_update_bytes=2, backup_bytes=2), AHEAD],
            9,
            18,
            27,
            3,
        ),
    ],
)
def test_updates_that_begin_in_backward(
    units: Sequence[UnitWork], room: int, seconds: float, clipped_seconds: float, backup_bytes: int
) -> None:
    for clips in (False, True):
        step = forecast(units, ONE, lazy=False, clips=clips, speculate_bytes=room)
        assert (step.seconds, step.clipped_seconds) == pytest.approx((seconds, clipped_seconds))
        assert step.backup_bytes == backup_bytes
        updates = sum(unit.host_update_bytes for unit in units)
        assert step.busy["host_update"] == pytest.approx(updates + 2 * backup_bytes)


def test_of_several_micro_batches_the_last_begins_updates() -> None:
    fast = dataclasses.replace(ONE, to_host=1e9, to_device=1e9)
    one, three = (forecast([AHEAD] * 2, fast, speculate_bytes=2, micro_batches=count) for count in (1, 3))
    assert three.seconds == pytest.approx(one.seconds + 2 * (2 + 8)) and three.backup_bytes == one.backup_bytes == 1


def test_parts_of_a_unit_follow_each_other() -> None:
    one = UnitWork("u", 0.0, 4.0, gradient_bytes=4, host_update_bytes=4, upload_bytes=4)
    # The last of four gradients leaves 4-5; updates 5-9; the last upload ends at 10.
    assert forecast([dataclasses.replace(one, parts=4)], ONE).seconds == pytest.approx(10.0)
    assert forecast([one], ONE).seconds == pytest.approx(16.0)


def test_no_forward_waits_for_writes_of_states() -> None:
    """They have all of the next step's compute to end beside."""
    unit = dataclasses.replace(UNIT, forward_seconds=10, backward_seconds=10, disk_read_bytes=1, disk_write_bytes=5)
    step = forecast([unit], ONE)
    assert step.busy["disk_write"] == pytest.approx(5) and step.exposed["disk_write"] == 0


def test_states_larger_than_their_window_are_read_while_others_are_written() -> None:
    unit = UnitWork("u", 0.0, 0.0, gradient_bytes=1, host_update_bytes=1, disk_read_bytes=80, disk_write_bytes=80)
    step = forecast([unit] * 2, ONE, window_bytes=40)
    assert 160 <= step.seconds < 180


def test_weights_on_disk_are_read_before_each_upload_and_each_update() -> None:
    """With room for two units, the least that there is, of twelve; what is in the cache is neither read nor written."""
    units = [streamed(stored_bytes=1)] * 12
    sent = sum(map(len, window_schedule(12, 1)))
    for micro_batches in (1, 3):
        step = forecast(units, ONE, micro_batches=micro_batches)
        assert 10 + micro_batches * (sent - 4) <= step.busy["disk_read"] <= 12 + micro_batches * sent
        assert 10 <= step.busy["disk_write"] <= 12
    step = forecast(units, dataclasses.replace(ONE, disk_write=1e-3), cache_bytes=12)
    assert step.busy["disk_read"] == step.busy["disk_write"] == 0
    assert step.bound_seconds <= step.seconds


@pytest.mark.parametrize(
    ("units", "options", "message"),
    [
        ([], {}, "no units"),
        ([UNIT], {"micro_batches": 0}, "micro_batches is 0"),
        ([UNIT], {"prefetch": 0}, "prefetch is 0"),
        ([dataclasses.replace(UNIT, disk_read_bytes=1)], {"machine": Machine(1.0, 1.0, 1.0)}, "Machine.disk_read="),
    ],
)
def test_what_makes_no_sense_is_refused(units: list[UnitWork], options: dict[str, Any], message: str) -> None:
    with pytest.raises(offload.InvalidArgument, match=message):
        forecast(units, options.pop("machine", ONE), **options)


def test_a_rate_is_positive() -> None:
    with pytest.raises(offload.InvalidArgument, match="to_host is 0"):
        Machine(0, 1.0)


# --- always -------------------------------------------------------------------------------------------------

_RATES = ("to_host", "to_device", "host_update", "device_update", "disk_read", "disk_write")
_bytes = st.integers(0, 50)
_seconds = st.floats(0, 50)


@st.composite
def works(draw: st.DrawFn) -> UnitWork:
    """A unit under any placement."""
    gradient, weight, states = draw(_bytes), draw(st.integers(1, 50)), draw(_bytes)
    leaves, streams, parts = draw(st.booleans()), draw(st.booleans()), draw(st.integers(1, 3))
    saves: dict[str, Any] = {"activation_bytes": draw(_bytes), "checkpointed": draw(st.booleans())}
    saves["sent_activation_bytes"] = draw(st.one_of(st.none(), st.integers(0, saves["activation_bytes"])))
    work = UnitWork("u", draw(_seconds), draw(_seconds), parts=parts, **saves)
    if leaves:
        work = dataclasses.replace(work, gradient_bytes=gradient)
    if streams:
        work = dataclasses.replace(work, weight_bytes=weight)
    if draw(st.booleans()):
        return dataclasses.replace(work, device_update_bytes=states, step_to_device_bytes=gradient if leaves else 0)
    on_disk, in_part = draw(st.booleans()), draw(st.booleans())
    return dataclasses.replace(
        work,
        step_to_host_bytes=0 if leaves else gradient,
        host_update_bytes=states + 1,
        device_update_bytes=states if in_part else 0,
        backup_bytes=states if leaves and not (streams or on_disk) else 0,
        upload_bytes=0 if streams else weight,
        disk_read_bytes=states if on_disk else 0,
        disk_write_bytes=states if on_disk else 0,
    )


@st.composite
def forecasts(draw: st.DrawFn) -> tuple[list[UnitWork], Machine, dict[str, Any]]:
    machine = Machine(**{name: draw(st.floats(0.1, 10)) for name in _RATES}, synchronous=draw(st.booleans()))
    options = {
        "micro_batches": draw(st.integers(1, 3)),
        "prefetch": draw(st.integers(1, 3)),
        "clips": draw(st.booleans()),
        "lazy": draw(st.booleans()),
        "kept_activations": draw(st.sampled_from([0.0, 0.125, 0.5, 1.0])),
        "activation_host_bytes": draw(st.sampled_from([None, 0, 512])),
        "window_bytes": draw(st.sampled_from([0, 30, 1000])),
        "ring_bytes": draw(st.sampled_from([0, 30, 1000])),
        "in_flight_bytes": draw(st.sampled_from([0, 30, 1000])),
    }
    return draw(st.lists(works(), min_size=1, max_size=5)), machine, options


@settings(max_examples=150, deadline=None)
@given(forecasts(), st.sampled_from([0, 30, 1000]))
def test_never_below_the_bound_and_all_of_it_is_compute_or_waiting(case: Any, room: int) -> None:
    units, machine, options = case
    step = forecast(units, machine, **options, speculate_bytes=room)
    assert 0 <= step.backup_bytes <= min(room, sum(unit.backup_bytes for unit in units))
    assert step.busy["host_update"] == pytest.approx(
        (sum(unit.host_update_bytes for unit in units) + 2 * step.backup_bytes) / machine.host_update,
        abs=2 / machine.host_update,
    )
    assert step.seconds >= step.bound_seconds * (1 - 1e-9)
    assert all(seconds <= step.seconds * (1 + 1e-9) for seconds in step.busy.values())
    assert step.busy["compute"] + sum(step.exposed.values()) == pytest.approx(step.seconds)
    saved = [nbytes for unit in units for nbytes in unit.saved_bytes]
    sent = [nbytes for unit in units for nbytes in unit.sent_bytes]
    order = activation_order(saved, options["kept_activations"], options["activation_host_bytes"], sent=sent)
    left = sum(unit.gradient_bytes for unit in units) + sum(sent[n] for gone in order.departures for n in gone)
    left = options["micro_batches"] * left + sum(unit.step_to_host_bytes for unit in units)
    assert step.busy["to_host"] == pytest.approx(left / machine.to_host)


@settings(max_examples=100, deadline=None)
@given(forecasts(), st.sampled_from(_RATES), st.floats(1.0, 10.0))
def test_a_faster_lane_makes_no_step_longer(case: Any, rate: str, times: float) -> None:
    units, machine, options = case
    faster = dataclasses.replace(machine, **{rate: getattr(machine, rate) * times})
    before, after = forecast(units, machine, **options), forecast(units, faster, **options)
    assert after.seconds <= before.seconds * (1 + 1e-9)
    assert after.bound_seconds <= before.bound_seconds * (1 + 1e-9)


@settings(max_examples=50, deadline=None)
@given(forecasts())
def test_everything_twice_as_fast_takes_half_as_long(case: Any) -> None:
    units, machine, options = case
    rates = {name: 2 * getattr(machine, name) for name in _RATES}
    halves = [
        dataclasses.replace(u, forward_seconds=u.forward_seconds / 2, backward_seconds=u.backward_seconds / 2)
        for u in units
    ]
    before = forecast(units, machine, **options)
    after = forecast(halves, dataclasses.replace(machine, **rates), **options)
    assert 2 * after.seconds == pytest.approx(before.seconds)
    assert 2 * after.bound_seconds == pytest.approx(before.bound_seconds)


@settings(max_examples=50, deadline=None)
@given(forecasts())
def test_lanes_without_bytes_need_no_rate(case: Any) -> None:
    units, machine, options = case
    step = forecast(units, machine, **options)
    unused = {name: None for name in _RATES[2:] if not step.busy.get(name)}
    fields = [
        ("device_update", "device_update_bytes"),
        ("device_update", "sent_activation_bytes"),
        ("disk_read", "disk_read_bytes"),
    ]
    for rate, field in fields:
        # Compute that updates, and that packs activations; states that the window keeps.
        if any(getattr(unit, field) is not None and getattr(unit, field) != 0 for unit in units):
            unused.pop(rate, None)
    assert forecast(units, dataclasses.replace(machine, **unused), **options) == step


def played_one_by_one(units: Sequence[UnitWork], machine: Machine, options: dict[str, Any]) -> StepForecast:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_simulator, "_FEW", 1 << 30)
        return forecast(units, machine, **options)


@settings(max_examples=60, deadline=None)
@given(forecasts(), st.integers(34, 90))
def test_micro_batches_that_repeat_are_passed_over(case: Any, micro_batches: int) -> None:
    """With the seconds of playing each, but for rounding."""
    units, machine, options = case
    options |= {"micro_batches": micro_batches}
    step, each = forecast(units, machine, **options), played_one_by_one(units, machine, options)
    assert step.seconds == pytest.approx(each.seconds)
    assert step.busy == pytest.approx(each.busy)
    assert step.exposed == pytest.approx(each.exposed, abs=1e-6 * each.seconds)


def test_a_disk_that_writes_for_many_micro_batches_is_waited_for_as_if_each_was_played() -> None:
    """States of 600 s on disk behind micro-batches of 1 s: at 300 they hide nothing of it, at 3,000 all."""
    unit = dataclasses.replace(
        UNIT, forward_seconds=0.5, backward_seconds=0.5, disk_read_bytes=600, disk_write_bytes=600
    )
    for micro_batches in (300, 3000):
        options = {"micro_batches": micro_batches}
        step, each = forecast([unit, unit], ONE, **options), played_one_by_one([unit, unit], ONE, options)
        assert step.seconds == pytest.approx(each.seconds) and step.busy == pytest.approx(each.busy)
        assert step.exposed == pytest.approx(each.exposed, abs=1e-6 * each.seconds)


def test_a_step_of_very_many_micro_batches_is_not_played_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    played = 0
    forward = _simulator.Pipeline._forward

    def counted(pipeline: Any) -> Any:
        nonlocal played
        played += 1
        return forward(pipeline)

    monkeypatch.setattr(_simulator.Pipeline, "_forward", counted)
    step = forecast([streamed(activation_bytes=3)] * 4, ONE, micro_batches=65_536)
    assert step.seconds >= 65_536 and played < 200


@given(st.integers(1, 12), st.integers(1, 5))
def test_weights_come_as_the_engine_sends_for_them(count: int, prefetch: int) -> None:
    touches = [(unit, False) for unit in range(count)] + [(unit, True) for unit in reversed(range(count))]
    order = TouchOrder()
    sent: list[list[int]] = []
    for _ in range(2):  # the first pass is recorded
        order.begin()
        present: list[int] = []
        sent = []
        for touch in touches:
            order.record(touch)
            window = [touch[0], *order.upcoming(prefetch, {touch[0]})]
            sent.append([unit for unit in window if unit not in present])
            present = window
    assert window_schedule(count, prefetch) == sent
