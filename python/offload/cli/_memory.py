"""`offload memory`: a few steps of the demo, and who owned which bytes in them."""

from __future__ import annotations

import argparse
import json
import sys

from ._corpus import read_corpus
from ._device import compute_device
from ._table import format_bytes, show_report
from ._training import train

__all__ = ["run_memory"]

_EXIT_INTERRUPTED = 130


def run_memory(options: argparse.Namespace) -> int:
    """Trains and prints the summary, as text or as JSON; returns the exit code."""
    run = train(
        options,
        read_corpus(),
        label="measured",
        steps=options.steps,
        snapshot_step=0,
        placement="host",
        device=compute_device(options.device),
    )
    measured = {"bytes": run.peak.nbytes, "source": run.peak.source}
    beside = []
    if run.peak.nbytes:
        beside.append(
            f"- on the device were {format_bytes(run.peak.nbytes)} at once, activations and workspace included, in "
            f"the first steps ({run.peak.source})"
        )
    show_report(run.memory, beside, file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps({"schema_version": 1, **run.memory.to_dict(), "measured_peak_device": measured}))
    return _EXIT_INTERRUPTED if run.interrupted else 0
