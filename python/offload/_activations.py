"""Activations off the device: what autograd saves in forward leaves for the host, and is back when backward asks.

`Activations.pack` and `unpack` are the hooks of torch.autograd.graph.saved_tensors_hooks.

[Note: the allowance] One number of device bytes serves both directions. In forward the most recent `keep` bytes stay:
a range departs when newer ones push it out, so the last of forward never leaves and backward's first need never waits.
In backward the same bytes hold what is still kept and what is prefetched, in the order of the backward before, or else
from the last saved to the first.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils import checkpoint

from ._errors import OffloadError, OutOfHostMemory
from ._host_grad import HostBytes
from ._interrupts import Uninterrupted
from ._saved_ranges import (
    DeviceCopy,
    KeptTensor,
    RangeKey,
    SavedRange,
    SavedView,
    is_plain,
    is_weight,
    keys_of,
)

__all__ = ["DEFAULT_KEEP", "MIN_BYTES", "Activations", "Lanes"]

# A copy of less costs more in launching it than it frees.
MIN_BYTES = 64 << 10
# Of what a forward saves, what stays: one layer in eight hides the way back of the next, on links that keep up at all.
DEFAULT_KEEP = 0.125
# torch.utils.checkpoint saves its inputs from its own file, up to so many calls deep.
_CHECKPOINT_FRAMES = 3


class Lanes(Protocol):
    """What carries bytes between device and host: `_copy_lanes.CopyLanes`."""

    def compute_stream(self) -> int: ...
    def send(self, tensor: Tensor, tag: Literal["activations"], stream: int) -> HostBytes: ...
    def start_upload(self, held: HostBytes, out: Tensor) -> Any: ...
    def wait_upload(self, ticket: Any) -> None: ...
    def reserve(self, nbytes: int) -> None: ...


class Forward:
    """What was saved between two backward passes, in order, and in which order its own backward read it.

    expected: that order in the pass before; a pass that saved another number of ranges is another computation.
    """

    def __init__(self, expected: dict[int, int | None], expected_count: int) -> None:
        self.ranges: list[weakref.ref[SavedRange]] = []
        self.saved_bytes = 0
        self.left_bytes = 0
        self.refused_bytes = 0
        self.order: dict[int, int | None] = {}
        self.latest: int | None = None  # read
        self.furthest: int | None = None  # read or prefetched
        self._expected = expected
        self._expected_count = expected_count

    def note_read(self, index: int) -> None:
        if index not in self.order:
            if self.latest is not None:
                self.order[self.latest] = index
            self.order[index] = None
            self.latest = index

    def after(self, index: int) -> int | None:
        """Which range backward probably reads next."""
        before = index - 1 if index else None
        return self._expected.get(index, before) if self._expected_count == len(self.ranges) else before


class Activations:
    """See the module's text.

    lanes: carries the bytes; device: where they are saved. budget: host bytes that may be in use, beyond which an
    activation stays. keep: device bytes that may stay, or their share of what was saved. min_bytes: smaller ones stay.
    checkpoints_only: only what torch.utils.checkpoint saves leaves.

    Any thread may pack and unpack. A range refers to its `Activations`, never the other way round: what the graph
    gives up is gone, whether backward ever read it or not.
    """

    def __init__(
        self,
        lanes: Lanes,
        device: torch.device,
        *,
        budget: int,
        keep: int | float = DEFAULT_KEEP,
        min_bytes: int | None = None,
        checkpoints_only: bool = False,
        poison: bool = False,
    ) -> None:
        self._lanes = lanes
        self._device = device
        self._budget = budget
        self._keep = keep
        self._min_bytes = max(1, MIN_BYTES if min_bytes is None else min_bytes)
        self._checkpoints_only = checkpoints_only
        self._poison = poison
        self._lock = threading.RLock()
        self._weights: frozenset[int] = frozenset()
        self._forward = Forward({}, 0)
        self._known: weakref.WeakValueDictionary[RangeKey, SavedRange] = weakref.WeakValueDictionary()
        self._recent: deque[weakref.ref[SavedRange]] = deque()  # on the device, the oldest first
        self._ahead: dict[int, weakref.ref[SavedRange]] = {}  # prefetched and not read, by id, the oldest first
        # Bytes of live ranges: all that may leave, those of them on the device (before or after their way), on the host.
        self._live_bytes = 0
        self._live_peak_bytes = 0
        self._device_bytes = 0
        self._host_bytes = 0
        self._host_peak_bytes = 0
        self._reserved = False

    def begin(self, resident: Iterable[Tensor] = ()) -> None:
        """Called before a forward: parameters and buffers of the model, whose memory is not to leave."""
        with torch._C.DisableTorchFunctionSubclass():
            self._weights = frozenset(tensor.untyped_storage()._cdata for tensor in resident)
        with self._lock:
            self._begin_pass()

    def stats(self) -> dict[str, int]:
        """Of the latest forward: bytes that could leave, that left, and that the host budget kept on the device."""
        forward = self._forward
        return {
            "saved_bytes": forward.saved_bytes,
            "offloaded_bytes": forward.left_bytes,
            "refused_bytes": forward.refused_bytes,
        }

    # --- forward --------------------------------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> KeptTensor | SavedView:
        """What autograd keeps in place of `tensor`."""
        if not self._may_leave(tensor):
            return KeptTensor(tensor)
        own, key = keys_of(tensor)
        if key.nbytes < self._min_bytes:  # expanded
            return KeptTensor(tensor)
        with self._lock:
            saved = self._find(own) or self._find(key)
            if saved is None:
                saved = self._save(key, tensor)
            view = saved.add_view(tensor)
            del saved
            self._make_room()
        return view

    def _may_leave(self, tensor: Tensor) -> bool:
        return (
            tensor.numel() * tensor.itemsize >= self._min_bytes
            and is_plain(tensor)
            and tensor.device == self._device
            and torch._C._current_graph_task_id() == -1  # what a recompute in backward saves is used at once
            and not is_weight(tensor)
            and tensor.untyped_storage()._cdata not in self._weights
            and (not self._checkpoints_only or _in_checkpoint())
        )

    def _find(self, key: RangeKey) -> SavedRange | None:
        found = self._known.get(key)
        # A `.data` alias counts its own versions: equal numbers do not make equal counters.
        return found if found is not None and found.witness._version == key.version else None

    def _save(self, key: RangeKey, tensor: Tensor) -> SavedRange:
        self._begin_pass()
        forward = self._forward
        saved = SavedRange(self, key, tensor, self._lanes.compute_stream(), forward, len(forward.ranges))
        reference = weakref.ref(saved)
        with Uninterrupted():
            self._known[key] = saved
            self._recent.append(reference)
            forward.ranges.append(reference)
            forward.saved_bytes += key.nbytes
        return saved

    def _begin_pass(self) -> None:
        """A new pass begins with the first that is saved after a backward, or when nothing saved is left."""
        over = self._forward
        if not over.ranges or (over.latest is None and self._live_bytes):
            return
        if over.latest is None:
            self._forward = Forward(over._expected, over._expected_count)
        else:
            self._forward = Forward(over.order, len(over.ranges))
        self._recent = deque(reference for reference in self._recent if reference() is not None)
        self._live_peak_bytes = self._live_bytes
        if not self._reserved and self._host_peak_bytes:
            self._reserved = True
            with_room = self._host_peak_bytes
            try:
                self._lanes.reserve(with_room)
            except OutOfHostMemory:
                pass
