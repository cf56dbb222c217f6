"""What every test shares: the device it runs on. Which tests run where is decided here alone."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from driver_double import DriverDouble, compile_double
from host_kernels import HostLaunch, compile_for_host

# cuBLAS gives the same bits in every run only with it; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

# The package is imported where it is needed: the layout is checked where it is not installed.
_EXT4 = 0xEF53
_REQUIRE_GPU = os.environ.get("OFFLOAD_REQUIRE_GPU", "0") not in ("", "0")


def pytest_configure(config: pytest.Config) -> None:
    # Weights that wait for their update and recycled buffers are filled with NaN: an early read shows in the loss.
    os.environ.setdefault("OFFLOAD_POISON", "1")
    _examples_are_the_same_everywhere()
    # A shell ignores Ctrl-C for what it starts in the background; the tests send it to themselves and to children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line(
        "markers", "cpu_only: uses the controls of HostDevice, or host tensors, so it runs on the CPU alone"
    )


def _examples_are_the_same_everywhere() -> None:
    """hypothesis tries the same examples in every run, and no clock has a say in what it thinks of them."""
    try:
        from hypothesis import HealthCheck, settings
    except ImportError:  # tests/compat has none
        return
    settings.register_profile(
        "offload", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
    )
    settings.load_profile("offload")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of the engine (its module uses the fixture `device`) runs on the CPU and, where there is one, on CUDA."""
    if "device" not in metafunc.fixturenames:
        return
    devices = ["cpu"]
    if (_REQUIRE_GPU or torch.cuda.is_available()) and not metafunc.definition.get_closest_marker("cpu_only"):
        devices.append("cuda")
    metafunc.parametrize("device", devices, indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The compute device; modules and tensors that the test makes are on it unless it says otherwise.

    A test on the CPU is one on a machine without a card: defaults and warnings are that machine's.
    """
    name: str = request.param
    if name == "cpu":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            yield torch.device("cpu")
        return
    if not torch.cuda.is_available():
        pytest.fail("OFFLOAD_REQUIRE_GPU=1, and torch sees no CUDA device")
    torch.set_default_device(name)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield torch.device(name, torch.cuda.current_device())
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_device(None)


def _skip_or_fail(reason: str) -> NoReturn:
    if _REQUIRE_GPU:
        pytest.fail(f"OFFLOAD_REQUIRE_GPU=1, and {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def host_kernels_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kernels/*.cu, compiled for the CPU."""
    return compile_for_host(tmp_path_factory.mktemp("host_kernels"))


@pytest.fixture
def kernels(device: torch.device, host_kernels_library: Path) -> Any:
    """The `Kernels` of `device` that update states; on the CPU the same source, compiled as C++."""
    return _kernels_of(device, host_kernels_library, "update")


@pytest.fixture
def activation_kernels(device: torch.device, host_kernels_library: Path) -> Any:
    """Those that round activations."""
    return _kernels_of(device, host_kernels_library, "activations")


def _kernels_of(device: torch.device, host_kernels_library: Path, source: Any) -> Any:
    from offload._kernels import Kernels, find_kernels

    if device.type == "cpu":
        return Kernels(HostLaunch(host_kernels_library))
    found = find_kernels(device, source)
    if found.kernels is None:
        _skip_or_fail(f"there are no kernels: {found.refusal}")
    return found.kernels


@pytest.fixture
def host_driver(host_kernels_library: Path) -> Path:
    """The same library, which is a libcuda.so.1 too, for another process to load."""
    if torch.version.cuda is not None:
        pytest.skip("a torch for CUDA needs the real libcuda.so.1; on a card test_kernels.py launches through it")
    return host_kernels_library


@pytest.fixture(scope="session")
def nvrtc() -> None:
    """NVRTC and cuda.core, which compile for any card without one."""
    try:
        import cuda.core  # noqa: F401
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except Exception as error:  # each of the three packages has its own
        _skip_or_fail(f"no kernel can be compiled, pip install cuda-core cuda-bindings nvidia-cuda-nvrtc: {error}")


@pytest.fixture
def disk_calls(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The `FailingSystemCalls` of every engine's disk tier: honest, on what passes for a disk anywhere."""
    from offload import _disk, _native, _state_store

    calls = _native.FailingSystemCalls()
    calls.pretend_file_system(_EXT4)
    monkeypatch.setattr(_state_store, "DiskStore", functools.partial(_disk.DiskStore, calls=calls))
    return calls


@pytest.fixture(scope="session")
def driver_double_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled double, for tests that load it in another process."""
    return compile_double(tmp_path_factory.mktemp("driver_double"))


@pytest.fixture
def driver_double(driver_double_library: Path) -> Iterator[DriverDouble]:
    """A CUDA driver over host memory, as after its start; `CudaDevice(driver_path=driver_double.path)` loads it."""
    double = DriverDouble(driver_double_library)
    double.reset()
    yield double
    double.reset()
