"""The driver double from Python: compiled once, controlled through ctypes."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

SOURCES = Path(__file__).resolve().parent

_SIZE_MAX = ctypes.c_size_t(-1).value


def compile_double(folder: Path) -> Path:
    """Builds libdriver_double.so in `folder`; needs a C++ compiler only (CXX picks it)."""
    library = folder / "libdriver_double.so"
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", "-Wl,-Bsymbolic", "-pthread", f"-I{SOURCES.parent}"]
    # As one source: most of the time goes into the headers. But what declares every entry without its parameters.
    alone = SOURCES / "symbols.cpp"
    rest = "".join(f'#include "{path}"\n' for path in sorted(SOURCES.glob("*.cpp")) if path != alone)
    command = [os.environ.get("CXX", "c++"), *flags, str(alone), "-x", "c++", "-", "-o", str(library)]
    subprocess.run(command, input=rest, text=True, check=True)
    return library


class DriverDouble:
    """The controls of driver_double.h. The library is loaded once a process, so all instances of a path are one."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        for name in ("double_calls", "double_live", "double_misuses", "double_races"):
            getattr(self._library, name).restype = ctypes.c_size_t
        for name in ("double_first_misuse", "double_race_texts"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def reset(self) -> None:
        self._library.double_reset()

    def set_kind(self, kind: str) -> None:
        assert self._library.double_set_kind(kind.encode()), kind

    def set_version(self, version: int) -> None:
        self._library.double_set_version(version)

    def set_device_count(self, count: int) -> None:
        self._library.double_set_device_count(count)

    def set_host_numa_node(self, node: int) -> None:
        self._library.double_set_host_numa_node(node)

    def set_free_bytes(self, nbytes: int) -> None:
        self._library.double_set_free_bytes(ctypes.c_size_t(nbytes))

    def set_proc_address(self, level: int) -> None:
        self._library.double_set_proc_address(level)

    def hide(self, symbol: str) -> None:
        self._library.double_hide(symbol.encode())

    def fail(self, entry: str, nth: int, code: int, lasting: bool = False) -> None:
        assert self._library.double_fail(entry.encode(), ctypes.c_size_t(nth), code, int(lasting)), entry

    def fail_copy(self, direction: str, nth: int, code: int) -> None:
        assert self._library.double_fail_copy(direction.encode(), ctypes.c_size_t(nth), code), direction

    def hold(self, direction: str) -> None:
        assert self._library.double_hold(direction.encode()), direction

    def set_capturing(self, capturing: bool) -> None:
        self._library.double_set_capturing(int(capturing))

    def release(self, direction: str) -> None:
        assert self._library.double_release(direction.encode()), direction

    def calls(self, entry: str) -> int:
        return self._known(self._library.double_calls(entry.encode()), entry)

    def live(self, what: str) -> int:
        return self._known(self._library.double_live(what.encode()), what)

    def free_managed(self, address: int) -> None:
        """Frees managed memory of device 0 past its owner."""
        context = ctypes.c_void_p()
        codes = [
            self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0),
            self._library.cuCtxPushCurrent_v2(context),
            self._library.cuMemFree_v2(ctypes.c_ulonglong(address)),
            self._library.cuCtxPopCurrent_v2(ctypes.byref(context)),
            self._library.cuDevicePrimaryCtxRelease_v2(0),
        ]
        assert codes == [0] * 5, codes

    def misuses(self) -> tuple[int, str]:
        """How many, and the first in words."""
        return self._library.double_misuses(), self._library.double_first_misuse().decode()

    def set_late(self, late: bool) -> None:
        self._library.double_set_late(int(late))

    def watch(self, on: bool) -> None:
        self._library.double_watch(int(on))

    def races(self) -> tuple[int, str]:
        """How many since watch(), and the first ones in words."""
        return self._library.double_races(), self._library.double_race_texts().decode()

    def synchronize(self) -> None:
        """The host waits for every stream."""
        self._library.double_synchronize()

    @staticmethod
    def _known(value: int, name: str) -> int:
        assert value != _SIZE_MAX, f"the double knows no {name!r}"
        return value
