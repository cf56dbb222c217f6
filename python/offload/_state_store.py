"""Optimizer states on disk: where each parameter's arrays are, and how others than the update read and write them.

The update itself goes through the native `StateWindow` (csrc/pipeline/state_window.h). Here states are made, loaded,
edited and saved, a chunk at a time: nothing ever holds all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._disk import DiskPath, DiskRange, DiskStore
from ._disk_snapshot import DiskSnapshot
from ._disk_window import DiskWindow
from ._errors import StorageError

__all__ = ["ARRAYS", "StateStore", "StoredArrays", "StoredChunk", "open_store"]

# In the order of the native core (csrc/pipeline/state_layout.h).
ARRAYS = ("master", "exp_avg", "exp_avg_sq")
# Of a path, as csrc/storage/block_file.cpp has it.
_MOST_THREADS = 256


@dataclass(frozen=True)
class StoredChunk:
    """Elements `begin` to `begin + count` of a state in storage order, and where they are on disk."""

    begin: int
    count: int
    where: DiskRange
    array_offsets: Mapping[str, int]


def open_store(paths: Sequence[DiskPath], *, block_bytes: int, queue_depth: int | None) -> DiskStore:
    """Files under `paths` for states and weights. Raises `StorageError` for a path that cannot be used."""
    return DiskStore(paths, block_bytes=block_bytes, **_depths(queue_depth))


class StateStore:
    """One process's states on disk, in the files of `store`.

    Raises `OutOfHostMemory` when the window does not fit the pool.
    """

    def __init__(self, store: DiskStore, pool: _native.HostPool, window: DiskWindow) -> None:
        self.store = store
        self._chunk_elements = window.chunk_elements
        pool.reserve(window.nbytes)
        self.window = self.store.state_window(pool, window.frame_bytes, window.frame_count)
        buffers = [self.store.buffer(pool, window.frame_bytes, "window") for _ in range(window.other_frames)]
        *edits, self._read_frame = buffers
        self._edit_frames = [(frame, torch.frombuffer(frame, dtype=torch.uint8)) for frame in edits]
        self._writes = [_native.Ticket() for _ in edits]
        self._reading = threading.RLock()  # reentrant, for Ctrl-C at the end of a block leaves it taken
        self._reserved = DiskRange(0, 0)
        self._written: dict[StoredArrays, None] = {}
        # Why states here are not what they should be: a write of an edit failed. Text: an exception keeps its frames.
        self.loss: str | None = None

    def layout(self, arrays: Mapping[str, torch.dtype], element_count: int) -> _native.StateLayout:
        sizes = {name: arrays[name].itemsize if name in arrays else 0 for name in ARRAYS}
        return _native.StateLayout(
            **sizes,
            element_count=element_count,
            chunk_elements=self._chunk_elements,
            block_bytes=self.store.block_bytes,
        )

    def bytes_of(self, arrays: Mapping[str, torch.dtype], element_count: int) -> int:
        """On disk, to whole blocks."""
        block = self.store.block_bytes
        return -(-self.layout(arrays, element_count).nbytes // block) * block

    def reserve(self, nbytes: int) -> None:
        """Space for so many bytes of states; raises `StorageError`, and changes nothing, without it.

        What was reserved for others that were refused is taken first, for a file gives nothing back.
        """
        if nbytes > self._reserved.nbytes:
            self._reserved = self.store.allocate(nbytes)

    def place(self, name: str, arrays: Mapping[str, torch.dtype], element_count: int) -> StoredArrays:
        """Where the arrays of a parameter will be: in what was reserved while that lasts. They have no values yet."""
        nbytes = self.bytes_of(arrays, element_count)
        offset = self._reserved.offset
        if nbytes <= self._reserved.nbytes:
            self._reserved = DiskRange(offset + nbytes, self._reserved.nbytes - nbytes)
        else:
            offset = self.store.allocate(nbytes).offset
        return StoredArrays(self, name, dict(arrays), offset, self.layout(arrays, element_count))

    def tell_written(self, tell: Callable[[int], None]) -> None:
        """Calls `tell` with the slots of what was written here since the last call: the window has it as it was."""
        for arrays in self._written:
            if arrays.slot >= 0:  # else no update uses them
                tell(arrays.slot)
        self._written.clear()

    def close(self) -> None:
        """Gives up its memory, whoever still refers to a state. Use nothing after it."""
        del self.store, self.window, self._edit_frames, self._read_frame

    # --- for StoredArrays -----------------------------------------------------------------------------------

    def edit(self, arrays: StoredArrays, *, read: bool, write: bool) -> Iterator[tuple[StoredChunk, Tensor]]:
        """Each chunk with its bytes in memory, which are written behind its turn."""
        if write:
            self._written[arrays] = None
        for number, chunk in enumerate(arrays.chunks()):
            turn = number % len(self._edit_frames)
            self._end_write(turn)
            frame, memory = self._edit_frames[turn]
            if read:
                self.store.submit_read(chunk.where, frame).wait()
            yield chunk, memory
            if write:
                self._writes[turn] = self.store.submit_write(chunk.where, frame)
        for turn in range(len(self._writes)):
            self._end_write(turn)

    def _end_write(self, turn: int) -> None:
        ticket, self._writes[turn] = self._writes[turn], _native.Ticket()
        try:
            ticket.wait()
        except StorageError as error:
            self.loss = str(error)
            raise

    def read(self, chunk: StoredChunk, begin: int, out: Tensor, snapshot: DiskSnapshot | None = None) -> None:
        """The chunk's bytes from `begin` on, as many as `out` (bytes) has. Threads: any, one after another."""
        file = self.store if snapshot is None else snapshot.of(self.store)
        block = file.block_bytes
        first = begin // block * block
        end = min(-(-(begin + out.numel()) // block) * block, chunk.where.nbytes)
        with self._reading:
            file.submit_read(chunk.where, self._read_frame, first, end - first).wait()
            memory = torch.frombuffer(self._read_frame, dtype=torch.uint8)
            out.copy_(memory[begin - first : begin - first + out.numel()])


class StoredArrays:
    """The arrays of one parameter's state: `dtypes` by their names, from `offset` of the store on."""

    def __init__(
        self,
        store: StateStore,
        name: str,
        dtypes: Mapping[str, torch.dtype],
        offset: int,
        layout: _native.StateLayout,
    ) -> None:
        self._store = store
        self._name = name
        self.dtypes = dtypes
        self.offset = offset
        self.layout = layout
        # Of the pipeline: whom to tell that they were written.
        self.slot = -1

    def chunks(self) -> Iterator[StoredChunk]:
        for begin, count, start, nbytes, places in self.layout.chunks():
            where = DiskRange(self.offset + start, nbytes)
            yield StoredChunk(begin, count, where, dict(zip(ARRAYS, places, strict=True)))

    def edit(self, *, read: bool = True, write: bool = True) -> Iterator[tuple[StoredChunk, dict[str, Tensor]]]:
        """Each chunk with its arrays in memory, to be changed there. read: with their values; write: keeps changes.

        Raises `StorageError` with the parameter's name.
        """
        try:
            for chunk, memory in self._store.edit(self, read=read, write=write):
                yield chunk, {name: self._array(name, chunk, memory) for name in self.dtypes}
        except StorageError as error:
            raise self._named(error) from error

    def read(self, name: str, first: int, out: Tensor, snapshot: DiskSnapshot | None = None) -> None:
        """Fills `out` (flat, of the array's dtype) with elements from `first` on, in storage order.

        snapshot: with those that it has.
        """
        size, end = out.element_size(), first + out.numel()
        try:
            for chunk in self.chunks():
                begin, stop = max(first, chunk.begin), min(end, chunk.begin + chunk.count)
                if begin < stop:
                    place = chunk.array_offsets[name] + (begin - chunk.begin) * size
                    part = out[begin - first : stop - first].view(torch.uint8)
                    self._store.read(chunk, place, part, snapshot)
        except StorageError as error:
            raise self._named(error) from error

    def _array(self, name: str, chunk: StoredChunk, memory: Tensor) -> Tensor:
        dtype, begin = self.dtypes[name], chunk.array_offsets[name]
        return memory[begin : begin + chunk.count * dtype.itemsize].view(dtype)

    def _named(self, error: StorageError) -> StorageError:
        text = f"{self._name}: its states on disk: {error.strerror or error}"
        return StorageError(text) if error.errno is None else StorageError(error.errno, text)


def _depths(queue_depth: int | None) -> dict[str, Any]:
    """So many transfers under way, by either back-end."""
    if queue_depth is None:
        return {}
    return {"queue_depth": queue_depth, "thread_count": min(queue_depth, _MOST_THREADS)}
