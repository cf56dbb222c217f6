"""The C functions that torch's pluggable allocator calls, over the driver double."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator

import pytest
from driver_double import DriverDouble

from offload import _native
from offload._errors import DeviceError
from what_lives import collect

MIB = 1 << 20

library = ctypes.CDLL(_native.__file__)
library.offload_unified_alloc.restype = ctypes.c_void_p
library.offload_unified_alloc.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
library.offload_unified_free.restype = None
library.offload_unified_free.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]


@pytest.fixture(scope="module", autouse=True)
def collected() -> None:
    """Models of other tests hold contexts and memory of the double."""
    collect()


@pytest.fixture(autouse=True)
def double(driver_double: DriverDouble, monkeypatch: pytest.MonkeyPatch) -> Iterator[DriverDouble]:
    """The process's CUDA driver, from which the test leaves nothing behind."""
    monkeypatch.setenv("OFFLOAD_CUDA_DRIVER", driver_double.path)
    yield driver_double
    assert driver_double.live("managed") == 0
    assert driver_double.misuses() == (0, "")


def alloc(nbytes: int, index: int = 0) -> int | None:
    return library.offload_unified_alloc(nbytes, index, None)


def free(address: int | None) -> None:
    library.offload_unified_free(address, 0, 0, None)


def test_torch_finds_our_functions() -> None:
    for name, address in (("alloc", _native.TORCH_ALLOC_ADDRESS), ("free", _native.TORCH_FREE_ADDRESS)):
        assert ctypes.cast(getattr(library, f"offload_unified_{name}"), ctypes.c_void_p).value == address


@pytest.mark.parametrize("guise", ["discrete", "hmm", "ats", "integrated"])
def test_alloc_and_free(double: DriverDouble, guise: str) -> None:
    double.set_kind(guise)
    _native.open_torch_allocator(0, host_bytes=4 * MIB)
    address = alloc(MIB)
    assert address is not None and double.live("managed_bytes") == MIB
    block = _native.UnifiedBlock.find(address, MIB)
    assert block is not None
    placement = block.placement(address, MIB)
    moves = guise != "integrated"
    assert (placement["preferred_location"], placement["accessed_by_device"]) == ("device" if moves else None, moves)
    ctypes.memset(address, 1, MIB)
    del block
    thread = threading.Thread(target=free, args=(address,))
    thread.start()
    thread.join()
    assert double.live("managed") == double.live("contexts") == 0
    free(address)  # twice, null and what was never ours: nothing happens
    free(None)
    free(16)


def test_a_forked_child_allocates_and_frees_nothing(double: DriverDouble) -> None:
    _native.open_torch_allocator(0, host_bytes=0)
    address = alloc(8)
    child = os.fork()
    if child == 0:
        free(address)
        os._exit(0 if alloc(8) is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert double.live("managed") == 1
    free(address)


def test_alloc_returns_null_for_what_it_does_not_serve(double: DriverDouble) -> None:
    double.set_device_count(3)
    _native.open_torch_allocator(1, host_bytes=0)
    assert [alloc(nbytes, 1) for nbytes in (0, -1)] == [None, None]
    assert [alloc(8, index) for index in (-1, 2, 99)] == [None] * 3
    assert _native.torch_allocator_refusal(1) == _native.torch_allocator_refusal(99) == ""
    with pytest.raises(DeviceError, match="no device cuda:3"):
        _native.open_torch_allocator(3, host_bytes=0)


def test_alloc_returns_null_and_keeps_the_reason(double: DriverDouble) -> None:
    double.set_free_bytes(MIB)
    _native.open_torch_allocator(0, host_bytes=0)
    assert alloc(MIB + 1) is None
    assert f"{MIB + 1} bytes of managed memory" in _native.torch_allocator_refusal(0)
    for entry in ("cuMemAllocManaged", "cuMemAdvise", "cuMemGetInfo_v2", "cuCtxPushCurrent_v2"):
        double.fail(entry, 1, 700)
        assert alloc(8) is None and "CUDA_ERROR_ILLEGAL_ADDRESS" in _native.torch_allocator_refusal(0)
    assert double.live("managed") == 0
    free(alloc(MIB))
    _native.open_torch_allocator(0, host_bytes=0)
    assert _native.torch_allocator_refusal(0) == ""


def test_free_after_the_driver_is_gone(double: DriverDouble) -> None:
    _native.open_torch_allocator(0, host_bytes=0)
    address = alloc(8)
    for entry in ("cuCtxPushCurrent_v2", "cuCtxSynchronize", "cuMemFree_v2"):
        double.fail(entry, 1, 4, lasting=True)  # CUDA_ERROR_DEINITIALIZED
    free(address)
    assert alloc(8) is None and "exiting" in _native.torch_allocator_refusal(0)
    assert double.live("managed") == 1  # gone with the driver
    double.reset()
    double.free_managed(address)


def test_memory_that_was_freed_past_us(double: DriverDouble) -> None:
    """As some versions of torch free a dropped pool's memory: the address comes again, and is not freed under it."""
    _native.open_torch_allocator(0, host_bytes=0)
    address = alloc(MIB)
    double.free_managed(address)
    assert alloc(MIB) == address  # as malloc has it
    assert double.live("managed") == 1 and _native.UnifiedMemory().live_managed_bytes == MIB
    ctypes.memset(address, 1, MIB)
    free(address)
    assert double.live("managed") == 0
