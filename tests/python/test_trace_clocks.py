"""Clocks of devices in a trace, from an NVML that is made up."""

from __future__ import annotations

import sys
import time
import types
from typing import Any

import pytest
import torch

from offload._clocks import ClockSampler
from offload._trace_units import times_of

DEVICE = torch.device("cuda", 0)


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = types.ModuleType("pynvml")
    made.asked = []  # type: ignore[attr-defined]
    made.throttle = 0x4 | 0x1  # type: ignore[attr-defined]
    functions = {
        "NVMLError": NVMLError,
        "NVML_CLOCK_SM": 1,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: made.asked.append(uuid) or "handle",
        "nvmlDeviceGetMaxClockInfo": lambda handle, kind: 1980,
        "nvmlDeviceGetClockInfo": lambda handle, kind: 1200,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: made.throttle,
    }
    for name, value in functions.items():
        setattr(made, name, value)
    monkeypatch.setitem(sys.modules, "pynvml", made)
    properties = types.SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 77)
    return made


def test_a_sample_has_the_clock_and_why_it_is_low(nvml: Any) -> None:
    sampler = ClockSampler([DEVICE])
    sampler.sample()
    (clock,) = sampler.clocks
    assert (clock.device, clock.sm_mhz, clock.most_mhz, clock.reasons) == ("cuda:0", 1200, 1980, ("power cap",))
    assert nvml.asked == ["GPU-1234"] and sampler.note == ""
    assert [(sample.tier, sample.kind, sample.nbytes) for sample in sampler.memory] == [
        ("device", "allocated on cuda:0", 77)
    ]


def test_the_thread_ends_with_the_trace(nvml: Any) -> None:
    sampler = ClockSampler([DEVICE])
    sampler.start()
    sampler.stop()
    assert not sampler._thread.is_alive()


def test_a_refusal_in_between_keeps_what_there_is(nvml: Any) -> None:
    sampler = ClockSampler([DEVICE])
    sampler.sample()

    def refuse(handle: Any, kind: int) -> int:
        raise NVMLError("the device fell off the bus")

    nvml.nvmlDeviceGetClockInfo = refuse
    sampler.sample()
    sampler.sample()
    assert len(sampler.clocks) == 1 and len(sampler.memory) == 3
    assert "fell off the bus" in sampler.note


def test_without_nvml_the_trace_says_so(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    sampler = ClockSampler([DEVICE])
    sampler.sample()
    assert not sampler.clocks and "pip install nvidia-ml-py" in sampler.note


def test_a_cpu_has_no_sampler_and_no_note() -> None:
    sampler = ClockSampler([])
    sampler.start()
    sampler.stop()
    assert sampler.note == "" and not sampler.clocks


class Event:
    """One that happens when it is recorded, 3 ms after the one before."""

    count = 0

    def record(self, stream: str) -> None:
        assert stream == "compute"
        Event.count += 1
        self.at_ms = 3 * Event.count

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: Event) -> float:
        return later.at_ms - self.at_ms


def test_events_of_the_compute_stream_are_times_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "compute")
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    before_ns = time.monotonic_ns()
    times = times_of(DEVICE)
    after_ns = time.monotonic_ns()
    first, second = times.now(), times.now()
    assert not waited
    assert times.read(second) - times.read(first) == 3_000_000
    assert before_ns <= times.read(first) - 3_000_000 <= after_ns
    assert waited == [DEVICE]  # once, when the trace is over
