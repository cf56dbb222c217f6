"""What a checkpoint is made of, with the bits of the moment it was asked for.

[Note: the snapshot] A synchronous save reads tensors where they are. An asynchronous one copies at the call what
anybody may write to: weights, buffers, and what is on a device. Optimizer states in host memory, and the host bytes of
weights, are written to by steps, loads and write-backs alone, which announce themselves (`watch_states`, or the hooks
of a stock optimizer). The writer reads them where they are, in the order of the file, and at an announcement what it
has not read yet is copied. So a save that ends before the next step copies no state, and the memory it takes is at most
the bytes that it still has to write. A step whose updates run in the background does not wait: each update waits for
the copies of what it changes, which are made in the order of the updates. What is on disk is read from a snapshot where
there is one (_disk_snapshot.py) and never copied, or only when its store goes; otherwise it is copied as the rest, but
before a step, not before each of its updates: the copies are read from the disk that the updates before them write to.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ._disk_snapshot import DiskSnapshot
from ._moments import Int8Moment
from ._safetensors import lay_out
from ._stored_values import LentWeight, SplitMaster, StoredValue, StoredWeight

__all__ = ["Cast", "CopyBeforeChange", "TensorFile", "Value", "copied", "shared_names"]


@dataclass(frozen=True)
class Cast:
    """A tensor that is written in another dtype, without all of a model being in both at once."""

    value: Tensor
    dtype: torch.dtype

    def join(self) -> Tensor:
        return self.value.to(self.dtype)


Value = Tensor | SplitMaster | StoredValue | StoredWeight | Cast | Int8Moment


class TensorFile:
    """The bytes of one safetensors file, taken in their order. Threads: any may call any method."""

    def __init__(self, values: Mapping[str, Value], metadata: Mapping[str, str]) -> None:
        described = [(name, _dtype_of(value), tuple(_shape_of(value))) for name, value in values.items()]
        _end_compute(values.values())
        layout = lay_out(described, metadata)
        self.nbytes = layout.nbytes
        header = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
        self.sources = [_Source(header, 0, len(layout.header))]
        self.sources += [_Source(values[entry.name], entry.begin, entry.end) for entry in layout.entries]
        self._changed = threading.Condition()
        # guarded by _changed, as what the sources say of readers and copies
        self._first = 0  # the sources before it are taken
        self._taken_bytes = 0
        self._error: BaseException | None = None

    def reads_disk(self) -> bool:
        return any(isinstance(source.value, (StoredValue, StoredWeight)) for source in self.sources)

    def read_from(self, snapshot: DiskSnapshot) -> None:
        """What is on disk is read there. Before anything is taken."""
        for source in self.sources:
            source.snapshot = snapshot

    @torch.no_grad()
    def take(self, buffer: Tensor) -> tuple[int, int] | None:
        """Fills `buffer` (bytes on the host) with what comes next: where that begins and its length, None at the end.

        What was taken is let go of. Raises the error of a copy that could not be made.
        """
        with self._changed:
            self._changed.wait_for(lambda: not any(source.is_copying for source in self._next(buffer.numel())))
            if self._error is not None:
                raise self._error
            begin = self._taken_bytes
            parts = self._next(buffer.numel())
            if not parts:
                return None
            end = min(begin + buffer.numel(), self.nbytes)
            self._first += len(parts) if parts[-1].end == end else len(parts) - 1
            self._taken_bytes = end
            for source in parts:
                source.readers += 1
        try:  # several threads read at once
            for source in parts:
                first, last = max(begin, source.begin), min(end, source.end)
                source.read(buffer[first - begin : last - begin], first - source.begin)
        finally:
            with self._changed:
                for source in parts:
                    source.readers -= 1
                    if source.readers == 0 and source.end <= self._taken_bytes:
                        source.let_go()
                self._changed.notify_all()
        return begin, end - begin

    def _next(self, nbytes: int) -> list[_Source]:
        """The sources of the next bytes."""
        end = min(self._taken_bytes + nbytes, self.nbytes)
        parts = []
        for source in itertools.islice(self.sources, self._first, None):
            if source.begin >= end:
                break
            parts.append(source)
        return parts

    def left_bytes(self, *, ending: bool = False) -> int:
        """The bytes that were not taken and are still those of live tensors. ending: or of a snapshot."""
        with self._changed:
            return sum(source.left_bytes(ending=ending) for source in self.sources[self._first :])

    def keep(self, source: _Source, *, ending: bool = False) -> None:
        """Copies what was not taken of it: when this returns, nothing is read from its live tensor any more.

        ending: nor from a snapshot.
        """
        with self._changed:
            self._changed.wait_for(lambda: not source.is_copying)
            source.is_copying = True
            self._changed.wait_for(lambda: source.readers == 0)
        try:
            source.copy(ending=ending)
        finally:
            with self._changed:
                source.is_copying = False
                self._changed.notify_all()

    def give_up(self, error: BaseException) -> None:
        """No byte is taken any more: `take` raises the error."""
        with self._changed:
            self._error = error
            self._changed.notify_all()


class _Source:
    """The values of one tensor at `begin` to `end` of the file: those of a live tensor, a copy, or nothing any more.

    `snapshot` has those on disk, None: they are live too.
    """

    __slots__ = ("_bytes", "begin", "end", "is_copying", "is_live", "readers", "snapshot", "value")

    def __init__(self, value: Value, begin: int, end: int) -> None:
        self.value: Value | None = value
        self._bytes: Tensor | None = None
        self.begin = begin
        self.end = end
        self.snapshot: DiskSnapshot | None = None
        self.is_live = True
        self.readers = 0
        self.is_copying = False

    def addresses(self) -> list[int]:
        """Of the live tensors that are read."""
        value = self.value
        parts: Sequence[Tensor] = ()
        if isinstance(value, SplitMaster):
            parts = (value.weight, value.remainder)
        elif isinstance(value, Int8Moment):
            parts = value.tensors()
        elif isinstance(value, (Tensor, Cast)):
            parts = (value.value if isinstance(value, Cast) else value,)
        elif isinstance(value, StoredValue) and self.snapshot is not None:  # else it is copied before the step
            parts = value.in_memory()
        return [part.data_ptr() for part in parts if part.numel() > 0]

    def left_bytes(self, *, ending: bool) -> int:
        """What a copy takes; see `copy`."""
        value = self.value
        if isinstance(value, (StoredValue, StoredWeight)) and self.snapshot is not None and not ending:
            return sum(part.nbytes for part in value.in_memory()) if self.is_live else 0
        is_copy = not self.is_live and not isinstance(value, (StoredValue, StoredWeight))
        return 0 if is_copy else self.end - self.begin

    def read(self, out: Tensor, begin: int) -> None:
        """Writes the bytes from `begin` on, as many as `out` has; of what is no tensor these are whole elements."""
        if out.numel() == 0:
            return
        value = self.value
        assert value is not None
        if isinstance(value, SplitMaster) and value.weight.is_contiguous():
            first, count = begin // 4, out.numel() // 4
            part = SplitMaster(*(half.view(-1)[first : first + count] for half in (value.weight, value.remainder)))
            part.join_into(out.view(torch.float32))
            return
        if isinstance(value, StoredValue) and value.is_contiguous():
            value.read_into(out.view(torch.float32), begin // 4, self.snapshot)
            return
        if isinstance(value, StoredWeight) and value.is_contiguous():
            value.read_into(out.view(value.dtype), begin // value.dtype.itemsize, self.snapshot)
            return
        if self._bytes is None:
            whole = self._whole(value)
            self._bytes = whole.detach().contiguous().view(-1).view(torch.uint8)
        out.copy_(self._bytes[begin : begin + out.numel()])

    def _whole(self, value: Value) -> Tensor:
        if isinstance(value, (StoredValue, StoredWeight)):
            return value.join(self.snapshot)
        return value if isinstance(value, Tensor) else value.join()

    @torch.no_grad()
    def copy(self, *, ending: bool = False) -> None:
        """Of what a snapshot has only the part in memory is copied; ending: the store of that goes, so all is."""
        value = self.value
        if isinstance(value, (StoredValue, StoredWeight)):
            if self.snapshot is None or ending:
                self.value, self._bytes = value.join(self.snapshot), None
            elif self.is_live:
                self.value = value.with_copies()
        elif self.is_live and value is not None:
            self.value = copied(value) if isinstance(value, Tensor) else value.join()
            self._bytes = None
        self.is_live = False

    def let_go(self) -> None:
        self.value = self._bytes = None
        self.is_live = False


def _end_compute(values: Iterable[Value]) -> None:
    """Other threads read them, on other streams: what this one has asked of a device ends first."""
    parts = [value.value if isinstance(value, Cast) else value for value in values]
    devices = {part.device for part in parts if isinstance(part, (Tensor, Int8Moment))}
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def copied(value: Tensor) -> Tensor:
    """A copy in host memory."""
    return value.detach().to("cpu", copy=True)


def _shape_of(value: Value) -> torch.Size:
    if isinstance(value, SplitMaster):
        return value.weight.shape
    return value.value.shape if isinstance(value, Cast) else value.shape


def _dtype_of(value: Value) -> torch.dtype:
    return torch.float32 if isinstance(value, (SplitMaster, StoredValue)) else value.dtype


def shared_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are the same memory as an earlier one, with the name of that: tied weights."""
    first: dict[tuple[object, ...], str] = {}
    shared = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        place = id(tensor.stored) if isinstance(tensor, LentWeight) else tensor.data_ptr()
        key = (place, tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if key in first:
            shared[name] = first[key]
        else:
            first[key] = name
    return shared


class CopyBeforeChange:
    """Keeps the bits of a snapshot that is still being written; see [Note: the snapshot].

    `available_bytes` of memory may be half used; where more is left to copy, whoever changes something waits with
    `wait` for the writer. Threads: one at a time changes tensors; the copies that an update waits for have their own.
    """

    def __init__(
        self, files: Sequence[TensorFile], available_bytes: Callable[[], int], wait: Callable[[], None]
    ) -> None:
        self._files = files
        self._available_bytes = available_bytes
        self._wait = wait
        self._sources: dict[int, list[tuple[TensorFile, _Source]]] = {}
        for file in files:
            for source in file.sources:
                for address in source.addresses():
                    self._sources.setdefault(address, []).append((file, source))
        self._copies: dict[int, Future[None]] = {}
        self._copier: ThreadPoolExecutor | None = None

    def before_change(self) -> None:
        """Any of the tensors may change after this. An error of copying is the save's."""
        self._keep_all(ending=False)

    def before_end(self) -> None:
        """The same, and the files on disk may go."""
        self._keep_all(ending=True)

    def _keep_all(self, *, ending: bool) -> None:
        left = [file.left_bytes(ending=ending) for file in self._files]
        if sum(left) > self._available_bytes() // 2:  # the rest of the process needs some too
            self._wait()
            return
        _keep([(file, source) for file in self._files for source in file.sources], ending=ending)

    def before_update(self, tensors: Iterable[Tensor]) -> Future[None] | None:
        """These may change after what is returned; it never fails, an error of copying is the save's."""
        addresses = [tensor.data_ptr() for tensor in tensors if tensor.numel() > 0]
        earlier = next((self._copies[address] for address in addresses if address in self._copies), None)
        sources = [pair for address in addresses for pair in self._sources.pop(address, ())]
        if earlier is not None or not sources:
            return earlier
        if self._copier is None:
            if sum(file.left_bytes() for file in self._files) > self._available_bytes() // 2:
                self._wait()
            self._copier = ThreadPoolExecutor(1, thread_name_prefix="offload-checkpoint-copies")
        copies = self._copier.submit(_keep, sources)
        for address in addresses:
            self._copies[address] = copies
        return copies

    def end(self) -> None:
        """The save has ended: nothing is copied any more."""
        self._sources.clear()
        if self._copier is not None:
            self._copier.shutdown()


def _keep(sources: Iterable[tuple[TensorFile, _Source]], *, ending: bool = False) -> None:
    file = None
    try:
        for file, source in sources:
            file.keep(source, ending=ending)
    except BaseException as error:  # what was not copied changes now: it may not come into the file
        assert file is not None
        file.give_up(error)
        if not isinstance(error, Exception):  # Ctrl-C in the thread that trains
            raise
