"""What the plan says of optimizer states that lie on the host and are updated by the device."""

from __future__ import annotations

from typing import Literal

from ._config import format_size

__all__ = ["MemoryKind", "advised_against", "words_of_unified"]

# What `offload.unified.classify` tells apart.
MemoryKind = Literal["discrete", "hmm", "ats", "integrated"]


def advised_against(kind: MemoryKind | None) -> bool:
    """Whether all states there cost this kind of device more than copies do: a card behind a link that is not coherent.

    A part of them may gain all the same, beside the host's update of the others.
    """
    return kind in ("discrete", "hmm")


def words_of_unified(kind: MemoryKind | None, states_bytes: int, read: int, written: int, copied: int) -> str:
    """The line of the plan; kind None: not known, or not CUDA.

    read, written: bytes that cross the link at every step. copied: gradients and weights, which an update on the host
    copies instead.
    """
    here = f"unified: {format_size(states_bytes)} of states, on the host and updated by the device"
    if kind is None:
        return here
    if kind == "integrated":
        return f"{here}; there is one memory for both, and no copy of gradients or weights"
    crossing = f"reads {format_size(read)} and writes {format_size(written)} a step"
    if kind == "ats":
        return f"{here}, which {crossing} over the coherent link, and copies nothing"
    return (
        f"{here}: a card of the kind {kind!r} {crossing} over its link before the next forward, where the host's own "
        f"update copies {format_size(copied)} beside it; it pays for a part of them, where steps are too short to hide "
        "that update, and is advised against for all of them"
    )
