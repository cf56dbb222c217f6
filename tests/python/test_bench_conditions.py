"""What a bench tells of the machine meanwhile: clocks of a GPU, and other work."""

from __future__ import annotations

import os
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.cli import _bench, _bench_conditions
from offload.cli._bench_clocks import ClocksUnknown, open_clocks, over_time
from offload.cli._bench_conditions import noise, recorded
from offload.cli._every import every

UUID = "GPU-12345678-1234-1234-1234-123456789abc"
POWER_CAP, IDLE, APPLICATION = 0x4, 0x1, 0x2


class NvmlError(Exception):
    pass


def pynvml(**changes: Any) -> types.ModuleType:
    """NVIDIA's binding over a card that runs at 1,410 MHz, held by its power cap."""

    def by_uuid(uuid: str) -> str:
        if uuid != UUID:
            raise NvmlError("Not Found")
        return "gpu"

    def not_told(gpu: str) -> int:
        raise NvmlError("Not Supported")

    module = types.ModuleType("pynvml")
    calls = {
        "NVMLError": NvmlError,
        "NVML_CLOCK_SM": 1,
        "NVML_CLOCK_MEM": 2,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetClockInfo": lambda gpu, kind: {1: 1410, 2: 2619}[kind],
        "nvmlDeviceGetMaxClockInfo": lambda gpu, kind: {1: 1980}[kind],
        "nvmlDeviceGetTemperature": lambda gpu, sensor: {0: 61}[sensor],
        "nvmlDeviceGetPowerUsage": lambda gpu: 698_500,
        "nvmlDeviceGetEnforcedPowerLimit": not_told,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: POWER_CAP | APPLICATION,
    }
    module.__dict__.update(calls | changes)
    return module


@pytest.fixture
def no_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Neither NVML nor nvidia-smi; the folder is all of PATH."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def nvidia_smi(folder: Path, script: str) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


# --- clocks of a GPU ------------------------------------------------------------------------------------------------


def test_nvml_tells_clocks_and_what_holds_them_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", pynvml())
    clocks = open_clocks(UUID)
    assert clocks.source == "nvml"
    assert clocks.sample() == {
        "sm_mhz": 1410,
        "memory_mhz": 2619,
        "max_sm_mhz": 1980,
        "temperature_c": 61,
        "power_w": 698.5,
        "power_limit_w": None,  # which this card does not tell
        "limited_by": ["application clocks", "power cap"],
    }


def test_nvidia_smi_stands_in_for_nvml(no_tools: Path) -> None:
    nvidia_smi(
        no_tools, f'echo "$@" > {no_tools}/asked; echo "1755, 2619, 1980, 45, [N/A], 700.00, 0x0000000000000001"'
    )
    clocks = open_clocks(UUID)
    assert clocks.source == "nvidia-smi" and clocks.period_s > 1, "each sample is a process"
    sample = clocks.sample()
    assert (sample["sm_mhz"], sample["memory_mhz"], sample["max_sm_mhz"]) == (1755, 2619, 1980)
    assert (sample["power_w"], sample["power_limit_w"], sample["limited_by"]) == (None, 700.0, ["idle"])
    asked = (no_tools / "asked").read_text()
    assert f"--id={UUID}" in asked and "clocks_event_reasons.active" in asked and "nounits" in asked


def test_an_older_nvidia_smi_is_asked_by_the_older_name(no_tools: Path) -> None:
    nvidia_smi(
        no_tools,
        'case "$2" in *event_reasons*) echo "Field is not a valid field to query."; exit 2;; esac\n'
        'echo "1000, 1, 2, 3, 4, 5, 0x0000000000000044"',
    )
    assert open_clocks(UUID).sample()["limited_by"] == ["power cap", "hardware thermal slowdown"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (None, "pynvml (nvidia-ml-py) is not installed; nvidia-smi is not on PATH"),
        ("echo No devices were found >&2; exit 6", "nvidia-smi: No devices were found"),
        ("echo some, words", "nvidia-smi: some, words"),
        ('echo "a, b, c, d, e, f, g"', "nvidia-smi: could not convert string to float"),
    ],
)
def test_clocks_that_nobody_tells_are_unknown_with_the_reason(script: str | None, words: str, no_tools: Path) -> None:
    if script is not None:
        nvidia_smi(no_tools, script)
    with pytest.raises(ClocksUnknown) as caught:
        open_clocks(UUID)
    assert words in str(caught.value)
    with recorded(UUID) as conditions:
        gpu = conditions()["gpu"]
    assert gpu == {"unknown": str(caught.value)}


