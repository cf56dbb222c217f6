"""The shape of the house: who may include or import whom, file sizes, names and header contracts.

Reads the sources as text, so it needs neither a compiler nor torch. The floors are those of docs/design.md; a new
module gets its floor here. Each rule is a function from a source tree to a list of violations, and each is
shown a tree that breaks it.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LINES_SOFT, LINES_HARD = 400, 600
SOURCE_FOLDERS = ("csrc", "kernels", "python", "tests", "benches", "examples")
SOURCE_SUFFIXES = (".h", ".cpp", ".inl", ".cu", ".py", ".pyi")

# A C++ floor includes itself and the floors named here.
CSRC_FLOORS = {
    "base": (),
    "device": ("base",),
    "memory": ("base", "device"),
    "storage": ("base", "device", "memory"),
    "transfer": ("base", "device", "memory", "storage"),
    "optimizer": ("base",),
    "pipeline": ("base", "device", "memory", "storage", "transfer", "optimizer"),
    "unified": ("base", "device", "memory", "storage", "transfer", "optimizer"),
    "bindings": (
        "base", "device", "memory", "storage", "transfer", "optimizer", "pipeline", "unified",
    ),
}  # fmt: skip

# A Python module imports from its own floor and the floors before it.
PYTHON_FLOORS = (
    ("_errors", "_config", "_parameter_size", "_tier_bytes", "_disk_window", "_unified_plan", "_hybrid",
     "_plan_sizes", "_plan", "_activation_order", "_step_work", "_simulated_lanes", "_simulated_cache",
     "_simulated_windows", "_simulator", "_forecast", "_hardware", "_token_costs", "_predicted_step", "_prediction",
     "_stats", "_memory",
     "_intervals", "_trace_records", "_trace_advice", "_trace_report", "_trace_file", "_trace_page"),
    (
        "_uncompiled", "_units", "_pending", "_torch_func", "_conversions", "_interrupts", "_cuda_graphs", "_adamw",
        "_lion", "_adagrad", "_kernels", "_unified", "_unified_pool", "_disk", "_disk_snapshot", "_state_store",
        "_stored_values", "_probe", "_environment", "_rates", "_trace", "_grad_dtype",
    ),
    ("_durable_files", "_safetensors", "_directory_lock", "_checkpoint_directory"),
    (
        "_host_grad", "_grad_cell", "_grad_face", "_grad_factors", "_touch_order", "_residency", "_weight_window",
        "_weight_copies", "_autocast_cache", "_streaming", "_away", "_checkpoint_inputs", "_activations",
        "_activation_format", "_saved_ranges", "_weight_casts", "_old_weight", "_state_pieces", "_parameter_state",
        "_moments", "_native_state",
    ),
    ("_copy_lanes", "_gradient_lanes"),
    ("_weight_cache", "_weight_lane", "_state_homes", "_engine", "_engine_step", "_speculation", "_engine_stats"),
    ("_checkpoint",),
    ("_activation_region", "_foreign_steps", "_hooks", "_live_states", "_updater", "_optimizer", "_native_updater",
     "_torch_updater", "_resident_move", "_model_sizes"),
    ("_clocks", "_trace_units", "_tracing"),
    ("_wrap_checks", "_wrap", "_predict"),
    ("_snapshot", "_running_save", "_saving", "_loading", "_export"),
)  # fmt: skip
DOORS = ("__init__", "__main__", "unified")  # may import every floor
PUBLIC_API_ONLY = ("cli", "deepspeed")
# The lanes are the engine's own way of copying and stores of gradients and weights, _state_homes the place of states
# and _engine_step its step, in files of their own; _state_store and _weight_cache are the disk tier's.
MAY_IMPORT_NATIVE = (
    "_engine", "_engine_step", "_speculation", "_copy_lanes", "_gradient_lanes", "_weight_cache", "_weight_lane",
    "_state_homes", "_adamw", "_lion", "_adagrad", "_kernels", "_unified", "_unified_pool", "_disk",
    "_state_store", "_environment", "_rates", "_trace", "_trace_units", "_tracing",
)  # fmt: skip

CONTRACT_LABELS = ("Ownership:", "Threads:", "Stream order:", "Units:", "Invariants:")
CONTRACT_LINES = range(3, 13)
BANNED_WORDS = {"util", "utils", "common", "helper", "helpers", "misc", "manager", "handler", "v2"}

Rule = Callable[[Path], list[str]]


def sources(root: Path, *folders: str, suffixes: tuple[str, ...] = SOURCE_SUFFIXES) -> Iterator[tuple[str, Path]]:
    """(path relative to root, path) of every source file."""
    for folder in folders or SOURCE_FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in suffixes and "__pycache__" not in path.parts:
                yield path.relative_to(root).as_posix(), path


def include_violations(root: Path) -> list[str]:
    """C++ floors include downwards only, and only the bindings know Python."""
    found = []
    for name, path in sources(root, "csrc"):
        floor = Path(name).parts[1]
        if floor not in CSRC_FLOORS:
            found.append(f"{name}: folder {floor!r} has no floor in CSRC_FLOORS")
            continue
        text = path.read_text()
        for target in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
            folder = target.split("/")[0] if "/" in target else floor
            if folder != floor and folder not in CSRC_FLOORS[floor]:
                found.append(f"{name}: {floor} may not include {target}")
        if floor != "bindings" and re.search(r"^\s*#\s*include\s+[<\"](pybind11|Python\.h)", text, re.MULTILINE):
            found.append(f"{name}: only csrc/bindings may include pybind11")
    return found


def python_imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Absolute dotted names of what a module of `package` imports, imports inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *(node.module.split(".") if node.module else ())))
            # `from . import _native` names modules; `from ._plan import Plan` names what is inside one.
            yield from (f"{stem}.{alias.name}" for alias in node.names) if stem == "offload" else (stem,)


def import_violations(root: Path) -> list[str]:
    """Python floors import leftwards only; the doors at the side see the public API only."""
    rank = {module: index for index, floor in enumerate(PYTHON_FLOORS) for module in floor}
    found = []
    for name, path in sources(root, "python/offload", suffixes=(".py",)):
        inside = Path(name).relative_to("python/offload")
        package = ("offload", *inside.parts[:-1])
        imported = {item.split(".")[1] for item in python_imports(ast.parse(path.read_text()), package)
                    if item.startswith("offload.")}  # fmt: skip
        private = {module for module in imported if module.startswith("_") and not module.startswith("__")}
        if inside.parts[0] in PUBLIC_API_ONLY:
            # A benchmark of the native core, or of the kernels, has to reach it, and the scalars that it takes.
            allowed = {"_native", "_adamw", "_kernels"} if inside.name.startswith("_bench_") else set()
            found += [f"{name}: uses private offload.{module}" for module in sorted(private - allowed)]
            continue
        if inside.stem in DOORS:
            continue
        if inside.stem not in rank:
            found.append(f"{name}: has no floor in PYTHON_FLOORS")
            continue
        if "_native" in private and inside.stem not in MAY_IMPORT_NATIVE:
            found.append(f"{name}: may not import offload._native")
        for module in sorted(private - {"_native"}):
            if rank.get(module, len(PYTHON_FLOORS)) > rank[inside.stem]:
                found.append(f"{name}: may not import offload.{module}, which is above it")
    return found


def torch_violations(root: Path) -> list[str]:
    """The lowest floor and the command's parser need no torch, but for the names of types."""
    light = [f"python/offload/{module}.py" for module in (*PYTHON_FLOORS[0], *DOORS)] + [
        "python/offload/cli/__init__.py"
    ]
    found = []
    for name in light:
        if not (root / name).exists():
            continue
        for node in ast.parse((root / name).read_text()).body:
            imported = [item.split(".")[0] for item in python_imports(node, ("offload",))]
            type_names_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if "torch" in imported and not type_names_only and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.append(f"{name}: imports torch")
    return found


