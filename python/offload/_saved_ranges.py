"""What autograd saved, as memory: ranges of storages, the views that show them, and whether anyone wrote to them.

A `SavedRange` is one stretch of one storage at one version. It outlives the device memory: its bytes may be on the
host, and come back as other memory, of which every `SavedView` is rebuilt with its own shape and strides.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from ._activation_format import ActivationFormat
from ._activation_order import HOST_BLOCK_BYTES
from ._host_grad import HostBytes
from ._interrupts import Uninterrupted

# Kernels may choose their path, and with it their rounding, by the alignment of an address; allocators align to 512 at
# most. So a range begins at a multiple of it, and what comes back is aligned as it was.
_ALIGNMENT_BYTES = 512
# A view with gaps takes its whole storage along, for its siblings (q, k and v of one projection), unless that is more
# than so many times the range that the view itself spans.
_STORAGE_PER_SPAN = 2
# What autocast and a layer put between a weight and the operation that saves it.
_WEIGHT_NODES = frozenset(
    ("ToCopyBackward0", "TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0", "UnsafeViewBackward0",
     "AliasBackward0")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RangeKey:
    """Identity: storage, elements [begin, begin + count) of `dtype`, how often the memory had been written to, and
    what the bytes are rounded to on their way, None for nothing.

    The address of a storage names it only while something, if only a weak reference, holds that address.
    """

    storage: int
    dtype: torch.dtype
    begin: int
    count: int
    version: int
    form: ActivationFormat | None

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    @property
    def sent_bytes(self) -> int:
        """What crosses the link."""
        return self.nbytes if self.form is None else self.form.packed_bytes(self.count)

    def landing_on(self, device: torch.device) -> Tensor:
        """Memory for what crosses the link to come back to."""
        count, dtype = (self.count, self.dtype) if self.form is None else (self.sent_bytes, torch.uint8)
        return torch.empty(count, dtype=dtype, device=device)


@dataclass(slots=True)
class DeviceCopy:
    """Device memory that a range came back to, valid after `ticket`; allocated on, and given back to, `stream`.

    form: what it is still packed in.
    """

    memory: Tensor
    version: int
    ticket: Any
    stream: int
    form: ActivationFormat | None

    def unpack(self, key: RangeKey) -> None:
        """Makes `memory` the values of `key`, behind what waits for the ticket."""
        if self.form is not None:
            memory = self.form.unpack(self.memory, key.count, key.dtype)
            with Uninterrupted():
                self.memory, self.version, self.form = memory, memory._version, None

    def check(self, view: SavedView) -> None:
        check_version(self.memory, self.version, self.memory.dtype, view.shape)


class SavedRange:
    """See the module's text. Its bytes are in `source` (still on the device) or in `held` (on the host).

    nbytes, sent_bytes, host_bytes: on the device, on their way, and of the block on the host.
    stream: the compute stream it was made on.
    index: its place in the order of its forward pass.
    copy: the memory it came back to, kept until all views of one backward pass have been read.
    ending: counts its bytes. ended: called with it when nothing refers to the range any more.
    """

    __slots__ = (
        "__weakref__", "copy", "ending", "forward", "held", "host_bytes", "index", "key", "nbytes", "sent_bytes",
        "source", "stream", "turn", "unread", "views", "witness",
    )  # fmt: skip

    def __init__(
        self, key: RangeKey, tensor: Tensor, stream: int, forward: Any, index: int, ended: Callable[[Any], None]
    ) -> None:
        self.key = key
        self.nbytes = key.nbytes
        self.sent_bytes = key.sent_bytes
        self.host_bytes = -(-self.sent_bytes // HOST_BLOCK_BYTES) * HOST_BLOCK_BYTES
        self.witness = version_witness(tensor)
        self.source: Tensor | None = tensor.detach()
        self.held: HostBytes | None = None
        self.copy: DeviceCopy | None = None
        self.stream = stream
        self.forward = forward
        self.index = index
        self.views = 0
        self.unread = 0
        self.turn = 0
        self.ending = Ending(self, ended)
        self.ending.key = key
        self.ending.storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self.ending.live_bytes = self.ending.device_bytes = self.nbytes
        self.ending.refused_bytes = self.ending.host_bytes = 0

    def add_view(self, tensor: Tensor) -> SavedView:
        """What autograd keeps in place of `tensor`, which lies in this range."""
        self.views += 1
        self.unread += 1
        return SavedView(self, tensor, self.turn)

    def note_read(self, view: SavedView) -> bool:
        """Whether `view` was the last one to be read in this backward pass: nobody needs the copy any more."""
        if view.turn != self.turn:
            return False  # read before in this pass
        view.turn += 1
        self.unread -= 1
        if self.unread:
            return False
        self.turn += 1
        self.unread = self.views
        return True

    def departing(self) -> Tensor:
        """The range as a dense tensor, for the copy to the host: packed on the current stream, if it has a form."""
        assert self.source is not None
        values = self.source.as_strided((self.key.count,), (1,), self.key.begin)
        return values if self.key.form is None else self.key.form.pack(values)


class Ending(weakref.ref[SavedRange]):
    """A weak reference to a range, with the bytes that it has in each place, to be counted out when it is gone.

    A range has no `__del__`, and no callback in Python: a signal handler may run in either, as soon as the node of a
    graph has ended that held the range, and what it raises there is lost.
    storage: holds the address that the key names.
    """

    __slots__ = ("device_bytes", "host_bytes", "key", "live_bytes", "refused_bytes", "storage")
    key: RangeKey
    storage: StorageWeakRef | None
    live_bytes: int
    device_bytes: int
    refused_bytes: int
    host_bytes: int


class SavedView:
    """What autograd keeps for a tensor that may leave: where in its range it was."""

    __slots__ = ("offset", "range", "shape", "stride", "turn")

    def __init__(self, range_: SavedRange, tensor: Tensor, turn: int) -> None:
        self.range = range_
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.offset = tensor.storage_offset()
        self.turn = turn

    def of(self, memory: Tensor, begin: int) -> Tensor:
        """The saved tensor in `memory`, which holds the elements from `begin` of the storage it was saved from."""
        return memory.as_strided(self.shape, self.stride, self.offset - begin)

    def check(self) -> None:
        check_version(self.range.witness, self.range.key.version, self.range.key.dtype, self.shape)


class KeptTensor:
    """What autograd keeps for a tensor that stays on the device as it is."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.version = tensor._version
        # Without its history: a tensor that its own node refers to would never die.
        self.tensor = tensor.detach()

    def check(self) -> None:
        check_version(self.tensor, self.version, self.tensor.dtype, self.tensor.shape)


