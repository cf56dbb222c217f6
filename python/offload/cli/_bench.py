"""`offload bench`: runs the measurements and wraps their results with what is needed to read them later."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

import offload

from ._bench_conditions import recorded
from ._bench_figures import absent_peers, figure_table
from ._device import compute_device
from ._outputs import check_writable
from ._progress import shown
from ._table import Piece, show

__all__ = ["PARTS", "environment", "run_bench"]

_SCHEMA_VERSION = 2
_EXIT_CHECK_FAILED = 1
# In the order of `all`: those that make algorithms deterministic for the whole process come last.
PARTS = (
    *("adamw", "pool", "link", "step", "swap", "activations", "trace", "engine", "update", "unified", "checkpoint"),
    *("disk", "plan", "train", "largest"),
)
# What `all` asks of a part on the CPU, beside its defaults: there both tiers are one memory.
_ON_CPU = {"largest": ("--device-budget", "1MiB", "--host-budget", "4MiB")}
_STDOUT = Path("-")  # of --json
# Options that no figure depends on; which device it was stands in the results.
_NOT_MEASURED = {"json", "compare", "command", "part", "device"}


def run_bench(options: argparse.Namespace) -> int:
    """Measures `options.part` (or all of them) and prints tables, with `--json -` on stderr, as JSON is on stdout then.

    The exit code is 1 if offloaded and resident losses were not equal bit for bit, if a part of `all` failed, or if a
    figure of ours is worse than in the result that `options.compare` names.

    The file that was asked for is written whenever a part has something new: a long run that is stopped leaves what
    it had.
    """
    in_place_of_tables = options.json == _STDOUT
    path, tables = (None, sys.stderr) if in_place_of_tables else (options.json, sys.stdout)
    check_writable("--json", path)
    chosen = PARTS if options.part == "all" else (options.part,)
    report: dict[str, Any] = {"schema_version": _SCHEMA_VERSION, "environment": environment(), "results": {}}
    report["quick"] = options.quick
    earlier = None
    if options.compare is not None:
        from ._bench_compare import read_earlier

        earlier = read_earlier(options.compare, report["environment"], chosen)
    for part in chosen:
        print(f"offload bench {part}: measuring", file=sys.stderr, flush=True)
        try:
            for result in _measured(part, _options_of(part, options)):
                report["results"][part] = result
                _write(path, report)
        except Exception as error:  # whatever fails in one part of `all` is to cost no other
            if options.part != "all":
                raise
            missing = isinstance(error, ModuleNotFoundError)
            outcome = {"unavailable": str(error)} if missing else {"failed": f"{type(error).__name__}: {error}"}
            report["results"][part] = {**report["results"].get(part, {}), **outcome}
        show(_pieces(part, report["results"][part]), file=tables)
    worse = False
    if earlier is not None:
        worse = _compare(earlier, report, tables)
    _write(path, report)
    if in_place_of_tables:
        print(json.dumps(report, indent=2))
    results = report["results"].values()
    # Only `train` compares losses; other parts have no such key.
    unequal = any(result.get("losses_equal_resident") is False for result in results)
    return _EXIT_CHECK_FAILED if unequal or worse or any("failed" in result for result in results) else 0


def _options_of(part: str, options: argparse.Namespace) -> argparse.Namespace:
    """Those of one part: what was given, or for `all` its defaults, with what it shares with `all`."""
    if options.part != "all":
        return options
    from . import _parser

    on_cpu = compute_device(options.device).type == "cpu"
    own = _parser().parse_args(["bench", part, *(_ON_CPU.get(part, ()) if on_cpu else ())])
    for name in ("quick", "device"):
        if hasattr(own, name):
            setattr(own, name, getattr(options, name))
    return own


def _measured(part: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What a part yields, with its figures and with what they depend on."""
    module = importlib.import_module(f"._bench_{part}", __package__)
    arguments = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in _NOT_MEASURED
    }
    device = compute_device(getattr(options, "device", None))
    with shown(f"offload bench {part}"), recorded(_gpu_uuid(device)) as conditions:
        for result in module.run(options):
            more = {"figures": module.figures(result), "arguments": arguments, "conditions": conditions()}
            yield {**result, **more}


def _pieces(part: str, result: Mapping[str, Any]) -> list[Piece]:
    """All that a terminal shows of a part."""
    outcomes = [f"{part}: {kind}: {result[kind]}" for kind in ("unavailable", "failed") if kind in result]
    if outcomes:
        return [*outcomes, ""]
    module = importlib.import_module(f"._bench_{part}", __package__)
    own: Callable[[Any], list[Piece]] | None = getattr(module, "pieces", None)
    shown = own(result) if own is not None else []
    if result["figures"]:
        shown.append(figure_table(result["figures"]))
    return [*shown, *absent_peers(result), ""]


def _compare(earlier: Mapping[str, Any], report: dict[str, Any], tables: TextIO) -> bool:
    """Adds the comparison to the report, shows it, and tells whether a figure of ours is worse."""
    from ._bench_compare import compare, comparison_lines, comparison_table

    report["comparison"] = compared = compare(earlier, report)
    show([*comparison_table(compared), *comparison_lines(compared)], file=tables)
    return bool(compared["counts"]["worse"])


def _write(path: Path | None, report: Mapping[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n")


def _gpu_uuid(device: torch.device) -> str | None:
    """As NVIDIA's tools call the device; None for the CPU."""
    if device.type != "cuda":
        return None
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


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
