"""benches/gpu_acceptance.py from end to end, before it meets a card: every section of it but the tests, which
`make test-card` runs, and the peers, which are packages of others. For `make test-card` alone."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from offload.cli import main

SCRIPT = Path(__file__).resolve().parents[2] / "benches/gpu_acceptance.py"


@pytest.fixture
def acceptance(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module. Other tests may have the machine, so no limit ends a section."""
    spec = importlib.util.spec_from_file_location("gpu_acceptance", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_acceptance", module)  # where its dataclass looks for its module
    spec.loader.exec_module(module)
    available = module.sections

    def sections(*kind: Any, **options: Any) -> list[Any]:
        return [dataclasses.replace(section, limit_s=3600.0) for section in available(*kind, **options)]

    monkeypatch.setattr(module, "sections", sections)
    monkeypatch.setattr(module, "CALL_LIMIT_S", 1e6)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    return module


@pytest.mark.timeout(1800)  # some twenty processes, each of which imports torch
@pytest.mark.parametrize(
    ("names", "count"),
    [
        ("link,adamw,pool,step", 4),
        ("swap,update,unified", 3),
        ("save-on-cpu,activations", 2),
        ("train,capped", 2),
        ("largest", 1),
    ],
)
def test_a_section_ends_well_and_can_be_reported(
    acceptance: ModuleType,
    device: torch.device,
    names: str,
    count: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "result.json"
    code = acceptance.main(["--device", device.type, "--tiny", "--sections", names, "--out", str(path)])
    report = json.loads(path.read_text())
    assert code == 0, [section.get("output") for section in report["sections"].values()]
    assert len(report["sections"]) == count and report["environment"]["accelerator"] is not None
    for name, section in report["sections"].items():
        train = section["bench"]["results"].get("train")
        assert train is None or train["losses_equal_resident"], name
    capfd.readouterr()
    assert main(["bench", "report", str(path)]) == 0
    tables = capfd.readouterr().out
    assert all(f"## {name}\n" in tables for name in report["sections"])
