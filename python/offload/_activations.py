"""Activations off the device: what autograd saves in forward leaves for the host, and is back when backward asks.

`Activations.pack` and `unpack` are the hooks of torch.autograd.graph.saved_tensors_hooks.

[Note: the allowance] One number of device bytes serves both directions. In forward the most recent `keep` bytes stay:
a range departs when newer ones push it out, so the last of forward never leaves and backward's first need never waits.
In backward the same bytes hold what is still kept and what is prefetched, in the order of the backward before, or else
from the last saved to the first. As much again may be on its way to the host, and IN_FLIGHT_BYTES where that is more.
_activation_order.py is the same rule over sizes alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ._activation_format import ActivationFormat, may_be_rounded
from ._activation_order import DEFAULT_KEEP, IN_FLIGHT_BYTES
from ._checkpoint_inputs import check_checkpoints_are_recognised, in_checkpoint
from ._cuda_graphs import refuse_capture
from ._errors import OffloadError, OutOfHostMemory
from ._host_grad import HostBytes
from ._interrupts import Uninterrupted
from ._pending import reading_metadata
from ._saved_ranges import (
    DeviceCopy,
    Ending,
    KeptTensor,
    RangeKey,
    SavedRange,
    SavedView,
    is_plain,
    is_weight,
    keys_of,
)
from ._uncompiled import not_compiled

__all__ = ["MIN_BYTES", "Activations", "Lanes"]

# A copy of less costs more in launching it than it frees.
MIN_BYTES = 64 << 10


class Lanes(Protocol):
    """What carries bytes between device and host: `_copy_lanes.CopyLanes`."""

    def compute_stream(self) -> int: ...
    def on_stream(self, stream: int) -> contextlib.AbstractContextManager[Any]: ...
    def send(self, tensor: Tensor, tag: Literal["activations"], stream: int, room: int) -> HostBytes: ...
    def start_upload(self, held: HostBytes, out: Tensor, room: int) -> Any: ...
    def wait_upload(self, ticket: Any, lock: contextlib.AbstractContextManager[Any]) -> None: ...
    def reserve(self, nbytes: int) -> None: ...
    def pool_stats(self) -> dict[str, Any]: ...
    def in_ring(self, *, leaving_only: bool = False) -> dict[int, int]: ...
    @property
    def peak_ring_bytes(self) -> int: ...
    def trace_sample(self) -> None: ...


class Forward:
    """What was saved between two backward passes, in order, and in which order its own backward read it.

    expected: that order in the pass before; a pass that saved another number of ranges is another computation.
    """

    def __init__(self, expected: dict[int, int | None], expected_count: int) -> None:
        self.ranges: list[Ending] = []
        self.saved_bytes = 0
        self.left_bytes = 0
        self.sent_bytes = 0
        self.refused_bytes = 0
        self.order: dict[int, int | None] = {}
        self.latest: int | None = None  # read
        self.furthest: int | None = None  # read or prefetched
        self.expected = expected
        self.expected_count = expected_count

    def note_read(self, index: int) -> None:
        if index not in self.order:
            if self.latest is not None:
                self.order[self.latest] = index
            self.order[index] = None
            self.latest = index

    def after(self, index: int) -> int | None:
        """Which range backward probably reads next."""
        before = index - 1 if index else None
        return self.expected.get(index, before) if self.expected_count == len(self.ranges) else before


class Activations:
    """See the module's text.

    lanes: carries the bytes; device: where they are saved. budget: host bytes that may be in use, beyond which an
    activation stays. keep: device bytes that may stay, or their share of what was saved. min_bytes: smaller ones stay.
    checkpoints_only: only what torch.utils.checkpoint saves leaves. form: what is rounded, and to what; None: nothing.

    Any thread may pack and unpack. Nothing here keeps a range: what the graph gives up is gone, whether backward ever
    read it or not, and is counted out before anything is counted on.
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
        form: ActivationFormat | None = None,
        poison: bool = False,
    ) -> None:
        if checkpoints_only:
            check_checkpoints_are_recognised()
        self._lanes = lanes
        self._device = device
        self._budget = budget
        self._keep = keep
        self._min_bytes = max(1, MIN_BYTES if min_bytes is None else min_bytes)
        self._checkpoints_only = checkpoints_only
        self._form = form
        self._poison = poison
        self._lock = threading.RLock()
        self._weights: frozenset[int] = frozenset()
        self._forward = Forward({}, 0)
        self._living: dict[int, Ending] = {}  # by id; kept here, as one that is gone itself tells nothing
        self._ended: deque[Ending] = deque()  # not counted out yet
        self._known: dict[RangeKey, Ending] = {}
        self._recent: deque[Ending] = deque()  # on the device, the oldest first
        self._ahead: dict[int, Ending] = {}  # prefetched and not read, by id, the oldest first
        # Bytes of live ranges: of all that may leave, of those on the device (before or after their way), on the host.
        self._live_bytes = 0
        self._live_peak_bytes = 0  # in this pass
        self._earlier_peak_bytes = 0  # in the pass before
        self._device_bytes = 0
        self._refused_bytes = 0  # of those beside _device_bytes that are there for good
        self._device_peak_bytes = 0
        self._host_bytes = 0
        self._host_peak_bytes = 0

    def begin(self, resident: Iterable[Tensor] = ()) -> None:
        """Called before a forward: parameters and buffers of the model, whose memory is not to leave."""
        refuse_capture("activations that come and go: keep them on the device (activations='device')")
        self._weights = reading_metadata(lambda: frozenset(t.untyped_storage()._cdata for t in resident))
        with self._lock:
            self.settle()
            self._begin_pass()

    def settle(self) -> None:
        """Counts out what nothing refers to any more: its graph is gone."""
        if not self._ended:
            return
        with self._lock, Uninterrupted():
            while self._ended:
                ending = self._ended.popleft()
                if self._living.pop(id(ending), None) is None:
                    continue  # its making failed
                self._live_bytes -= ending.live_bytes
                self._device_bytes -= ending.device_bytes
                self._refused_bytes -= ending.refused_bytes
                self._host_bytes -= ending.host_bytes
                if self._known.get(ending.key) is ending:
                    del self._known[ending.key]
                self._ahead.pop(id(ending), None)
                ending.storage = None

    def stats(self) -> dict[str, int]:
        """Of the latest forward: bytes that could leave, that left, what these were on their way, and what the host
        budget kept on the device."""
        forward = self._forward
        return {
            "saved_bytes": forward.saved_bytes,
            "offloaded_bytes": forward.left_bytes,
            "sent_bytes": forward.sent_bytes,
            "refused_bytes": forward.refused_bytes,
        }

    def fallbacks(self) -> list[str]:
        """Every slower path that is taken, one sentence each."""
        return [] if self._form is None else self._form.fallbacks()

    def pool_stats(self) -> dict[str, Any]:
        """The counters of the host pool that activations leave for."""
        return self._lanes.pool_stats()

    def device_bytes(self) -> tuple[dict[str, int], dict[str, int]]:
        """Of what is saved, and of copies that take it away, the bytes on the device: now, and the most at once."""
        self.settle()
        # A range on its way back counts as one that is there, for whom its copy is.
        leaving = sum(self._lanes.in_ring(leaving_only=True).values())
        now = {"activations": self._on_device(), "copies": leaving}
        return now, {"activations": self._device_peak_bytes, "copies": self._lanes.peak_ring_bytes}

    def _on_device(self) -> int:
        return self._device_bytes + self._refused_bytes

    def trace_sample(self) -> None:
        """A trace that runs shows what that pool holds now."""
        self._lanes.trace_sample()

    # --- forward --------------------------------------------------------------------------------------------

    @not_compiled  # compiled code calls it between its graphs
    def pack(self, tensor: Tensor) -> KeptTensor | SavedView:
        """What autograd keeps in place of `tensor`."""
        if not self._may_leave(tensor):
            return KeptTensor(tensor)
        own, key = keys_of(tensor, self._form if self._form is not None and may_be_rounded(tensor) else None)
        if key.nbytes < self._min_bytes:  # expanded
            return KeptTensor(tensor)
        with self._lock:
            self.settle()
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
            and (not self._checkpoints_only or in_checkpoint())
        )

    def _find(self, key: RangeKey) -> SavedRange | None:
        ending = self._known.get(key)
        found = None if ending is None else ending()
        # A `.data` alias counts its own versions: equal numbers do not make equal counters.
        return found if found is not None and found.witness._version == key.version else None

    def _save(self, key: RangeKey, tensor: Tensor) -> SavedRange:
        self._begin_pass()
        forward = self._forward
        stream = self._lanes.compute_stream()
        with Uninterrupted():
            saved = SavedRange(key, tensor, stream, forward, len(forward.ranges), self._ended.append)
            self._living[id(saved.ending)] = saved.ending
            forward.saved_bytes += saved.nbytes
            self._device_bytes += saved.nbytes
            self._live_bytes += saved.nbytes
            self._live_peak_bytes = max(self._live_peak_bytes, self._live_bytes)
            forward.ranges.append(saved.ending)
            self._recent.append(saved.ending)
            self._known[key] = saved.ending
            self._device_peak_bytes = max(self._device_peak_bytes, self._on_device())
        return saved

    def _begin_pass(self) -> None:
        """A new pass begins with the first that is saved after a backward, or when nothing saved is left."""
        over = self._forward
        if not over.ranges or (over.latest is None and self._live_bytes):
            return
        if over.latest is None:
            self._forward = Forward(over.expected, over.expected_count)
        else:
            self._forward = Forward(over.order, len(over.ranges))
        self._recent = deque(reference for reference in self._recent if reference() is not None)
        self._earlier_peak_bytes, self._live_peak_bytes = self._live_peak_bytes, self._live_bytes
        with contextlib.suppress(OutOfHostMemory):  # what does not fit stays on the device
            self._lanes.reserve(self._host_peak_bytes - self._host_bytes)

    def _allowance(self) -> int:
        """See [Note: the allowance]. A share is one of the most that was alive, in this pass or the one before."""
        if isinstance(self._keep, int):
            return self._keep
        return int(self._keep * max(self._live_peak_bytes, self._earlier_peak_bytes))

    def _room(self) -> int:
        return max(self._allowance(), IN_FLIGHT_BYTES)

    def _make_room(self) -> None:
        keep = self._allowance()
        newest = 1 if keep else 0
        while self._device_bytes > keep and len(self._recent) > newest:
            oldest = self._recent.popleft()()
            if oldest is not None and oldest.source is not None:
                self._depart(oldest)

    def _depart(self, saved: SavedRange) -> None:
        held = None
        if self._host_bytes + saved.host_bytes <= self._budget:
            with contextlib.suppress(OutOfHostMemory):
                held = self._lanes.send(self._departing(saved), "activations", saved.stream, self._room())
        with Uninterrupted():
            self._device_bytes -= saved.nbytes
            saved.ending.device_bytes = 0
            if held is None:
                saved.ending.refused_bytes = saved.nbytes
                self._refused_bytes += saved.nbytes
                saved.forward.refused_bytes += saved.nbytes
                return
            saved.held = held
            saved.source = None
            saved.forward.left_bytes += saved.nbytes
            saved.forward.sent_bytes += saved.sent_bytes
            saved.ending.host_bytes = saved.host_bytes
            self._host_bytes += saved.host_bytes
            self._host_peak_bytes = max(self._host_peak_bytes, self._host_bytes)

    def _departing(self, saved: SavedRange) -> Tensor:
        if saved.key.form is None:
            return saved.departing()
        with self._lanes.on_stream(saved.stream):  # whose memory it packs, and takes for the packed bytes
            return saved.departing()

    # --- backward -------------------------------------------------------------------------------------------

    @not_compiled
    def unpack(self, packed: KeptTensor | SavedView) -> Tensor:
        """The tensor that `packed` stands for. Raises `RuntimeError`, as torch, when it was written to since.

        The compute stream waits for its bytes. Raises `DeviceError` when they were lost on their way.
        """
        packed.check()
        if isinstance(packed, KeptTensor):
            return packed.tensor
        saved = packed.range
        with self._lock:
            self.settle()
            copy = self._bring(saved)
            source = saved.source
            if saved.note_read(packed):
                self._drop_copy(saved)
        if copy is None:
            assert source is not None
            return packed.of(source, 0)
        try:
            self._lanes.wait_upload(copy.ticket, self._lock)
        except OffloadError as error:
            raise type(error)(
                f"a saved activation of shape {tuple(packed.shape)} did not come back: {error}"
            ) from error
        with self._lock:
            copy.unpack(saved.key)
        copy.check(packed)
        return packed.of(copy.memory, saved.key.begin)

    def _bring(self, saved: SavedRange) -> DeviceCopy | None:
        """The device memory that `saved` came back to, its upload started; None for one that never left."""
        forward = saved.forward
        forward.note_read(saved.index)
        was_here = saved.source is not None or saved.copy is not None
        stream = self._lanes.compute_stream()
        if saved.source is None and (saved.copy is None or saved.copy.stream != stream):
            if self._device_bytes + saved.nbytes > self._allowance():
                self._evict()
            self._start_return(saved, stream)
        self._ahead.pop(id(saved.ending), None)
        if not was_here or forward.furthest is None:
            forward.furthest = saved.index
        self._prefetch(forward, stream)
        return saved.copy

    def _start_return(self, saved: SavedRange, stream: int) -> None:
        assert saved.held is not None
        memory = saved.key.landing_on(self._device)
        if self._poison:
            memory.view(torch.uint8).fill_(0xFF)  # NaN in every float format, and in every scale
        # What comes back has a room of its own beside what may still leave.
        ticket = self._lanes.start_upload(saved.held, memory, 2 * self._room())
        with Uninterrupted():
            if saved.copy is None:
                saved.ending.device_bytes = saved.nbytes  # of what is packed too: it will be
                self._device_bytes += saved.nbytes
            saved.copy = DeviceCopy(memory, memory._version, ticket, stream, saved.key.form)
            self._device_peak_bytes = max(self._device_peak_bytes, self._on_device())

    def _prefetch(self, forward: Forward, stream: int) -> None:
        """Goes on along the order of backward while the allowance lasts, but always one range ahead."""
        allowance = self._allowance()
        assert forward.furthest is not None
        while (following := forward.after(forward.furthest)) is not None:
            saved = forward.ranges[following]()
            # Memory belongs to the stream it is allocated on: what another stream saved is brought when asked for.
            if saved is not None and saved.held is not None and saved.copy is None and saved.stream == stream:
                if self._ahead and self._device_bytes + saved.nbytes > allowance:
                    return
                self._start_return(saved, stream)
                self._ahead[id(saved.ending)] = saved.ending
            forward.furthest = following

    def _evict(self) -> None:
        """What was prefetched first and still not asked for makes room: its branch may never see backward."""
        for key in list(self._ahead)[:1]:
            saved = self._ahead.pop(key)()
            if saved is not None:
                self._drop_copy(saved)

    def _drop_copy(self, saved: SavedRange) -> None:
        if saved.copy is not None:
            with Uninterrupted():
                saved.copy = None
                saved.ending.device_bytes = 0
                self._device_bytes -= saved.nbytes
