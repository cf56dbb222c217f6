"""Where a step's time went, from records made by hand: every figure is reckoned on paper."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload import TraceReport
from offload._intervals import Intervals, intersect, subtract, total, union
from offload._trace_advice import duration
from offload._trace_file import to_json
from offload._trace_records import ClockSample, MemorySample, Span, TraceData
from offload._trace_report import analyse

MS = 1_000_000
HOST_MODEL: dict[str, Any] = {
    "device": "cpu",
    "optimizer": "host",
    "gradients": "host",
    "params": "device",
    "activations": "device",
    "master": "split",
    "moments": "fp32",
    "prefetch": 1,
    "trainable_count": 1_000_000,
    "disk_bytes": 0,
    "disk_path_count": 1,
}


def span(lane: str, begin_ms: float, end_ms: float, name: str = "", nbytes: int = 0, kind: str = "") -> Span:
    return Span(lane, name, int(begin_ms * MS), int(end_ms * MS), nbytes, kind)


def report(*spans: Span, model: dict[str, Any] | None = None, **more: Any) -> TraceReport:
    """Of a step from 0 to 100 ms with one backward, unless `spans` has steps."""
    given_steps = [one for one in spans if one.lane == "step"]
    steps = () if given_steps else (span("step", 0, 100, "step 1"),)
    data = TraceData(0, 1000 * MS, 0, (*steps, *spans), models=(HOST_MODEL | (model or {}),), **more)
    return analyse(data)


PASSES = (span("phase", 0, 40, "forward"), span("phase", 40, 90, "backward"))


def milliseconds(values: Any) -> Any:
    return {name: pytest.approx(seconds * 1e3) for name, seconds in values.items()}


# --- the sums -----------------------------------------------------------------------------------------------


def test_a_step_is_compute_exposed_and_other() -> None:
    found = report(*PASSES, span("wait", 5, 15, kind="update"), span("host_update", 0, 12, nbytes=600))
    assert milliseconds(found.exposed_s) == {"host_update": 7, "hand_over": 3}
    assert found.compute_s * 1e3 == pytest.approx(90 - 10)
    assert found.other_s * 1e3 == pytest.approx(10)
    assert found.compute_s + found.other_s + found.exposed_total_s == pytest.approx(found.step_s)
    use = found.lanes["host_update"]
    assert (use.busy_s * 1e3, use.hidden_s * 1e3, use.exposed_s * 1e3) == pytest.approx((12, 5, 7))
    assert use.bytes_per_s == pytest.approx(600 / 0.012)


def test_an_exposed_instant_is_of_the_busiest_lane_at_work() -> None:
    spans = [*PASSES, span("wait", 0, 10), span("to_device", 0, 4), span("host_update", 2, 30), span("to_host", 0, 1)]
    assert milliseconds(report(*spans).exposed_s) == {"to_device": 2, "host_update": 8}
    # The link works longer in all, so it is what the update waits for.
    busier = [*spans, span("to_device", 40, 80)]
    assert milliseconds(report(*busier).exposed_s) == {"to_device": 4, "host_update": 6}


def test_what_overlaps_counts_once() -> None:
    reads = [span("disk_read", begin, begin + 20, nbytes=10) for begin in (0, 10)]
    found = report(*PASSES, *reads, span("wait", 0, 5), span("wait", 3, 8))
    assert found.lanes["disk_read"].busy_s * 1e3 == pytest.approx(30)
    assert found.lanes["disk_read"].nbytes == 20
    assert milliseconds(found.exposed_s) == {"disk_read": 8}


def test_the_first_of_several_steps_does_not_count() -> None:
    steps = [span("step", at, at + 100, f"step {at}") for at in (0, 100, 200)]
    waits = [span("wait", 10, 60), span("wait", 110, 120), span("wait", 210, 230)]
    found = report(*steps, *waits)
    assert found.steps == 2 and found.step_s * 1e3 == pytest.approx(100)
    assert milliseconds(found.exposed_s) == {"hand_over": 15}
    assert report(steps[0], waits[0]).exposed_total_s * 1e3 == pytest.approx(50)  # the only one does


def test_micro_batches_and_bytes_are_of_a_step() -> None:
    steps = [span("step", at, at + 100) for at in (0, 100, 200)]
    passes = [span("phase", at, at + 10, "backward") for at in (10, 20, 110, 130, 150, 210, 230, 250, 270)]
    copies = [span("to_host", at, at + 1, nbytes=50, kind="gradients") for at in (110, 210, 10)]
    found = report(*steps, *passes, *copies)
    assert found.micro_batches == 3
    assert found.lanes["to_host"].kinds == {"gradients": 50}


def test_on_cuda_what_the_device_computes_meanwhile_hides_a_wait() -> None:
    spans = (*PASSES, span("compute", 0, 30), span("compute", 45, 90), span("wait", 20, 35))
    assert report(*spans, model={"device": "cuda"}).exposed_total_s * 1e3 == pytest.approx(5)
    assert report(*spans).exposed_total_s * 1e3 == pytest.approx(15)


def test_on_cuda_the_compute_stream_waits_for_uploads_by_itself() -> None:
    spans = (*PASSES, span("compute", 0, 10), span("compute", 30, 90), span("to_device", 5, 20))
    found = report(*spans, model={"device": "cuda"})
    assert milliseconds(found.exposed_s) == {"to_device": 10}  # from 10 to 20; then it is doing something else
    assert found.lanes["to_device"].hidden_s * 1e3 == pytest.approx(5)


def test_without_a_step_there_is_no_figure() -> None:
    found = analyse(TraceData(0, MS, 0, (span("wait", 0, 1),)))
    assert found.steps == 0 and found.advice is None
    assert "No step ended" in found.verdict and "No step ended" in str(found)
    json.dumps(found.to_dict())


def test_memory_is_the_most_of_each_kind() -> None:
    samples = [MemorySample("host", "master", at, size) for at, size in ((0, 5), (1, 9), (2, 3))]
    found = report(*PASSES, memory=(*samples, MemorySample("device", "weights", 0, 4)))
    assert found.memory == {"host": {"master": 9}, "device": {"weights": 4}}


def test_losses_and_notes_are_told() -> None:
    found = report(*PASSES, lost_count=1234, notes=("no clocks",))
    assert "1,234 records were lost" in str(found) and "no clocks" in str(found)


def test_what_recording_took_is_told() -> None:
    found = report(*PASSES, recording_ns=3 * MS)
    assert found.recording_s * 1e3 == pytest.approx(3)
    assert "its own hooks" not in str(found) and "the trace's own hooks took 3.00 ms (3.0%)" in str(found)
    assert "own hooks" not in str(report(*PASSES))


# --- the verdict and the advice -----------------------------------------------------------------------------


def test_a_hidden_step_needs_no_advice() -> None:
    found = report(*PASSES, span("wait", 0, 1.5), span("host_update", 0, 80, nbytes=1))
    assert found.advice is None
    assert found.verdict.startswith("Everything is hidden: 1.50 ms of 100.00 ms")


def test_time_outside_of_training_is_named() -> None:
    found = report(span("phase", 0, 30, "forward"))
    assert "70% is neither compute nor waiting" in found.verdict


@pytest.mark.parametrize(
    ("spans", "model", "setting", "saves_ms", "figure"),
    [
        # 20 of 80 ms are exposed: three quarters of the states on the host hide.
        ([span("wait", 0, 20), span("host_update", 0, 80, nbytes=1)], {}, "optimizer=0.75", 20, "80.00 ms"),
        # All of the update is exposed: no share hides, bf16 moments take 8 of 30 bytes off.
        ([span("wait", 0, 60), span("host_update", 0, 60, nbytes=1)], {}, 'moments="bf16"', 16, "22 of the 30"),
        ([span("wait", 0, 40), span("disk_read", 0, 60)], {"optimizer": "disk", "disk_bytes": 2**30},
         "a disk_path of 2 drives", 30, "1.00 GiB"),
        ([span("wait", 10, 30), span("to_host", 0, 50, nbytes=9, kind="gradients"),
          *(span("phase", at, at + 1, "backward") for at in (1, 5, 9))], {},
         "one micro-batch a step (or fewer, larger ones)", 15, "4 micro-batches"),
        ([span("wait", 0, 10), span("to_host", 0, 50, nbytes=9, kind="activations")], {"activations": "host"},
         "activations=0.80", 10, "100% of the bytes are activations"),
        ([span("wait", 0, 10), span("to_device", 0, 50, nbytes=9)], {"params": "host", "prefetch": 2}, "prefetch=3", 10,
         "rests for 50%"),
        # The link is the limit: 90 ms of passes, of which 20 are waited for.
        ([span("wait", 0, 20), span("to_device", 0, 98, nbytes=9)], {"params": "host"},
         "1.3 times the tokens in a micro-batch", 20, "98% of the step"),
    ],
    ids=["share", "moments", "disk", "micro-batches", "activations", "prefetch", "link"],
)  # fmt: skip
def test_the_setting_that_helps_most(
    spans: list[Span], model: dict[str, Any], setting: str, saves_ms: float, figure: str
) -> None:
    advice = report(*PASSES, *spans, model=model).advice
    assert advice is not None
    assert advice.setting == setting
    assert advice.saves_s * 1e3 == pytest.approx(saves_ms)
    assert figure in advice.because


def test_another_class_is_told_nothing_of_native_settings() -> None:
    """What runs as its own class has no bytes of weights in its records."""
    assert report(*PASSES, span("wait", 0, 20), span("host_update", 0, 80)).advice is None


# --- clocks -------------------------------------------------------------------------------------------------


def clocks(*values: int, reasons: tuple[str, ...] = ()) -> tuple[ClockSample, ...]:
    return tuple(ClockSample(at, "cuda:0", mhz, 1980, reasons) for at, mhz in enumerate(values))


def test_a_slowed_clock_is_told_with_its_reason() -> None:
    found = report(*PASSES, clocks=clocks(1980) + clocks(1200, 1200, reasons=("power cap",)))
    (clock,) = found.clocks
    assert clock.fell and clock.median_mhz == 1200 and clock.throttled_share == pytest.approx(2 / 3)
    assert "SLOWED DOWN in 67% of the samples, power cap (2 of 3 samples)" in str(found)


def test_a_low_clock_without_a_reason_is_rest() -> None:
    found = report(*PASSES, clocks=clocks(300, 300, 1980))
    assert not found.clocks[0].fell and "SLOWED" not in str(found)


# --- tracks -------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=40))
def test_spans_of_a_track_lie_beside_or_inside_each_other(pairs: list[tuple[int, int]]) -> None:
    spans = sorted(
        (Span("disk_read", "", at, at + length) for at, length in pairs), key=lambda s: (s.begin_ns, -s.end_ns)
    )
    events = [e for e in to_json(TraceData(0, 99, 0, tuple(spans)))["traceEvents"] if e["ph"] == "X"]
    by_track: dict[int, list[Span]] = {}
    for event, one in zip(events, spans, strict=True):
        by_track.setdefault(event["tid"], []).append(one)
    for track in by_track.values():
        for one, other in itertools.combinations(track, 2):  # the other begins later, or is shorter
            assert other.begin_ns >= one.end_ns or other.end_ns <= one.end_ns
    most = max((sum(s.begin_ns <= at < s.end_ns for s in spans) for at in range(70)), default=0)
    assert len(by_track) <= most


# --- sets of time -------------------------------------------------------------------------------------------

SETS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8).map(union)


def members(intervals: Intervals) -> set[int]:
    return {instant for begin, end in intervals for instant in range(begin, end)}


@given(SETS, SETS)
def test_intervals_are_sets(one: Intervals, other: Intervals) -> None:
    for result, expected in (
        (intersect(one, other), members(one) & members(other)),
        (subtract(one, other), members(one) - members(other)),
        (union([*one, *other]), members(one) | members(other)),
    ):
        assert members(result) == expected and total(result) == len(expected)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(result))


def test_a_report_is_plain_data() -> None:
    found = report(*PASSES, span("wait", 0, 20), span("host_update", 0, 80, nbytes=1), clocks=clocks(1))
    values = json.loads(json.dumps(found.to_dict()))
    assert values["advice"]["setting"] == "optimizer=0.75" and values["verdict"] == found.verdict
    assert set(dataclasses.asdict(found)) <= set(values)


def test_long_times_are_in_seconds() -> None:
    assert [duration(seconds) for seconds in (0.0015, 9.5, 19.0054)] == ["1.50 ms", "9,500.00 ms", "19.01 s"]
