"""The log of the door: a standard logger, shown on stdout where the program has configured none, as DeepSpeed's is."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

__all__ = ["log_dist", "logger", "show_log"]

logger = logging.getLogger("offload.deepspeed")


def show_log() -> None:
    """Makes messages of level INFO visible, unless the program decides about logging itself."""
    if not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] [%(name)s] %(message)s"))
        logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Logs where this process, of rank 0, is among `ranks`; None or -1 means all."""
    if not ranks or -1 in ranks or 0 in ranks:
        logger.log(level, "%s", message)
