"""The clocks of NVIDIA devices while a trace runs, by NVML (`pynvml`, the package nvidia-ml-py)."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from ._trace_records import ClockSample, MemorySample

__all__ = ["ClockSampler"]

_PERIOD_S = 0.02
# NVML's bits of why a clock is lower than it could be. An idle device and clocks that the user set are none.
_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}


class ClockSampler:
    """A thread that samples clocks and torch's allocated bytes of CUDA devices, from start() to stop().

    note: why there are no clocks, "" where there are.
    """

    def __init__(self, devices: list[torch.device]) -> None:
        self.clocks: list[ClockSample] = []
        self.memory: list[MemorySample] = []
        self.note = ""
        self._devices = devices
        self._nvml: Any = None
        self._handles: list[tuple[str, Any, int]] = []
        self._stopped = threading.Event()
        # A daemon: a process may end inside a trace.
        self._thread = threading.Thread(target=self._run, name="offload-clocks", daemon=True)
        if devices:
            self._open()

    def _open(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            for device in self._devices:
                uuid = str(torch.cuda.get_device_properties(device).uuid)
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
                most = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)
                self._handles.append((str(device), handle, most))
            self._nvml = pynvml
        except ModuleNotFoundError:
            self.note = "clocks were not sampled: pip install nvidia-ml-py"
        except Exception as error:  # NVML has an error class of its own, and a MIG slice no clock
            self.note = f"clocks were not sampled: NVML refuses, {error}"

    def start(self) -> None:
        if self._devices:
            self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(_PERIOD_S):
            self.sample()

    def sample(self) -> None:
        now_ns = time.monotonic_ns()
        for device in self._devices:
            allocated = torch.cuda.memory_allocated(device)
            self.memory.append(MemorySample("device", f"allocated on {device}", now_ns, allocated))
        try:
            for name, handle, most in self._handles if self._nvml is not None else ():
                mhz = self._nvml.nvmlDeviceGetClockInfo(handle, self._nvml.NVML_CLOCK_SM)
                bits = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
                reasons = tuple(reason for bit, reason in _REASONS.items() if bits & bit)
                self.clocks.append(ClockSample(now_ns, name, mhz, most, reasons))
        except self._nvml.NVMLError as error:
            self._nvml = None
            self.note = f"clocks were sampled until NVML refused, {error}"
