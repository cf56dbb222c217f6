"""Where the time of traced steps went: a pure function of what was recorded.

Each instant of a step is one of three. It is *exposed* when the training thread was blocked (on a CUDA device: and no
unit computed), *compute* when a forward or backward ran otherwise, and *other* in between: data loading, the loss,
logging, `step()` itself. An exposed instant is charged to the lane that worked then; where several did, to the one that
is busiest over the whole trace, as that is the one the others wait for. Where none did, work was handed from one thread
to another.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ._config import format_size
from ._intervals import Intervals, intersect, subtract, total, union
from ._trace_advice import Advice, advise, duration
from ._trace_records import WORK_LANES, ClockSample, Span, TraceData

__all__ = ["CAUSES", "ClockReport", "LaneUse", "TraceReport", "analyse"]

# What an exposed instant is charged to, beside the lanes.
HAND_OVER = "hand_over"
CAUSES = {
    "to_host": "link, to the host",
    "to_device": "link, to the device",
    "host_update": "host optimizer",
    "disk_read": "disk, reads",
    "disk_write": "disk, writes",
    HAND_OVER: "hand-over between threads",
}
_HIDDEN = 0.02  # of a step: less is within what steps differ by
_MUCH = 0.2  # of a step
_THROTTLED_SHARE = 0.05  # of the samples: fewer may be the beginning of work
_SLOW_CLOCK = 0.95  # of the fastest clock that was seen
_WIDTHS = {3: (36, 12, 8), 6: (16, 11, 11, 11, 14, 13)}  # of the columns of tables that have so many


@dataclasses.dataclass(frozen=True)
class LaneUse:
    """What a lane did in a step, on average: seconds at work, of these hidden and exposed, and bytes by kind."""

    busy_s: float
    hidden_s: float
    exposed_s: float
    nbytes: int
    kinds: Mapping[str, int]

    @property
    def bytes_per_s(self) -> float:
        return self.nbytes / self.busy_s if self.busy_s else 0.0


@dataclasses.dataclass(frozen=True)
class ClockReport:
    """A device's clock over the trace. throttled_share: of the samples, those with a reason; reasons: how many each."""

    device: str
    samples: int
    median_mhz: int
    least_mhz: int
    most_mhz: int
    throttled_share: float
    reasons: Mapping[str, int]

    @property
    def fell(self) -> bool:
        return self.throttled_share > _THROTTLED_SHARE and self.median_mhz < _SLOW_CLOCK * self.most_mhz


