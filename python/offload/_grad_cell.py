"""GradCell: the one owner of one gradient's bytes, on the host, nowhere (all zero) or on the device.

Bytes that are on the host are never written again: a changed gradient departs to new ones, so that a submitted step
reads what it was given. A device copy departs only when nothing else can reach its memory.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ._grad_factors import Factor, HostBytes

__all__ = ["GradCell", "GradStore", "NormKey", "Owner", "StepGradient"]

# What a norm over all elements depends on: the operation, its order and the dtype it was asked for.
NormKey = tuple[Any, float, "torch.dtype | None"]

# More than clipping, unscaling and averaging over micro-batches together ask for; a longer list is a loop of the
# user's that would grow without end.
_MAX_PENDING = 8

# Of a new cell, and of every one whose norms nobody asks for: a gradient is to make few objects.
_NO_NORMS: Mapping[NormKey, Tensor] = MappingProxyType({})

# Those of all gradients, one object for equal ones: two tuples less a gradient that the garbage collector has to see.
_SHAPES: dict[torch.Size, torch.Size] = {}
_STRIDES: dict[tuple[int, ...], tuple[int, ...]] = {}

_FOREACH_NORM = torch.ops.aten._foreach_norm.Scalar


class GradStore(Protocol):
    """What moves the bytes: the engine. Copies run on transfer lanes, in order with the current compute stream."""

    # Norms to take from gradients on their way to the host; a cell adds one when it is first asked for. By parameter's
    # name: from which departure of a gradient on. Of a sum of micro-batches it is the last one whose norm is wanted.
    learned: dict[NormKey, dict[str, int]]

    def compute_stream(self) -> int:
        """The handle of this thread's current stream."""

    def to_host(self, tensor: Tensor) -> HostBytes:
        """Starts the copy of a dense tensor's bytes in storage order. The tensor is given away to the store."""

    def to_device(self, held: HostBytes, out: Tensor) -> None:
        """Fills `out`, which has the strides that `held` was copied with; the compute stream waits, not the host."""

    def widened(self, tensor: Tensor) -> Tensor:
        """A dense tensor's values in fp32 and in its own strides, until this thread's next call."""

    def start_upload(self, held: HostBytes, out: Tensor) -> Any:
        """Starts filling `out` and keeps it alive until that ended; nothing waits before wait_upload()."""

    def wait_upload(self, upload: Any) -> None:
        """The compute stream waits until what start_upload() returned has ended."""


@dataclass(frozen=True, slots=True)
class StepGradient:
    """A gradient as the optimizer reads it: `bytes` is `dtype` in storage order of `strides`.

    factors: (kind, address of an fp32 or 0, fp32 value, what keeps the address valid), to be applied in order. The
    bytes never change; they, and the factors' addresses, may be read when every one of `tickets` is done.
    """

    bytes: HostBytes
    dtype: torch.dtype
    strides: tuple[int, ...]
    factors: list[tuple[int, int, float, HostBytes | None]]

    @property
    def tickets(self) -> list[Any]:
        return [self.bytes.ticket, *(held.ticket for *_, held in self.factors if held is not None)]


class Owner(enum.Enum):
    """Where the bytes of a gradient are: HOST (and pending factors), ZERO (no bytes), DEVICE (a tensor)."""

    HOST = enum.auto()
    ZERO = enum.auto()
    DEVICE = enum.auto()


# For every gradient of every backward: Python looks a member of an enum up for a tenth of a microsecond.
_HOST, _ZERO, _DEVICE = Owner


