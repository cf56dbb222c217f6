"""A trace as one HTML page: timeline, memory by tier, the verdict. It needs no network, and no more than a browser."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

from ._trace_records import LANES, MemorySample, Span, TraceData
from ._trace_report import CAUSES, TraceReport

__all__ = ["page"]

_MOST_SPANS = 100_000  # more than a browser draws at leisure; of a longer trace the last steps are shown
_MOST_SAMPLES = 4_000  # of a kind of memory: more than there are pixels


def page(data: TraceData, report: TraceReport) -> str:
    """The page's text."""
    shown = _last_steps(data)
    # The first step begins with the trace, and what comes before its first forward may be long.
    begin_ns = min((span.begin_ns for span in shown if span.lane != "step"), default=data.begin_ns)
    names: dict[str, int] = {}

    def index(text: str) -> int:
        return names.setdefault(text, len(names))

    lanes = [
        {
            "lane": lane,
            "spans": [
                [span.begin_ns - begin_ns, span.end_ns - span.begin_ns, index(span.name), span.nbytes, index(span.kind)]
                for span in shown
                if span.lane == lane
            ],
        }
        for lane in LANES
        if any(span.lane == lane for span in shown)
    ]
    values: dict[str, Any] = {
        "lanes": lanes,
        "names": list(names),
        "memory": _series(data.memory, begin_ns, data.end_ns),
        "clocks": [[clock.at_ns - begin_ns, clock.device, clock.sm_mhz] for clock in data.clocks],
        "duration": max(data.end_ns - begin_ns, 1),
        "hidden_spans": len(data.spans) - len(shown),
        "report": report.to_dict(),
        "causes": CAUSES,
    }
    template = files("offload").joinpath("trace_page.html").read_text()
    # Inside a script element nothing but its end tag is special.
    text = json.dumps(values, separators=(",", ":")).replace("</", "<\\/")
    return template.replace("@VERDICT@", html.escape(report.verdict)).replace("@DATA@", text)


def _last_steps(data: TraceData) -> list[Span]:
    spans = list(data.spans)
    for step in data.lane("step"):
        if len(spans) <= _MOST_SPANS:
            break
        spans = [span for span in spans if span.begin_ns >= step.end_ns]
    return spans[-_MOST_SPANS:]


def _series(samples: Iterable[MemorySample], begin_ns: int, end_ns: int) -> list[dict[str, Any]]:
    """By tier and kind: times and bytes, of which each holds until the next one."""
    by_kind: dict[tuple[str, str], list[list[int]]] = {}
    for sample in samples:
        points = by_kind.setdefault((sample.tier, sample.kind), [])
        point = [max(sample.at_ns - begin_ns, 0), sample.nbytes]
        if points and points[-1][0] == point[0]:
            points[-1] = point
        elif not points or points[-1][1] != point[1]:
            points.append(point)
    tiers: dict[str, list[dict[str, Any]]] = {}
    for (tier, kind), points in by_kind.items():
        if any(nbytes for _, nbytes in points):
            tiers.setdefault(tier, []).append({"kind": kind, "points": _thinned(points, end_ns - begin_ns)})
    return [{"tier": tier, "kinds": kinds} for tier, kinds in tiers.items()]


def _thinned(points: list[list[int]], duration_ns: int) -> list[list[int]]:
    """The largest of each pixel's worth of time, where there are more."""
    if len(points) <= _MOST_SAMPLES:
        return points
    largest: dict[int, list[int]] = {}
    for point in points:
        cell = point[0] * _MOST_SAMPLES // max(duration_ns, 1)
        if cell not in largest or point[1] > largest[cell][1]:
            largest[cell] = point
    return list(largest.values())
