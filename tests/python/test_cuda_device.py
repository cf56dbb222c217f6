"""CudaDevice through the native boundary, over the driver double: the door, its facts and its host memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from driver_double import DriverDouble

from offload import _native
from offload._errors import DeviceError


def device_of(double: DriverDouble, index: int = 0) -> _native.CudaDevice:
    return _native.CudaDevice(index, driver_path=double.path)


def test_the_facts_of_the_device(driver_double: DriverDouble) -> None:
    facts = device_of(driver_double).facts()
    assert facts["index"] == 0
    assert facts["driver_version"] == 13000
    assert facts["name"]
    assert [len(part) for part in facts["uuid"].split("-")] == [8, 4, 4, 4, 12]
    assert len(facts["compute_capability"]) == 2
    assert 0 < facts["free_bytes"] <= facts["total_bytes"]
    assert facts["multiprocessor_count"] > 0
    assert facts["copy_engine_count"] > 0
    assert facts["can_pin"] is True
    assert facts["pageable_copy_count"] == 0


@pytest.mark.parametrize("kind", ["discrete", "hmm", "ats", "integrated"])
def test_the_kind_of_memory(driver_double: DriverDouble, kind: str) -> None:
    driver_double.set_kind(kind)
    assert device_of(driver_double).facts()["memory_kind"] == kind


@pytest.mark.parametrize("index", [-1, 2])
def test_a_device_that_is_not_there(driver_double: DriverDouble, monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    driver_double.set_device_count(2)
    assert device_of(driver_double, 1).facts()["index"] == 1
    with pytest.raises(DeviceError, match=rf"no device cuda:{index}: the driver shows 2 \(.* is '4,7'\)"):
        device_of(driver_double, index)


def test_no_driver() -> None:
    with pytest.raises(DeviceError, match=r"cannot load the CUDA driver '/nowhere/libcuda.so.1'.*--gpus all"):
        _native.CudaDevice(driver_path="/nowhere/libcuda.so.1")


def test_the_driver_of_the_environment_and_no_driver_at_import(driver_double_library: Path) -> None:
    script = """
from offload import _native
import sys
print("driver_double" in open("/proc/self/maps").read())
print(_native.CudaDevice().kind)
"""
    environment = {"OFFLOAD_CUDA_DRIVER": str(driver_double_library), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False, env=environment
    )
    assert done.stdout.split() == ["False", "cuda"], done.stderr


def test_a_pinned_pool_makes_copies_direct(driver_double: DriverDouble) -> None:
    device = device_of(driver_double)
    pool = _native.HostPool(device, budget_bytes=1 << 20, slab_bytes=1 << 16, pin=True)
    queue = _native.TransferQueue(device)
    buffer = pool.acquire(1024, "staging")
    source = torch.arange(256, dtype=torch.int32)
    assert device.pinned_bytes == driver_double.live("registered_bytes") > 0
    assert queue.submit_to_host(buffer.address, source.data_ptr(), 1024).wait()
    assert torch.equal(torch.frombuffer(buffer, dtype=torch.int32)[:256], source)
    assert device.facts()["pageable_copy_count"] == 0
    assert queue.submit_to_device(source.data_ptr(), torch.zeros(256, dtype=torch.int32).data_ptr(), 1024).wait()
    assert device.facts()["pageable_copy_count"] == 1
    del buffer, pool, queue, device
    assert [driver_double.live(what) for what in ("registrations", "streams", "events", "contexts")] == [0] * 4
    assert driver_double.misuses() == (0, "")


def test_a_pool_that_may_not_pin_says_what_to_do_and_works(driver_double: DriverDouble) -> None:
    device = device_of(driver_double)
    driver_double.fail("cuMemHostRegister_v2", 1, 2, lasting=True)  # CUDA_ERROR_OUT_OF_MEMORY
    pool = _native.HostPool(device, budget_bytes=1 << 20, slab_bytes=1 << 16, pin=True)
    buffer = pool.acquire(1024, "staging")
    refusal = str(pool.stats()["pin_refusal"])
    assert "CUDA_ERROR_OUT_OF_MEMORY" in refusal
    assert "ulimit -l" in refusal
    assert device.pinned_bytes == 0
    source = torch.arange(256, dtype=torch.int32)
    queue = _native.TransferQueue(device)
    assert queue.submit_to_host(buffer.address, source.data_ptr(), 1024).wait()
    assert torch.equal(torch.frombuffer(buffer, dtype=torch.int32)[:256], source)
    assert device.facts()["pageable_copy_count"] == 1
