"""The disk tier for Python: buffers of the host pool to private files on disk and back.

Everything that can fail raises StorageError with the file, the offset and what to do; its `errno` is the system's.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from . import _native
from ._errors import InvalidArgument, StorageError

__all__ = ["DiskFacts", "DiskPath", "DiskRange", "DiskStore", "padded", "probe_disk"]

DiskPath = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class DiskFacts:
    """How one directory serves as disk_path; each refusal says why the better way is not taken, None: it is.

    backend is "io_uring" or "threads"; direct means O_DIRECT, else reads and writes pass the page cache. free_bytes
    is what this user may still write there. reflink: files can share their bytes, so asynchronous saves stop no step.
    """

    directory: str
    file_system: str
    backend: str
    uring_refusal: str | None
    direct: bool
    direct_refusal: str | None
    free_bytes: int
    reflink: bool
    reflink_refusal: str | None


@dataclasses.dataclass(frozen=True)
class DiskRange:
    """`nbytes` on disk, from `offset` of their store."""

    offset: int
    nbytes: int


class DiskStore:
    """Bytes on disk, striped over `paths`; the files are private, have no name and go with the store or the process.

    Ranges are read and written in whole blocks of `block_bytes`; only the last block of a range may be shorter.
    Operations on one block take effect in the order of their submission. `backend` None is the best that the kernel
    lets us have. Raises StorageError for a path that is missing, read-only, memory (tmpfs) or in use by another
    process.
    """

    def __init__(
        self,
        paths: DiskPath | Sequence[DiskPath],
        *,
        block_bytes: int = 1 << 20,
        queue_depth: int = 16,
        thread_count: int = 8,
        backend: _native.DiskBackend = "auto",
        direct: bool = True,
        calls: _native.FailingSystemCalls | None = None,
    ) -> None:
        names = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        self._file = _native.BlockFile(
            [os.fsencode(name) for name in names],  # bytes: a name need not be in any encoding
            block_bytes=block_bytes,
            queue_depth=queue_depth,
            thread_count=thread_count,
            backend=backend,
            direct=direct,
            calls=calls,
        )
        # Of _disk_snapshot.py: how many there were, what the present one may take and any did, and why the last one was
        # not made.
        self.snapshot_count = self.snapshot_bytes = self.snapshot_peak_bytes = 0
        self.snapshot_refusal: str | None = None

    def clone(self) -> DiskStore:
        """A store of what was written here by now, to be read: later writes do not change it.

        By reflinks, which copy nothing; raises `StorageError` where the file system has none.
        """
        clone = copy.copy(self)
        clone._file = self._file.clone()
        return clone

    @property
    def allocated_bytes(self) -> int:
        """What the files take."""
        return sum(path["allocated_bytes"] for path in self._file.facts())

    @property
    def block_bytes(self) -> int:
        return self._file.block_bytes

    def allocate(self, nbytes: int) -> DiskRange:
        """Reserves `nbytes`, rounded up to blocks, on the disks; raises StorageError, and changes nothing, without
        the space."""
        if nbytes < 0:
            raise InvalidArgument(f"nbytes={nbytes} is negative; give a number of bytes")
        return DiskRange(self._file.allocate(nbytes), nbytes)

    def buffer(self, pool: _native.HostPool, nbytes: int, tag: _native.Tag = "staging") -> _native.HostBuffer:
        """A buffer for transfers of up to `nbytes`, aligned as the disk needs it and rounded up to that."""
        return pool.acquire(padded(nbytes), tag, _native.DISK_ALIGNMENT)

    def state_window(self, pool: _native.HostPool, frame_bytes: int, frame_count: int) -> _native.StateWindow:
        """What the step pipeline reads states of this store into, and writes them from."""
        return _native.StateWindow(self._file, pool, frame_bytes=frame_bytes, frame_count=frame_count)

    def submit_read(
        self, where: DiskRange, buffer: _native.HostBuffer, start: int = 0, nbytes: int | None = None
    ) -> _native.Ticket:
        """Reads `nbytes` (None: all that follow) of the range from `start` into the buffer's beginning.

        The ticket fails with StorageError unless the bytes are those of the last write, and leaves the buffer's
        contents undefined then. The buffer's memory is not reused before the ticket ended.
        """
        nbytes = self._checked("read", where, buffer, start, nbytes)
        ticket = self._file.submit_read(where.offset + start, buffer.address, nbytes)
        buffer.release_after(ticket)
        return ticket

    def submit_write(
        self, where: DiskRange, buffer: _native.HostBuffer, start: int = 0, nbytes: int | None = None
    ) -> _native.Ticket:
        """Writes the buffer's first `nbytes` (None: all that follow) to the range from `start`.

        The buffer must not change before the ticket ended. A failed write loses its blocks: reads of them raise
        until a later write succeeds.
        """
        nbytes = self._checked("write", where, buffer, start, nbytes)
        ticket = self._file.submit_write(where.offset + start, buffer.address, nbytes)
        buffer.release_after(ticket)
        return ticket

    def submit_read_after(
        self, after: Sequence[_native.Ticket], where: DiskRange, buffer: _native.HostBuffer, begin: int
    ) -> _native.Ticket:
        """Reads the range into the buffer from `begin` on (a multiple of DISK_ALIGNMENT) when all of `after` ended.

        Well or badly. The memory is the read's from now on, and every error is the ticket's.
        """
        ticket = self._file.submit_read_after(after, where.offset, buffer.address + begin, where.nbytes)
        buffer.release_after(ticket)
        return ticket

    def submit_write_after(
        self, after: _native.Ticket, where: DiskRange, buffer: _native.HostBuffer, begin: int
    ) -> _native.Ticket:
        """Writes the range from the buffer's bytes from `begin` on when `after` ended well.

        Else its error is the ticket's, and the range is as it was.
        """
        ticket = self._file.submit_write_after(after, where.offset, buffer.address + begin, where.nbytes)
        buffer.release_after(ticket)
        return ticket

    def close(self) -> None:
        """Gives up the files, though the store is referred to still. Use nothing after it. Idempotent."""
        self.__dict__.pop("_file", None)

    def stats(self) -> list[dict[str, Any]]:
        """By path: directory, file_system, backend, direct, reserved, why each is not the best, and bytes so far."""
        return self._file.facts()

    def _checked(self, verb: str, where: DiskRange, buffer: _native.HostBuffer, start: int, nbytes: int | None) -> int:
        block = self._file.block_bytes
        if nbytes is None:
            nbytes = where.nbytes - start
        end = start + nbytes
        if start < 0 or nbytes < 0 or end > where.nbytes:
            raise InvalidArgument(f"a {verb} of {nbytes} bytes from {start} leaves its range of {where.nbytes} bytes")
        if start % block or (end % block and end != where.nbytes):
            raise InvalidArgument(
                f"a {verb} of {nbytes} bytes from {start} must begin and end at a multiple of block_bytes={block}, "
                f"or end with its range of {where.nbytes} bytes"
            )
        if padded(nbytes) > buffer.nbytes:
            raise InvalidArgument(
                f"a {verb} of {nbytes} bytes needs a buffer of {padded(nbytes)} bytes, this one has {buffer.nbytes}; "
                "take it from DiskStore.buffer"
            )
        return nbytes


def probe_disk(path: DiskPath) -> DiskFacts:
    """Opens a file in the directory `path` as training would, and says how it can be used. Leaves nothing behind."""
    store = DiskStore(path)
    (facts,) = store.stats()
    reflink_refusal = None
    try:
        store.clone()
    except StorageError as error:
        reflink_refusal = error.strerror or str(error)
    space = os.statvfs(path)
    return DiskFacts(
        directory=facts["directory"],
        file_system=facts["file_system"],
        backend=facts["backend"],
        uring_refusal=facts["uring_refusal"] or None,
        direct=facts["direct"],
        direct_refusal=facts["direct_refusal"] or None,
        free_bytes=space.f_bavail * space.f_frsize,
        reflink=reflink_refusal is None,
        reflink_refusal=reflink_refusal,
    )


def padded(nbytes: int) -> int:
    """`nbytes` of memory rounded up to what a transfer takes."""
    return -(-nbytes // _native.DISK_ALIGNMENT) * _native.DISK_ALIGNMENT
