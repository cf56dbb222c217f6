"""Traces as JSON that Perfetto and chrome://tracing open, and back; and joined with one of torch.profiler.

Times are microseconds after `baseTimeNanoseconds` of the calendar, by the rule of Kineto, torch.profiler's tracer: so
one of each, of the same run, shows on one axis when both are opened together.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ._errors import InvalidArgument
from ._trace_records import LANES, ClockSample, MemorySample, Span, TraceData

__all__ = ["from_json", "join_profiler", "read_json", "to_json", "write_text"]

_VERSION = 1
# Kineto counts from the beginning of the present quarter: of a year of 365.2425 days, in whole seconds.
_QUARTER_NS = 7_889_238 * 10**9
# Processes of ours beside torch.profiler's, which has the real number: Linux has none as high.
_PROCESS_OFFSET = 10_000_000
# Of a lane, at most so many tracks.
_ROWS = 100
_TITLES = {
    "step": "steps",
    "phase": "forward, backward, step()",
    "compute": "compute, by unit",
    "wait": "the training thread waits",
    "to_host": "copies to the host",
    "to_device": "copies to the device",
    "host_update": "host optimizer",
    "disk_read": "disk reads",
    "disk_write": "disk writes",
}


def to_json(data: TraceData) -> dict[str, Any]:
    """The trace as Chrome's trace format. `from_json` gives it back; times are as exact as the format's numbers are in
    a quarter, to a nanosecond."""
    base_ns = (data.begin_ns + data.realtime_offset_ns) // _QUARTER_NS * _QUARTER_NS
    shift_ns = data.realtime_offset_ns - base_ns
    process = os.getpid() + _PROCESS_OFFSET

    def microseconds(at_ns: int) -> float:
        return (at_ns + shift_ns) / 1000

    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": process, "tid": 0, "name": "process_name", "args": {"name": "offload"}},
        {"ph": "M", "pid": process, "tid": 0, "name": "process_sort_index", "args": {"sort_index": -1}},
    ]
    tracks = _tracks(data.spans)
    for track in sorted(set(tracks)):
        lane, row = LANES[track // _ROWS], track % _ROWS
        title = _TITLES[lane] if row == 0 else f"{_TITLES[lane]} ({row + 1})"
        meta = {"ph": "M", "pid": process, "tid": track + 1}
        events.append({**meta, "name": "thread_name", "args": {"name": title}})
        events.append({**meta, "name": "thread_sort_index", "args": {"sort_index": track}})
    events += [
        {
            "ph": "X",
            "pid": process,
            "tid": track + 1,
            "cat": span.lane,
            "name": span.name or span.kind or span.lane,
            "ts": microseconds(span.begin_ns),
            "dur": (span.end_ns - span.begin_ns) / 1000,
            "args": {"unit": span.name, "bytes": span.nbytes, "kind": span.kind, "thread": span.thread},
        }
        for span, track in zip(data.spans, tracks, strict=True)
    ]

    def counter(name: str, at_ns: int, values: dict[str, int]) -> dict[str, Any]:
        return {"ph": "C", "pid": process, "tid": 0, "name": name, "ts": microseconds(at_ns), "args": values}

    # A counter event shows all kinds of its tier, stacked.
    present: dict[str, dict[str, int]] = {}
    for sample in data.memory:
        tier = present.setdefault(sample.tier, {})
        tier[sample.kind] = sample.nbytes
        events.append(counter(f"{sample.tier} memory", sample.at_ns, dict(tier)))
    events += [counter(f"{clock.device} clock MHz", clock.at_ns, {"sm": clock.sm_mhz}) for clock in data.clocks]
    return {
        "schemaVersion": 1,
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": base_ns,
        "traceEvents": events,
        "offload": {
            "version": _VERSION,
            "begin_ns": data.begin_ns,
            "end_ns": data.end_ns,
            "realtime_offset_ns": data.realtime_offset_ns,
            "memory": [[s.tier, s.kind, s.at_ns, s.nbytes] for s in data.memory],
            "clocks": [[c.at_ns, c.device, c.sm_mhz, c.most_mhz, list(c.reasons)] for c in data.clocks],
            "models": [dict(model) for model in data.models],
            "lost_count": data.lost_count,
            "recording_ns": data.recording_ns,
            "notes": list(data.notes),
        },
    }


def _tracks(spans: Sequence[Span]) -> list[int]:
    """The track of each span: the first of its lane in which it lies beside the others, or inside one.

    Viewers draw what overlaps otherwise wrongly, or not at all; several reads of a disk do. `spans` are in order.
    """
    open_ends: dict[str, list[list[int]]] = {}
    tracks = []
    for span in spans:
        rows = open_ends.setdefault(span.lane, [])
        for row, ends in enumerate(rows):
            while ends and ends[-1] <= span.begin_ns:
                ends.pop()
            if not ends or span.end_ns <= ends[-1] or row == _ROWS - 1:
                ends.append(span.end_ns)
                break
        else:
            row = len(rows)
            rows.append([span.end_ns])
        tracks.append(LANES.index(span.lane) * _ROWS + row)
    return tracks


def from_json(values: Mapping[str, Any], where: str) -> TraceData:
    """The trace that `to_json` wrote. Raises `InvalidArgument` for anything else; `where` is its name."""
    try:
        own = values["offload"]
        if own["version"] != _VERSION:
            raise InvalidArgument(f"{where} is a trace of version {own['version']}; this offload reads {_VERSION}")
        shift_ns = own["realtime_offset_ns"] - values["baseTimeNanoseconds"]
        spans = []
        for event in values["traceEvents"]:
            if event["ph"] == "X" and event.get("cat") in LANES:
                begin_ns = round(event["ts"] * 1000) - shift_ns
                facts = event["args"]
                spans.append(
                    Span(
                        event["cat"],
                        facts["unit"],
                        begin_ns,
                        begin_ns + round(event["dur"] * 1000),
                        facts["bytes"],
                        facts["kind"],
                        facts["thread"],
                    )
                )
        return TraceData(
            begin_ns=own["begin_ns"],
            end_ns=own["end_ns"],
            realtime_offset_ns=own["realtime_offset_ns"],
            spans=tuple(spans),
            memory=tuple(MemorySample(*sample) for sample in own["memory"]),
            clocks=tuple(
                ClockSample(at_ns, device, sm_mhz, most_mhz, tuple(reasons))
                for at_ns, device, sm_mhz, most_mhz, reasons in own["clocks"]
            ),
            models=tuple(own["models"]),
            lost_count=own["lost_count"],
            recording_ns=own.get("recording_ns", 0),  # traces of before have none
            notes=tuple(own["notes"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(
            f"{where} is no trace of `offload trace`: give the JSON that it wrote ({type(error).__name__}: {error})"
        ) from error


def join_profiler(trace: Mapping[str, Any], profile: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What torch.profiler exported of the same run, with the events of `trace` on its time axis.

    Raises `InvalidArgument` when `profile` is none, or of another time.
    """
    events = profile.get("traceEvents") if isinstance(profile, Mapping) else None
    if not isinstance(events, list):
        raise InvalidArgument(f"{where} is no trace of torch.profiler: give what export_chrome_trace() wrote")
    # Before torch 2.3 times are of the calendar.
    shift_us = (trace["baseTimeNanoseconds"] - profile.get("baseTimeNanoseconds", 0)) / 1000
    moved = [{**event, "ts": event["ts"] + shift_us} if "ts" in event else event for event in trace["traceEvents"]]
    theirs = [event["ts"] for event in events if event.get("ph") == "X"]
    ours = [event["ts"] for event in moved if event["ph"] == "X"]
    if theirs and ours and (max(theirs) < min(ours) or max(ours) < min(theirs)):
        gap_s = max(min(ours) - max(theirs), min(theirs) - max(ours)) / 1e6
        raise InvalidArgument(f"{where} is of another run: its events and those of the trace are {gap_s:,.0f} s apart")
    return {**profile, "traceEvents": [*events, *moved], "offload": trace["offload"]}


def read_json(path: str | os.PathLike[str]) -> Any:
    """The JSON in a file, or in one of gzip (`.gz`). Raises `InvalidArgument` for one that cannot be read."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        return json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except (OSError, ValueError, EOFError, RecursionError) as error:  # RecursionError: brackets in brackets
        raise InvalidArgument(f"cannot read {path}: {error}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Whole or not at all: a file of that name is replaced by a complete one."""
    path = Path(path)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
