"""Clocks of an NVIDIA GPU and what holds them down: by NVML where its Python binding is installed, else nvidia-smi."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ._bench_spread import low_median_high

__all__ = ["Clocks", "ClocksUnknown", "open_clocks", "over_time"]

# NVML's bits of what limits clocks (nvmlClocksEventReasons); those of THROTTLING are more than a choice or idleness.
_REASONS = {
    0x001: "idle",
    0x002: "application clocks",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}
_THROTTLING = frozenset(_REASONS[bit] for bit in (0x004, 0x008, 0x020, 0x040, 0x080, 0x200, 0x400))
_SMI_FIELDS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw", "enforced.power.limit")
# The name of the bits since driver 535, and the one before.
_SMI_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
_SMI_TIMEOUT_S = 10.0

Sample = dict[str, Any]


class ClocksUnknown(Exception):
    """Why they cannot be read."""


class Clocks(Protocol):
    """Where clocks are read. period_s: how often, at most, without taking notable time from what is measured."""

    source: str
    period_s: float

    def sample(self) -> Sample:
        """MHz, degrees Celsius, W; None where the card does not say. `limited_by`: names of what holds clocks down.

        Raises `ClocksUnknown`.
        """
        ...


def open_clocks(uuid: str) -> Clocks:
    """Those of the GPU of this UUID, "GPU-...". Raises `ClocksUnknown` with the reason of each way that failed."""
    nvml = _opened(_Nvml, uuid)
    if not isinstance(nvml, str):
        return nvml
    smi = _opened(_NvidiaSmi, uuid)
    if not isinstance(smi, str):
        return smi
    raise ClocksUnknown(f"{nvml}; {smi}")


def _opened(way: Callable[[str], Clocks], uuid: str) -> Clocks | str:
    """Clocks that gave a sample, or why there are none."""
    try:
        clocks = way(uuid)
        clocks.sample()
    except ClocksUnknown as error:
        return str(error)
    return clocks


def over_time(samples: Sequence[Sample]) -> dict[str, Any]:
    """Of samples taken while something ran: how SM clocks and power went, and the share of them that was throttled."""
    throttled = [not _THROTTLING.isdisjoint(one["limited_by"]) for one in samples]
    return {
        "samples": len(samples),
        **{
            name: low_median_high([one[name] for one in samples if one[name] is not None])
            for name in ("sm_mhz", "power_w")
        },
        "limited_by": sorted({reason for one in samples for reason in one["limited_by"]}),
        "throttled_share": sum(throttled) / len(samples) if samples else None,
    }


class _Nvml:
    """By NVIDIA's own binding, nvidia-ml-py, which is imported as pynvml."""

    source = "nvml"
    period_s = 1.0

    def __init__(self, uuid: str) -> None:
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ImportError as error:
            raise ClocksUnknown("pynvml (nvidia-ml-py) is not installed") from error
        try:
            self._nvml.nvmlInit()
            self._gpu = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        except self._nvml.NVMLError as error:
            raise ClocksUnknown(f"NVML: {error}") from error

    def sample(self) -> Sample:
        nvml = self._nvml
        power, limit = self._ask("nvmlDeviceGetPowerUsage"), self._ask("nvmlDeviceGetEnforcedPowerLimit")
        bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        return {
            "sm_mhz": self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            "memory_mhz": self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            "max_sm_mhz": self._ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
            "temperature_c": self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            "power_w": None if power is None else power / 1000,  # told in mW
            "power_limit_w": None if limit is None else limit / 1000,
            "limited_by": _names(bits or 0),
        }

    def _ask(self, name: str, *arguments: int) -> Any:
        """None where this card, or its driver, does not tell."""
        call: Callable[..., Any] = getattr(self._nvml, name)
        try:
            return call(self._gpu, *arguments)
        except self._nvml.NVMLError:
            return None


class _NvidiaSmi:
    """By the driver's own command: a process for each sample."""

    source = "nvidia-smi"
    period_s = 5.0

    def __init__(self, uuid: str) -> None:
        command = shutil.which("nvidia-smi")
        if command is None:
            raise ClocksUnknown("nvidia-smi is not on PATH")
        self._command, self._uuid = command, uuid

    def sample(self) -> Sample:
        refusal = ""
        for reasons in _SMI_REASONS:
            command = [self._command, f"--id={self._uuid}", f"--query-gpu={','.join((*_SMI_FIELDS, reasons))}"]
            try:
                done = subprocess.run(
                    [*command, "--format=csv,noheader,nounits"],
                    capture_output=True,
                    text=True,
                    timeout=_SMI_TIMEOUT_S,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise ClocksUnknown(f"nvidia-smi: {error}") from error
            cells = [cell.strip() for cell in done.stdout.strip().split(",")]
            if done.returncode == 0 and len(cells) == len(_SMI_FIELDS) + 1:
                return _sample_of(cells)
            refusal = (done.stderr or done.stdout).strip().partition("\n")[0]
        raise ClocksUnknown(f"nvidia-smi: {refusal}")


def _sample_of(cells: Sequence[str]) -> Sample:
    """Of a line of nvidia-smi, in which what a card does not tell is "[N/A]" or the like."""

    def number(cell: str) -> float | None:
        return None if cell.startswith("[") else float(cell)

    names = ("sm_mhz", "memory_mhz", "max_sm_mhz", "temperature_c", "power_w", "power_limit_w")
    try:
        sample: Sample = {name: number(cell) for name, cell in zip(names, cells, strict=False)}
        sample["limited_by"] = [] if cells[-1].startswith("[") else _names(int(cells[-1], 16))
    except ValueError as error:
        raise ClocksUnknown(f"nvidia-smi: {error}") from error
    return sample


def _names(bits: int) -> list[str]:
    return [name for bit, name in _REASONS.items() if bits & bit]
