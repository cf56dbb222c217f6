"""Kernels of our own for what stays on a CUDA device: compiled for it at first use, launched on torch's current stream.

`kernels/*.cu` is CUDA C++ that includes nothing; prelude.inl is put before each. NVRTC, which torch's CUDA
packages bring, compiles it through `cuda.core`; the result is kept on disk. Where one of these is missing or too old,
`find_kernels` says why, and the same arithmetic runs as separate torch operations.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import _native
from ._adamw import FORMATS, MOMENT_FORMATS
from ._errors import DeviceError

__all__ = [
    "Found",
    "Kernels",
    "Launch",
    "compile_kernel",
    "compile_options",
    "find_kernels",
    "how_to_install",
    "kernel_source",
    "known_architectures",
    "load_copy_kernel",
    "locale_of_thread_kept",
]

# (kernel, blocks, threads a block, arguments): an int is an address or a 64-bit number, others are ctypes scalars.
Launch = Callable[[str, int, int, Sequence[Any]], None]

# Every operation rounds by itself to fp32, denormals included, as on the host.
_ARITHMETIC = {"fma": False, "ftz": False, "prec_div": True, "prec_sqrt": True}
# kThreads, kElementsPerThread and kElementsPerLane of the sources: what a block works through where each thread has
# elements of its own, and where each warp has blocks of elements that share a scale.
_THREADS = 256
_ELEMENTS_BY_THREAD = 4 * _THREADS
_ELEMENTS_BY_WARP = 8 * _THREADS
_SPLIT = 3  # kSplit of update.cu, beside FORMATS
# What the kernels of each optimizer take after the arguments that all have.
_SCALARS = {
    "adamw": ("weight_scale", "l2", "one_minus_beta1", "beta2", "one_minus_beta2", "step_size", "eps"),
    "lion": ("weight_scale", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "step_size"),
    "adagrad": ("l2", "step_size", "eps"),
}
# What the name of an optimizer's kernel ends with, by the format of the moments.
_MOMENTS = {MOMENT_FORMATS["fp32"]: "", MOMENT_FORMATS["bf16"]: "_bf16", MOMENT_FORMATS["int8"]: "_int8"}
# The kernels of each source, and what is done without them, in words.
_KERNELS = {
    "update": ("adamw", "adamw_bf16", "adamw_int8", "lion", "lion_bf16", "lion_int8", "adagrad"),
    "activations": ("encode_int8", "decode_int8", "encode_fp8", "decode_fp8"),
}
_WORK = {
    "update": "what stays on {device} is updated",
    "activations": "activations that leave {device} are rounded",
}
Source = Literal["update", "activations"]


class Kernels:
    """The kernels of one source on one device; `launch` puts one behind what that device's current stream has."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def update_(
        self,
        rule: str,
        master: Tensor,
        weight: Tensor | None,
        moments: Mapping[str, int],
        gradient: Tensor,
        scalars: Mapping[str, Any],
        grad_scale: float | Tensor = 1.0,
        rounding_key: int = 0,
        copy: Tensor | None = None,
    ) -> None:
        """One step of the optimizer `rule` ("adamw", "lion" or "adagrad"), in place, with the bits of the native core.

        All are dense, of one shape and strides, where the device of these kernels reads and writes: in its memory, or
        page-locked on the host. `gradient` is fp32, bf16 or fp16, `master` fp32, with the bf16 or fp16 working
        `weight`, or None where the master is the weight; or int16, the lower halves of masters whose upper ones are the
        bf16 `weight`; or bf16 and the weight itself, which is rounded stochastically. copy: gets what the weight
        becomes. moments: addresses of `exp_avg` and `exp_avg_sq`, 0 for one that the optimizer does not keep, their
        `moment_format` (fp32 unless given), and `exp_avg_scales`, `exp_avg_sq_scales` of int8 ones.
        scalars: what `scalars()` of its hyperparameters gives. grad_scale multiplies the gradient in fp32: a number, or
        an fp32 tensor of one element on the device, which the kernel reads when it runs.
        rounding_key: of the `RandomWords` that small formats are rounded with.
        """
        count = master.numel()
        if count == 0:
            return
        form = moments.get("moment_format", MOMENT_FORMATS["fp32"])
        arguments = (
            gradient.data_ptr(),
            ctypes.c_int(FORMATS[gradient.dtype]),
            master.data_ptr(),
            ctypes.c_int(_SPLIT if master.dtype == torch.int16 else FORMATS[master.dtype]),
            0 if weight is None else weight.data_ptr(),
            ctypes.c_int(FORMATS[(master if weight is None else weight).dtype]),
            0 if copy is None else copy.data_ptr(),
            moments["exp_avg"],
            moments["exp_avg_sq"],
            moments.get("exp_avg_scales", 0),
            moments.get("exp_avg_sq_scales", 0),
            ctypes.c_uint32(rounding_key),
            count,
            grad_scale.data_ptr() if isinstance(grad_scale, Tensor) else 0,
            ctypes.c_float(1.0 if isinstance(grad_scale, Tensor) else grad_scale),
            ctypes.c_bool(scalars["maximize"]),
            *(ctypes.c_float(scalars[name]) for name in _SCALARS[rule]),
        )
        by_warp = form == MOMENT_FORMATS["int8"]
        per_block = _ELEMENTS_BY_WARP if by_warp else _ELEMENTS_BY_THREAD
        self._launch(rule + _MOMENTS[form], -(-count // per_block), _THREADS, arguments)

    def encode(self, form: str, values: Tensor, codes: Tensor, scales: Tensor) -> None:
        """Writes `values` as `form` ("int8" or "fp8"): [Note: activation formats] of kernels/activations.cu.

        All are contiguous, on the device of these kernels: `values` fp32, bf16 or fp16, `codes` as many bytes, `scales`
        one fp32 for every 256 of them, the last for fewer.
        """
        if values.numel() > 0:
            arguments = (values.data_ptr(), ctypes.c_int(FORMATS[values.dtype]), codes.data_ptr(), scales.data_ptr())
            self._launch_blocks(f"encode_{form}", arguments, values.numel())

    def decode(self, form: str, codes: Tensor, scales: Tensor, values: Tensor) -> None:
        """Writes to `values` what `encode` made `codes` and `scales` of, rounded to its dtype."""
        if values.numel() > 0:
            arguments = (codes.data_ptr(), scales.data_ptr(), values.data_ptr(), ctypes.c_int(FORMATS[values.dtype]))
            self._launch_blocks(f"decode_{form}", arguments, values.numel())

    def _launch_blocks(self, name: str, arguments: Sequence[Any], count: int) -> None:
        self._launch(name, -(-count // _ELEMENTS_BY_WARP), _THREADS, (*arguments, count))


class Found(NamedTuple):
    """The kernels of a source on a device, or why there are none."""

    kernels: Kernels | None
    refusal: str | None


@functools.cache
def find_kernels(device: torch.device, source: Source = "update") -> Found:
    """Compiles and loads `source`.cu for `device`, once a process; warns when a CUDA device has to do without."""
    if device.type != "cuda":
        return Found(None, f"kernels are for CUDA devices, this is {device}")
    try:
        return Found(Kernels(_cuda_launch(device, source)), None)
    except Exception as error:  # the compiler's, the driver's and cuda.core's own: whichever, torch's operations remain
        refusal = _in_words(error)
    work = _WORK[source].format(device=device)
    warnings.warn(f"{work} by separate torch operations: {refusal}", stacklevel=2)
    return Found(None, refusal)


def load_copy_kernel(device: _native.Device) -> str | None:
    """Has `device` send small copies by kernels/copies.cu if its driver takes no batches; what refuses it, in words."""
    if not isinstance(device, _native.CudaDevice) or device.copies_together != "one by one":
        return None
    major, minor = device.facts()["compute_capability"]
    try:
        device.load_copy_kernel(_cubin("copies", f"sm_{major}{minor}"))
    except Exception as error:  # as above; copies go one by one then
        return _in_words(error)
    return None


def _in_words(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"{error}: {how_to_install(torch.version.cuda)}"
    return f"{type(error).__name__}: {error}" + _other_bindings()


def how_to_install(of_torch: str | None) -> str:
    """What brings cuda.core, and bindings of the CUDA that torch is built for, whose packages have the NVRTC."""
    older = " 'cuda-bindings<13'" if of_torch is not None and of_torch.startswith("12.") else ""
    return f"pip install 'offload[cuda]'{older}"


def _other_bindings() -> str:
    """What to add to a refusal where the bindings are of another CUDA than torch: they look for that one's NVRTC."""
    import cuda.bindings

    version, of_torch = cuda.bindings.__version__, torch.version.cuda
    if of_torch is None or version.partition(".")[0] == of_torch.partition(".")[0]:
        return ""
    return f" (cuda-bindings {version} beside a torch for CUDA {of_torch}: {how_to_install(of_torch)})"


def _cuda_launch(device: torch.device, source: Source) -> Launch:
    from cuda.core import Device, LaunchConfig, ObjectCode, Stream, launch

    index = torch.cuda.current_device() if device.index is None else device.index
    major, minor = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        loaded = ObjectCode.from_cubin(_cubin(source, f"sm_{major}{minor}"))
        kernels = {name: loaded.get_kernel(name) for name in _KERNELS[source]}

    def launch_on_current_stream(name: str, grid: int, block: int, arguments: Sequence[Any]) -> None:
        with torch.cuda.device(device):
            Device(index).set_current()  # a thread in which torch has run nothing yet has no context
            stream = Stream.from_handle(torch.cuda.current_stream(device).cuda_stream)
            launch(stream, LaunchConfig(grid=grid, block=block), kernels[name], *arguments)

    return launch_on_current_stream


# --- from source to binary --------------------------------------------------------------------------------------


def kernel_source(name: str) -> str:
    """What is compiled of `name`.cu, of the installed package or the source tree that this module is run from."""
    package = Path(__file__).resolve().parent
    installed = package / "kernels"
    folder = installed if installed.exists() else package.parents[1] / "kernels"
    return (folder / "prelude.inl").read_text() + (folder / f"{name}.cu").read_text()


def compile_options(arch: str) -> Any:
    """cuda.core's options for every kernel; `arch` is such as "sm_90"."""
    from cuda.core import ProgramOptions

    return ProgramOptions(arch=arch, std="c++17", **_ARITHMETIC)


def compile_kernel(name: str, arch: str) -> bytes:
    """The binary of `name`.cu; needs neither a device nor a driver.

    Raises DeviceError for an architecture that this NVRTC does not know, and what cuda.core does.
    """
    from cuda.bindings import nvrtc
    from cuda.core import Program

    known = known_architectures()
    if arch not in known:
        _, *version = nvrtc.nvrtcVersion()
        raise DeviceError(
            f"NVRTC {'.'.join(map(str, version))} compiles for {known[0]} to {known[-1]}, and not for {arch}: a newer "
            f"torch, or one for a newer CUDA, brings a newer one"
        )
    program = Program(kernel_source(name), "c++", compile_options(arch))
    with locale_of_thread_kept():
        return bytes(program.compile("cubin").code)


@contextlib.contextmanager
def locale_of_thread_kept() -> Iterator[None]:
    """NVRTC before CUDA 12.6.2 leaves its thread in the C locale, where Python takes every text file for ASCII."""
    libc = ctypes.CDLL(None)
    libc.uselocale.argtypes, libc.uselocale.restype = [ctypes.c_void_p], ctypes.c_void_p
    before = libc.uselocale(None)
    try:
        yield
    finally:
        libc.uselocale(before)


def known_architectures() -> list[str]:
    """What this NVRTC compiles for, the oldest first."""
    from cuda.bindings import nvrtc

    _, numbers = nvrtc.nvrtcGetSupportedArchs()
    return [f"sm_{number}" for number in numbers]


def _cubin(name: str, arch: str) -> bytes:
    """What `compile_kernel` gives, from the disk if it was compiled before by the same compiler."""
    from cuda.bindings import nvrtc

    recipe = (kernel_source(name), arch, sorted(_ARITHMETIC.items()), nvrtc.nvrtcVersion())
    digest = hashlib.sha256(repr(recipe).encode()).hexdigest()
    path = _cache_folder() / f"{name}-{arch}-{digest[:32]}.cubin"
    with contextlib.suppress(OSError):
        stored = path.read_bytes()
        checksum, cubin = stored[:32], stored[32:]
        if hashlib.sha256(cubin).digest() == checksum:  # a power cut may leave a file without its bytes
            return cubin
    cubin = compile_kernel(name, arch)
    with contextlib.suppress(OSError):  # a home that cannot be written to costs a fifth of a second a process
        _write_whole(path, hashlib.sha256(cubin).digest() + cubin)
    return cubin


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "offload" / "kernels"


def _write_whole(path: Path, content: bytes) -> None:
    """Other processes see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
