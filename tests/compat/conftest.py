"""What the script shows under each library, run once for all tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cases import CASES

HERE = Path(__file__).parent


def run(library: str, folder: Path) -> dict[str, Any]:
    """What the script showed for each case."""
    cases = [{key: value for key, value in case.items() if key != "tolerance"} for case in CASES]
    (folder / "cases.json").write_text(json.dumps(cases))
    output = folder / f"{library}.json"
    # DeepSpeed compiles its optimizer on first use; what another environment compiled is not for this one.
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions")}
    # Its ninja is a program of this environment.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, str(HERE / "script.py"), library, str(folder / "cases.json"), str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results: dict[str, Any] = json.loads(output.read_text())
    return results


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compat")


@pytest.fixture(scope="session")
def theirs(folder: Path) -> dict[str, Any]:
    return run("deepspeed", folder)


@pytest.fixture(scope="session")
def ours(folder: Path) -> dict[str, Any]:
    return run("offload", folder)
