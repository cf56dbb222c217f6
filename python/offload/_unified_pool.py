"""torch's own allocations in managed memory: a torch.cuda.MemPool over the allocator functions of the native core."""

from __future__ import annotations

import contextlib
import functools
from types import TracebackType
from typing import Any

import torch

from . import _native
from ._errors import DeviceError, StateError
from ._probe import probe_host
from ._unified import index_of

__all__ = ["Pool", "pool"]


class Pool:
    """Managed memory for what torch allocates on one CUDA device within `with pool:`; see `pool`.

    Can be entered again and again, by one thread at a time. Tensors may outlive it; memory that they gave back goes to
    the driver when the pool is dropped.
    """

    def __init__(self, index: int) -> None:
        if not torch.cuda.is_available():
            raise DeviceError("a pool of unified memory needs a CUDA device, and torch sees none: check nvidia-smi")
        _native.open_torch_allocator(index, host_bytes=probe_host().available_bytes)
        self._index = index
        self._memory: Any = torch.cuda.MemPool(_allocator().allocator())
        self._entered: contextlib.ExitStack | None = None
        self._proven = False

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self._index)

    @property
    def refusal(self) -> str | None:
        """Why the last allocation on this device was refused, None where none was: the reason behind torch's error."""
        return _native.torch_allocator_refusal(self._index) or None

    def __enter__(self) -> Pool:
        if self._entered is not None:
            raise StateError("this pool of unified memory is entered already: leave it first, or make another one")
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.cuda.use_mem_pool(self._memory, self._index))
            # torch routes the allocations of a thread: those of backward belong here only if it runs in this one.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            if not self._proven:
                self._prove()
            self._entered = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._entered = self._entered, None
        if stack is not None:
            stack.__exit__(kind, error, trace)

    def _prove(self) -> None:
        """Some settings of torch's allocator pass the pool by: older versions without a word, newer ones refuse it."""
        cause: RuntimeError | None = None
        try:
            probe = torch.empty(1, dtype=torch.uint8, device=self.device)
            self._proven = _native.UnifiedBlock.find(probe.data_ptr(), 1) is not None
        except RuntimeError as error:
            if "expandable_segments" not in str(error):
                raise
            cause = error
        if not self._proven:
            raise StateError(
                "torch did not allocate in the pool of unified memory: take expandable_segments:True out of "
                "PYTORCH_CUDA_ALLOC_CONF and PYTORCH_ALLOC_CONF"
            ) from cause


def pool(device: str | torch.device | int | None = None) -> Pool:
    """A pool of managed memory: what torch allocates on the CUDA `device` within `with pool():` lies in it.

        with offload.unified.pool():
            loss = model(batch).loss
            loss.backward()

    torch routes by thread: only allocations of the thread that entered the pool lie in it, those of other threads
    (loaders, a thread that calls backward itself) do not. backward usually runs in a thread of torch's own; within the
    pool it runs in the calling one (`torch.autograd.set_multithreading_enabled(False)`), so that gradients lie in it.

    Pages prefer the device and are mapped there. On a coherent machine ("ats") they may exceed the device's memory, up
    to what the host had available when the pool was made; on a discrete card all managed memory must fit what the card
    has free (`offload.unified.empty` has the rule), and torch raises its OutOfMemoryError beyond that, with the
    reason in `refusal`. `advise`, `prefetch` and the others take tensors of the pool.

    Raises InvalidArgument for what is no CUDA device, DeviceError without one. Entering raises StateError when the
    pool is entered already, or when torch's settings would pass it by.
    """
    return Pool(index_of(device))


@functools.cache
def _allocator() -> Any:
    # Kept for ever: some versions of torch free the last tensors of a pool through it without owning it.
    return torch.cuda.memory.CUDAPluggableAllocator(_native.__file__, "offload_unified_alloc", "offload_unified_free")
