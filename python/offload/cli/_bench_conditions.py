"""What else a figure depends on while it is measured: other work on the CPUs, their clocks, and those of a GPU."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ._bench_clocks import Clocks, ClocksUnknown, open_clocks, over_time
from ._bench_spread import low_median_high
from ._every import every

__all__ = ["noise", "recorded"]

# CPUs that others use on average, above which a run is called noisy.
_NOISY_CPUS = 0.25
_BUSY = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")  # the columns of /proc/stat
_IDLE = {"idle", "iowait", "steal"}


@contextlib.contextmanager
def recorded(uuid: str | None) -> Iterator[Callable[[], dict[str, Any]]]:
    """Gives a call that tells the conditions from the beginning of the context until now.

    uuid: of the GPU to watch; None where there is none. The dict, ready for JSON: `seconds`; `load_average` (of one
    minute) and `cpu_mhz` (lowest, median, highest) `before` and `after`; `others_cpus` and `stolen_cpus`, how many CPUs
    other processes and other virtual machines used on average; and `gpu`, None without one: `source`, `before`,
    `after` and `during`, or only `unknown` with the reason.
    """
    clocks, unknown = _clocks(uuid)
    samples: list[dict[str, Any]] = []

    def sample() -> None:
        with contextlib.suppress(ClocksUnknown):  # one that fails among others is one less
            assert clocks is not None
            samples.append(clocks.sample())

    before = _cpu(), _used_s(), time.monotonic()
    if clocks is not None:
        sample()

    def until_now() -> dict[str, Any]:
        (cpu, used, began), now_used = before, _used_s()
        seconds = max(time.monotonic() - began, 1e-9)
        gpu: dict[str, Any] | None = None if uuid is None else {"unknown": unknown}
        if clocks is not None:
            during = samples[1:]
            sample()
            first, last = (samples[0], samples[-1]) if samples else (None, None)
            gpu = {"source": clocks.source, "before": first, "after": last, "during": over_time(during)}
        now = _cpu()
        return {
            "seconds": seconds,
            **{name: {"before": cpu[name], "after": now[name]} for name in now},
            **{name: max(0.0, now_used[name] - used[name]) / seconds for name in used},
            "gpu": gpu,
        }

    with every(clocks.period_s, sample) if clocks is not None else contextlib.nullcontext():
        yield until_now


def noise(conditions: Mapping[str, Any]) -> list[str]:
    """What disturbed a run, in words; nothing where it was quiet."""
    found = []
    for name, whose in (("others_cpus", "other processes"), ("stolen_cpus", "other virtual machines")):
        if conditions[name] > _NOISY_CPUS:
            found.append(f"{whose} used {conditions[name]:.1f} CPUs")
    gpu = conditions["gpu"] or {}
    during = gpu.get("during", {})
    if during.get("throttled_share"):
        found.append(f"the GPU was throttled in {during['throttled_share']:.0%} of samples")
    return found


def _clocks(uuid: str | None) -> tuple[Clocks | None, str]:
    if uuid is None:
        return None, ""
    try:
        return open_clocks(uuid), ""
    except ClocksUnknown as error:
        return None, str(error)


def _cpu() -> dict[str, Any]:
    found = re.findall(r"^cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {"load_average": os.getloadavg()[0], "cpu_mhz": low_median_high([float(mhz) for mhz in found])}


def _used_s() -> dict[str, float]:
    """Seconds of CPU time so far that others than this process and its children used, and that was stolen."""
    ticks = os.sysconf("SC_CLK_TCK")
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    seconds = {name: int(word) / ticks for name, word in zip(_BUSY, words, strict=False)}
    all_s = sum(value for name, value in seconds.items() if name not in _IDLE)
    return {"others_cpus": all_s - sum(os.times()[:4]), "stolen_cpus": seconds["steal"]}
