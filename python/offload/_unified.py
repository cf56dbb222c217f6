"""Memory that host and device read at one address: which kind a machine has, and tensors in it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Literal, TypedDict

import torch

from . import _native
from ._errors import InvalidArgument
from ._probe import probe_host

__all__ = [
    "MemoryFacts",
    "Placement",
    "advise",
    "alias",
    "classify",
    "discard",
    "empty",
    "index_of",
    "placement",
    "prefetch",
]

Side = Literal["host", "device"]
Kind = Literal["discrete", "hmm", "ats", "integrated"]

_MEANINGS: dict[str, str] = {
    "discrete": (
        "The card has a memory of its own and reads the host's only where it is pinned. Offload by copies through "
        "pinned memory, which is what offload does; managed memory works too, one page fault at a time."
    ),
    "hmm": (
        "A discrete card whose driver also serves ordinary host memory, by moving a page when it is touched. Right "
        "for code that was not prepared; offload by copies through pinned memory all the same."
    ),
    "ats": (
        "Host and device share page tables over a coherent link, as on Grace Hopper: the device reads any host "
        "memory where it lies, at the speed of the link. States can stay in host memory and be read there."
    ),
    "integrated": (
        "There is one memory for both. Moving bytes from the device to the host frees nothing here: offload to disk, "
        "or make the states smaller."
    ),
}


@dataclasses.dataclass(frozen=True)
class MemoryFacts:
    """What a CUDA device tells of the memory that it shares with the host.

    `kind` is "discrete", "hmm", "ats" or "integrated", and `meaning` says what that means for offloading.
    concurrent_managed_access: both sides may use managed memory at the same time (where False, the host must not touch
    it before the device is idle). pageable_memory_access: the device reads ordinary host memory; through the host's
    own page tables with uses_host_page_tables. direct_access_from_host: the host reads managed memory on the device
    where it lies. host_native_atomics: atomics work across the link. reads_page_locked_memory: the device reads memory
    that is registered with it where it lies. host_numa_node: the host memory next to the
    device, None where the driver does not say.
    """

    device: str
    kind: Kind
    integrated: bool
    managed_memory: bool
    concurrent_managed_access: bool
    pageable_memory_access: bool
    uses_host_page_tables: bool
    direct_access_from_host: bool
    host_native_atomics: bool
    reads_page_locked_memory: bool
    host_numa_node: int | None

    @property
    def meaning(self) -> str:
        return _MEANINGS[self.kind]


@dataclasses.dataclass(frozen=True)
class Placement:
    """What the driver was told of a tensor's pages, where all of them agree: the arguments of `advise`.

    last_prefetch: where the last `prefetch` sent them, None where there was none.
    """

    preferred_location: Side | None
    accessed_by: tuple[Side, ...]
    read_mostly: bool
    last_prefetch: Side | None


class _Hints(TypedDict):
    preferred_location: Side | None
    accessed_by_host: bool
    accessed_by_device: bool
    read_mostly: bool


def classify(device: str | torch.device | int | None = None) -> MemoryFacts:
    """Facts and kind of a CUDA device's memory; None takes torch's current device. Makes no context on it.

    "discrete": memory of its own; "hmm": the same, and the driver migrates ordinary host pages; "ats": one coherent
    memory over a fast link (Grace Hopper); "integrated": one memory. Raises InvalidArgument for what is no CUDA
    device, DeviceError without a driver or without that device.
    """
    index = index_of(device)
    return MemoryFacts(device=f"cuda:{index}", **_native.unified_memory_facts(index))


def empty(
    shape: int | Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | int | None = None,
    kind: Literal["managed", "system"] = "managed",
    preferred_location: Side | None = None,
    accessed_by: Side | Iterable[Side] = (),
    read_mostly: bool = False,
    side: Side = "device",
) -> torch.Tensor:
    """An uninitialised contiguous tensor in memory that the CUDA `device` and the host read at one address.

    Zero-copy: torch uses the memory itself, as a tensor on the device or, with `side="host"`, on the CPU; `alias` gives
    the other one. It is freed with the last tensor over it, once the device is idle. kind "managed" is the driver's;
    "system" is ordinary memory of the host's node next to the device, for devices that read it ("hmm", "ats"). The
    hints are those of `advise`. dtype None is torch's default.

    Live managed memory and the new tensor must fit what a discrete card has free, for beyond that the driver would
    page at every use; pages that are on the card already count twice, since the driver does not tell which are. On
    "ats" the host's available bytes come on top, on "integrated" they are the bound, as for "system" everywhere.

    Raises InvalidArgument when the device does not take the kind, the hints or the size, OutOfHostMemory when the host
    has no room, DeviceError when the driver refuses. After an error nothing is allocated.
    """
    index = index_of(device)
    sizes = torch.Size([shape] if isinstance(shape, int) else shape)
    if any(size < 0 for size in sizes):
        raise InvalidArgument(f"shape {tuple(sizes)} has a negative size; sizes are 0 or more")
    dtype = dtype or torch.get_default_dtype()
    nbytes = math.prod(sizes) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(sizes, dtype=dtype, device="cpu" if _known(side) == "host" else f"cuda:{index}")
    _known(side)
    hints = _hints(preferred_location, accessed_by, read_mostly)
    block = _native.UnifiedMemory(index).allocate(nbytes, kind, **hints, host_bytes=probe_host().available_bytes)
    return _tensor(block, side, dtype, sizes)


def alias(tensor: torch.Tensor, side: Side) -> torch.Tensor:
    """A tensor of the same bytes, shape, strides and dtype as seen from the other side: CPU or CUDA tensor.

    Both own the memory. Streams do not order the host: synchronise before one side reads what the other wrote. Outside
    autograd, as `detach`. Raises InvalidArgument for a tensor outside unified memory.
    """
    _known(side)
    block, _, _ = _range_of(tensor)
    offset_bytes = tensor.data_ptr() - block.address
    return _tensor(block, side, tensor.dtype, tensor.shape, tensor.stride(), offset_bytes // tensor.element_size())


def advise(
    tensor: torch.Tensor,
    *,
    preferred_location: Side | None = None,
    accessed_by: Side | Iterable[Side] = (),
    read_mostly: bool = False,
) -> None:
    """Tells the driver how the tensor's memory is used, in place of all that it was told before.

    preferred_location: the side on which pages stay while there is room; the other reads them from afar where it can.
    accessed_by: sides that keep the memory mapped, so that their reads never fault. read_mostly: each side gets a copy
    of its own until one writes. Hints concern whole pages and never change a result.

    Raises InvalidArgument for a tensor outside unified memory and where the device takes no hints
    (concurrent_managed_access is False), DeviceError when the driver refuses.
    """
    hints = _hints(preferred_location, accessed_by, read_mostly)
    block, address, nbytes = _range_of(tensor)
    block.advise(address, nbytes, **hints)


def placement(tensor: torch.Tensor) -> Placement:
    """What `advise` and `prefetch` have told the driver of the tensor, as the driver has it.

    Raises InvalidArgument for a tensor outside unified memory, DeviceError when the driver refuses.
    """
    block, address, nbytes = _range_of(tensor)
    told = block.placement(address, nbytes)
    sides: tuple[Side, ...] = ("host", "device")
    return Placement(
        preferred_location=told["preferred_location"],
        accessed_by=tuple(side for side in sides if told[f"accessed_by_{side}"]),
        read_mostly=told["read_mostly"],
        last_prefetch=told["last_prefetch"],
    )


def prefetch(tensor: torch.Tensor, side: Side) -> None:
    """Moves the tensor's pages to a side ahead of their use: work of the device's current stream, in its order.

    Raises InvalidArgument for a tensor outside unified memory and where the device moves no pages
    (concurrent_managed_access is False), DeviceError when the driver refuses.
    """
    block, address, nbytes = _range_of(tensor)
    block.prefetch(address, nbytes, side, _current_stream(block.index))


def discard(tensor: torch.Tensor) -> bool:
    """The tensor's values are not needed any more, so no side has to move them: undefined until written again.

    Work of the device's current stream; concerns the whole pages inside the tensor. Returns False, with the values as
    they are, where it cannot be done: drivers before CUDA 13, devices without concurrent_managed_access. Raises
    InvalidArgument for a tensor outside unified memory or with gaps between its elements, DeviceError when the driver
    refuses.
    """
    block, address, nbytes = _range_of(tensor)
    if nbytes != tensor.nbytes:
        raise InvalidArgument(
            f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} spans {nbytes} bytes and has "
            f"{tensor.nbytes}: discarding it would take what lies between; discard a dense tensor"
        )
    return block.discard(address, nbytes, _current_stream(block.index))


def index_of(device: str | torch.device | int | None) -> int:
    """The index of a CUDA device, None for the current one. Raises InvalidArgument for another type of device."""
    if isinstance(device, int):
        return device
    try:
        named = torch.device("cuda" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgument(f"device {device!r} is not a torch device: {error}") from error
    if named.type != "cuda":
        raise InvalidArgument(f"device {device!r} shares no memory with the host; give 'cuda' or 'cuda:N'")
    if named.index is not None:
        return named.index
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _tensor(
    block: _native.UnifiedBlock,
    side: Side,
    dtype: torch.dtype,
    sizes: torch.Size,
    strides: Sequence[int] | None = None,
    offset: int = 0,
) -> torch.Tensor:
    whole = torch.utils.dlpack.from_dlpack(block.dlpack(side))
    strides = torch.empty(sizes, device="meta").stride() if strides is None else strides
    # Not a view of the bytes: it may require gradients and be written in place as any new tensor.
    return torch.empty(0, dtype=dtype, device=whole.device).set_(whole.untyped_storage(), offset, sizes, strides)


def _range_of(tensor: torch.Tensor) -> tuple[_native.UnifiedBlock, int, int]:
    """The block that holds the tensor, the address of its first byte, and its bytes with those between elements."""
    if not isinstance(tensor, torch.Tensor):
        raise InvalidArgument(f"{tensor!r} is no tensor: give one that lies in unified memory")
    if tensor.numel() == 0 or tensor.layout is not torch.strided or tensor.device.type not in ("cpu", "cuda"):
        raise InvalidArgument(
            f"a tensor of {tensor.numel()} elements, layout {tensor.layout}, on {tensor.device} has no unified memory; "
            "give a dense one with elements, on the CPU or a CUDA device"
        )
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    address, nbytes = tensor.data_ptr(), (last + 1) * tensor.element_size()
    block = _native.UnifiedBlock.find(address, nbytes)
    if block is None:
        raise InvalidArgument(
            f"a tensor of shape {tuple(tensor.shape)} on {tensor.device} does not lie in unified memory; make it with "
            "offload.unified.empty, or in offload.unified.pool()"
        )
    return block, address, nbytes


def _hints(preferred_location: Side | None, accessed_by: Side | Iterable[Side], read_mostly: bool) -> _Hints:
    sides = {accessed_by} if isinstance(accessed_by, str) else set(accessed_by)
    for side in sides | ({preferred_location} if preferred_location is not None else set()):
        _known(side)
    return {
        "preferred_location": preferred_location,
        "accessed_by_host": "host" in sides,
        "accessed_by_device": "device" in sides,
        "read_mostly": bool(read_mostly),
    }


def _known(side: Side) -> Side:
    if side not in ("host", "device"):
        raise InvalidArgument(f"{side!r} is no side of unified memory; the sides are 'host' and 'device'")
    return side


def _current_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream if torch.cuda.is_available() else 0
