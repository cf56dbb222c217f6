"""The weight that a split master belongs to, while the model's own weight is another one.

A streamed weight on the host is the upper half of its split master and the model's own: when somebody writes to it,
what it was tells at the next step which elements came back, and those keep their low bits. An average of the weights
that is swapped in for an evaluation leaves training as it was. It is kept where the remainders are: in memory, or on
disk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from ._disk_snapshot import DiskSnapshot
from ._state_store import StateStore, StoredArrays
from ._stored_values import StoredWeight, flat

# Of the names that a layout on disk knows.
_ARRAY = "master"


class OldWeight:
    """See the module's text. store: where the remainders of `parameter` are, None: in memory."""

    def __init__(self, name: str, parameter: Parameter, store: StateStore | None) -> None:
        self._name = name
        self._parameter = parameter
        self._store = store
        self._place: StoredArrays | None = None  # once there was need of one, for good
        self._elements: Tensor | None = None

    def keep(self, value: Callable[[int, int], Tensor]) -> None:
        """value(begin, count): those elements in storage order. Raises `StorageError` when the disk cannot take it."""
        if self._store is None:
            self._elements = value(0, self._parameter.numel()).clone()
            return
        if self._place is None:
            dtypes = {_ARRAY: self._parameter.dtype}
            self._place = self._store.place(self._name, dtypes, self._parameter.numel())
        for chunk, arrays in self._place.edit(read=False):
            arrays[_ARRAY].copy_(value(chunk.begin, chunk.count))

    def forget(self) -> None:
        self._elements = None

    def elements(self, begin: int, count: int) -> Tensor:
        """Those elements in storage order. Raises `StorageError`."""
        if self._elements is not None:
            return self._elements[begin : begin + count]
        assert self._place is not None
        out = torch.empty(count, dtype=self._parameter.dtype, device="cpu")
        self._place.read(_ARRAY, begin, out)
        return out

    def equals(self, weight: Tensor) -> bool:
        """Whether the bits of a weight on the host, of the parameter's layout, are these."""
        stretches = [(0, weight.numel())]
        if self._place is not None:
            stretches = [(chunk.begin, chunk.count) for chunk in self._place.chunks()]
        return all(
            same_bits(self.elements(begin, count), flat(weight)[begin : begin + count]) for begin, count in stretches
        )

    def live(self) -> Tensor | StoredWeight:
        """Where it lies: a tensor, or what reads it."""
        shape, strides, dtype = self._parameter.shape, self._parameter.stride(), self._parameter.dtype
        if self._elements is not None:
            return self._elements.as_strided(shape, strides)
        place = self._place
        assert place is not None

        def read(begin: int, out: Tensor, snapshot: DiskSnapshot | None) -> None:
            place.read(_ARRAY, begin // dtype.itemsize, out.view(dtype), snapshot)

        return StoredWeight(read, dtype, shape, strides)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Of two 16-bit tensors of one shape: NaN is equal to itself, 0 is not -0."""
    return torch.equal(a.view(torch.int16), b.view(torch.int16))
