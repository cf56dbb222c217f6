"""What a trace is made of, as plain values: spans on lanes, samples of memory and of clocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["COMPUTE_LANES", "LANES", "WORK_LANES", "ClockSample", "MemorySample", "Span", "TraceData"]

# In the order in which they are shown. A step ends with the optimizer's step(); phases are forward and backward of the
# model and step() itself, compute those of its units; wait is when the training thread was blocked.
COMPUTE_LANES = ("step", "phase", "compute", "wait")
WORK_LANES = ("to_host", "to_device", "host_update", "disk_read", "disk_write")
LANES = (*COMPUTE_LANES, *WORK_LANES)


@dataclasses.dataclass(frozen=True)
class Span:
    """Something that took from begin_ns to end_ns, on one clock for all. kind: of the host memory that a copy used.

    name: the unit or parameter, "" for several. nbytes: moved, or of weights updated. thread: the kernel's number.
    """

    lane: str
    name: str
    begin_ns: int
    end_ns: int
    nbytes: int = 0
    kind: str = ""
    thread: int = 0


@dataclasses.dataclass(frozen=True)
class MemorySample:
    """Bytes in use from at_ns on, of `tier` ("device", "host", "disk") for `kind`."""

    tier: str
    kind: str
    at_ns: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class ClockSample:
    """A device's clock at at_ns, the fastest that it has, and why it is slowed down."""

    at_ns: int
    device: str
    sm_mhz: int
    most_mhz: int
    reasons: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TraceData:
    """A whole trace. Times are nanoseconds of CLOCK_MONOTONIC; add realtime_offset_ns for those of the calendar.

    models: by wrapped model, its device and where the plan has put what. lost_count: records that found no room.
    recording_ns: what the trace's own hooks took of the threads that ran the steps.
    """

    begin_ns: int
    end_ns: int
    realtime_offset_ns: int
    spans: tuple[Span, ...]
    memory: tuple[MemorySample, ...] = ()
    clocks: tuple[ClockSample, ...] = ()
    models: tuple[Mapping[str, Any], ...] = ()
    lost_count: int = 0
    recording_ns: int = 0
    notes: tuple[str, ...] = ()

    def lane(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.lane == name]