def size_violations(root: Path) -> list[str]:
    found = []
    for name, path in sources(root):
        count = len(path.read_text().splitlines())
        if count > LINES_HARD:
            found.append(f"{name}: {count} lines, more than {LINES_HARD}")
        elif count > LINES_SOFT:
            warnings.warn(f"{name}: {count} lines, more than the soft cap of {LINES_SOFT}", stacklevel=2)
    return found


def words(name: str) -> set[str]:
    """The words of a snake_case or CamelCase name, in lower case."""
    return {word.lower() for part in name.split("_") for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", part)}


def name_violations(root: Path) -> list[str]:
    """Names that say nothing are banned from files and types; so are notes of unfinished work."""
    found = []
    type_name = re.compile(r"^\s*(?:class|struct|enum class|enum)\s+(?:\[\[\w+\]\]\s*)?(\w+)", re.MULTILINE)
    unfinished = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")  # in parts, so as not to find itself
    for name, path in sources(root):
        text = path.read_text()
        found += [f"{name}: {word!r} in a file name" for word in sorted(words(path.stem) & BANNED_WORDS)]
        for type_ in type_name.findall(text):
            found += [f"{name}: {word!r} in type {type_}" for word in sorted(words(type_) & BANNED_WORDS)]
        found += [f"{name}: {mark}" for mark in unfinished.findall(text)]
    return found


def contract_violations(root: Path) -> list[str]:
    """A header opens with a contract of a few lines under the labels that apply."""
    found = []
    for name, path in sources(root, "csrc", suffixes=(".h",)):
        opening = []
        for line in path.read_text().splitlines():
            if not line.startswith("//"):
                break
            opening.append(line)
        if len(opening) not in CONTRACT_LINES:
            found.append(
                f"{name}: opens with {len(opening)} comment lines, not {CONTRACT_LINES[0]} to {CONTRACT_LINES[-1]}"
            )
        elif not any(label in line for line in opening for label in CONTRACT_LABELS):
            found.append(f"{name}: its contract has none of the labels {', '.join(CONTRACT_LABELS)}")
    return found


RULES: list[Rule] = [
    include_violations,
    import_violations,
    torch_violations,
    size_violations,
    name_violations,
    contract_violations,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule: Rule) -> None:
    assert rule(ROOT) == []


def test_the_rules_see_the_house() -> None:
    names = [name for name, _ in sources(ROOT)]
    assert "csrc/base/error.h" in names and "python/offload/_errors.py" in names


BROKEN: list[tuple[Rule, str, str, str]] = [
    (include_violations, "csrc/optimizer/a.cpp", '#include "device/device.h"\n', "may not include"),
    (include_violations, "csrc/device/a.h", '#include "memory/host_pool.h"\n', "may not include"),
    (include_violations, "csrc/memory/a.cpp", "#include <pybind11/pybind11.h>\n", "only csrc/bindings"),
    (include_violations, "csrc/attic/a.h", "", "no floor"),
    (import_violations, "python/offload/_host_grad.py", "from ._engine import Engine\n", "above it"),
    (import_violations, "python/offload/_pending.py", "from offload import _wrap\n", "above it"),
    (import_violations, "python/offload/_config.py", "def f():\n    from . import _native\n", "_native"),
    (import_violations, "python/offload/_attic.py", "", "no floor"),
    (import_violations, "python/offload/cli/_train.py", "from .._engine import Engine\n", "private"),
    (import_violations, "python/offload/cli/_train.py", "import offload._native\n", "private"),
    (torch_violations, "python/offload/_plan.py", "import torch.nn\n", "imports torch"),
    (size_violations, "csrc/base/a.cpp", "\n" * (LINES_HARD + 1), "601 lines"),
    (name_violations, "csrc/base/file_utils.cpp", "", "'utils' in a file name"),
    (name_violations, "csrc/base/a.h", "class PoolManager {};\n", "'manager' in type"),
    (name_violations, "python/offload/_a.py", "class Adam_v2:\n    pass\n", "'v2' in type"),
    (name_violations, "python/offload/_a.py", "# TO" "DO later\n", "TO" "DO"),
    (contract_violations, "csrc/base/a.h", "#pragma once\n", "opens with 0"),
    (contract_violations, "csrc/base/a.h", "// a\n// b\n// c\n#pragma once\n", "none of the labels"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "name", "text", "message"), BROKEN)
def test_the_rule_can_fail(rule: Rule, name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (violation,) = rule(tmp_path)
    assert message in violation


LEGAL: list[tuple[Rule, str, str]] = [
    (include_violations, "csrc/pipeline/a.cpp", '#include "transfer/transfer_queue.h"\n#include <vector>\n'),
    (include_violations, "csrc/bindings/a.cpp", "#include <pybind11/pybind11.h>\n"),
    (import_violations, "python/offload/_wrap.py", "from ._engine import Engine\nimport torch\n"),
    (import_violations, "python/offload/cli/_train.py", "import offload\nfrom ._table import table\n"),
    (import_violations, "python/offload/cli/_bench_pool.py", "from .. import _native\n"),
    (torch_violations, "python/offload/_plan.py", "if TYPE_CHECKING:\n    import torch\n"),
    (name_violations, "python/offload/_a.py", "class Commons:\n    pass\n"),
    (contract_violations, "csrc/base/a.h", "// A thing.\n//\n// Threads: none.\n#pragma once\n"),
]


@pytest.mark.parametrize(("rule", "name", "text"), LEGAL)
def test_the_rule_lets_the_legal_pass(rule: Rule, name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert rule(tmp_path) == []


def test_the_soft_cap_warns(tmp_path: Path) -> None:
    path = tmp_path / "csrc/base/a.cpp"
    path.parent.mkdir(parents=True)
    path.write_text("\n" * (LINES_SOFT + 1))
    with pytest.warns(UserWarning, match="401 lines"):
        assert size_violations(tmp_path) == []
