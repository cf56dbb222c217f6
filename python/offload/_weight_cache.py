"""Weights that live on disk, and the host memory that they pass through.

[Note: weights on disk] The host bytes of each residency are an image: a range on disk, and a place in one arena of host
memory while somebody uses them. Everything that the training thread asks for is submitted and not waited for: the read
of an image begins when whatever used its place has ended (`submit_read_after`), the upload and the update wait for the
read, and the write of an image that gives up its place for the update. So an image is

- read when its upload or its update is submitted, or ahead of that, in the order that touches were recorded in;
- changed by its update, which writes nothing;
- written when it gives up its place, if it was changed: those of frozen weights are written once.

Places are given up by the images that are needed last; one that is needed sooner than what comes is left where it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import _native
from ._config import format_size
from ._disk import DiskRange, DiskStore, padded
from ._disk_snapshot import DiskSnapshot
from ._disk_window import IN_TURN, CacheSize
from ._errors import OffloadError, OutOfHostMemory, StorageError
from ._interrupts import Uninterrupted
from ._residency import Residency

__all__ = ["WeightCache"]

# Later than any use that is known: of images whose next use is not, the least recently used one goes first.
_UNKNOWN = 1 << 40
_NEVER = 1 << 62


class _Image:
    """The host bytes of one residency; `begin` is where they are in the arena, None: nowhere."""

    def __init__(self, where: DiskRange) -> None:
        self.where = where
        self.begin: int | None = None
        self.is_changed = False
        self.is_unused = False  # since it was read
        self.last_use = 0
        ended = _native.Ticket()
        self.read, self.written, self.upload = ended, ended, ended
        # Of the last update since the read, which it waits for; one that fails before it began may end sooner.
        self.updated: _native.Ticket | None = None

    @property
    def ready(self) -> _native.Ticket:
        """Ends when the bytes in the arena are the present ones."""
        return self.read if self.updated is None else self.updated

    def in_use(self) -> list[_native.Ticket]:
        return [ticket for ticket in (self.read, self.ready, self.written, self.upload) if not ticket.done]


@dataclass(eq=False)
class _Extent:
    """A stretch of the arena: an image's, or free as soon as what is `busy` with it has ended."""

    begin: int
    nbytes: int
    residency: Residency | None = None
    busy: list[_native.Ticket] = field(default_factory=list)


