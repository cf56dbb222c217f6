"""What every test shares: the device it runs on. Which tests run where is decided here alone."""

from __future__ import annotations

import fcntl
import functools
import gc
import importlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from driver_double import DriverDouble, compile_double
from host_kernels import HostLaunch, compile_for_host
from programs import Programs

# cuBLAS gives the same bits in every run only with it; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# pytest-xdist gives its workers a width, as if somebody had asked for one.
os.environ.pop("COLUMNS", None)

import torch

# The package is imported where it is needed: the layout is checked where it is not installed.
_EXT4 = 0xEF53
# A directory on a file system with reflinks, such as XFS and btrfs: what uses them is tested there too.
_REFLINK_PATH = os.environ.get("OFFLOAD_REFLINK_PATH", "")
_REQUIRE_GPU = os.environ.get("OFFLOAD_REQUIRE_GPU", "0") not in ("", "0")
# Whose absence `--skip-missing` forgives. Without torch there is nothing to test.
_FORGIVEN = {"accelerate", "hjson", "hypothesis", "matplotlib", "numpy", "peft", "rich", "safetensors", "transformers"}
# On a card in this order, then all others that run on it, then what the CPU has shown elsewhere: a run that is stopped
# by its time has tested what the rest stands on.
_FIRST_ON_A_CARD = (
    *("test_copies", "test_cuda_streams", "test_stream_rules", "test_kernels", "test_wrap"),
    *("test_gradients", "test_streaming", "test_activations", "test_checkpoints", "test_together"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--skip-missing", action="store_true", help="skip what needs a package that is not installed, by its name"
    )


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


def pytest_collection_finish() -> None:
    if "offload" in sys.modules:
        importlib.import_module("torch._dynamo")  # as the first optimizer would, too late
    _what_is_here_stays()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """What a module of tests has imported and cached stays, too. A traceback that pytest still has does not."""
    done = yield
    if nextitem is not None and nextitem.path != item.path and not hasattr(sys, "last_value"):
        _what_is_here_stays()
    return done


def _what_is_here_stays() -> None:
    """The many collections of the tests need not look at what is imported: 300,000 objects and more."""
    for _ in range(10):  # frozen garbage would never go, and what a collection ends may leave some
        if gc.collect() == 0:
            break
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of the engine (its module uses the fixture `device`) runs on the CPU and, where there is one, on CUDA."""
    if "cloning_disk" in metafunc.fixturenames:
        kinds = ["copies", "reflinks"] if _REFLINK_PATH else ["copies"]
        metafunc.parametrize("cloning_disk", kinds, indirect=True)
    if "device" not in metafunc.fixturenames:
        return
    devices = ["cpu"]
    if (_REQUIRE_GPU or torch.cuda.is_available()) and not metafunc.definition.get_closest_marker("cpu_only"):
        devices.append("cuda")
    metafunc.parametrize("device", devices, indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """What a test holds when it fails is released: what waits for it, the end of its model above all, would not end."""
    try:
        return (yield)
    finally:
        engine = sys.modules.get("offload._engine")
        for held in list(engine._engines) if engine is not None else ():
            held.pipeline.release()
            if held.device.kind == "cpu":
                held.device.release("to_host")
                held.device.release("to_device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not _REQUIRE_GPU:
        return

    def place(item: pytest.Item) -> tuple[bool, int]:
        spec = getattr(item, "callspec", None)
        on_card = spec is not None and spec.params.get("device") == "cuda"
        module = item.path.stem
        first = _FIRST_ON_A_CARD.index(module) if module in _FIRST_ON_A_CARD else len(_FIRST_ON_A_CARD)
        return not on_card, first

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    call: pytest.CallInfo[Any] | None = getattr(report, "call", None)
    reason = _missing_package(collector.config, None if call is None else call.excinfo)
    if reason is not None:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 1, reason)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    reason = _missing_package(item.config, call.excinfo)
    if reason is not None:
        report.outcome, report.longrepr = "skipped", (str(item.path), (item.location[1] or 0) + 1, reason)
    return report


def _missing_package(config: pytest.Config, info: pytest.ExceptionInfo[BaseException] | None) -> str | None:
    """Why `--skip-missing` skips what raised this; None for every other error."""
    error = info.value if info is not None and config.getoption("skip_missing") else None
    if isinstance(error, pytest.Collector.CollectError):  # of a module, which says why as its cause
        error = error.__cause__
    name = (getattr(error, "name", None) or "").partition(".")[0] if isinstance(error, ImportError) else ""
    return f"needs {name}, which is not installed" if name in _FORGIVEN else None


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
    # Only a warning, for some models of the tests have layers without a deterministic backward. Fused attention takes
    # that for leave to add in any order, which shows from 65 keys on: no test that compares bits has so many.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield torch.device(name, torch.cuda.current_device())
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_device(None)
        _end_with_a_lost_context()


def _end_with_a_lost_context() -> None:
    """After a wrong access no CUDA call of a process works: the test fails, another worker goes on with the rest."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            raise
        print(error, file=sys.__stderr__, flush=True)
        os._exit(1)


def _skip_or_fail(reason: str) -> NoReturn:
    if _REQUIRE_GPU:
        pytest.fail(f"OFFLOAD_REQUIRE_GPU=1, and {reason}")
    pytest.skip(reason)


def _compiled_once(compile_in: Callable[[Path], Path], temporary: pytest.TempPathFactory) -> Path:
    """The library that `compile_in` puts into a folder; the processes of a run share it."""
    run = temporary.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        run = run.parent  # of the folders of all workers
    folder, unfinished = run / compile_in.__name__, run / f"{compile_in.__name__}_unfinished"
    with open(run / f"{compile_in.__name__}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished.mkdir(exist_ok=True)
            compile_in(unfinished)
            unfinished.rename(folder)
    (library,) = folder.iterdir()
    return library


@pytest.fixture(scope="session")
def host_kernels_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kernels/*.cu, compiled for the CPU."""
    return _compiled_once(compile_for_host, tmp_path_factory)


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
        importlib.import_module("cuda.core")
        importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    except Exception as error:  # each of the three packages has its own
        _skip_or_fail(f"no kernel can be compiled, pip install cuda-core cuda-bindings nvidia-cuda-nvrtc: {error}")


@pytest.fixture(scope="session")
def cuda_headers() -> Path:
    """A folder with cuda.h of CUDA 13 or newer; torch's CUDA packages bring one, as does nvidia-cuda-runtime."""
    packages = [folder for entry in sys.path for folder in Path(entry).glob("nvidia/*/include")]
    toolkits = [
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include",
        *Path("/usr/local").glob("cuda-*/include"),
    ]
    for folder in (*packages, *toolkits):
        header = folder / "cuda.h"
        version = re.search(r"^#define CUDA_VERSION (\d+)", header.read_text(), re.M) if header.exists() else None
        if version is not None and int(version[1]) >= 13000 and (folder / "cudaTypedefs.h").exists():
            return folder
    pytest.skip("needs cuda.h of CUDA 13: pip install nvidia-cuda-runtime")


@pytest.fixture
def disk_calls(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The `FailingSystemCalls` of every engine's disk tier: honest, on what passes for a disk anywhere."""
    from offload import _disk, _native, _state_store

    calls = _native.FailingSystemCalls()
    calls.pretend_file_system(_EXT4)
    monkeypatch.setattr(_state_store, "DiskStore", functools.partial(_disk.DiskStore, calls=calls))
    return calls


@pytest.fixture
def cloning_disk(request: pytest.FixtureRequest, tmp_path: Path, disk_calls: Any) -> Iterator[Path]:
    """A directory for the disk tier whose files can be cloned: by copies anywhere, by reflinks where there are any."""
    if request.param == "copies":
        disk_calls.pretend_clones()
    with tempfile.TemporaryDirectory(dir=tmp_path if request.param == "copies" else _REFLINK_PATH) as path:
        yield Path(path)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Asynchronous saves wait before their first byte; the test lets them go."""
    from held_saves import HeldWriter
    from offload import _running_save

    writer = HeldWriter(monkeypatch)
    yield writer
    writer.release()
    _running_save.finish_saves()


@pytest.fixture
def disk_path(tmp_path: Path) -> Iterator[str]:
    """A directory on a disk: where temporary files are memory, one beside the tests."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent if "tmpfs" in kind else tmp_path) as path:
        yield path


@pytest.fixture(scope="session")
def driver_double_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled double, for tests that load it in another process."""
    return _compiled_once(compile_double, tmp_path_factory)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """Runs Python code in processes of its own."""
    programs = Programs(tmp_path_factory.mktemp("programs"))
    yield programs
    programs.close()


@pytest.fixture
def driver_double(driver_double_library: Path) -> Iterator[DriverDouble]:
    """A CUDA driver over host memory, as after its start; `CudaDevice(driver_path=driver_double.path)` loads it."""
    double = DriverDouble(driver_double_library)
    double.reset()
    yield double
    double.reset()
