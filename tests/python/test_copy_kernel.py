"""Small copies where the driver takes no batches: kernels/copies.cu, and how the native core launches it.

On the CPU the kernel is compiled as C++; on CUDA the native core launches it, as on a driver before CUDA 12.8.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from host_kernels import HostLaunch
from torch import Tensor

from offload import _native
from offload._kernels import load_copy_kernel

pytestmark = pytest.mark.usefixtures("device")

LARGEST_BYTES = 64 * 1024
SPANS_AT_MOST = 64
BLOCKS_PER_SPAN, THREADS = 4, 256
ARENA_BYTES = 4 * 1024 * 1024

Copies = Sequence[tuple[int, int, int]]  # offset in the destination, in the source, bytes
CopyAll = Callable[[Tensor, Tensor, Copies], None]  # destination, source


class Span(ctypes.Structure):
    _fields_ = (("destination", ctypes.c_uint64), ("source", ctypes.c_uint64), ("bytes", ctypes.c_int64))


class Spans(ctypes.Structure):
    _fields_ = (("at", Span * SPANS_AT_MOST),)


@pytest.fixture
def native(device: torch.device) -> _native.CudaDevice | None:
    """The card, as if its driver took no batches."""
    if device.type == "cpu":
        return None
    native = _native.CudaDevice(device.index, takes_batches=False)
    assert load_copy_kernel(native) is None
    return native


@pytest.fixture
def copy_all(native: _native.CudaDevice | None, host_kernels_library: Path) -> CopyAll:
    """Copies spans of an arena to the other in one launch."""
    if native is None:
        launch = HostLaunch(host_kernels_library)

        def launched(destination: Tensor, source: Tensor, copies: Copies) -> None:
            spans = Spans()
            for i, (to, at, nbytes) in enumerate(copies):
                spans.at[i] = Span(destination.data_ptr() + to, source.data_ptr() + at, nbytes)
            launch("copy_spans", BLOCKS_PER_SPAN * len(copies), THREADS, (spans,))

        return launched

    queue = _native.TransferQueue(native)

    def submitted(destination: Tensor, source: Tensor, copies: Copies) -> None:
        addressed = [(destination.data_ptr() + to, source.data_ptr() + at, nbytes) for to, at, nbytes in copies]
        to_device = destination.device.type != "cpu"
        stream = torch.cuda.current_stream((destination if to_device else source).device).cuda_stream
        queue.submit_batch("to_device" if to_device else "to_host", addressed, stream).wait()
        # Neither refused nor left to the copy engines.
        assert native.copies_together == "by a kernel" and native.facts()["pageable_copy_count"] == 0

    return submitted


@pytest.fixture
def arenas(device: torch.device, native: _native.CudaDevice | None) -> tuple[Tensor, Tensor]:
    """Bytes on the device, and in host memory that is registered with it."""
    host = _native.HostPool(native, pin=native is not None).acquire(ARENA_BYTES, "staging")
    return torch.empty(ARENA_BYTES, dtype=torch.uint8, device=device), torch.frombuffer(host, dtype=torch.uint8)


def drawn(draw: random.Random, count: int, aligned: bool) -> list[tuple[int, int, int]]:
    """Copies between arenas that share no byte, some of a byte, some as large as a launch takes."""
    copies, places = [], [0, 0]
    room = ARENA_BYTES // count
    for _ in range(count):
        most = min(LARGEST_BYTES, room - 128)
        nbytes = draw.choice([1, 15, 16, 17, 4096, most, draw.randrange(1, most + 1)])
        starts = [place + (16 * draw.randrange(4) if aligned else draw.randrange(64)) for place in places]
        copies.append((starts[0], starts[1], nbytes))
        places = [place + room for place in places]
    return copies


@pytest.mark.parametrize("way", ["to_host", "to_device"])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("seed", range(3))
def test_every_byte_arrives_and_no_other_changes(
    copy_all: CopyAll, arenas: tuple[Tensor, Tensor], way: str, aligned: bool, seed: int
) -> None:
    destination, source = arenas if way == "to_device" else arenas[::-1]
    draw = random.Random(f"{way} {aligned} {seed}")
    for count in (2, draw.randrange(3, SPANS_AT_MOST), SPANS_AT_MOST):
        source.random_(256)
        destination.fill_(0xA5)
        before = source.cpu().clone()
        expected = destination.cpu().clone()
        copies = drawn(draw, count, aligned)
        for to, at, nbytes in copies:
            expected[to : to + nbytes] = before[at : at + nbytes]
        copy_all(destination, source, copies)
        assert torch.equal(destination.cpu(), expected)
        assert torch.equal(source.cpu(), before)
