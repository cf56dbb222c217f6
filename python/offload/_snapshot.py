"""What a checkpoint is made of, with the bits of the moment it was asked for.

[Note: the snapshot] A synchronous save reads tensors where they are. An asynchronous one copies at the call what
anybody may write to: weights, buffers, and what is on a device. Optimizer states in host memory, and the host bytes of
weights, are written to by steps, loads and write-backs alone, which announce themselves (`watch_states`, or the hooks
of a stock optimizer). The writer reads them where they are, in the order of the file, and at an announcement what it
has not read yet is copied. So a save that ends before the next step copies no state, and the memory it takes is at most
the bytes that it still has to write.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ._parameter_state import SplitMaster, StoredValue
from ._safetensors import lay_out

__all__ = ["Cast", "TensorFile", "Value", "shared_names"]


@dataclass(frozen=True)
class Cast:
    """A tensor that is written in another dtype, without all of a model being in both at once."""

    value: Tensor
    dtype: torch.dtype

    def join(self) -> Tensor:
        return self.value.to(self.dtype)


Value = Tensor | SplitMaster | StoredValue | Cast


class TensorFile:
    """The bytes of one safetensors file, taken in their order. Threads: any may call any method."""

    def __init__(self, values: Mapping[str, Value], metadata: Mapping[str, str]) -> None:
        described = [(name, _dtype_of(value), tuple(_shape_of(value))) for name, value in values.items()]
        layout = lay_out(described, metadata)
        self.nbytes = layout.nbytes
        self._idle = threading.Condition()
        self._readers = 0
        self._copying = False
        header = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
        self._sources = deque([_Source(header, 0, len(layout.header))])
        self._sources += [_Source(values[entry.name], entry.begin, entry.end) for entry in layout.entries]
        self._taken_bytes = 0

    @torch.no_grad()
    def take(self, buffer: Tensor) -> tuple[int, int] | None:
        """Fills `buffer` (bytes on the host) with what comes next: where that begins and its length, None at the end.

        What was taken is let go of.
        """
        with self._idle:
            self._idle.wait_for(lambda: not self._copying)
            begin = self._taken_bytes
            end = min(begin + buffer.numel(), self.nbytes)
            if begin == end:
                return None
            parts = []
            while self._sources and self._sources[0].begin < end:
                parts.append(self._sources[0])
                if parts[-1].end > end:
                    break
                self._sources.popleft()
            self._taken_bytes = end
            self._readers += 1
        try:  # several threads read at once; what a change is announced for waits for them
            for source in parts:
                first, last = max(begin, source.begin), min(end, source.end)
                source.read(buffer[first - begin : last - begin], first - source.begin)
        finally:
            with self._idle:
                self._readers -= 1
                self._idle.notify_all()
        return begin, end - begin

    def left_bytes(self) -> int:
        """The bytes that were not taken and are still those of live tensors."""
        with self._idle:
            return sum(source.end - source.begin for source in self._sources if source.is_live)

    @torch.no_grad()
    def copy_rest(self) -> None:
        """Copies what was not taken: when it returns nothing is read from live tensors any more."""
        with self._idle:
            self._copying = True
            try:
                self._idle.wait_for(lambda: self._readers == 0)
                for source in self._sources:
                    source.copy()
            finally:
                self._copying = False
                self._idle.notify_all()


class _Source:
    """The values of one tensor at `begin` to `end` of the file: those of a live tensor, or a copy."""

    __slots__ = ("_bytes", "_value", "begin", "end", "is_live")

    def __init__(self, value: Value, begin: int, end: int) -> None:
        self._value: Value = value
        self._bytes: Tensor | None = None
        self.begin = begin
        self.end = end
        self.is_live = True

    def read(self, out: Tensor, begin: int) -> None:
        """Writes the bytes from `begin` on, as many as `out` has; of what is no tensor these are whole elements."""
        if out.numel() == 0:
            return
        value = self._value
        if isinstance(value, SplitMaster) and value.weight.is_contiguous():
            first, count = begin // 4, out.numel() // 4
            part = SplitMaster(*(half.view(-1)[first : first + count] for half in (value.weight, value.remainder)))
            part.join_into(out.view(torch.float32))
            return
        if isinstance(value, StoredValue) and value.is_contiguous():
            value.read_into(out.view(torch.float32), begin // 4)
            return
        if self._bytes is None:
            whole = value if isinstance(value, Tensor) else value.join()
            self._bytes = whole.detach().contiguous().view(-1).view(torch.uint8)
        out.copy_(self._bytes[begin : begin + out.numel()])

    def copy(self) -> None:
        if self.is_live:
            value = self._value
            self._value = copied(value) if isinstance(value, Tensor) else value.join()
            self._bytes = None
            self.is_live = False


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
        key = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if key in first:
            shared[name] = first[key]
        else:
            first[key] = name
    return shared


def copy_before_changes(
    files: Iterable[TensorFile], available_bytes: Callable[[], int], wait: Callable[[], None]
) -> None:
    """Before live tensors change: copies what was not taken, or waits for the writer where memory would be short."""
    for file in files:
        left = file.left_bytes()
        if left > available_bytes() // 2:  # the rest of the process needs some too
            wait()
            return
        file.copy_rest()
