"""kernels/*.cu compiled as C++ for the CPU: the same source, the same launches, on host tensors.

The library is a libcuda.so.1 too (driver.cpp): where the loader finds it first, cuda.core launches these kernels.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parent


def compile_for_host(folder: Path) -> Path:
    """Builds libcuda.so.1 in `folder`; needs a C++ compiler only (CXX picks it)."""
    library = folder / "libcuda.so.1"
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
    subprocess.run([os.environ.get("CXX", "c++"), *flags, *sources, "-ldl", "-o", str(library)], check=True)
    return library


class HostLaunch:
    """A `Launch` that runs the kernel at once, on the calling thread. `count` is how many it ran."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self.count = 0

    def __call__(self, name: str, grid: int, block: int, arguments: Sequence[Any]) -> None:
        # As cuda.core passes them : an int is 64 bits wide.
        cells = [ctypes.c_int64(value) if isinstance(value, int) else value for value in arguments]
        addresses = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
        function = getattr(self._library, f"launch_{name}")
        function.restype = ctypes.c_bool
        assert function(grid, block, addresses, ctypes.c_size_t(len(cells))), f"{name}: another number of arguments"
        self.count += 1
