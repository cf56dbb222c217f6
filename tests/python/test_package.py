"""What is installed: what the native module needs, what import costs, and that the stub tells the truth."""

from __future__ import annotations

import ast
import inspect
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import offload
from offload import _native

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(offload.__file__).parent
# What every Linux with a C++ runtime has. libpthread and libdl are part of libc since glibc 2.34.
LEGAL_LIBRARIES = re.compile(r"(lib(c|m|stdc\+\+|gcc_s|pthread|dl|rt)\.so\.\d+|ld-linux.*\.so\.\d+)$")
DT_NULL, DT_NEEDED, DT_STRTAB = 0, 1, 5
PT_LOAD, PT_DYNAMIC = 1, 2


def needed_libraries(path: Path) -> list[str]:
    """The DT_NEEDED names of a 64-bit little-endian ELF file."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", f"{path} is not a 64-bit little-endian ELF file"
    (offset,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", data, offset + index * size) for index in range(count)]
    loads = [(header[3], header[2], header[5]) for header in headers if header[0] == PT_LOAD]
    (start,) = [header[2] for header in headers if header[0] == PT_DYNAMIC]
    entries = []
    for position in range(start, len(data), 16):
        tag, value = struct.unpack_from("<qQ", data, position)
        if tag == DT_NULL:
            break
        entries.append((tag, value))
    address = dict(entries)[DT_STRTAB]
    (strings,) = [address - base + at for base, at, length in loads if base <= address < base + length]
    names = [strings + value for tag, value in entries if tag == DT_NEEDED]
    return [data[at : data.index(b"\0", at)].decode() for at in names]


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_make_keeps_bytecode_where_the_environment_says_not_to() -> None:
    """Each process of the tests would compile torch's sources anew."""
    asked = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = ["make", "-s", "--eval=asked: ; @printenv PYTHONDONTWRITEBYTECODE || echo unset", "asked"]
    done = subprocess.run(command, cwd=ROOT, env=asked, capture_output=True, text=True, check=True)
    assert done.stdout == "unset\n"


def test_native_module_needs_the_c_and_cpp_runtime_only() -> None:
    needed = needed_libraries(Path(_native.__file__))
    assert any(name.startswith("libc.so") for name in needed), "the reader found nothing"
    assert [name for name in needed if not LEGAL_LIBRARIES.match(name)] == []


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert (PACKAGE / "_native.pyi").exists()


def test_import_alone_loads_no_torch() -> None:
    assert run_python("import sys, offload; print('torch' in sys.modules)") == "False"


def test_import_is_cheap_beyond_torch() -> None:
    code = (
        "import time\nstart = time.process_time()\nimport torch.utils.checkpoint\nbetween = time.process_time()\n"
        "import offload\noffload.wrap, offload.AdamW\nprint((time.process_time() - between) / (between - start))"
    )
    # Of torch's own CPU time, which is as slow on a slow machine: 0.3 s where torch takes 1.5. The best of three.
    # In torch 2.6 checkpointing brings sympy.
    assert any(float(run_python(code)) < 0.2 for _ in range(3))


def test_import_starts_no_thread_and_makes_no_cuda_context() -> None:
    code = (
        "import os, torch\ncount = lambda: len(os.listdir('/proc/self/task'))\nbefore = count()\n"
        "import offload\noffload.wrap, offload.AdamW\nprint(count() - before, torch.cuda.is_initialized())"
    )
    assert run_python(code) == "0 False"


def test_public_names_resolve() -> None:
    for name in offload.__all__:
        assert getattr(offload, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'warp'"):
        offload.warp  # noqa: B018


def stub_names() -> dict[str, set[str] | None]:
    """Top-level names of the stub; for a class its public members, for anything else None."""
    names: dict[str, set[str] | None] = {}
    for node in ast.parse((PACKAGE / "_native.pyi").read_text()).body:
        if isinstance(node, ast.ClassDef):
            names[node.name] = {
                item.name for item in node.body if isinstance(item, ast.FunctionDef) and not item.name.startswith("_")
            }
        elif isinstance(node, ast.FunctionDef):
            names[node.name] = None
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = None
    return names


def public_members(owner: object) -> set[str]:
    return {name for name in vars(owner) if not name.startswith("_")}


def test_the_stub_names_what_the_module_has() -> None:
    stub = stub_names()
    assert public_members(_native) == set(stub)
    for name, members in stub.items():
        if members is not None:
            assert inspect.isclass(getattr(_native, name))
            assert public_members(getattr(_native, name)) == members, name


def test_versions_agree() -> None:
    assert _native.version == offload.__version__


def test_the_readme_code_runs() -> None:
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert text[: text.index(code)].count("\n") < 40, "the first runnable code stands near the top"
    assert "optimizer on the host" in run_python(code)
