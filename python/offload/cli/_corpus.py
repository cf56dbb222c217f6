"""Text that needs no download: the Python standard library's own sources, as byte tokens."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["VOCABULARY", "batches", "read_corpus"]

VOCABULARY = 256  # a token is a byte
_MAX_BYTES = 8 << 20  # the top-level modules are 4 to 5 MB


def read_corpus(folder: Path | None = None) -> Tensor:
    """The top-level modules of the standard library in order of their names: uint8 of shape [bytes]."""
    folder = folder or Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))[:_MAX_BYTES]
    if not text:
        raise FileNotFoundError(f"no Python sources under {folder}: the demo trains on the standard library's")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batches(corpus: Tensor, *, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless random windows: int64 of shape [batch, length]; equal seeds give equal batches."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(corpus) - length, (batch,), generator=generator).tolist()
        yield torch.stack([corpus[start : start + length] for start in starts]).long()
