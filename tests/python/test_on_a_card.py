"""What tests/conftest.py does for machines with a card and little else: the order, and packages that are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

# One imports hypothesis at its top, one transformers in a test; the third needs neither.
FILES = ("test_sure_of_examples.py", "test_of_a_model.py", "test_of_torch.py")
SOURCES = (
    "import hypothesis\n\ndef test_examples(): pass\n",
    "def test_model():\n    import transformers.models\n\ndef test_broken():\n    import offload.not_there\n",
    "def test_alone(): pass\n",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tests of their own under the project's conftest, and packages that cannot be imported."""
    for name in ("conftest.py", "driver_double", "host_kernels", "programs.py"):
        (tmp_path / name).symlink_to(TESTS.parent / name)
    for name, source in zip(FILES, SOURCES, strict=True):
        (tmp_path / name).write_text(source)
    (tmp_path / "missing").mkdir()
    for name in ("hypothesis", "transformers"):
        (tmp_path / "missing" / f"{name}.py").write_text(f"raise ModuleNotFoundError('none', name='{name}')\n")
    return tmp_path


def pytest_in(folder: Path, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    paths = [str(folder / "missing"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment = os.environ | own | settings
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", *options, str(folder)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_what_needs_a_missing_package_is_skipped_by_its_name(folder: Path) -> None:
    done = pytest_in(folder, "--skip-missing")
    assert done.returncode == 1 and "1 failed, 1 passed, 2 skipped" in done.stdout, done.stdout + done.stderr
    assert "test_sure_of_examples.py:1: needs hypothesis, which is not installed" in done.stdout
    assert "test_of_a_model.py:1: needs transformers, which is not installed" in done.stdout
    assert "FAILED test_of_a_model.py::test_broken" in done.stdout  # the project's own modules must be there


def test_elsewhere_it_is_an_error(folder: Path) -> None:
    done = pytest_in(folder)
    assert done.returncode == 2 and "ERROR test_sure_of_examples.py" in done.stdout, done.stdout + done.stderr


def test_what_runs_on_the_card_comes_first(folder: Path) -> None:
    for name in ("another", "copies"):
        source = "def test_it(device): pass\n\ndef test_without(): pass\n"
        (folder / f"test_{name}.py").write_text(source)
    done = pytest_in(folder, "--skip-missing", "--collect-only", OFFLOAD_REQUIRE_GPU="1")
    ids = [line for line in done.stdout.splitlines() if "::" in line]
    on_card = ["test_copies.py::test_it[cuda]", "test_another.py::test_it[cuda]"]
    assert ids[:2] == on_card and ids[2:4] == ["test_copies.py::test_it[cpu]", "test_copies.py::test_without"], ids
    assert len(ids) == 2 * 3 + 3