@dataclasses.dataclass(frozen=True)
class TraceReport:
    """Seconds a step, on average over `steps` steps. exposed_s: by cause, see `CAUSES`.

    micro_batches: backward passes a step. memory: the most bytes in use at once, by tier and kind. advice: the one
    setting that would help most, None where none would. lost_count: records that found no room; the sums lack them.
    recording_s: what the trace's own hooks took of the threads that ran the steps; part of the times above.
    """

    steps: int
    step_s: float
    compute_s: float
    other_s: float
    exposed_s: Mapping[str, float]
    lanes: Mapping[str, LaneUse]
    micro_batches: float
    memory: Mapping[str, Mapping[str, int]]
    clocks: tuple[ClockReport, ...]
    advice: Advice | None
    models: tuple[Mapping[str, Any], ...]
    lost_count: int
    notes: tuple[str, ...]
    recording_s: float = 0.0

    @property
    def exposed_total_s(self) -> float:
        return sum(self.exposed_s.values())

    @property
    def hidden_s(self) -> float:
        """Seconds of copies, updates and disk that ran behind something else, lanes added up."""
        return sum(use.hidden_s for use in self.lanes.values())

    @property
    def verdict(self) -> str:
        """One sentence: what bounds the step."""
        if not self.steps:
            return "No step ended inside the trace: call optim.step() inside it"
        exposed = self.exposed_total_s
        share = exposed / self.step_s
        waited = f"{duration(exposed)} of {duration(self.step_s)} a step ({share:.1%}) are waited for"
        if share < _HIDDEN:
            text = f"Everything is hidden: {waited}"
        else:
            cause = max(self.exposed_s, key=self.exposed_s.__getitem__)
            text = f"{waited}, {duration(self.exposed_s[cause])} of them for: {CAUSES[cause]}"
        if self.other_s > max(_MUCH * self.step_s, exposed):
            text += f"; {self.other_s / self.step_s:.0%} is neither compute nor waiting: data, loss, clipping, logging"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        values = dataclasses.asdict(self)
        for name, use in self.lanes.items():
            values["lanes"][name]["bytes_per_s"] = use.bytes_per_s
        return values | {"verdict": self.verdict, "exposed_total_s": self.exposed_total_s, "hidden_s": self.hidden_s}

    def pieces(self) -> list[str | list[tuple[str, ...]]]:
        """What `str()` shows, in its order: lines of text, and tables as rows of cells, the first being the header."""
        if not self.steps:
            return [self.verdict, *self._warnings()]
        shown: list[str | list[tuple[str, ...]]] = [self._times()]
        if self.recording_s:
            share = self.recording_s / self.step_s
            shown.append(f"of it the trace's own hooks took {duration(self.recording_s)} ({share:.1%})")
        shown += ["", self._lanes()]
        for tier, kinds in self.memory.items():
            parts = ", ".join(f"{kind} {format_size(nbytes)}" for kind, nbytes in kinds.items() if nbytes)
            shown += [""] if tier == next(iter(self.memory)) else []
            shown += [f"{tier} memory, most at once: {parts}"] if parts else []
        shown += [*map(_clock_text, self.clocks), "", self.verdict]
        if self.advice is not None:
            shown.append(f"try {self.advice.setting}: {self.advice.because}")
        return [*shown, *self._warnings()]

    def __str__(self) -> str:
        return "\n".join(piece if isinstance(piece, str) else _table(piece) for piece in self.pieces())

    def _times(self) -> list[tuple[str, ...]]:
        rows = [("step", self.step_s), ("  compute", self.compute_s)]
        rows += [(f"  exposed: {CAUSES[cause]}", seconds) for cause, seconds in self.exposed_s.items()]
        rows.append(("  other (data, loss, step() itself)", self.other_s))
        batches = "micro-batch" if self.micro_batches == 1 else "micro-batches"
        heading = f"{self.steps} steps of {self.micro_batches:g} {batches}, a step on average:"
        return [(heading, "", ""), *((name, duration(value), f"{value / self.step_s:.1%}") for name, value in rows)]

    def _lanes(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("lane", "busy", "hidden", "exposed", "bytes", "rate")]
        for lane, use in self.lanes.items():
            # Of an update the weights are counted, a part of what it reads and writes.
            rate = "" if lane == "host_update" else f"{use.bytes_per_s / 1e9:.2f} GB/s"
            times = (duration(use.busy_s), duration(use.hidden_s), duration(use.exposed_s))
            rows.append((lane, *times, format_size(use.nbytes), rate))
        return rows

    def _warnings(self) -> list[str]:
        lost = f"{self.lost_count:,} records were lost: the sums lack them; trace fewer steps"
        return [*([lost] if self.lost_count else []), *self.notes]


def analyse(data: TraceData) -> TraceReport:
    """The report of a trace."""
    steps = _counted_steps(data.lane("step"))
    count = len(steps)
    inside = union((step.begin_ns, step.end_ns) for step in steps)
    spans: dict[str, Intervals] = {
        lane: intersect(_covered(data.lane(lane)), inside) for lane in ("phase", "compute", "wait", *WORK_LANES)
    }
    exposed = _exposed(spans, on_cuda=any(model.get("device") == "cuda" for model in data.models))
    causes = _causes(exposed, {lane: spans[lane] for lane in WORK_LANES})
    busy_phases = union([*_covered(_of_names(data.lane("phase"), ("forward", "backward"))), *spans["compute"]])
    compute = subtract(intersect(busy_phases, inside), exposed)
    wall = total(inside)

    def a_step(nanoseconds: int) -> float:
        return nanoseconds / 1e9 / count if count else 0.0

    lanes = {}
    for lane in WORK_LANES:
        if spans[lane]:
            busy, charged = total(spans[lane]), causes.get(lane, 0)
            kinds = _bytes_by_kind(_within(data.lane(lane), inside), count)
            lanes[lane] = LaneUse(a_step(busy), a_step(busy - charged), a_step(charged), sum(kinds.values()), kinds)
    # Of the whole trace: a device may come to a backward after the host has come to the end of its step.
    backwards = _of_names(data.lane("phase"), ("backward",))
    report = TraceReport(
        steps=count,
        step_s=a_step(wall),
        compute_s=a_step(total(compute)),
        other_s=a_step(wall - total(compute) - total(exposed)),
        exposed_s={cause: a_step(causes[cause]) for cause in CAUSES if causes.get(cause)},
        lanes=lanes,
        micro_batches=len(backwards) / len(data.lane("step")) if count else 0.0,
        memory=_peaks(data),
        clocks=tuple(_clock_reports(data.clocks)),
        advice=None,
        models=data.models,
        lost_count=data.lost_count,
        notes=data.notes,
        recording_s=data.recording_ns / 1e9 / len(data.lane("step")) if count else 0.0,
    )
    return dataclasses.replace(report, advice=advise(report)) if count else report


