"""What the files compiled for one instruction set put into the linker's hands."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPTIMIZER = ROOT / "csrc" / "optimizer"
FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mf16c"],
    "neon": [],
    "sve128": ["-march=armv8.2-a+sve", "-msve-vector-bits=128"],
    "sve256": ["-march=armv8.2-a+sve", "-msve-vector-bits=256"],
    "sve512": ["-march=armv8.2-a+sve", "-msve-vector-bits=512"],
}
AARCH64_ISAS = ["scalar", "neon", "sve128", "sve256", "sve512"]
ISAS = ["scalar", "avx2", "avx512"] if platform.machine() == "x86_64" else AARCH64_ISAS
# The folder of those that `make test-aarch64` built, for the tests of cross-compiled objects.
CROSS_COMPILED = os.environ.get("AARCH64_OBJECTS")
cross_compiled = pytest.mark.skipif(CROSS_COMPILED is None, reason="`make test-aarch64` sets AARCH64_OBJECTS")
ALLOWED_INCLUDES = {
    "immintrin.h",
    "emmintrin.h",
    "arm_neon.h",
    "arm_sve.h",
    "optimizer/update_kernels.h",
    "optimizer/sve_lanes.inl",
    "optimizer/lanes.inl",
    "optimizer/moment_formats.inl",
    "optimizer/update_body.inl",
    "optimizer/update_rules.inl",
    "optimizer/float_formats.inl",
}


def compiled(isa: str, level: str, folder: Path) -> Path:
    built = folder / "kernel.o"
    options = ["-std=c++20", level, "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", *FLAGS[isa]]
    source = OPTIMIZER / f"kernels_{isa}.cpp"
    subprocess.run(
        ["c++", *options, f"-I{ROOT / 'csrc'}", "-w", "-c", str(source), "-o", str(built)],
        check=True,
        timeout=100,
    )
    return built


def installed(isa: str) -> Path | None:
    """The object that this checkout's `pip install` gave to the linker, if the sources are still those."""
    objects = ROOT.glob(f"build/cp3*/CMakeFiles/offload_core.dir/csrc/optimizer/kernels_{isa}.cpp.o")
    changed = max(path.stat().st_mtime for path in OPTIMIZER.iterdir())
    return next((path for path in objects if path.stat().st_mtime > changed), None)


@pytest.mark.parametrize("isa", ISAS)
def test_one_strong_symbol_and_no_weak_one(isa: str, tmp_path: Path) -> None:
    """The linker keeps any one copy of a weak function, for every CPU: it may be the one with AVX-512."""
    for built in (installed(isa) or compiled(isa, "-O2", tmp_path), compiled(isa, "-O0", tmp_path)):
        check_symbols(isa, output_of("nm", "-C", str(built)))


@cross_compiled
@pytest.mark.parametrize("isa", AARCH64_ISAS)
def test_one_strong_symbol_and_no_weak_one_in_a_cross_compiled_object(isa: str) -> None:
    check_symbols(isa, output_of("aarch64-linux-gnu-nm", "-C", f"{CROSS_COMPILED}/kernels_{isa}.cpp.o"))


@cross_compiled
@pytest.mark.parametrize("isa", ["sve128", "sve256", "sve512"])
def test_sve_objects_compute_in_sve_registers(isa: str) -> None:
    """A compiler may lower vectors to halves of NEON's width, or to single elements, without a word."""
    code = output_of("aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", f"{CROSS_COMPILED}/kernels_{isa}.cpp.o")
    for operation in ("fadd", "fmul", "fdiv", "fsqrt", "umax"):
        registers = re.findall(rf"\t{operation}\t([zv])\d+\.", code)
        assert registers.count("z") >= 50 and "v" not in registers, operation
    for access in ("ld1w", "ld1h", "ld1b", "st1w", "st1h", "st1b"):
        assert len(re.findall(rf"\t{access}\t{{z\d+\.s}}", code)) >= 50, access


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def check_symbols(isa: str, listing: str) -> None:
    symbols = re.findall(r"^[0-9a-f]*\s+([A-Za-z]) (.+)$", listing, flags=re.MULTILINE)
    defined = [name.partition("(")[0] for kind, name in symbols if kind.isupper() and kind not in "UVW"]
    assert defined == [f"offload::kernels_{isa}"]
    assert [name for kind, name in symbols if kind in "VWvwu"] == []
    needed = {name for kind, name in symbols if kind == "U"}
    assert needed <= {"memcpy", "memset", "_GLOBAL_OFFSET_TABLE_"}


@pytest.mark.parametrize("isa", FLAGS)
def test_includes_nothing_that_could_emit_shared_functions(isa: str) -> None:
    included = re.findall(r'#include [<"](.+?)[>"]', (OPTIMIZER / f"kernels_{isa}.cpp").read_text())
    assert set(included) <= ALLOWED_INCLUDES
    headers = (
        "update_kernels.h",
        "update_rules.h",
        *(f"{n}.inl" for n in ("lanes", "sve_lanes", "moment_formats", "update_body", "update_rules", "float_formats")),
    )
    for header in headers:
        nested = re.findall(r"#include <(.+?)>", (OPTIMIZER / header).read_text())
        assert set(nested) <= {"cstddef", "cstdint"}