class WeightCache:
    """See the module's text. One thread at a time, but for `read()`.

    Raises `OutOfHostMemory` when the pool cannot hold them.
    """

    def __init__(
        self, store: DiskStore, pool: _native.HostPool, size: CacheSize, name_of: Callable[[Tensor], str]
    ) -> None:
        self._store = store
        self._name_of = name_of
        pool.reserve(size.nbytes)
        self._arena = store.buffer(pool, size.image_bytes, "weights")
        self._frame = store.buffer(pool, size.frame_bytes, "weights")
        self._reading = threading.RLock()  # of _frame; reentrant, for Ctrl-C at the end of a block leaves it taken
        self._extents = [_Extent(0, size.image_bytes)]
        self._images: dict[Residency, _Image] = {}
        self._coming: list[Residency] = []
        self._rank: dict[Residency, int] = {}
        self._uses = 0
        # Writes that were not looked at yet: whose, what it waits for, and its ticket.
        self._writes: list[tuple[Residency, _native.Ticket, _native.Ticket]] = []
        # Why weights on disk are not what they should be. Text: an exception keeps its frames.
        self.loss: str | None = None
        self._nbytes = size.nbytes
        self._allocated_bytes = 0  # on disk
        self._read_bytes = self._kept_bytes = self._written_bytes = 0

    def open(self, residencies: Sequence[Residency]) -> None:
        """Space on disk for their images; raises `StorageError` without it, and `OutOfHostMemory` for one too large."""
        largest = max((residency.nbytes for residency in residencies), default=0)
        if padded(largest) > self._extents[0].nbytes:
            raise OutOfHostMemory(
                f"weights that travel together take {format_size(largest)}, and the host memory that weights on disk "
                f"pass through has {format_size(self._extents[0].nbytes)}: raise host_budget, or pass units= to make "
                "smaller ones"
            )
        block = self._store.block_bytes
        ranges = [-(-residency.nbytes // block) * block for residency in residencies]
        self._allocated_bytes = sum(ranges)
        offset = self._store.allocate(self._allocated_bytes).offset
        for residency, nbytes in zip(residencies, ranges, strict=True):
            self._images[residency] = _Image(DiskRange(offset, residency.nbytes))
            offset += nbytes

    def stats(self) -> dict[str, int]:
        return {
            "cache_bytes": self._nbytes,
            "allocated_bytes": self._allocated_bytes,
            "read_bytes": self._read_bytes,
            "written_bytes": self._written_bytes,
            "kept_bytes": self._kept_bytes,
        }

    def close(self) -> None:
        """Gives up the memory, whoever still refers to a weight. Use nothing after it."""
        del self._store, self._arena, self._frame, self._images, self._extents, self._coming, self._rank

    # --- what comes -----------------------------------------------------------------------------------------

    def expect(self, coming: Iterable[Residency]) -> None:
        """In this order the images are needed next, as far as it is known."""
        self._coming = list(dict.fromkeys(coming))
        self._rank = {residency: rank for rank, residency in enumerate(self._coming)}

    def read_ahead(self) -> None:
        """Sends for images in the order in which they are expected, while none gives way that is needed sooner."""
        for rank, residency in enumerate(self._coming):
            if self._images[residency].begin is None:
                first, last = self._place_for(padded(residency.nbytes), rank)
                if first == last:
                    return
                self._bring(residency, (first, last))

    # --- use without waiting --------------------------------------------------------------------------------

    def begin_upload(self, residency: Residency, upload: _native.Ticket) -> _native.Ticket:
        """Its host bytes have a place until `upload` ended; what is returned ends when they are there."""
        image = self._asked(residency)
        image.upload = upload
        return image.ready

    def begin_update(self, residency: Residency) -> tuple[list[_native.Ticket], _native.Ticket]:
        """Its host bytes have a place and are about to be updated.

        Returns what the update must wait for, and a ticket that is to end with the update: all else waits for that.
        """
        image = self._asked(residency)
        before = image.in_use()
        image.updated = _native.Ticket.pending()
        image.is_changed = True
        return before, image.updated

    def _asked(self, residency: Residency) -> _Image:
        image = self._present(residency)
        if image.is_unused:
            image.is_unused = False
        else:
            self._kept_bytes += residency.nbytes
        return image

    # --- use by Python --------------------------------------------------------------------------------------

    def hold(self, residency: Residency, *, for_writing: bool = False) -> None:
        """Its host bytes are in memory until another one's are asked for. Raises `StorageError`; may be tried again."""
        image = self._present(residency)
        try:
            image.ready.wait()
            if for_writing:
                image.written.wait()  # it reads them
                image.is_changed = True
        except StorageError as error:
            raise self.told(residency, error) from error

    def hold_or_lose(self, residency: Residency) -> bool:
        """As hold() after a failure: False where its values are lost. What there is may be of either step."""
        image = self._images[residency]
        if image.begin is not None:
            if _error_of(image.read) is None:
                _error_of(image.ready)
                return True
            self.discard(residency)
        try:
            self.hold(residency)
        except OffloadError:
            return False
        return True

    def admit(self, residency: Residency) -> None:
        """A place for the values of a residency that has none yet. Waits for the writes of those that give way."""
        span = self._place_for(padded(residency.nbytes), None)
        for extent in self._extents[slice(*span)]:
            if extent.residency is not None:
                self.write(extent.residency)
        self.check(wait=True)  # what could not be written stays where it is
        with Uninterrupted():
            busy = self._take(residency, *span)
            self._images[residency].is_changed = True
        for ticket in busy:
            _error_of(ticket)

    def discard(self, residency: Residency) -> None:
        """Its values in memory are not needed any more."""
        image = self._images[residency]
        image.is_changed = False
        for extent in self._extents:
            if extent.residency is residency:
                extent.residency, extent.busy = None, image.in_use()
        self._leave(residency)

    def is_present(self, residency: Residency) -> bool:
        return residency in self._images and self._images[residency].begin is not None

    def write(self, residency: Residency) -> _native.Ticket:
        """Its bytes, if they were changed, go to the disk; what is returned ends when the disk has the present ones."""
        image = self._images[residency]
        if image.begin is not None and image.is_changed:
            with Uninterrupted():
                image.written = self._store.submit_write_after(image.ready, image.where, self._arena, image.begin)
                image.is_changed = False
                self._writes.append((residency, image.ready, image.written))
            self._written_bytes += image.where.nbytes
        return image.written

    def flush(self) -> None:
        """Everything is on disk."""
        for residency in self._images:
            self.write(residency)
        self.check(wait=True)

    def check(self, *, wait: bool = False) -> None:
        """Raises the error of a write that failed: what it should have written is lost. wait: for all of them."""
        left = []
        for residency, after, written in self._writes:
            if not (wait or written.done):
                left.append((residency, after, written))
            elif _error_of(after) is None and (error := _error_of(written)) is not None:
                told = self.named(residency, error)
                self.loss = str(told)
                raise told from error
        self._writes = left

    def told(self, residency: Residency, error: OffloadError) -> OffloadError:
        """What to raise for the error of a read of its image. Raises that of the write before it, if that failed."""
        self.check()
        return self.named(residency, error)

    def read(self, residency: Residency, begin: int, out: Tensor, snapshot: DiskSnapshot | None = None) -> None:
        """Fills `out` (bytes) with those of the image on disk from `begin` on, or of that in the snapshot.

        Threads: any, one after another.
        """
        file = self._store if snapshot is None else snapshot.of(self._store)
        where, block = self._images[residency].where, file.block_bytes
        memory = torch.frombuffer(self._frame, dtype=torch.uint8)
        done = 0
        while done < out.numel():
            first = (begin + done) // block * block
            end = min(first + memory.numel() // block * block, where.nbytes)
            with self._reading:
                try:
                    file.submit_read(where, self._frame, first, end - first).wait()
                except StorageError as error:
                    raise self.named(residency, error) from error
                part = memory[begin + done - first : end - first][: out.numel() - done]
                out[done : done + part.numel()].copy_(part)
            done += part.numel()

    def named(self, residency: Residency, error: OffloadError) -> OffloadError:
        """The error of a read or write of its image, with the weight's name."""
        if not isinstance(error, StorageError):
            return error
        text = f"{self._name_of(residency.parameters[0])}: weights on disk: {error.strerror or error}"
        return StorageError(text) if error.errno is None else StorageError(error.errno, text)

    # --- places ---------------------------------------------------------------------------------------------

    def _present(self, residency: Residency) -> _Image:
        """The image, which has a place afterwards."""
        image = self._images[residency]
        self._uses += 1
        image.last_use = self._uses
        if image.begin is not None and not image.is_changed and image.read.done and _error_of(image.read) is not None:
            self.discard(residency)  # whoever waited for it was told; it is tried again
        if image.begin is None:
            self._bring(residency, self._place_for(padded(residency.nbytes), None))
        return image

    def _bring(self, residency: Residency, span: tuple[int, int]) -> None:
        """Sends for an image, into the place of these extents."""
        image = self._images[residency]
        with Uninterrupted():
            busy = self._take(residency, *span)
            assert image.begin is not None
            image.read = self._store.submit_read_after([*busy, image.written], image.where, self._arena, image.begin)
            image.is_unused = True
        self._read_bytes += residency.nbytes

    def _place_for(self, nbytes: int, rank: int | None) -> tuple[int, int]:
        """Neighbouring extents of so many bytes, where the image that is needed first is needed last of all: of the few
        best of these, the one that was used least recently.

        rank: none that is needed sooner gives way; an empty span where there is no such place.
        """
        latest = -1 if rank is None else rank
        needed = [self._next_use(extent) for extent in self._extents]
        spans = []
        for first in range(len(self._extents)):
            size, soonest = 0, _NEVER
            for last in range(first, len(self._extents)):
                size, soonest = size + self._extents[last].nbytes, min(soonest, needed[last])
                if soonest <= latest:
                    break
                if size >= nbytes:
                    spans.append((soonest, first, last + 1))
                    break
        spans.sort(key=lambda span: -span[0])
        _, first, last = min(spans[:IN_TURN], key=lambda span: self._last_use(*span[1:]), default=(0, 0, 0))
        return first, last

    def _last_use(self, first: int, last: int) -> int:
        """The number of the use; 0 for places of nobody."""
        extents = self._extents[first:last]
        return max(0 if one.residency is None else self._images[one.residency].last_use for one in extents)

    def _next_use(self, extent: _Extent) -> int:
        if extent.residency is None:
            return _NEVER
        rank = self._rank.get(extent.residency)
        return _UNKNOWN - self._images[extent.residency].last_use if rank is None else rank

    def _take(self, residency: Residency, first: int, last: int) -> list[_native.Ticket]:
        """Gives the residency the beginning of these extents, and what is left of them to nobody.

        Returns what still uses the place.
        """
        taken, nbytes, busy = self._extents[first:last], padded(residency.nbytes), list[_native.Ticket]()
        for extent in taken:
            busy += [ticket for ticket in extent.busy if not ticket.done]
            if extent.residency is not None:
                self.write(extent.residency)
                busy += self._images[extent.residency].in_use()
                self._leave(extent.residency)
        begin, left = taken[0].begin, sum(extent.nbytes for extent in taken) - nbytes
        rest = [_Extent(begin + nbytes, left, None, busy)] if left else []
        self._extents[first:last] = [_Extent(begin, nbytes, residency), *rest]
        image = self._images[residency]
        image.begin, image.updated = begin, None
        image.read = image.upload = _native.Ticket()
        residency.take_host_bytes(self._arena, begin)
        return busy

    def _leave(self, residency: Residency) -> None:
        self._images[residency].begin = None
        residency.lose_host_bytes()


def _error_of(ticket: _native.Ticket) -> OffloadError | None:
    """How the ticket ended, which is waited for."""
    try:
        ticket.wait()
    except OffloadError as error:
        return error
    return None