def test_a_card_that_nvml_does_not_know_is_asked_of_nvidia_smi(no_tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", pynvml())
    with pytest.raises(ClocksUnknown, match="NVML: Not Found; nvidia-smi is not on PATH"):
        open_clocks("GPU-other")


def test_a_gpu_is_named_as_nvidias_tools_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(uuid=UUID.removeprefix("GPU-"))  # as torch has it
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert _bench._gpu_uuid(torch.device("cuda", 0)) == UUID and _bench._gpu_uuid(torch.device("cpu")) is None


def test_throttling_is_more_than_idleness() -> None:
    samples = [
        {"sm_mhz": 1980, "power_w": None, "limited_by": []},
        {"sm_mhz": 210, "power_w": 70.0, "limited_by": ["idle", "application clocks"]},
        {"sm_mhz": 1410, "power_w": 700.0, "limited_by": ["power cap"]},
        {"sm_mhz": None, "power_w": 690.0, "limited_by": ["hardware thermal slowdown"]},
    ]
    during = over_time(samples)
    assert during["throttled_share"] == 0.5 and during["sm_mhz"] == {"min": 210, "median": 1410, "max": 1980}
    assert during["limited_by"] == ["application clocks", "hardware thermal slowdown", "idle", "power cap"]
    assert over_time([])["throttled_share"] is None


# --- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_is_sampled_before_during_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, enough = iter(range(1000, 10**6)), threading.Event()

    def tick(gpu: str, kind: int) -> int:
        mhz = next(clock)
        if mhz > 1020:
            enough.set()
        return mhz

    monkeypatch.setitem(sys.modules, "pynvml", pynvml(nvmlDeviceGetClockInfo=tick))
    monkeypatch.setattr(_bench_conditions, "every", lambda seconds, call: every(1e-3, call))
    with recorded(UUID) as conditions:
        assert enough.wait(60), "the thread samples"
        gpu = conditions()["gpu"]
    assert gpu["source"] == "nvml" and gpu["before"]["sm_mhz"] < gpu["after"]["sm_mhz"]
    assert gpu["during"]["samples"] >= 8 and gpu["before"]["sm_mhz"] < gpu["during"]["sm_mhz"]["min"]
    assert noise(conditions() | {"others_cpus": 0, "stolen_cpus": 0}) == ["the GPU was throttled in 100% of samples"]


def test_other_work_on_the_cpus_is_counted_and_ours_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    # In seconds: within 10 s all CPUs together were busy for 12, of which 5 were ours; 4 were stolen.
    stat = iter(["100 0 50 900 7 0 0 2", "105 1 55 903 9 0 1 6"])
    times = iter([(30.0, 10.0, 1.0, 1.0, 0.0), (33.0, 11.0, 2.0, 1.0, 0.0)])
    now = iter([1000.0, 1010.0])
    honest = Path.read_text

    def read_text(path: Path, *arguments: Any, **more: Any) -> str:
        if str(path) == "/proc/stat":
            return "cpu  " + " ".join(str(int(word) * ticks) for word in next(stat).split()) + "\ncpu0 0\n"
        if str(path) == "/proc/cpuinfo":
            return "processor\t: 0\ncpu MHz\t\t: 2596.124\nprocessor\t: 1\ncpu MHz\t\t: 3000.5\n"
        return honest(path, *arguments, **more)

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(os, "times", lambda: next(times))
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 9.0, 9.0))
    monkeypatch.setattr(_bench_conditions.time, "monotonic", lambda: next(now))
    with recorded(None) as conditions:
        told = conditions()
    assert told["seconds"] == 10.0 and told["gpu"] is None
    assert told["others_cpus"] == pytest.approx(0.7) and told["stolen_cpus"] == pytest.approx(0.4)
    assert told["load_average"] == {"before": 1.5, "after": 1.5}
    assert told["cpu_mhz"]["before"] == {"min": 2596.124, "median": 3000.5, "max": 3000.5}
    assert noise(told) == ["other processes used 0.7 CPUs", "other virtual machines used 0.4 CPUs"]
