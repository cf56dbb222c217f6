"""Memory of optimizer states that the device updates where it lies, on the host's side."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._probe import probe_host
from ._unified import Side, classify, index_of

__all__ = ["BLOCK_BYTES", "UnifiedStates"]

# Arrays begin at multiples of this, as in the host pool.
BLOCK_BYTES = 256


class UnifiedStates:
    """Hands out arrays in unified memory of `device`, from one block: its bound is asked once, for all of them.

    A block of its own for each array would round small ones up to the driver's pages. Each array has a storage of its
    own, which keeps the block: what is saved or copied of a state is that state. The memory is managed, of which every
    driver takes the hints and torch's copies in any direction. On the CPU it is memory like any other.
    side: from which torch sees the arrays.
    """

    def __init__(self, device: torch.device, side: Side = "device") -> None:
        self._device = device
        self._side: Side = side
        self._block: _native.UnifiedBlock | None = None
        self._used = 0

    def reserve(self, nbytes: int) -> None:
        """Obtains what the next arrays take. Raises as `offload.unified.empty`; nothing is held then."""
        if self._device.type == "cpu" or nbytes == 0:
            return
        index = index_of(self._device)
        takes_hints = classify(index).concurrent_managed_access
        self._block = _native.UnifiedMemory(index).allocate(
            nbytes,
            "managed",
            preferred_location="host" if takes_hints else None,
            accessed_by_device=takes_hints,
            host_bytes=probe_host().available_bytes,
        )
        self._used = 0

    def take(self, dtype: torch.dtype, count: int) -> Tensor:
        """`count` elements in a row, not initialised. Beyond what was reserved they get a block of their own."""
        if self._device.type == "cpu" or count == 0:
            return torch.empty(count, dtype=dtype, device="cpu" if self._side == "host" else self._device)
        nbytes = count * dtype.itemsize
        if self._block is None or self._used + nbytes > self._block.nbytes:
            self.reserve(nbytes)
        assert self._block is not None
        whole = torch.utils.dlpack.from_dlpack(self._block.dlpack(self._side, offset=self._used, nbytes=nbytes))
        self._used += -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES
        return torch.empty(0, dtype=dtype, device=whole.device).set_(whole.untyped_storage(), 0, (count,), (1,))

    def close(self) -> None:
        """Lets go of the block: from here on the arrays alone keep it."""
        self._block = None
