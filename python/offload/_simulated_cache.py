"""Weights on disk in the simulated pipeline: which are in host memory, when they are read, and when written.

What `_weight_cache.py` does, over sizes and seconds: the same images give way in the same order. What is left out is
that places lie beside each other: here the bytes of two that gave way are one place wherever they were; and that the
disk begins what is ready first: here it keeps the order in which it was asked. A step was off by a tenth at most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ._disk_window import IN_TURN, LEAST_IMAGES
from ._simulated_lanes import BEGIN, Piece, latest
from ._step_work import UnitWork

if TYPE_CHECKING:
    from ._simulator import Pipeline

__all__ = ["SimulatedWeightCache", "cache_room"]


@dataclasses.dataclass(eq=False)
class _Image:
    """The host bytes of a unit. next_use: the higher, the later; last_use: the higher, the later.

    ready: they are the present ones; read, written, upload: what uses their place.
    """

    nbytes: int
    is_present: bool = False
    is_changed: bool = False
    next_use: int = 0
    last_use: int = 0
    read: Piece = BEGIN
    ready: Piece = BEGIN
    written: Piece = BEGIN
    upload: Piece = BEGIN

    @property
    def used(self) -> Piece:
        return latest((self.read, self.ready, self.written, self.upload))


class SimulatedWeightCache:
    """The images of units whose weights are on disk, by the unit's number."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._images = {n: _Image(unit.stored_bytes) for n, unit in enumerate(pipeline.units) if unit.stored_bytes}
        self._left = cache_room(pipeline.units, pipeline.settings.cache_bytes)
        self._coming: list[int] = []
        self._uses = 0

    def expect(self, coming: Iterable[int]) -> None:
        """In this order units are needed next, each of them."""
        self._coming = [number for number in dict.fromkeys(coming) if number in self._images]
        for place, number in enumerate(self._coming):
            self._images[number].next_use = place

    def read_ahead(self) -> None:
        """Sends for what is needed next, while none gives way that is needed sooner."""
        for number in self._coming:
            image = self._images[number]
            if not image.is_present:
                leaving = self._who_leaves(image.nbytes, image.next_use)
                if leaving is None:
                    return
                self._bring(image, leaving)

    def use(self, number: int) -> Piece:
        """When its bytes are there; they stay until all that uses them has ended."""
        image = self._images.get(number)
        return BEGIN if image is None else self._used(image).ready

    def uploaded(self, number: int, upload: Piece) -> None:
        if number in self._images:
            self._images[number].upload = upload

    def use_for_update(self, number: int) -> Piece:
        """When an update may write to its bytes."""
        image = self._images.get(number)
        return BEGIN if image is None else self._used(image).used

    def updated(self, number: int, updated: Piece) -> None:
        if number in self._images:
            self._images[number].ready, self._images[number].is_changed = updated, True

    def map_pieces(self, of: Callable[[Piece], Piece]) -> None:
        for image in self._images.values():
            image.read, image.ready, image.written, image.upload = map(
                of, (image.read, image.ready, image.written, image.upload)
            )

    def _used(self, image: _Image) -> _Image:
        self._uses += 1
        image.last_use = self._uses
        if not image.is_present:
            leaving = self._who_leaves(image.nbytes, -1)
            assert leaving is not None
            self._bring(image, leaving)
        return image

    def _who_leaves(self, nbytes: int, needed: int) -> list[_Image] | None:
        """Who gives way to so many bytes that are `needed` then; None: only those that are needed sooner could."""
        left = self._left
        there = [image for image in self._images.values() if image.is_present and image.next_use > needed]
        there.sort(key=lambda image: -image.next_use)
        leaving = []
        while left < nbytes:
            if not there:
                return None
            leaving.append(min(there[:IN_TURN], key=lambda image: image.last_use))
            there.remove(leaving[-1])
            left += leaving[-1].nbytes
        return leaving

    def _bring(self, image: _Image, leaving: Sequence[_Image]) -> None:
        busy = []
        for other in leaving:
            if other.is_changed:
                other.written = self._pipeline.run("disk_write", other.nbytes, other.ready)
            busy.append(other.used)
            other.is_present = other.is_changed = False
            self._left += other.nbytes
        self._left -= image.nbytes
        image.read = image.ready = self._pipeline.run("disk_read", image.nbytes, *busy, image.written)
        image.upload = BEGIN
        image.is_present = True


def cache_room(units: Sequence[UnitWork], cache_bytes: int) -> int:
    """Bytes of weights on disk that a cache has room for: of two units at least."""
    return max(cache_bytes, LEAST_IMAGES * max((unit.stored_bytes for unit in units), default=0))
