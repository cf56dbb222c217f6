"""What the files compiled for one instruction set put into the linker's hands."""

from __future__ import annotations

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
}
ISAS = ["scalar", "avx2", "avx512"] if platform.machine() == "x86_64" else ["scalar", "neon"]
ALLOWED_INCLUDES = {
    "immintrin.h",
    "emmintrin.h",
    "arm_neon.h",
    "optimizer/update_kernels.h",
    "optimizer/lanes.inl",
    "optimizer/moment_formats.inl",
    "optimizer/update_body.inl",
    "optimizer/update_rules.inl",
    "optimizer/float_formats.inl",
}


@pytest.mark.parametrize("level", ["-O0", "-O2"])
@pytest.mark.parametrize("isa", ISAS)
def test_one_strong_symbol_and_no_weak_one(isa: str, level: str, tmp_path: Path) -> None:
    """The linker keeps any one copy of a weak function, for every CPU: it may be the one with AVX-512."""
    built = tmp_path / "kernel.o"
    options = ["-std=c++20", level, "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", *FLAGS[isa]]
    source = OPTIMIZER / f"kernels_{isa}.cpp"
    subprocess.run(
        ["c++", *options, f"-I{ROOT / 'csrc'}", "-w", "-c", str(source), "-o", str(built)],
        check=True,
        timeout=100,
    )
    listing = subprocess.run(["nm", "-C", str(built)], capture_output=True, text=True, check=True).stdout
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
        *(f"{n}.inl" for n in ("lanes", "moment_formats", "update_body", "update_rules", "float_formats")),
    )
    for header in headers:
        nested = re.findall(r"#include <(.+?)>", (OPTIMIZER / header).read_text())
        assert set(nested) <= {"cstddef", "cstdint"}
