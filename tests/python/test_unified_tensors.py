"""Tensors in unified memory: on a CUDA device, and over the driver double, where torch sees them from the host."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

import pytest
import torch
from driver_double import DriverDouble

import offload
from offload import _native
from offload._errors import DeviceError, InvalidArgument, OutOfHostMemory, StateError
from offload._unified import MemoryFacts, Placement, Side
from offload._unified_pool import Pool
from what_lives import collect

unified = offload.unified
PAGE = 2 << 20  # of the largest pages in which a driver keeps managed memory


def live_bytes() -> int:
    return _native.UnifiedMemory(0).live_managed_bytes


def raises(error: Exception) -> NoReturn:
    raise error


@pytest.fixture
def side(device: torch.device, driver_double: DriverDouble, monkeypatch: pytest.MonkeyPatch) -> Iterator[Side]:
    """The side from which torch sees the tensors of the test, after which none is left."""
    if device.type == "cpu":
        monkeypatch.setenv("OFFLOAD_CUDA_DRIVER", driver_double.path)
    if live_bytes() != 0:
        collect()  # what tests before have left in cycles
    before = live_bytes()
    yield "host" if device.type == "cpu" else "device"
    if live_bytes() != before:
        collect()  # graphs and errors hold tensors in cycles
    assert live_bytes() == before
    if device.type == "cpu":
        assert driver_double.live("managed") == 0
        assert driver_double.misuses() == (0, "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), 7, (3, 0, 2), (5, 33), [2, 3, 4, 5]])
def test_it_is_a_tensor_like_any_other(side: Side, shape: int | tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = unified.empty(shape, dtype=dtype, side=side)
    plain = torch.empty(shape, dtype=dtype, device=tensor.device)
    assert tensor.shape == plain.shape and tensor.stride() == plain.stride() and tensor.dtype == dtype
    assert not tensor._is_view() and tensor.storage_offset() == 0
    values = torch.arange(plain.numel(), device=tensor.device).reshape(plain.shape).to(dtype)
    assert torch.equal(tensor.copy_(values), values)


def test_autograd_over_it(side: Side) -> None:
    weight = torch.nn.Parameter(unified.empty((4, 4), dtype=torch.float64, side=side).fill_(0.5))
    x = torch.arange(4.0, dtype=torch.float64, device=weight.device)
    (weight @ x).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, x.expand(4, 4))


def test_the_other_side_sees_the_same_bytes(side: Side, device: torch.device) -> None:
    ours = unified.empty((6, 8), dtype=torch.float32, side=side)
    theirs = unified.alias(ours[1:, ::2], "host")
    assert theirs.device.type == "cpu" and theirs.stride() == (8, 2) and theirs.shape == (5, 4)
    ours.copy_(torch.arange(48.0).reshape(6, 8))
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(theirs, torch.arange(48.0, device="cpu").reshape(6, 8)[1:, ::2])
    theirs.zero_()
    back = unified.alias(theirs, side)
    assert back.device == ours.device and back.data_ptr() == ours[1:].data_ptr() and not back.any()
    del ours, back
    assert live_bytes() >= 48 * 4 and not theirs.any()  # an alias owns the memory, too


def test_hints_reach_the_driver_and_replace_each_other(side: Side) -> None:
    tensor = unified.empty(4 * PAGE, dtype=torch.uint8, side=side)
    nothing = Placement(preferred_location=None, accessed_by=(), read_mostly=False, last_prefetch=None)
    assert unified.placement(tensor) == nothing
    unified.advise(tensor, preferred_location="host", accessed_by="device", read_mostly=True)
    assert unified.placement(tensor) == Placement("host", ("device",), True, None)
    unified.advise(tensor[:PAGE], preferred_location="device", accessed_by=["device", "host"])
    assert unified.placement(tensor[:PAGE]) == Placement("device", ("host", "device"), False, None)
    assert unified.placement(tensor[2 * PAGE :]) == Placement("host", ("device",), True, None)
    assert unified.placement(tensor).preferred_location is None  # its pages do not agree
    unified.advise(tensor)
    assert unified.placement(tensor) == nothing
    made = unified.empty(PAGE, side=side, preferred_location="host", accessed_by=("device",), read_mostly=False)
    assert unified.placement(made) == Placement("host", ("device",), False, None)


def test_a_prefetch_moves_and_changes_nothing(side: Side) -> None:
    tensor = unified.empty(4 * PAGE, dtype=torch.int32, side=side)
    values = torch.arange(4 * PAGE, dtype=torch.int32, device=tensor.device)
    tensor.copy_(values)
    for target in ("device", "host", "device"):
        unified.prefetch(tensor, target)
        assert unified.placement(tensor).last_prefetch == target
        assert torch.equal(tensor, values)


def test_a_discard_leaves_the_neighbours(side: Side, device: torch.device) -> None:
    tensor = unified.empty(6 * PAGE, dtype=torch.uint8, side=side).fill_(7)
    driver = 13000 if device.type == "cpu" else _native.CudaDevice(device.index or 0).facts()["driver_version"]
    assert unified.discard(tensor[PAGE // 2 : 4 * PAGE + 100]) == (driver >= 13000)
    assert bool((tensor[: PAGE // 2] == 7).all()) and bool((tensor[4 * PAGE + 100 :] == 7).all())
    if device.type == "cpu":
        assert not bool((tensor[PAGE : 4 * PAGE] == 7).any())
    assert torch.equal(tensor.fill_(3), torch.full_like(tensor, 3))
    assert unified.discard(tensor[10:20]) == (driver >= 13000)  # no whole page inside
    assert bool((tensor == 3).all())
    with pytest.raises(InvalidArgument, match="discard a dense tensor"):
        unified.discard(tensor[::2])


def test_discard_in_a_stream(side: Side, device: torch.device) -> None:
    if device.type == "cpu":
        with pytest.raises(DeviceError, match="INVALID_HANDLE"):
            tensor = unified.empty(2 * PAGE, dtype=torch.uint8, side=side)
            block = _native.UnifiedBlock.find(tensor.data_ptr(), PAGE)
            assert block is not None
            block.discard(tensor.data_ptr(), 2 * PAGE, 12345)
        return
    tensor = unified.empty(2 * PAGE, dtype=torch.uint8, side=side)
    with torch.cuda.stream(torch.cuda.Stream()):
        unified.discard(tensor.fill_(1))
        tensor.fill_(2)
    torch.cuda.synchronize()
    assert bool((tensor == 2).all())


def test_memory_goes_with_the_last_tensor_on_any_thread(side: Side) -> None:
    before = live_bytes()
    held = [unified.empty(3 * PAGE, dtype=torch.uint8, side=side)]
    held += [held[0][5:], unified.alias(held[0], "host")]
    assert live_bytes() == before + 3 * PAGE
    del held[0], held[0]
    assert live_bytes() == before + 3 * PAGE
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert live_bytes() == before
    capsule = _native.UnifiedMemory().allocate(8, "managed", host_bytes=0).dlpack("host")
    assert live_bytes() == before + 8
    del capsule  # that nobody took
    assert live_bytes() == before


def test_what_does_not_fit_is_refused_with_numbers(side: Side) -> None:
    before = live_bytes()
    with pytest.raises((InvalidArgument, OutOfHostMemory), match=rf"{2**60} bytes of managed memory.*free.*at most"):
        unified.empty(2**60, dtype=torch.uint8, side=side)
    assert live_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (2, -1)}, "negative size"),
        ({"device": "cpu"}, "give 'cuda' or 'cuda:N'"),
        ({"device": "toaster"}, "not a torch device"),
        ({"side": "left"}, "the sides are 'host' and 'device'"),
        ({"preferred_location": "disk"}, "the sides are 'host' and 'device'"),
        ({"accessed_by": ("host", "all")}, "the sides are 'host' and 'device'"),
        ({"kind": "pinned"}, "the kinds are 'managed' and 'system'"),
    ],
)
def test_wrong_arguments(side: Side, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        unified.empty(**{"shape": 4, "side": side, **arguments})  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match="no device cuda:99"):
        unified.empty(4, device="cuda:99", side=side)


def test_tensors_elsewhere_are_refused(side: Side, device: torch.device) -> None:
    plain = torch.zeros(8, device=device)
    for call in (unified.advise, unified.placement, unified.discard):
        with pytest.raises(InvalidArgument, match=r"does not lie in unified memory.*offload.unified.empty"):
            call(plain)
        with pytest.raises(InvalidArgument, match="3 is no tensor"):
            call(3)  # type: ignore[operator]
    for tensor in (torch.empty(0, device=device), torch.zeros(2, device="meta"), plain.to_sparse()):
        with pytest.raises(InvalidArgument, match="has no unified memory"):
            unified.prefetch(tensor, "host")
    tensor = unified.empty(4, side=side)
    with pytest.raises(InvalidArgument, match="there is no side 'left'"):
        unified.prefetch(tensor, "left")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="'left' is no side"):
        unified.alias(tensor, "left")  # type: ignore[arg-type]


def test_system_memory_where_the_device_reads_it(side: Side, device: torch.device, driver_double: DriverDouble) -> None:
    if device.type == "cpu":
        driver_double.set_kind("ats")
    facts = unified.classify()
    if not facts.pageable_memory_access:
        with pytest.raises(InvalidArgument, match="use the kind 'managed'"):
            unified.empty(4, kind="system", side=side)
        return
    before = live_bytes()
    tensor = unified.empty(3 * PAGE, dtype=torch.uint8, kind="system", side=side, preferred_location="host")
    assert live_bytes() == before  # it is the host's
    assert torch.equal(tensor.fill_(5), torch.full_like(tensor, 5))
    unified.prefetch(tensor, "device")
    assert torch.equal(unified.alias(tensor, "host"), torch.full((3 * PAGE,), 5, dtype=torch.uint8, device="cpu"))
    if device.type == "cpu":
        assert driver_double.calls("cuMemPrefetchAsync") == 1
        with pytest.raises(DeviceError, match="tell the placement of managed memory alone"):
            unified.placement(tensor)


def test_a_pool_takes_forward_and_backward(device: torch.device) -> None:
    if device.type == "cpu":
        with pytest.raises(DeviceError, match="torch sees none"):
            unified.pool("cuda:0")
        return
    before = live_bytes()
    pool = unified.pool()
    weight = torch.ones(1 << 18, requires_grad=True)
    for _ in range(2):
        weight.grad = None
        with pool as entered:
            assert entered is pool and not torch._C._is_multithreading_enabled()
            y = weight * 3
            y.sum().backward()
            with pytest.raises(StateError, match="entered already"):
                pool.__enter__()
        assert torch._C._is_multithreading_enabled()
        assert weight.grad is not None and torch.equal(weight.grad, torch.full_like(weight, 3))
        for inside in (y, weight.grad):
            assert unified.placement(inside).preferred_location in ("device", None)
    with pytest.raises(InvalidArgument, match="does not lie in unified memory"):
        unified.placement(torch.ones(8, device=device))
    with pool, pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**50, dtype=torch.uint8, device=device)
    assert pool.refusal is not None and f"{2**50} bytes of managed memory" in pool.refusal
    del y, inside, weight, entered, pool
    gc.collect()
    torch.cuda.empty_cache()
    assert live_bytes() == before


@pytest.mark.cpu_only
@pytest.mark.parametrize("refusal", [None, "MemPool doesn't currently support expandable_segments."])
def test_a_pool_that_torch_passes_by_is_refused(
    side: Side, monkeypatch: pytest.MonkeyPatch, refusal: str | None
) -> None:
    """torch's part is played: what it routes shows on a card alone."""
    entered: list[object] = []

    class Route:
        def __init__(self, *arguments: object) -> None:
            entered.append(arguments)

        def __enter__(self) -> None:
            assert torch._C._is_multithreading_enabled()

        def __exit__(self, *error: object) -> None:
            entered.pop()

    class Allocator:
        def __init__(self, path: str, alloc: str, free: str) -> None:
            assert (path, alloc, free) == (_native.__file__, "offload_unified_alloc", "offload_unified_free")

        def allocator(self) -> str:
            return "ours"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "MemPool", lambda allocator: ("pool of", allocator))
    monkeypatch.setattr(torch.cuda, "use_mem_pool", Route)
    monkeypatch.setattr(torch.cuda.memory, "CUDAPluggableAllocator", Allocator)
    assert unified.pool("cuda:0").device == torch.device("cuda", 0)
    monkeypatch.setattr(Pool, "device", torch.device("cpu"))
    pool = unified.pool("cuda:0")
    with monkeypatch.context() as patch, pytest.raises(StateError, match="expandable_segments:True"):
        if refusal is not None:
            patch.setattr(torch, "empty", lambda *_, **__: raises(RuntimeError(refusal)))
        pool.__enter__()
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "empty", lambda *_, **__: raises(torch.OutOfMemoryError("CUDA out of memory")))
        pool.__enter__()
    assert not entered and torch._C._is_multithreading_enabled()
    probes: list[object] = []
    with monkeypatch.context() as patch:
        managed = [unified.empty(1, dtype=torch.uint8, device="cuda:0", side="host")]
        patch.setattr(torch, "empty", lambda *arguments, **_: probes.append(arguments) or managed.pop())
        for _ in range(2):
            with pool:
                assert entered == [(("pool of", "ours"), 0)] and not torch._C._is_multithreading_enabled()
                with pytest.raises(StateError, match="entered already"), pool:
                    raise AssertionError("not entered")
            assert not entered and torch._C._is_multithreading_enabled()
    assert pool.refusal is None and len(probes) == 1  # proven once


def test_the_classes_are_told_apart(side: Side) -> None:
    facts = unified.classify()
    assert isinstance(facts, MemoryFacts) and facts.meaning
    assert facts.kind in ("discrete", "hmm", "ats", "integrated") and facts.device.startswith("cuda:")


EXIT = """
import sys, torch
import offload
tensor = offload.unified.empty(1000, dtype=torch.uint8, side=sys.argv[1]).fill_(1)
sys.kept = offload.unified.alias(tensor, "host")      # dies with the interpreter
torch.kept = tensor                                    # dies with torch
class Late:
    def __del__(self, tensor=tensor):
        assert bool((tensor == 1).all())
late = Late()
late.itself = late
print("done")
"""


def test_exit_in_any_order(side: Side) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXIT, side], capture_output=True, text=True, timeout=100, check=False,
        env=None if side == "device" else {**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