class GradCell:
    """Owns the bytes of one gradient; every HostGrad over it shows the same gradient.

    name is the parameter's, for messages; shape, strides, dtype and device are the gradient's. A new cell is owned by
    `gradient` itself, dense and not overlapping; `settle()` sends it off once the caller has dropped its reference.

    Ctrl-C may come between any two lines: `owner` changes in one assignment, with what the new owner needs in place
    before it. What is on the host counts for the owner HOST only, norms are dropped before a value changes, and a loan
    that was not settled is settled by the next edit.
    """

    __slots__ = (
        "_copy",
        "_departures",
        "_exposed",
        "_factors",
        "_held",
        "_norms",
        "_upload",
        "device",
        "dtype",
        "name",
        "owner",
        "shape",
        "store",
        "strides",
        "writer",
    )

    def __init__(self, name: str, gradient: Tensor, store: GradStore) -> None:
        self.name = name
        shape, strides = gradient.shape, gradient.stride()
        self.shape = _SHAPES.setdefault(shape, shape)
        self.strides = _STRIDES.setdefault(strides, strides)
        self.dtype = gradient.dtype
        self.device = gradient.device
        self.store = store
        self.writer: Any = None  # kept by hold(): the backward pass that last wrote
        self.owner = _DEVICE
        self._copy: Tensor | None = gradient  # the owner, or the copy lent to the operation that runs
        # What prefetch() asked for: the held bytes, no factors applied, what to wait for, and the compute stream whose
        # memory they come to.
        self._upload: tuple[Tensor, Any, int] | None = None
        self._held: HostBytes | None = None
        self._factors: tuple[Factor, ...] = ()
        self._norms = _NO_NORMS  # of the value as it is, pending factors included
        self._exposed = False  # a raw address is out: nobody can tell when its user is done
        self._departures = 0  # since the gradient was new, or zero

    # --- reading ------------------------------------------------------------------------------------------

    def prefetch(self) -> None:
        """Starts the upload of the held bytes ahead of their use; materialize() takes it."""
        if self.owner is _HOST and self._upload is None:
            stream, out = self.store.compute_stream(), self._empty()
            self._upload = (out, self.store.start_upload(self._held_bytes(), out), stream)

    def materialize(self) -> Tensor:
        """The gradient as a device tensor, pending factors applied by torch's own operations.

        The owner itself while that is a device tensor, else a new copy: read it, do not edit it.
        """
        if self.owner is _DEVICE:
            assert self._copy is not None
            return self._copy
        if self.owner is _ZERO:
            return self._empty().zero_()
        if self._upload is not None and self._upload[2] == self.store.compute_stream():
            (copy, upload, _), self._upload = self._upload, None
            self.store.wait_upload(upload)
        else:  # what was sent for on another stream may not be used on this one
            self._upload = None
            copy = self._empty()
            self.store.to_device(self._held_bytes(), copy)
        for factor in self._factors:
            factor.apply(copy)
        return copy

    def lend(self) -> Tensor:
        """The device copy for one operation; settle() follows when the caller has dropped it."""
        if self._copy is None:
            self._copy = self.materialize()
        return self._copy

    def settle(self) -> None:
        """Ends a loan: a copy that something else still reaches is the owner, an owner that nothing does departs."""
        if self._copy is None:
            return
        if self._exposed or _references(self) > _SOLE_OWNER:
            self.own_on_device()
        elif self.owner is _DEVICE:
            self._depart(self._copy)
        else:
            self._copy = None

    # --- writing ------------------------------------------------------------------------------------------

    def own_on_device(self) -> Tensor:
        """Makes the device copy the owner (an edit of it counts), until settle() finds that nothing else reaches it."""
        copy = self.lend()
        self._norms = _NO_NORMS
        self.owner = _DEVICE
        self._forget_host()
        return copy

    def expose(self) -> Tensor:
        """As own_on_device(), for good: for users of raw addresses."""
        self._exposed = True
        return self.own_on_device()

    def zero(self) -> None:
        """Sets every element to zero."""
        if self.owner is _DEVICE:
            self.lend().zero_()
            self.settle()
        if self.owner is not _DEVICE:
            self._copy = None
            self._norms = _NO_NORMS
            self.owner = _ZERO
            self._forget_host()
        self._departures = 0

    def overwrite(self, source: Tensor) -> None:
        """Copies `source`, of any dtype and device and a shape that broadcasts, over the gradient."""
        if self.owner is _DEVICE:
            self.lend().copy_(source)
        else:
            copy = self._empty()
            copy.copy_(source)
            self._copy = copy
            del copy  # the cell is to be the only one that refers to it
            self.own_on_device()
        self.settle()

    def replace(self, tensor: Tensor) -> None:
        """Makes `tensor`, which has the cell's shape, strides, dtype and device, the owner."""
        self._copy = tensor
        self._exposed = False
        self.own_on_device()

    def defer(self, factor: Factor) -> None:
        """Appends a pending scale; legal when can_defer()."""
        self._norms = _NO_NORMS
        self._factors = (*self._factors, factor)

    def can_defer(self) -> bool:
        self.settle()
        # A gradient without dimensions takes part in type promotion like a scalar: torch's rounding was not probed.
        return self.owner is _HOST and len(self._factors) < _MAX_PENDING and len(self.shape) > 0

    # --- norms and the step -------------------------------------------------------------------------------

    def norm(self, key: NormKey) -> Tensor:
        """The norm as torch's own operation gives it: taken on the way out where `key` is learned, else now.

        It may be kept and returned again: read it, do not edit it.
        """
        if key not in self._norms:
            if self.owner is _HOST and not self._factors:
                # A norm of a scaled gradient is no use on the way out.
                self.store.learned.setdefault(key, {})[self.name] = self._departures
            norm = self._take_norm(key, self.lend())
            self.settle()
            if self.owner is _DEVICE:
                return norm  # whoever else reaches the copy may edit it at any time
            self._norms = {**self._norms, key: norm}
        return self._norms[key]

    def for_step(self) -> StepGradient:
        """The gradient in host bytes that nothing will write to, whatever happens to it later."""
        self._upload = None
        if self.owner is not _HOST:
            self.own_on_device()
            self.settle()
        if self.owner is _DEVICE:
            # Others may edit the owner while its bytes are read, so a copy goes.
            assert self._copy is not None
            return StepGradient(self.store.to_host(self._copy.clone()), self.dtype, self.strides, [])
        factors = [
            (factor.kind, 0 if factor.held is None else factor.held.address, factor.value, factor.held)
            for factor in self._factors
        ]
        return StepGradient(self._held_bytes(), self.dtype, self.strides, factors)

    # --- inside -------------------------------------------------------------------------------------------

    def _depart(self, copy: Tensor) -> None:
        """When the store refuses it, `copy` stays the owner and nothing is lost."""
        store, departures, norms = self.store, self._departures + 1, _NO_NORMS
        for key, first in store.learned.items():
            if departures >= first.get(self.name, 1):
                norms = {**norms, key: self._take_norm(key, copy)}
        self._held = store.to_host(copy)
        self._upload = None
        self._factors = ()
        self._norms = norms
        self._departures = departures
        self.owner = _HOST
        self._copy = None

    def _take_norm(self, key: NormKey, tensor: Tensor) -> Tensor:
        operation, order, dtype = key
        if dtype is torch.float32 and tensor.itemsize < dtype.itemsize and tensor.device.type == "cpu":
            # What torch does there, too, but in new memory for every gradient, whose pages cost more than the norm.
            tensor = self.store.widened(tensor)
        if operation is _FOREACH_NORM:
            return torch._foreach_norm([tensor], order, dtype)[0]
        norm: Tensor = torch.linalg.vector_norm(tensor, order, dtype=dtype)
        return norm

    def _forget_host(self) -> None:
        self._held = None
        self._upload = None
        self._factors = ()
        self._norms = _NO_NORMS

    def _empty(self) -> Tensor:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # an inference tensor could not be edited outside that mode
                return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)

    def _held_bytes(self) -> HostBytes:
        assert self._held is not None
        return self._held


def _references(cell: GradCell) -> int:
    """How much refers to the copy and its memory: in Python and C++, to the tensor and to its storage."""
    assert cell._copy is not None
    storage = cell._copy.untyped_storage()
    count: int = sys.getrefcount(cell._copy) + cell._copy._use_count()  # type: ignore[attr-defined]
    count += sys.getrefcount(storage) + torch._C._storage_Use_Count(storage._cdata)
    return count


def _count_sole_owner() -> int:
    """What _references() gives for a copy that only its cell refers to: it varies with Python and torch."""
    return _references(GradCell("", torch.empty(1, device="cpu"), cast(GradStore, None)))


_SOLE_OWNER = _count_sole_owner()
