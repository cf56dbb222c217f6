"""Unified memory over the driver double in all its guises: classes, bounds, refusals, lifetimes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from driver_double import DriverDouble

import offload
from offload import _environment, _native, _probe
from offload._errors import DeviceError, InvalidArgument, OutOfHostMemory
from offload._unified import Placement
from offload.cli import main
from what_lives import collect

unified = offload.unified
GUISES = ["discrete", "hmm", "ats", "integrated"]
MIB = 1 << 20


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


# --- classes ----------------------------------------------------------------------------------------------

TRUE_IN = {
    "integrated": {"integrated"},
    "managed_memory": set(GUISES),
    "concurrent_managed_access": {"discrete", "hmm", "ats"},
    "pageable_memory_access": {"hmm", "ats"},
    "uses_host_page_tables": {"ats"},
    "direct_access_from_host": {"ats"},
    "host_native_atomics": {"ats"},
    "reads_page_locked_memory": set(GUISES),
}


@pytest.mark.parametrize("guise", GUISES)
def test_classify(double: DriverDouble, guise: str) -> None:
    double.set_kind(guise)
    double.set_device_count(2)
    facts = unified.classify("cuda:1")
    expected = {name: guise in guises for name, guises in TRUE_IN.items()}
    assert dataclasses.asdict(facts) == {"device": "cuda:1", "kind": guise, "host_numa_node": None, **expected}
    assert unified.classify(1) == unified.classify(torch.device("cuda", 1)) == facts
    assert double.calls("cuDevicePrimaryCtxRetain") == 0


def test_every_class_has_its_meaning(double: DriverDouble) -> None:
    meanings = []
    for guise in GUISES:
        double.set_kind(guise)
        meanings.append(unified.classify().meaning)
    assert len(set(meanings)) == len(GUISES)


def test_a_driver_that_knows_no_numa_nodes(double: DriverDouble) -> None:
    attributes = double.calls("cuDeviceGetAttribute")
    facts = unified.classify()
    last = double.calls("cuDeviceGetAttribute") - attributes
    double.fail("cuDeviceGetAttribute", last, 1)  # CUDA_ERROR_INVALID_VALUE, of an attribute that came later
    assert unified.classify() == facts
    double.fail("cuDeviceGetAttribute", last, 999)
    with pytest.raises(DeviceError, match="cuDeviceGetAttribute failed"):
        unified.classify()


def test_what_is_no_cuda_device() -> None:
    with pytest.raises(InvalidArgument, match="give 'cuda' or 'cuda:N'"):
        unified.classify("cpu")
    with pytest.raises(DeviceError, match="no device cuda:7"):
        unified.classify("cuda:7")


def test_env_shows_the_class(
    double: DriverDouble, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_environment, "probe_device", lambda: _probe.probe_device("cpu"))
    assert offload.environment()["memory"] is None
    device = _probe.DeviceFacts("cuda:0", "cuda", 8 << 30, 6 << 30)
    copies = {"bytes": 1, "to_host_gb_per_s": 25.0, "to_device_gb_per_s": 24.0, "pin_refusal": None}
    monkeypatch.setattr(_environment, "probe_device", lambda: device)
    monkeypatch.setattr(_environment, "_measured_copies", lambda _: copies)
    double.set_kind("ats")
    facts = unified.classify()
    assert offload.environment()["memory"] == {**dataclasses.asdict(facts), "meaning": facts.meaning}
    assert main(["env"]) == 0
    output = capsys.readouterr().out
    assert f"memory    ats: {facts.meaning}" in output
    assert "24.0 GB/s to the device, 25.0 GB/s to the host, over the link" in output


def test_the_namespace_is_public() -> None:
    script = "import offload, sys; assert 'torch' not in sys.modules; offload.unified.empty; import offload.unified"
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)})


# --- what fits --------------------------------------------------------------------------------------------


def allocate(nbytes: int, kind: str = "managed", host_bytes: int = 0, **hints: bool) -> _native.UnifiedBlock:
    return _native.UnifiedMemory().allocate(nbytes, kind, host_bytes=host_bytes, **hints)


@pytest.mark.parametrize(
    ("guise", "room", "error"),
    [
        ("discrete", 10 * MIB, InvalidArgument),
        ("hmm", 10 * MIB, InvalidArgument),
        ("ats", 13 * MIB, OutOfHostMemory),
        ("integrated", 3 * MIB, OutOfHostMemory),
    ],
)
def test_managed_memory_is_bounded(double: DriverDouble, guise: str, room: int, error: type[Exception]) -> None:
    double.set_kind(guise)
    double.set_free_bytes(10 * MIB)
    first = allocate(2 * MIB, host_bytes=3 * MIB)
    message = rf"{room - 2 * MIB + 1} bytes .*\({guise}\): {2 * MIB} bytes .* at most {room - 2 * MIB} bytes"
    with pytest.raises(error, match=message):
        allocate(room - 2 * MIB + 1, host_bytes=3 * MIB)
    assert double.live("managed_bytes") == 2 * MIB
    second = allocate(room - 2 * MIB, host_bytes=3 * MIB)
    assert double.live("managed_bytes") == _native.UnifiedMemory().live_managed_bytes == room
    with pytest.raises(error, match="at most 0 bytes"):
        allocate(1, host_bytes=3 * MIB)
    del first, second
    allocate(room, host_bytes=3 * MIB)


def test_every_device_has_its_own_bound(double: DriverDouble) -> None:
    double.set_device_count(2)
    double.set_free_bytes(MIB)
    first = allocate(MIB)
    second = _native.UnifiedMemory(1).allocate(MIB, "managed", host_bytes=0)
    assert (first.index, second.index) == (0, 1)
    assert [_native.UnifiedMemory(index).live_managed_bytes for index in (0, 1)] == [MIB, MIB]


def test_threads_cannot_pass_the_bound_together(double: DriverDouble) -> None:
    double.set_free_bytes(8 * MIB)
    taken: list[_native.UnifiedBlock] = []
    refused: list[str] = []

    def take() -> None:
        try:
            taken.append(allocate(3 * MIB))
        except InvalidArgument as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (2, 6)


@pytest.mark.parametrize("guise", GUISES)
def test_system_memory(double: DriverDouble, guise: str) -> None:
    double.set_kind(guise)
    if guise in ("discrete", "integrated"):
        with pytest.raises(InvalidArgument, match=rf"cuda:0 \({guise}\) does not read the system's own memory"):
            allocate(MIB, "system", host_bytes=MIB)
        return
    with pytest.raises(OutOfHostMemory, match=rf"{MIB} bytes of system memory .*has {MIB - 1} bytes for it"):
        allocate(MIB, "system", host_bytes=MIB - 1)
    advised = double.calls("cuMemAdvise")
    block = allocate(MIB, "system", host_bytes=MIB, accessed_by_device=True)
    assert (block.kind, block.nbytes, double.live("managed")) == ("system", MIB, 0)
    assert double.calls("cuMemAdvise") > advised
    with pytest.raises(DeviceError, match="tell the placement of managed memory alone"):
        block.placement(block.address, MIB)


def test_system_memory_where_its_node_is_refused(double: DriverDouble) -> None:
    """A container may forbid the choice, or have no memory of the device's node: the device's wish is no demand."""
    double.set_kind("hmm")
    double.set_host_numa_node(1023)
    assert unified.classify().host_numa_node == 1023
    assert allocate(MIB, "system", host_bytes=MIB).nbytes == MIB


# --- what a device does not take, and what fails ----------------------------------------------------------


def test_a_device_that_moves_no_pages(double: DriverDouble) -> None:
    double.set_kind("integrated")
    tensor = unified.empty(8, side="host").fill_(1)
    for hints in ({"preferred_location": "device"}, {"accessed_by": "host"}, {"read_mostly": True}):
        with pytest.raises(InvalidArgument, match=r"cuda:0 \(integrated\) takes no hints"):
            unified.advise(tensor, **hints)
        with pytest.raises(InvalidArgument, match="takes no hints"):
            unified.empty(8, side="host", **hints)
    with pytest.raises(InvalidArgument, match="takes no prefetches"):
        unified.prefetch(tensor, "device")
    unified.advise(tensor)
    assert unified.placement(tensor) == Placement(None, (), False, None)
    assert unified.discard(tensor) is False and bool((tensor == 1).all())
    assert double.live("managed") == 1


def test_nothing_stays_of_what_fails(double: DriverDouble) -> None:
    for entry, nth, call in (("cuMemAllocManaged", 1, "allocating 32 bytes"), ("cuMemAdvise", 3, "cuMemAdvise")):
        double.fail(entry, nth, 2)  # CUDA_ERROR_OUT_OF_MEMORY
        with pytest.raises(DeviceError, match=f"{call}.* failed: CUDA_ERROR_OUT_OF_MEMORY"):
            unified.empty(8, side="host", preferred_location="device")
        assert double.live("managed") == 0
    with pytest.raises(InvalidArgument, match="ask for at least 1"):
        allocate(0)
    for address, nbytes in ((0, 4), (1, 8), (0, 0), (8, 1)):
        block = allocate(8)
        with pytest.raises(InvalidArgument, match="not inside the block of 8 bytes"):
            block.prefetch(block.address + address if (address, nbytes) != (0, 4) else 16, nbytes, "host", 0)


def test_find(double: DriverDouble) -> None:
    blocks = [allocate(1000), allocate(2000)]
    for block in blocks:
        for start, nbytes in ((0, block.nbytes), (0, 0), (block.nbytes - 1, 1)):
            assert _native.UnifiedBlock.find(block.address + start, nbytes) is block
        assert _native.UnifiedBlock.find(block.address, block.nbytes + 1) is None
        assert _native.UnifiedBlock.find(block.address - 1, 1) is None
    address = blocks[0].address
    del blocks, block
    assert _native.UnifiedBlock.find(address, 1) is None


def test_an_old_driver_cannot_discard(driver_double: DriverDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    driver_double.set_version(12080)
    folder, _, name = driver_double.path.rpartition("/")
    monkeypatch.setenv("OFFLOAD_CUDA_DRIVER", f"{folder}/./{name}")  # another table of the same library
    tensor = unified.empty(MIB, dtype=torch.uint8, side="host").fill_(1)
    assert unified.discard(tensor) is False and bool((tensor == 1).all())
    assert driver_double.calls("cuMemDiscardBatchAsync") == 0


def test_a_refused_discard(double: DriverDouble) -> None:
    collect()  # errors of earlier tests hold streams
    tensor = unified.empty(MIB, dtype=torch.uint8, side="host").fill_(1)
    double.fail("cuMemDiscardBatchAsync", 1, 801)  # CUDA_ERROR_NOT_SUPPORTED
    assert unified.discard(tensor) is False
    double.fail("cuMemDiscardBatchAsync", 1, 999)
    with pytest.raises(DeviceError, match="cuMemDiscardBatchAsync failed"):
        unified.discard(tensor)
    assert bool((tensor == 1).all()) and double.live("streams") == 0
    # The one behind the discard: what is written next must not be discarded.
    waits = double.calls("cuCtxSynchronize")
    double.fail("cuEventRecord", 2, 999)
    with pytest.raises(DeviceError, match="cuEventRecord failed"):
        unified.discard(tensor)
    assert double.calls("cuCtxSynchronize") == waits + 1 and double.live("streams") == 0


# --- lifetimes --------------------------------------------------------------------------------------------


def test_memory_waits_for_the_work_of_the_device(double: DriverDouble) -> None:
    queue = _native.TransferQueue(_native.CudaDevice())
    held = [unified.empty(1024, dtype=torch.uint8, side="host")]
    source = torch.ones(1024, dtype=torch.uint8)
    double.hold("to_device")
    ticket = queue.submit_to_device(held[0].data_ptr(), source.data_ptr(), 1024)
    thread = threading.Thread(target=held.clear)
    thread.start()
    while thread.is_alive() and double.calls("cuCtxSynchronize") == 0:
        pass
    double.release("to_device")
    thread.join()
    assert ticket.wait()
    assert double.live("managed") == 0 and double.calls("cuCtxSynchronize") == 1


@pytest.mark.parametrize("found", [False, True])
def test_a_block_ends_without_the_interpreter(double: DriverDouble, found: bool) -> None:
    """What the end waits for may itself need the interpreter."""
    queue = _native.TransferQueue(_native.CudaDevice())
    held = [_native.UnifiedMemory().allocate(1024, "managed", host_bytes=0)]
    address = held[0].address
    if found:  # by who looked for it while it was the tensor's
        tensor = torch.utils.dlpack.from_dlpack(held.pop().dlpack("host"))
        block = _native.UnifiedBlock.find(address, 1)
        assert block is not None
        held.append(block)
        del tensor, block
    source = torch.ones(1024, dtype=torch.uint8)
    double.hold("to_device")
    ticket = queue.submit_to_device(address, source.data_ptr(), 1024)

    def release() -> None:
        while double.calls("cuCtxSynchronize") == 0:
            time.sleep(0.001)
        double.release("to_device")

    thread = threading.Thread(target=release)
    thread.start()
    held.clear()
    thread.join()
    assert ticket.wait()
    assert double.live("managed") == 0


def test_the_context_goes_with_the_last_block(double: DriverDouble) -> None:
    collect()  # errors of earlier tests hold contexts
    memory = _native.UnifiedMemory()
    tensor = torch.utils.dlpack.from_dlpack(memory.allocate(8, "managed", host_bytes=0).dlpack("host"))
    del memory
    assert double.live("contexts") == 1 and double.live("pushed_contexts") == 0
    del tensor
    assert double.live("contexts") == 0


@pytest.mark.parametrize("code", [4, 700])  # CUDA_ERROR_DEINITIALIZED, CUDA_ERROR_ILLEGAL_ADDRESS
def test_the_end_of_a_block_survives_the_driver(double: DriverDouble, code: int) -> None:
    tensor = unified.empty(8, side="host")
    address = tensor.data_ptr()
    double.fail("cuMemFree_v2", 1, code)
    double.fail("cuCtxSynchronize", 1, code)
    del tensor
    assert _native.UnifiedBlock.find(address, 1) is None
    double.free_managed(address)  # what the block could not


def test_a_forked_child_leaves_the_memory_alone(double: DriverDouble) -> None:
    tensor = unified.empty(8, dtype=torch.uint8, side="host").fill_(1)
    child = os.fork()
    if child == 0:
        lost = _native.UnifiedBlock.find(tensor.data_ptr(), 1) is None
        del tensor
        os._exit(0 if lost else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert bool((tensor == 1).all()) and double.live("managed") == 1
