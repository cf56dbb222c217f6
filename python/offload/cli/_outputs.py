"""Files that a command is to write, looked at before it begins: what takes minutes is not lost at its end."""

from __future__ import annotations

import os
from pathlib import Path

import offload

__all__ = ["check_writable"]


def check_writable(option: str, path: str | os.PathLike[str] | None) -> None:
    """Raises InvalidArgument, naming the option, for a path that no file can be written to; None is not asked for."""
    if path is None:
        return
    file = Path(path)
    there = file if file.exists() else file.parent
    if file.is_dir() or not there.exists() or not os.access(there, os.W_OK):
        raise offload.InvalidArgument(f"{option} {path}: give a file in a folder that exists and can be written to")