def _counted_steps(steps: Sequence[Span]) -> Sequence[Span]:
    """Not the first of several: what it waited for began before the trace did, or it had nothing to wait for."""
    return steps[1:] if len(steps) > 1 else steps


def _covered(spans: Iterable[Span]) -> Intervals:
    return union((span.begin_ns, span.end_ns) for span in spans)


def _of_names(spans: Iterable[Span], names: Sequence[str]) -> list[Span]:
    return [span for span in spans if span.name in names]


def _within(spans: Iterable[Span], inside: Intervals) -> list[Span]:
    """Those that end inside."""
    return [span for span in spans if any(begin < span.end_ns <= end for begin, end in inside)]


def _exposed(spans: Mapping[str, Intervals], *, on_cuda: bool) -> Intervals:
    if not on_cuda:
        return spans["wait"]
    # The compute stream waits for uploads by itself: between two units of a pass, while the lane works.
    stalls = intersect(subtract(spans["phase"], spans["compute"]), spans["to_device"])
    return subtract(union([*spans["wait"], *stalls]), spans["compute"])


def _causes(exposed: Intervals, lanes: Mapping[str, Intervals]) -> dict[str, int]:
    charged: dict[str, int] = {}
    left = exposed
    for lane in sorted(lanes, key=lambda lane: total(lanes[lane]), reverse=True):
        charged[lane] = total(intersect(left, lanes[lane]))
        left = subtract(left, lanes[lane])
    charged[HAND_OVER] = total(left)
    return charged


def _bytes_by_kind(spans: Iterable[Span], steps: int) -> dict[str, int]:
    sums: dict[str, int] = defaultdict(int)
    for span in spans:
        sums[span.kind or "weights"] += span.nbytes
    return {kind: round(nbytes / steps) for kind, nbytes in sorted(sums.items())}


def _peaks(data: TraceData) -> dict[str, dict[str, int]]:
    peaks: dict[str, dict[str, int]] = {}
    for sample in data.memory:
        tier = peaks.setdefault(sample.tier, {})
        tier[sample.kind] = max(sample.nbytes, tier.get(sample.kind, 0))
    return peaks


def _clock_reports(samples: Sequence[ClockSample]) -> Iterable[ClockReport]:
    by_device: dict[str, list[ClockSample]] = {}
    for sample in samples:
        by_device.setdefault(sample.device, []).append(sample)
    for device, own in by_device.items():
        clocks = sorted(sample.sm_mhz for sample in own)
        reasons: dict[str, int] = defaultdict(int)
        for sample in own:
            for reason in sample.reasons:
                reasons[reason] += 1
        yield ClockReport(
            device=device,
            samples=len(own),
            median_mhz=clocks[len(clocks) // 2],
            least_mhz=clocks[0],
            most_mhz=max(sample.most_mhz for sample in own),
            throttled_share=sum(bool(sample.reasons) for sample in own) / len(own),
            reasons=dict(reasons),
        )


def _clock_text(clock: ClockReport) -> str:
    line = f"{clock.device} clock: {clock.median_mhz} MHz, at least {clock.least_mhz}, of {clock.most_mhz} possible"
    if not clock.fell:
        return line
    reasons = ", ".join(f"{reason} ({count} of {clock.samples} samples)" for reason, count in clock.reasons.items())
    return f"{line}: SLOWED DOWN in {clock.throttled_share:.0%} of the samples, {reasons}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    first, *others = _WIDTHS[len(rows[0])]
    lines = []
    for name, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, others, strict=True)]
        lines.append((name.ljust(first) + "".join(aligned)).rstrip())
    return "\n".join(lines)
