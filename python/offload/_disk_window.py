"""How much host memory states and weights on disk pass through, and in which pieces. Pure functions, no devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

__all__ = [
    "IN_TURN",
    "LEAST_IMAGES",
    "WANTED_FRAMES",
    "CacheSize",
    "DiskWindow",
    "image_bytes",
    "plan_cache",
    "plan_window",
]

# What the disk tier wants memory aligned to (csrc/storage/scratch_file.h).
_ALIGNMENT = 4096
# Of a chunk: 12 MiB of fp32 states, by which the disk works in long stretches; a power of two.
_MOST_CHUNK_ELEMENTS = 1 << 20
# Arrays of so many elements of 2 bytes or more end at a multiple of 256 bytes, as those of a chunk do.
_LEAST_CHUNK_ELEMENTS = 1 << 10
# One chunk is read while another is updated and a third is written.
_LEAST_FRAMES = 3
WANTED_FRAMES = 8
# Beside the frames of the update: two through which states are loaded and edited, one from which they are saved.
_OTHER_FRAMES = 3
# Of weights: each starts at a multiple of this in its image (_residency.py).
_WEIGHT_ALIGNMENT = 256
# Beside the images of weights: the frame that saves read them through, in blocks at most.
_READ_BLOCKS = 4
# One image is read or written while another is in use.
LEAST_IMAGES = 2
# So many of the places that are needed last are used in turn: the updates of a step all pass through them, and in one
# place a read waits for the write before it.
IN_TURN = 3


@dataclasses.dataclass(frozen=True)
class DiskWindow:
    """`frame_count` frames, each for one chunk of `chunk_elements` elements in `frame_bytes` bytes.

    other_frames: of the same size, for loads, edits and saves.
    """

    chunk_elements: int
    frame_bytes: int
    frame_count: int
    other_frames: int = _OTHER_FRAMES

    @property
    def nbytes(self) -> int:
        """Of host memory, alignment included."""
        return (self.frame_count + self.other_frames) * self.frame_bytes + (1 + self.other_frames) * _ALIGNMENT

    @property
    def kept_bytes(self) -> int:
        """Of states, what stays in it from one update to the next: in whole chunks, and not where others pass."""
        return self.frame_count * self.frame_bytes


def plan_window(numels: Sequence[int], element_bytes: int, wanted_bytes: int) -> DiskWindow:
    """The window for states of parameters with so many elements each, at most `element_bytes` an element on disk.

    It has at most `wanted_bytes`, unless that is less than the smallest window takes, and no more frames than chunks.
    """
    chunk = _MOST_CHUNK_ELEMENTS
    largest = max(numels, default=1)
    while chunk > _LEAST_CHUNK_ELEMENTS and (
        chunk // 2 >= largest or _window(chunk, element_bytes, WANTED_FRAMES).nbytes > wanted_bytes
    ):
        chunk //= 2
    chunk_count = sum(-(-numel // chunk) for numel in numels)
    frame_bytes = _window(chunk, element_bytes, 0).frame_bytes
    room = (wanted_bytes - _window(chunk, element_bytes, 0).nbytes) // frame_bytes
    return _window(chunk, element_bytes, max(_LEAST_FRAMES, min(room, chunk_count)))


def _window(chunk_elements: int, element_bytes: int, frame_count: int) -> DiskWindow:
    return DiskWindow(
        chunk_elements=chunk_elements,
        frame_bytes=-(-chunk_elements * element_bytes // _ALIGNMENT) * _ALIGNMENT,
        frame_count=frame_count,
    )


def image_bytes(sizes: Sequence[int]) -> int:
    """What weights of these sizes take in the cache at most, if they travel together."""
    nbytes = sum(-(-size // _WEIGHT_ALIGNMENT) * _WEIGHT_ALIGNMENT for size in sizes)
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


@dataclasses.dataclass(frozen=True)
class CacheSize:
    """Host bytes that weights on disk pass through: those of their images, and of the frame that saves read through."""

    image_bytes: int
    frame_bytes: int

    @property
    def nbytes(self) -> int:
        """Of host memory, alignment included."""
        return self.image_bytes + self.frame_bytes + 2 * _ALIGNMENT


def plan_cache(images: Sequence[int], wanted_bytes: int, block_bytes: int) -> CacheSize:
    """The cache for units of weights whose images take so many bytes.

    It has at most `wanted_bytes`, unless that is less than the smallest cache takes, and no more than all of them need.
    """
    largest = max(images, default=0)
    frame = min(_READ_BLOCKS, -(-largest // block_bytes)) * block_bytes
    room = (wanted_bytes - CacheSize(0, frame).nbytes) // _ALIGNMENT * _ALIGNMENT
    return CacheSize(min(sum(images), max(LEAST_IMAGES * largest, room)), frame)
