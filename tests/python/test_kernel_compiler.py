"""From kernels/*.cu to a binary: every architecture without a card, the arithmetic in it, the cache, and refusals."""

from __future__ import annotations

import ctypes
import functools
import locale
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import offload
from offload import DeviceError, _kernels
from offload._kernels import (
    Found,
    compile_kernel,
    compile_options,
    find_kernels,
    kernel_source,
    known_architectures,
    locale_of_thread_kept,
)

SOURCES = sorted((Path(__file__).resolve().parents[2] / "kernels").glob("*.cu"))
# And the first NVRTC that knows them.
ARCHITECTURES = {"sm_80": (11, 0), "sm_90": (11, 8), "sm_100": (12, 8), "sm_120": (12, 8)}
KERNELS = {
    "update": {"adamw", "adamw_bf16", "adamw_int8", "lion", "lion_bf16", "lion_int8", "adagrad"},
    "activations": {"encode_int8", "decode_int8", "encode_fp8", "decode_fp8"},
    "copies": {"copy_spans"},
}


def test_there_are_kernels_and_they_include_nothing() -> None:
    assert {path.stem for path in SOURCES} == set(KERNELS)
    for path in SOURCES:
        assert kernel_source(path.stem).endswith(path.read_text())
        assert not re.search(r"^\s*#\s*include", kernel_source(path.stem), re.MULTILINE)


@pytest.fixture
def knows(nvrtc: None) -> dict[str, bool]:
    """Whether this NVRTC, which torch brings, compiles for an architecture: that of torch 2.6 is 12.4."""
    from cuda.bindings import nvrtc as compiler

    _, *version = compiler.nvrtcVersion()
    return {arch: tuple(version) >= first for arch, first in ARCHITECTURES.items()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", KERNELS)
def test_every_architecture_compiles_that_the_compiler_knows(name: str, arch: str, knows: dict[str, bool]) -> None:
    assert (arch in known_architectures()) == knows[arch]
    if not knows[arch]:
        with pytest.raises(DeviceError, match=rf"NVRTC 12\.\d compiles for sm_\d+ to sm_\d+, and not for {arch}:"):
            compile_kernel(name, arch)
        return
    binary = compile_kernel(name, arch)
    assert binary.startswith(b"\x7fELF")
    assert set(re.findall(rb"\.text\.(\w+)", binary)) == {kernel.encode() for kernel in KERNELS[name]}


@pytest.mark.parametrize(
    ("name", "expected"), [("update", ("div", "sqrt", "rcp", "mul")), ("activations", ("div", "rcp", "mul", "add"))]
)
def test_each_operation_rounds_by_itself(name: str, expected: tuple[str, ...], knows: dict[str, bool]) -> None:
    """No fused multiply-add, no approximation, no flushed subnormal in what NVRTC gives to the assembler."""
    pattern = r"\b((?:fma|mad|add|sub|mul|div|rcp|sqrt|rsqrt|neg)\.\S*f(?:32|64))\b"
    allowed = {f"{operation}.rn.f32" for operation in ("add", "sub", "mul", "div", "rcp", "sqrt")} | {"neg.f32"}
    compiled = {arch: ptx_of(name, arch) for arch, is_known in knows.items() if is_known}
    assert {"sm_80", "sm_90"} <= set(compiled)
    for arch, text in compiled.items():
        operations = Counter(re.findall(pattern, text))
        assert set(operations) <= allowed, arch
        assert all(operations[f"{operation}.rn.f32"] > 0 for operation in expected), arch


def ptx_of(name: str, arch: str) -> str:
    """Through NVRTC itself, with the options of `compile_kernel`: cuda.core asks the driver before it gives PTX."""
    from cuda.bindings import nvrtc

    def checked(result: Any, *values: Any) -> Any:
        assert result == nvrtc.nvrtcResult.NVRTC_SUCCESS
        return values[0] if values else None

    options = compile_options(arch).as_bytes("nvrtc")
    program = checked(*nvrtc.nvrtcCreateProgram(kernel_source(name).encode(), b"kernel.cu", 0, [], []))
    with locale_of_thread_kept():
        checked(*nvrtc.nvrtcCompileProgram(program, len(options), options))
    text = b" " * checked(*nvrtc.nvrtcGetPTXSize(program))
    checked(*nvrtc.nvrtcGetPTX(program, text))  # writes into it
    checked(*nvrtc.nvrtcDestroyProgram(program))
    return text.decode()


def test_the_locale_of_the_thread_stays(nvrtc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise what a program reads after its first engine is ASCII to it: NVRTC of CUDA 12.4 leaves the C locale."""
    import cuda.core

    libc = ctypes.CDLL(None)
    libc.newlocale.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p]
    libc.uselocale.argtypes = libc.freelocale.argtypes = [ctypes.c_void_p]
    libc.newlocale.restype = libc.uselocale.restype = ctypes.c_void_p
    of_compiler = libc.newlocale(1 << locale.LC_CTYPE, b"C", None)
    before = libc.uselocale(None)
    seen = []

    class Program:
        def __init__(self, *arguments: object) -> None: ...

        def compile(self, form: str) -> SimpleNamespace:
            libc.uselocale(of_compiler)
            seen.append(libc.uselocale(None))
            if len(seen) == 2:
                raise RuntimeError("an error of the compiler")
            return SimpleNamespace(code=b"binary")

    monkeypatch.setattr(cuda.core, "Program", Program)
    try:
        assert compile_kernel("update", "sm_90") == b"binary"
        assert libc.uselocale(None) == before
        with pytest.raises(RuntimeError, match="an error of the compiler"):
            compile_kernel("update", "sm_90")
        assert libc.uselocale(None) == before
    finally:
        libc.uselocale(before)
        libc.freelocale(of_compiler)
    assert seen == [of_compiler] * 2 and of_compiler != before


# --- the cache ----------------------------------------------------------------------------------------------


@functools.cache
def _binary_of(source: str, name: str, arch: str) -> bytes:
    return compile_kernel(name, arch)


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvrtc: None) -> list[str]:
    """A cache of its own, and the architectures that were compiled for: the compiler is run for each once a process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    architectures: list[str] = []

    def compile_and_count(name: str, arch: str) -> bytes:
        architectures.append(arch)
        return _binary_of(_kernels.kernel_source(name), name, arch)

    monkeypatch.setattr(_kernels, "compile_kernel", compile_and_count)
    return architectures


def test_a_binary_is_compiled_once(compiled: list[str], tmp_path: Path) -> None:
    first = _kernels._cubin("update", "sm_90")
    assert _kernels._cubin("update", "sm_90") == first == compile_kernel("update", "sm_90")
    assert _kernels._cubin("update", "sm_80") != first
    assert compiled == ["sm_90", "sm_80"]
    names = [path.name for path in (tmp_path / "offload" / "kernels").iterdir()]
    assert sorted(name[:13] for name in names) == ["update-sm_80-", "update-sm_90-"]


@pytest.mark.parametrize("kept_bytes", [0, 20, 5000, -1])
def test_a_torn_or_changed_entry_is_compiled_again(compiled: list[str], tmp_path: Path, kept_bytes: int) -> None:
    first = _kernels._cubin("update", "sm_90")
    (path,) = (tmp_path / "offload" / "kernels").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:kept_bytes] if kept_bytes >= 0 else content[:-1] + bytes([content[-1] ^ 1]))
    assert _kernels._cubin("update", "sm_90") == first
    assert _kernels._cubin("update", "sm_90") == first
    assert compiled == ["sm_90"] * 2


