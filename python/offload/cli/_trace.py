"""`offload trace`: the demo training with a trace of its steps, and the report of a trace that was saved."""

from __future__ import annotations

import argparse
import json
import sys

import offload

from ._corpus import read_corpus
from ._device import compute_device
from ._progress import shown
from ._table import show_report
from ._training import train

__all__ = ["run_trace", "run_trace_report"]

_EXIT_INTERRUPTED = 130


def run_trace(options: argparse.Namespace) -> int:
    """Trains, writes the files that are asked for and prints the report; returns the exit code."""
    device = compute_device(options.device)
    corpus = read_corpus()
    with offload.trace(options.out, html=options.html) as trace:
        run = train(
            options,
            corpus,
            label="traced",
            steps=options.steps,
            snapshot_step=0,
            placement="host",
            device=device,
            measures_peak=False,
        )
    _show(options, trace)
    return _EXIT_INTERRUPTED if run.interrupted else 0


def run_trace_report(options: argparse.Namespace) -> int:
    """Reads a trace and prints its report; returns the exit code."""
    with shown("offload trace report"):
        trace = offload.trace.load(options.file)
        if options.profiler is not None and options.out is None:
            raise offload.InvalidArgument("--profiler: give --out, the file for both traces on one time axis")
        if options.out is not None:
            trace.save(options.out, profiler=options.profiler)
        if options.html is not None:
            trace.save_html(options.html)
    _show(options, trace)
    return 0


def _show(options: argparse.Namespace, trace: offload.trace) -> None:
    if options.json:
        print(json.dumps({"schema_version": 1, **trace.report.to_dict()}))
    else:
        show_report(trace.report)
    for path in (options.out, options.html):
        if path is not None:
            print(f"offload trace: wrote {path}", file=sys.stderr)
