"""Files in the safetensors format: the header that leads them, and their tensors as views of a mapped file.

Layout (https://github.com/huggingface/safetensors): eight bytes, little endian, with the length of a JSON header; the
header, `{name: {"dtype", "shape", "data_offsets"}}` and `"__metadata__"` of strings; the bytes of all tensors, C order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._errors import InvalidArgument, StorageError

__all__ = ["Entry", "FileLayout", "lay_out", "map_tensors", "read_header"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The data begins at a multiple of it, so that every tensor is aligned to its own element.
_ALIGNMENT_BYTES = 64
_HEADER_LIMIT_BYTES = 100_000_000  # the format's own


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `begin` and `end` are bytes from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class FileLayout:
    """Where everything of a file is: its first bytes, and its tensors in the order of their bytes."""

    header: bytes
    entries: tuple[Entry, ...]
    nbytes: int


def lay_out(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> FileLayout:
    """The layout of a file with these tensors, those of the widest elements first.

    Raises `InvalidArgument` naming the tensor for a dtype that the format does not have.
    """
    described = list(tensors)
    for name, dtype, _ in described:
        if dtype not in _NAMES:
            raise InvalidArgument(f"{name} has dtype {dtype}, which a safetensors file cannot hold")
    described.sort(key=lambda tensor: -tensor[1].itemsize)  # stable: otherwise in the given order
    position = 0
    spans = []
    for name, dtype, shape in described:
        begin, position = position, position + math.prod(shape) * dtype.itemsize
        spans.append((name, dtype, shape, begin, position))
    document: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, dtype, shape, begin, end in spans:
        document[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT_BYTES)
    header = len(text).to_bytes(8, "little") + text
    start = len(header)
    entries = tuple(Entry(name, dtype, shape, start + begin, start + end) for name, dtype, shape, begin, end in spans)
    return FileLayout(header, entries, start + position)


def read_header(path: Path) -> tuple[dict[str, str], list[Entry]]:
    """The metadata and the tensors of a file; raises `StorageError` naming what is wrong with it."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_HEADER_LIMIT_BYTES, file_bytes - 8):
            raise StorageError(f"{path} is no safetensors file: a header of {length} bytes in {file_bytes} bytes")
        text = file.read(length)
    try:
        document = json.loads(text)
        metadata = document.pop("__metadata__", {})
        entries = [_entry(name, described, 8 + length) for name, described in document.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{path} is no safetensors file: its header cannot be read ({error!r})") from error
    for entry in entries:
        if entry.end > file_bytes or entry.end - entry.begin != math.prod(entry.shape) * entry.dtype.itemsize:
            raise StorageError(
                f"{path} is damaged: {entry.name} of shape {entry.shape} has bytes {entry.begin} to {entry.end} of "
                f"{file_bytes}"
            )
    return metadata, entries


def _entry(name: str, described: Any, start: int) -> Entry:
    begin, end = (int(offset) for offset in described["data_offsets"])
    shape = tuple(int(size) for size in described["shape"])
    if begin < 0 or any(size < 0 for size in shape):
        raise ValueError(f"negative size or offset of {name}")
    return Entry(name, DTYPES[described["dtype"]], shape, start + begin, start + end)


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on its mapped pages: nothing is read before it is used.

    Writing to one changes memory, never the file. Raises `StorageError` as `read_header` does.
    """
    _, entries = read_header(path)
    nbytes = path.stat().st_size
    file = torch.from_file(str(path), shared=False, size=nbytes, dtype=torch.uint8, device="cpu")
    tensors = {}
    for entry in entries:
        values = file[entry.begin : entry.end]
        if entry.begin % entry.dtype.itemsize:
            values = values.clone()  # other writers do not align
        tensors[entry.name] = values.view(entry.dtype).view(entry.shape)
    return tensors
