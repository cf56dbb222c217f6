"""`benches/gpu_acceptance.py`: no section costs another one its result, and every one of them is a command."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from offload.cli import _bench_train, _parser

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("gpu_acceptance", ROOT / "benches/gpu_acceptance.py")
assert _spec is not None and _spec.loader is not None
acceptance = importlib.util.module_from_spec(_spec)
sys.modules["gpu_acceptance"] = acceptance  # where its dataclass looks for its module
_spec.loader.exec_module(acceptance)

ENVIRONMENT = {"date": "2026-11-21T10:00:00+00:00", "accelerator": "NVIDIA H200", "cpu": "EPYC", "cpu_count": 16}
ENVIRONMENT |= {"torch": "2.13", "device": "cuda", "quick": False, "tiny": False, "sources": "0123456789ab"}


def shell(name: str, script: str, limit_s: float = 60.0) -> Any:
    return acceptance.Section(name, limit_s, ("sh", "-c", script, "{out}"))


def report_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def work(path: Path, *sections: Any, limit_s: float = 400.0, again: bool = False) -> int:
    code: int = acceptance.work(sections, acceptance.load(path, ENVIRONMENT), path, limit_s, again=again)
    return code


LIMIT_S = 12.5  # of sections that are stopped


class Stopped(subprocess.Popen[bytes]):
    """Its limit comes once the child has written its file, however slow the machine is."""

    def wait(self, timeout: float | None = None) -> int:
        if timeout != LIMIT_S:
            return super().wait(timeout)
        out = Path(self.args[-1])  # type: ignore[index]
        while not out.exists() or not out.read_text().endswith("\n"):
            os.sched_yield()
        raise subprocess.TimeoutExpired(self.args, timeout)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance.subprocess, "Popen", Stopped)


@pytest.mark.usefixtures("stopped")
def test_no_section_costs_another_one_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    sections = [
        shell("fails", "echo words of it; exit 7"),
        shell("silent", "true"),
        # Both have written something when they are stopped; the second cannot be asked to end.
        shell("slow", """trap 'exit 130' INT; echo '{"half": 1}' > "$0"; sleep 1000 & wait""", LIMIT_S),
        shell("deaf", """trap '' INT; echo '{"half": 2}' > "$0"; sleep 1000""", LIMIT_S),
        shell("good", """echo '{"whole": 3}' > "$0" """),
    ]
    assert work(path, *sections[:3]) == acceptance.EXIT_FAILED
    monkeypatch.setattr(acceptance, "GRACE_S", 1.0)  # all of it passes
    assert work(path, *sections[3:]) == acceptance.EXIT_FAILED
    held = report_of(path)["sections"]
    assert {name: one["state"] for name, one in held.items()} == {
        "fails": "failed",
        "silent": "failed",
        "slow": "stopped",
        "deaf": "stopped",
        "good": "done",
    }
    assert held["fails"]["exit_code"] == 7 and "words of it" in held["fails"]["output"]
    assert "bench" not in held["silent"] and "wrote nothing" in held["silent"]["output"]
    assert held["slow"]["bench"] == {"half": 1} and held["slow"]["exit_code"] == 130
    assert held["deaf"]["bench"] == {"half": 2} and held["deaf"]["exit_code"] == -9
    assert held["good"]["bench"] == {"whole": 3} and "output" not in held["good"]


def test_a_later_call_goes_on(tmp_path: Path) -> None:
    path, log = tmp_path / "result.json", tmp_path / "log"

    def logged(name: str, limit_s: float = 60.0, code: int = 0) -> Any:
        return shell(name, f"""echo {name} >> {log}; echo 1 > "$0"; exit {code}""", limit_s)

    def ran() -> list[str]:
        names = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return names

    first, long, last = logged("first", code=1), logged("long", 300.0), logged("last")
    # The long one does not fit into the call, the one after it does.
    assert work(path, first, long, last, limit_s=200.0) == acceptance.EXIT_FAILED
    assert ran() == ["first", "last"]
    # What was never tried goes before what has failed, and what is done is not repeated.
    assert work(path, first, long, last) == acceptance.EXIT_FAILED
    assert ran() == ["long", "first"]
    assert work(path, logged("first"), long, last) == 0 and ran() == ["first"]
    assert work(path, logged("first"), long, last, logged("new", 300.0), limit_s=200.0) == acceptance.EXIT_LEFT
    assert ran() == []
    assert work(path, first, last, again=True) == acceptance.EXIT_FAILED and ran() == ["first", "last"]
    assert report_of(path)["environment"] == ENVIRONMENT and report_of(path)["schema_version"] == 1


def test_an_interrupted_call_keeps_what_had_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"

    def stopped(section: Any) -> Any:
        if section.name != "link":
            raise KeyboardInterrupt
        return {"state": "done", "seconds": 1.0}

    monkeypatch.setattr(acceptance, "run", stopped)
    monkeypatch.setattr(acceptance, "describe", lambda device, quick, tiny: ENVIRONMENT)
    monkeypatch.setattr(acceptance.signal, "signal", lambda *_: None)
    assert acceptance.main(["--sections", "link,adamw", "--out", str(path)]) == acceptance.EXIT_INTERRUPTED
    assert list(report_of(path)["sections"]) == ["link"]


@pytest.mark.parametrize(
    ("name", "value"), [("sources", "ba9876543210"), ("accelerator", None), ("date", "2026-11-22T00:00:00+00:00")]
)
def test_a_file_of_another_run_is_not_mixed_with_this_one(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "result.json"
    work(path, shell("good", 'echo 1 > "$0"'))
    before = path.read_text()
    with pytest.raises(ValueError, match=f"differs in {name}"):
        acceptance.load(path, ENVIRONMENT | {name: value})
    assert path.read_text() == before
    assert acceptance.default_file(ENVIRONMENT) != acceptance.default_file(ENVIRONMENT | {name: value})


def test_sections_are_chosen_by_name_and_by_group() -> None:
    available = acceptance.sections("cuda", quick=False, tiny=False, host_budget=None)

    def chosen(names: str | None) -> list[str]:
        return [section.name for section in acceptance.choose(available, names)]

    assert chosen("train-8b,link") == ["link", "train-8b", "train-8b-hybrid", "train-8b-streamed"]
    assert chosen("peers-1b") == [f"peers-1b-{peer}" for peer in ("fsdp2", "torchao", "deepspeed")]
    assert chosen(None) == [section.name for section in available]
    with pytest.raises(ValueError, match="--sections trains"):
        chosen("link,trains")


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(("kind", "tiny"), [("cpu", True), ("cuda", False), ("cuda", True)])
def test_every_section_is_a_command_and_fits_a_call(kind: str, tiny: bool, quick: bool) -> None:
    limit_s = acceptance.QUICK_CALL_LIMIT_S if quick else acceptance.CALL_LIMIT_S
    for section in acceptance.sections(kind, quick=quick, tiny=tiny, host_budget="110GiB"):
        assert section.limit_s + acceptance.GRACE_S < limit_s - 5, f"{section.name} would never begin"
        if section.key == "tests":
            assert ("OFFLOAD_REQUIRE_GPU=1" in section.command) == (kind == "cuda")
            assert 1 <= int(section.command[section.command.index("-n") + 1]) <= 8, "beside each other they fit a call"
            continue
        assert section.command[:3] == (sys.executable, "-m", "offload")
        options = _parser().parse_args(section.command[3:])  # ends the test where it is no command
        assert str(options.json) == "{out}"
        if options.part == "train":
            size = _bench_train._size(options)
            assert all(_bench_train.parse_places(text) for text in options.offload)
            assert tiny or (size.shape.vocabulary == 32768 and 4096 <= size.micro_batch <= 8192)


@pytest.mark.parametrize(("key", "setting"), [("tests", ""), ("bench", "expandable_segments:True")])
def test_tests_run_with_torchs_own_allocator_settings(monkeypatch: pytest.MonkeyPatch, key: str, setting: str) -> None:
    """Pools of unified memory, which tests make, are refused with those that large models want."""
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    script = 'echo "\\"$PYTORCH_CUDA_ALLOC_CONF\\"" > "$0"'
    record = acceptance.run(acceptance.Section("prints", 60.0, ("sh", "-c", script, "{out}"), key))
    assert record["state"] == "done" and record[key] == setting


def test_the_parts_hold_every_test_once() -> None:
    run = [
        word for section in acceptance.tests("cuda", quick=False) for word in section.command if word.endswith(".py")
    ]
    there = [str(path) for folder in ("python", "layout") for path in (ROOT / "tests" / folder).glob("test_*.py")]
    assert sorted(run) == sorted(there) and len(run) > 50
    (quick,) = acceptance.tests("cpu", quick=True)
    assert sum(word.endswith(".py") for word in quick.command) == len(acceptance._QUICK_TESTS)


def test_outcomes_of_tests_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"/><testcase classname="a" name="two"><skipped/>'
        '</testcase><testcase classname="b" name="three[cuda]"><failure>words</failure></testcase>'
        '<testcase classname="b" name="four"><error/></testcase></testsuite></testsuites>'
    )
    counts = acceptance.read_tests(path)
    assert counts == {"passed": 1, "skipped": 1, "failed": 2, "not_passed": ["b::three[cuda]", "b::four"]}


def test_a_real_call_on_the_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    arguments = ["--device", "cpu", "--quick", "--sections", "pool,activations", "--out", str(path)]
    assert acceptance.main(arguments) == 0
    report = report_of(path)
    assert {"commit", "dirty", "sources", "driver", "memory_bytes", "torch"} <= set(report["environment"])
    train = report["sections"]["activations"]["bench"]["results"]["train"]
    assert train["losses_equal_resident"] and "optimizer+gradients+activations" in train["runs"]
    assert report["sections"]["pool"]["bench"]["results"]["pool"]["acquire_release_ns"]["median"] > 0
    assert str(path) in capfd.readouterr().out
