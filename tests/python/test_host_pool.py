"""HostPool: blocks, budget, tickets, pages, torch tensors over buffers, fork."""

from __future__ import annotations

import gc
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload import InvalidArgument, OutOfHostMemory, StateError, _native
from offload.cli._model_shapes import MODELS, shapes

KIB, MIB, GIB = 2**10, 2**20, 2**30
PAGE = os.sysconf("SC_PAGE_SIZE")
BLOCK = 256
HUGE_PAGE_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")


def rounded(nbytes: int, step: int = BLOCK) -> int:
    return -(-max(nbytes, 1) // step) * step


def tensor_over(buffer: _native.HostBuffer, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.frombuffer(buffer, dtype=dtype)


# --- blocks and budget --------------------------------------------------------------------------------------


def test_no_rounding_beyond_256_bytes() -> None:
    pool = _native.HostPool()
    buffers = [pool.acquire(nbytes, "weights") for nbytes in (0, 1, 256, 257, 70_000)]
    assert pool.stats()["used_bytes"] == 256 + 256 + 256 + 512 + 70_144
    assert pool.stats()["requested_bytes"] == 70_514
    assert len({buffer.address for buffer in buffers}) == len(buffers), "zero bytes too have an address of their own"
    assert memoryview(buffers[0]).nbytes == 0


@pytest.mark.parametrize("alignment", [1, 256, 512, 4096, 1 << 16])
def test_alignment_costs_its_own_room_and_no_more(alignment: int) -> None:
    pool = _native.HostPool()
    first, second = pool.acquire(1000, "staging"), pool.acquire(5000, "staging", alignment)
    assert second.address % max(alignment, BLOCK) == 0
    assert second.nbytes == memoryview(second).nbytes == 5000
    assert pool.stats()["used_bytes"] == 1024 + 5120 + max(alignment, BLOCK) - BLOCK
    tensor_over(second).fill_(7)
    assert first.address + 1024 <= second.address
    del second
    assert pool.stats()["used_bytes"] == 1024


def test_reserve_maps_what_is_needed_and_acquire_then_maps_nothing() -> None:
    pool = _native.HostPool()
    sizes = [3 * MIB + 7, 256, 5 * MIB, 1000]
    pool.reserve(sum(map(rounded, sizes)))
    mapped = pool.stats()["mapped_bytes"]
    assert mapped == rounded(sum(map(rounded, sizes)), PAGE)
    buffers = [pool.acquire(nbytes, "moments") for nbytes in sizes]
    assert pool.stats()["mapped_bytes"] == mapped
    pool.reserve(PAGE)
    assert pool.stats()["mapped_bytes"] == mapped + PAGE
    assert len(buffers) == pool.stats()["live_count"]


def test_refusal_names_the_numbers_and_changes_nothing() -> None:
    pool = _native.HostPool(budget_bytes=4 * MIB, slab_bytes=MIB)
    weights, moments = pool.acquire(MIB, "weights"), pool.acquire(2 * MIB, "moments")
    before = pool.stats()
    with pytest.raises(OutOfHostMemory) as refusal:
        pool.acquire(3 * MIB // 2, "gradients")
    for part in ("1.50 MiB", "gradients", "4.00 MiB", "3.00 MiB are in use", "weights 1.00 MiB", "moments 2.00 MiB"):
        assert part in str(refusal.value)
    assert "host_budget" in str(refusal.value)
    with pytest.raises(OutOfHostMemory, match="reservation"):
        pool.reserve(2 * MIB)
    assert pool.stats() == before
    pool.acquire(MIB, "gradients")  # what fits still fits
    assert (weights.nbytes, moments.nbytes) == (MIB, 2 * MIB)


def test_the_last_slab_shrinks_to_the_budget() -> None:
    pool = _native.HostPool(budget_bytes=5 * PAGE, slab_bytes=4 * PAGE)
    buffers = [pool.acquire(4 * PAGE, "weights"), pool.acquire(PAGE, "weights")]
    assert pool.stats()["mapped_bytes"] == 5 * PAGE
    assert len(buffers) == 2


def test_pages_double_up_to_a_slab_under_a_wide_budget_alone() -> None:
    wide, narrow = _native.HostPool(budget_bytes=1 << 30), _native.HostPool(budget_bytes=(1 << 30) - 1)
    kept, mapped = [], []
    while len(kept) < 25:
        kept.append(wide.acquire(8 * MIB, "weights"))
        mapped.append(wide.stats()["mapped_bytes"] // MIB)
    assert mapped == [8, 16, 32, 32, *4 * [64], *8 * [128], *8 * [192], 256]
    kept.append(narrow.acquire(1, "weights"))
    assert narrow.stats()["mapped_bytes"] == 64 * MIB
    wide.reserve(PAGE)
    assert wide.stats()["mapped_bytes"] == 256 * MIB + PAGE, "what is reserved is exact, as ever"


def test_trim_keeps_slabs_in_use() -> None:
    pool = _native.HostPool(slab_bytes=PAGE)
    first, second = pool.acquire(PAGE, "weights"), pool.acquire(PAGE, "weights")
    del first
    assert pool.trim() == PAGE
    assert pool.trim() == 0
    tensor_over(second).fill_(3)
    assert pool.stats()["mapped_bytes"] == PAGE
    del second
    assert pool.trim() == PAGE


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: _native.HostPool().acquire(-1, "weights"), "negative"),
        (lambda: _native.HostPool().acquire(1, "weight"), "the tags are weights, master, moments"),
        (lambda: _native.HostPool().reserve(-1), "negative"),
        (lambda: _native.HostPool(budget_bytes=-5), "negative"),
        (lambda: _native.HostPool(slab_bytes=0), "slab_bytes"),
        (lambda: _native.HostPool(pin=True), "needs a device"),
        (lambda: _native.HostPool(numa_node=-2), "numa_node"),
    ],
)
def test_bad_input(call: Callable[[], object], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        call()


@pytest.mark.parametrize("name", MODELS)
def test_overhead_of_published_models(name: str) -> None:
    counts = [math.prod(shape) for shape in shapes(MODELS[name])]
    # Weight, remainder, both moments and gradient of every parameter.
    stats = _native.pool_layout([count * width for count in counts for width in (2, 2, 4, 4, 2)])
    assert stats["requested_bytes"] == 14 * sum(counts)
    assert stats["mapped_bytes"] <= 1.03 * stats["requested_bytes"]


@pytest.mark.parametrize(
    ("name", "bfloat16_gib"),
    [
        ("Llama-3.1-8B", 14.96), ("Llama-3.2-1B", 2.30), ("Mistral-7B", 13.49), ("Llama-3.1-70B", 131.42),
        ("Gemma-2-9B", 17.21), ("Qwen3-8B", 15.26), ("Llama-2-13B", 24.24), ("Qwen2.5-14B", 27.51),
        ("Qwen2.5-7B", 14.19),
    ],
)  # fmt: skip
def test_published_shapes_have_the_published_size(name: str, bfloat16_gib: float) -> None:
    counts = [math.prod(shape) for shape in shapes(MODELS[name])]
    assert round(2 * sum(counts) / GIB, 2) == bfloat16_gib


# --- tickets ------------------------------------------------------------------------------------------------


def test_pending_block_is_skipped_then_reused() -> None:
    pool = _native.HostPool(slab_bytes=PAGE)
    buffer = pool.acquire(PAGE, "gradients")
    address, ticket = buffer.address, _native.Ticket.pending()
    buffer.release_after(ticket)
    buffer.release_after(_native.Ticket())  # done already
    del buffer
    other = pool.acquire(PAGE, "gradients")
    assert other.address != address
    assert pool.stats()["waiting_bytes"] == PAGE
    ticket.complete()
    assert pool.stats()["waiting_bytes"] == 0
    assert pool.acquire(PAGE, "gradients").address == address


def test_acquire_waits_only_when_the_budget_forbids_more_pages() -> None:
    pool = _native.HostPool(budget_bytes=PAGE, slab_bytes=PAGE)
    ticket = _native.Ticket.pending()
    buffer = pool.acquire(PAGE, "gradients")
    address = buffer.address
    buffer.release_after(ticket)
    del buffer
    got: list[_native.HostBuffer] = []
    waiter = threading.Thread(target=lambda: got.append(pool.acquire(PAGE, "weights")))
    waiter.start()
    # The waiter holds neither the GIL nor the pool's locks, else these two calls would hang.
    assert pool.stats()["waiting_bytes"] == PAGE
    ticket.fail("the copy failed")  # ended badly is ended: the error belongs to whoever submitted the copy
    waiter.join()
    assert [buffer.address for buffer in got] == [address]


def test_pool_may_die_while_a_copy_is_pending() -> None:
    device = _native.HostDevice()
    queue = _native.TransferQueue(device)
    device.hold("to_host")
    source = torch.full((1000,), 7, dtype=torch.uint8)
    pool = _native.HostPool(slab_bytes=PAGE)
    buffer = pool.acquire(1000, "gradients")
    ticket = queue.submit_to_host(buffer.address, source.data_ptr(), 1000)
    buffer.release_after(ticket)
    del buffer, pool
    device.release("to_host")
    assert ticket.wait(), "the copy found its pages"


# --- tensors ------------------------------------------------------------------------------------------------


def test_tensor_is_zero_copy_and_its_death_returns_the_block() -> None:
    pool = _native.HostPool()
    buffer = pool.acquire(4 * 1000, "weights")
    tensor = torch.frombuffer(buffer, dtype=torch.float32)
    assert tensor.data_ptr() == buffer.address
    assert tensor.shape == (1000,)
    tensor.fill_(1.5)
    assert memoryview(buffer).cast("f")[999] == 1.5
    view = memoryview(buffer)
    assert (view.format, view.readonly, view.ndim, view.nbytes) == ("B", False, 1, 4000)
    view.release()
    del buffer
    part = tensor[10:20]
    del tensor
    assert pool.stats()["live_count"] == 1, "a view keeps the block"
    del part
    gc.collect()
    assert pool.stats()["live_count"] == 0


def test_tensor_may_die_on_another_thread_and_after_the_pool() -> None:
    pool = _native.HostPool()
    tensors = [tensor_over(pool.acquire(1000, "weights")) for _ in range(10)]
    worker = threading.Thread(target=tensors.clear)
    worker.start()
    worker.join()
    assert pool.stats()["live_count"] == 0
    last = tensor_over(pool.acquire(1000, "weights"))
    del pool
    last.fill_(1)
    assert int(last.sum()) == 1000


def test_poison_is_nan_in_every_float_format() -> None:
    pool = _native.HostPool(poison=True)
    for _ in range(2):  # fresh, then recycled
        buffer = pool.acquire(8 * KIB, "weights")
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            assert bool(tensor_over(buffer, dtype).isnan().all())
        tensor_over(buffer).zero_()
        del buffer


# --- pages --------------------------------------------------------------------------------------------------


def smaps_entry(address: int) -> str:
    """The paragraph of /proc/self/smaps that holds the address."""
    entry: list[str] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if span:
            if inside:
                break
            inside = int(span[1], 16) <= address < int(span[2], 16)
        if inside:
            entry.append(line)
    return "\n".join(entry)


def flags_of(address: int) -> list[str]:
    found = re.search(r"^VmFlags: (.*)$", smaps_entry(address), re.M)
    assert found is not None
    return found[1].split()


@pytest.mark.parametrize("huge_pages", [True, False])
def test_pages_are_absent_from_children_and_huge(huge_pages: bool) -> None:
    pool = _native.HostPool(budget_bytes=64 * MIB, huge_pages=huge_pages)  # one slab
    buffer = pool.acquire(KIB, "weights")
    flags = flags_of(buffer.address)
    assert "dc" in flags  # MADV_DONTFORK
    assert ("hg" in flags) is (huge_pages and HUGE_PAGE_SIZE.exists())  # some kernels have none
    assert pool.stats()["mapped_bytes"] == 64 * MIB
    huge = int(HUGE_PAGE_SIZE.read_text()) if HUGE_PAGE_SIZE.exists() else PAGE
    if huge <= 64 * MIB:
        assert buffer.address % huge == 0, "the first block of a slab starts a huge page"


def test_pages_are_touched_when_mapped() -> None:
    pool = _native.HostPool(huge_pages=False)
    pool.reserve(3 * MIB + PAGE)
    buffer = pool.acquire(1, "weights")
    resident = re.search(r"^Rss: +(\d+) kB", smaps_entry(buffer.address), re.M)
    assert resident is not None
    assert int(resident[1]) * KIB >= 3 * MIB + PAGE


def test_numa_node() -> None:
    numa_maps = Path("/proc/self/numa_maps")
    if numa_maps.exists():  # else the kernel has no NUMA, and refuses every node
        pool = _native.HostPool(numa_node=0, slab_bytes=PAGE)
        try:
            buffer = pool.acquire(1, "weights")
        except InvalidArgument as refusal:  # of a container, which has to say so
            assert "Operation not permitted" in str(refusal) and "SYS_NICE" in str(refusal)
        else:
            assert re.search(rf"^{buffer.address:x} prefer[^:]*:0 ", numa_maps.read_text(), re.M)
    for node in (1023, 100_000):
        absent = _native.HostPool(numa_node=node, slab_bytes=PAGE)
        with pytest.raises(InvalidArgument, match=f"numa_node={node}"):
            absent.acquire(1, "weights")
        assert absent.stats()["mapped_bytes"] == 0


def test_pinning_is_counted_and_undone() -> None:
    device = _native.HostDevice()
    pool = _native.HostPool(device, pin=True, slab_bytes=4 * PAGE)
    buffer = pool.acquire(1, "weights")
    assert pool.stats()["pinned_bytes"] == device.pinned_bytes == 4 * PAGE
    assert not pool.stats()["pin_refused"]
    del pool, buffer
    assert device.pinned_bytes == 0


def test_refused_pin_is_visible_and_harmless() -> None:
    device = _native.HostDevice()
    device.fail_pin(1)
    pool = _native.HostPool(device, pin=True, slab_bytes=PAGE)
    tensor_over(pool.acquire(PAGE, "weights")).fill_(1)
    stats = pool.stats()
    assert (stats["pin_refused"], stats["pinned_bytes"], device.pinned_bytes) == (True, 0, 0)
    assert stats["pin_refusal"]


# --- processes ----------------------------------------------------------------------------------------------


@pytest.fixture
def in_child() -> Iterator[Callable[[Callable[[], bool]], bool]]:
    def run(body: Callable[[], bool]) -> bool:
        child = os.fork()
        if child == 0:
            good = False
            try:
                good = body()
            finally:
                os._exit(0 if good else 1)  # no teardown of the test runner in the child
        return os.waitpid(child, 0)[1] == 0

    yield run


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_neither_has_nor_touches_the_pages(in_child: Callable[[Callable[[], bool]], bool]) -> None:
    device = _native.HostDevice()
    state: dict[str, Any] = {"pool": _native.HostPool(device, pin=True)}
    state["buffer"] = state["pool"].acquire(MIB, "weights")
    state["tensor"] = tensor_over(state["buffer"])
    address = state["buffer"].address

    def child() -> bool:
        absent = smaps_entry(address) == ""
        for call in (state["pool"].stats, state["pool"].trim, lambda: state["pool"].acquire(1, "weights")):
            with pytest.raises(StateError, match="forked"):
                call()
        state.clear()
        gc.collect()
        own = _native.HostPool(slab_bytes=PAGE)  # a pool of the child's own works
        tensor_over(own.acquire(PAGE, "weights")).fill_(1)
        return absent

    assert in_child(child)
    state["tensor"].fill_(9)
    assert state["pool"].stats()["live_count"] == 1


def test_threads_share_a_pool() -> None:
    pool = _native.HostPool(budget_bytes=4 * MIB, slab_bytes=256 * KIB, poison=True)
    errors: list[str] = []

    def work(stamp: int) -> None:
        for round_ in range(200):
            tensor = tensor_over(pool.acquire(1 + (round_ * 7919 * stamp) % (200 * KIB), "activations"))
            tensor.fill_(stamp)
            if not bool((tensor == stamp).all()):
                errors.append(f"block of thread {stamp} overwritten in round {round_}")

    threads = [threading.Thread(target=work, args=(stamp,)) for stamp in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert pool.stats()["live_count"] == 0
    mapped = pool.stats()["mapped_bytes"]
    assert pool.trim() == mapped
