"""The log of the door: a standard logger, shown on stdout where the program has configured none, as DeepSpeed's is."""

from __future__ import annotations

import logging
import sys

__all__ = ["logger", "show_log"]

logger = logging.getLogger("offload.deepspeed")


def show_log() -> None:
    """Makes messages of level INFO visible, unless the program decides about logging itself."""
    if not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] [%(name)s] %(message)s"))
        logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
