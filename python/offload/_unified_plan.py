"""What the plan says of optimizer states in unified memory: whether they fit there, and whether they belong there."""

from __future__ import annotations

from typing import Literal

from ._config import format_size
from ._errors import InvalidArgument

__all__ = ["MemoryKind", "advised_against", "check_room", "words_of_unified"]

# What `offload.unified.classify` tells apart.
MemoryKind = Literal["discrete", "hmm", "ats", "integrated"]


def advised_against(kind: MemoryKind | None) -> bool:
    """Whether states in unified memory cost this kind of device more than copies do: a card that is not coherent."""
    return kind in ("discrete", "hmm")


def check_room(kind: MemoryKind | None, states_bytes: int, device_bytes: int, free_bytes: int) -> None:
    """Raises InvalidArgument where managed memory would not fit what the driver calls free, as its allocation would.

    device_bytes: what else the plan has on the device, of free_bytes. Beyond that a card that is not coherent pages
    at every use (csrc/unified/unified_memory.cpp, require_room).
    """
    if advised_against(kind) and states_bytes + device_bytes > free_bytes:
        raise InvalidArgument(
            f"optimizer='unified' on a card of the kind {kind!r}: {format_size(states_bytes)} of states and "
            f"{format_size(device_bytes)} of weights and gradients must fit the {format_size(free_bytes)} that it has "
            "free, although the states lie in host memory, or the driver may page at every use; pass optimizer='host'"
        )


def words_of_unified(kind: MemoryKind | None, states_bytes: int, copied_bytes: int) -> str:
    """The line of the plan; kind None: not known, or not CUDA.

    copied_bytes: gradients and weights, which optimizer='host' copies at every step.
    """
    crossing = format_size(2 * states_bytes)
    here = f"unified memory: {format_size(states_bytes)} of states, on the host's side and updated by the device"
    if kind is None:
        return here
    if kind == "integrated":
        return f"{here}; there is one memory for both, and no copy of gradients or weights"
    if kind == "ats":
        return f"{here}, which reads and writes {crossing} a step over the coherent link, and copies nothing"
    return (
        f"{here}: advised against on a card of the kind {kind!r}, which reads and writes {crossing} a step over its "
        f"link, where optimizer='host' copies {format_size(copied_bytes)}"
    )
