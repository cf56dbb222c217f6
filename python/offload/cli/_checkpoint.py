"""`offload checkpoint`: looks into a checkpoint, and exports its weights."""

from __future__ import annotations

import argparse
import json
import sys

import offload

from ._outputs import check_writable
from ._progress import shown

__all__ = ["run_checkpoint"]

_EXIT_CHECK_FAILED = 1


def run_checkpoint(options: argparse.Namespace) -> int:
    """The exit code is 1 for a checkpoint that is absent or damaged, and for a disk that refuses."""
    try:
        if options.action == "show":
            with shown("offload checkpoint show"):
                described = offload.describe_checkpoint(options.directory, tag=options.tag)
            print(json.dumps({"schema_version": 1, **described}, indent=2))
        else:
            check_writable("--out", options.out)
            with shown("offload checkpoint export"):
                path = offload.export_checkpoint(options.directory, options.out, dtype=options.dtype, tag=options.tag)
            size = path.stat().st_size
            if options.json:
                print(json.dumps({"schema_version": 1, "file": str(path), "bytes": size, "dtype": options.dtype}))
            else:
                print(f"{path}: {size:,} bytes")
    except offload.StorageError as error:
        print(f"offload: {error}", file=sys.stderr)
        return _EXIT_CHECK_FAILED
    return 0
