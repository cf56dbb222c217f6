"""Files that are whole or absent: written past the page cache in checksummed chunks, made durable, then renamed.

A host that offloads has its memory full of states; writing with O_DIRECT leaves the page cache alone and reaches the
disk's own speed, which a cached write followed by fsync does not. A chunk's checksum is CRC-32 (zlib's).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ._errors import StorageError

__all__ = ["WrittenFile", "check_file", "remove_tree", "rename", "sync_directory", "write_bytes", "write_file"]

CHUNK_BYTES = 8 << 20
# O_DIRECT takes whole blocks of the device: 512 or 4096 bytes.
_BLOCK_BYTES = 4096
# One core copies and sums faster than most disks write; more than this many requests gain nothing there.
_THREADS = 4

# Fills the buffer with the file's next bytes: (where they begin, how many there are), or None at the end.
Take = Callable[[Tensor], "tuple[int, int] | None"]


@dataclass(frozen=True)
class WrittenFile:
    """What a file must be: its bytes, and the CRC-32 of each chunk of `chunk_bytes`."""

    nbytes: int
    chunk_bytes: int
    crc32: tuple[int, ...]


def write_bytes(path: Path, content: bytes) -> WrittenFile:
    """Writes a small file and makes it durable. The name becomes durable with `sync_directory`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _write_all(descriptor, memoryview(content), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sums = (zlib.crc32(content[start : start + CHUNK_BYTES]) for start in range(0, len(content), CHUNK_BYTES))
    return WrittenFile(len(content), CHUNK_BYTES, tuple(sums))


def write_file(path: Path, nbytes: int, take: Take) -> WrittenFile:
    """Writes a file of `nbytes` and makes it durable; `take` is called under no lock, from several threads."""
    chunk_count = -(-nbytes // CHUNK_BYTES)
    sums = [0] * chunk_count
    descriptor = _open_direct(path)
    failed = threading.Event()

    def write_chunks() -> None:
        pages = mmap.mmap(-1, CHUNK_BYTES)  # aligned to a page, as O_DIRECT wants its source
        buffer = torch.frombuffer(pages, dtype=torch.uint8)
        view = memoryview(pages)
        try:
            while not failed.is_set() and (span := take(buffer)) is not None:
                begin, count = span
                sums[begin // CHUNK_BYTES] = zlib.crc32(view[:count])
                whole_blocks = -(-count // _BLOCK_BYTES) * _BLOCK_BYTES
                _write_all(descriptor, view[:whole_blocks], begin)
        except BaseException:
            failed.set()
            raise

    try:
        threads = min(_THREADS, chunk_count)
        if threads <= 1:
            write_chunks()
        else:
            with ThreadPoolExecutor(threads, thread_name_prefix="offload-checkpoint") as pool:
                try:
                    for writer in [pool.submit(write_chunks) for _ in range(threads)]:
                        writer.result()
                except BaseException:
                    failed.set()  # Ctrl-C in this thread too
                    raise
        os.ftruncate(descriptor, nbytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return WrittenFile(nbytes, CHUNK_BYTES, tuple(sums))


def _open_direct(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)  # a file system without O_DIRECT, tmpfs for one


def _write_all(descriptor: int, content: memoryview, position: int) -> None:
    while content:
        count = os.pwrite(descriptor, content, position)
        content, position = content[count:], position + count


def check_file(path: Path, written: WrittenFile) -> None:
    """Raises `StorageError`, naming file and bytes, unless it is what was written."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise StorageError(f"{path} is missing: this checkpoint is not whole, load another one") from None
    if size != written.nbytes:
        raise StorageError(f"{path} has {size:,} bytes, and {written.nbytes:,} were saved: load another checkpoint")

    def check(index: int) -> None:
        begin = index * written.chunk_bytes
        count = min(written.chunk_bytes, size - begin)
        content = os.pread(descriptor, count, begin)
        if len(content) != count or zlib.crc32(content) != written.crc32[index]:
            raise StorageError(
                f"{path} is damaged between bytes {begin:,} and {begin + count:,}: load another checkpoint"
            )

    descriptor = os.open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(check, range(len(written.crc32))):
                pass
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Gives a file or directory its name, replacing a file of that name, and makes that durable."""
    os.replace(source, target)
    sync_directory(target.parent)


def sync_directory(path: Path) -> None:
    """Makes names that were given, changed or removed in this directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Removes what is there, if anything is."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)
