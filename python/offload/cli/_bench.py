"""`offload bench`: runs one measurement and wraps its result with what is needed to read it later."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

import offload

__all__ = ["environment", "run_bench", "summary"]

_SCHEMA_VERSION = 1
_EXIT_CHECK_FAILED = 1
_ALL = ("adamw", "pool", "step", "link", "swap")


def run_bench(options: argparse.Namespace) -> int:
    """Measures `options.part` (or all of them), prints the JSON, and its table on stderr where a part has one.

    The exit code is 1 if offloaded and resident losses were not equal bit for bit.

    The file that was asked for is written whenever a part has something new: a long run that is stopped leaves what
    it had.
    """
    report: dict[str, Any] = {
        "schema_version": _SCHEMA_VERSION,
        "quick": options.quick,
        "environment": environment(),
        "results": {},
    }
    for part in _ALL if options.part == "all" else (options.part,):
        print(f"offload bench {part}: measuring", file=sys.stderr, flush=True)
        module = importlib.import_module(f"._bench_{part}", __package__)
        for result in module.run(options):
            report["results"][part] = result
            if options.json is not None:
                options.json.write_text(json.dumps(report, indent=2) + "\n")
        if hasattr(module, "text"):
            print(module.text(report["results"][part]), file=sys.stderr)
    print(json.dumps(report, indent=2))
    # Only `train` compares bits; other parts have no such key.
    unequal = any(result.get("losses_equal_resident") is False for result in report["results"].values())
    return _EXIT_CHECK_FAILED if unequal else 0


def environment() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "offload": offload.__version__,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "accelerator_bytes": torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None,
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
    }


def summary(samples: list[float]) -> dict[str, Any]:
    """`samples` with their median and 20th and 80th percentiles, in the samples' own unit."""
    ordered = sorted(samples)

    def percentile(share: float) -> float:
        return ordered[round(share * (len(ordered) - 1))]

    return {"samples": samples, "median": percentile(0.5), "p20": percentile(0.2), "p80": percentile(0.8)}


def _driver_version() -> str | None:
    """Of NVIDIA's kernel module, None without one."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found.group() if found else None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"  # aarch64 names no model