def version_witness(tensor: Tensor) -> Tensor:
    """Shares the version counter of `tensor` and none of its memory: it sees writes to what it does not hold."""
    witness = tensor.detach()
    witness.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return witness


def check_version(counter: Tensor, version: int, dtype: torch.dtype, shape: torch.Size) -> None:
    """Raises what torch raises, which does not check what saved-tensor hooks return, for memory written to since."""
    if counter._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a "
            f"{dtype} tensor of shape {tuple(shape)} is at version {counter._version}; expected version {version} "
            "instead. Hint: torch.autograd.set_detect_anomaly(True) finds the operation that failed to compute its "
            "gradient."
        )


def keys_of(tensor: Tensor, form: ActivationFormat | None) -> tuple[RangeKey, RangeKey]:
    """The range that the tensor itself spans, and the one to send when nothing is known of it."""
    storage = tensor.untyped_storage()
    size, offset, version = tensor.dtype.itemsize, int(tensor.storage_offset()), tensor._version
    begin = offset - offset % (_ALIGNMENT_BYTES // size)
    span = 1 + sum(int(length - 1) * int(step) for length, step in zip(tensor.shape, tensor.stride(), strict=True))
    own = RangeKey(storage._cdata, tensor.dtype, begin, offset + span - begin, version, form)
    whole = RangeKey(storage._cdata, tensor.dtype, 0, storage.nbytes() // size, version, form)
    has_gaps = span > tensor.numel()
    return own, whole if has_gaps and whole.count <= _STORAGE_PER_SPAN * span else own


def is_plain(tensor: Tensor) -> bool:
    """Whether shape, strides and memory say everything about the tensor."""
    return (
        type(tensor) in (Tensor, Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized or tensor._is_zerotensor())
    )


def is_weight(tensor: Tensor) -> bool:
    """Whether the tensor is a leaf that trains, a parameter, a view of one, or the cast of one that autocast makes.

    Its memory stays on the device anyway, or, as a cast, would cost the link as much as the weights.
    """
    base = tensor if tensor._base is None else tensor._base
    if isinstance(base, Parameter) or (tensor.is_leaf and tensor.requires_grad):
        return True
    node = tensor.grad_fn
    while node is not None and node.name() in _WEIGHT_NODES:
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), Parameter)