def test_another_source_is_another_entry(compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _kernels._cubin("update", "sm_90")
    changed = kernel_source("update") + "// changed\n"
    monkeypatch.setattr(_kernels, "kernel_source", lambda name: changed)
    _kernels._cubin("update", "sm_90")
    assert compiled == ["sm_90"] * 2


def test_a_cache_that_cannot_be_written_to(compiled: list[str], tmp_path: Path) -> None:
    (tmp_path / "offload").write_text("a file where the folder should be")
    assert _kernels._cubin("update", "sm_90").startswith(b"\x7fELF")
    assert [path.name for path in tmp_path.iterdir()] == ["offload"]


# --- launching -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(nvrtc: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has every kernel for the card of the double."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        for name in KERNELS:
            _kernels._cubin(name, "sm_90")
    return folder


def launched(cache: Path, library: Path, **driver: str) -> subprocess.CompletedProcess[str]:
    """kernel_launches.py over a driver that runs kernels on the CPU; the binary comes from the cache."""
    folders = {
        "LD_LIBRARY_PATH": str(library.parent),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XDG_CACHE_HOME": str(cache),
    }
    script = [sys.executable, str(Path(__file__).with_name("kernel_launches.py"))]
    environment = {**os.environ, **folders, **driver}
    return subprocess.run(script, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_cuda_core_launches_on_the_current_stream_of_torch(cache: Path, host_driver: Path) -> None:
    done = launched(cache, host_driver)
    assert done.returncode == 0, done.stderr
    # Each optimizer twice: its scale is a number, or lies on the device.
    names = ["adamw", "adamw", "lion", "lion", "adagrad", "adagrad", "adamw_bf16", "adamw_int8"]
    names += ["encode_int8", "decode_int8", "encode_fp8", "decode_fp8"]
    assert done.stdout.splitlines() == [f"{name} on {64 * stream}" for stream, name in enumerate(names)]


def test_a_driver_that_refuses_the_binary(cache: Path, host_driver: Path) -> None:
    done = launched(cache, host_driver, HOST_DRIVER_FAILS="cuLibraryLoadData", HOST_DRIVER_CODE="209")
    assert re.search(r"^refused: CUDAError: .*209", done.stderr, re.MULTILINE), done.stderr
    assert "separate torch operations" in done.stderr and done.stdout == ""


def test_a_launch_that_fails_is_an_error(cache: Path, host_driver: Path) -> None:
    done = launched(cache, host_driver, HOST_DRIVER_FAILS="cuLaunchKernelEx", HOST_DRIVER_CODE="700")
    assert done.returncode == 1 and re.search("CUDAError: .*700", done.stderr), done.stderr
    assert done.stdout == "adamw on 0\n"


# --- refusals -----------------------------------------------------------------------------------------------


def found_on_cuda(source: _kernels.Source = "update") -> Found:
    return find_kernels.__wrapped__(torch.device("cuda", 0), source)


def test_without_cuda_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.warns(UserWarning, match=r"cuda:0 is updated by separate torch operations: .*offload\[cuda\]"):
        found = found_on_cuda()
    assert found.kernels is None and "pip install 'offload[cuda]'" in str(found.refusal)


@pytest.mark.parametrize(
    ("of_torch", "bindings", "remedy"),
    [
        ("12.4", "13.5.0", "pip install 'offload[cuda]' 'cuda-bindings<13'"),
        ("13.0", "12.9.4", "pip install 'offload[cuda]'"),
        ("12.4", "12.9.4", None),
        ("13.0", "13.5.0", None),
    ],
)
def test_bindings_of_another_cuda_are_told(
    monkeypatch: pytest.MonkeyPatch, nvrtc: None, of_torch: str, bindings: str, remedy: str | None
) -> None:
    """They load the NVRTC of their own CUDA, which torch's packages do not have then."""
    import cuda.bindings

    def refuse(device: torch.device, source: str) -> None:
        raise RuntimeError("no libnvrtc.so")

    monkeypatch.setattr(_kernels, "_cuda_launch", refuse)
    monkeypatch.setattr(torch.version, "cuda", of_torch)
    monkeypatch.setattr(cuda.bindings, "__version__", bindings)
    with pytest.warns(UserWarning, match="no libnvrtc.so"):
        found = found_on_cuda()
    told = f" (cuda-bindings {bindings} beside a torch for CUDA {of_torch}: {remedy})" if remedy else ""
    assert found.refusal == f"RuntimeError: no libnvrtc.so{told}"


def test_a_compiler_or_a_driver_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device, source: str) -> None:
        raise RuntimeError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION")

    monkeypatch.setattr(_kernels, "_cuda_launch", refuse)
    monkeypatch.setattr(torch.version, "cuda", None)  # or the bindings here may be of another
    with pytest.warns(UserWarning, match="CUDA_ERROR_UNSUPPORTED_PTX_VERSION"):
        found = found_on_cuda()
    assert found == Found(None, "RuntimeError: CUDA_ERROR_UNSUPPORTED_PTX_VERSION")
    with pytest.warns(UserWarning, match="activations that leave cuda:0 are rounded by separate torch operations"):
        assert found_on_cuda("activations") == found


def test_a_card_newer_than_the_compiler(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernels, "_cuda_launch", lambda device, source: _kernels._cubin(source, "sm_999"))
    message = r"NVRTC [\d.]+ compiles for sm_\d+ to sm_\d+, and not for sm_999: a newer torch, .* brings a newer one"
    with pytest.warns(UserWarning, match=f"cuda:0 is updated by separate torch operations: DeviceError: {message}"):
        found = found_on_cuda()
    assert found.kernels is None and re.search(message, str(found.refusal))


def test_the_cpu_has_no_kernels_and_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    find_kernels.cache_clear()
    assert find_kernels(torch.device("cpu")) == Found(None, "kernels are for CUDA devices, this is cpu")
    # What the garbage collector finds open meanwhile warns of itself.
    assert not [warning for warning in recwarn if warning.category is not ResourceWarning]


def test_the_environment_says_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from offload.cli import main

    monkeypatch.setattr(_kernels, "find_kernels", lambda device: Found(None, f"no compiler for {device}"))
    assert "no compiler for" in offload.environment()["kernel_refusal"]
    assert main(["env"]) == 0
    assert "kernels   no compiler for" in capsys.readouterr().out
    monkeypatch.setattr(_kernels, "find_kernels", lambda device: Found(None, None))
    assert main(["env"]) == 0
    assert "kernels   compiled for this device" in capsys.readouterr().out
