#!/usr/bin/env python3
"""Proves on this machine what is promised of a card: the tests, then every bench, into one JSON.

Each section is a child process with a time limit; what it measured is in the file as soon as it has ended, and a
section that fails or is stopped costs no other one. A call ends by itself in under 8 minutes (`--quick`: 3) and the
next goes on with what is left: what the file holds already, of these sources, machine and day, is not repeated.

Exit codes: 0 every section is done; 1 one of them failed or was stopped; 2 bad arguments; 3 none failed and some are
left: call again; 130 Ctrl-C. With `--tiny`, as always on the CPU (`--device cpu`), the same sections run with models
that show that they run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCHEMA_VERSION = 1
EXIT_FAILED, EXIT_LEFT, EXIT_INTERRUPTED = 1, 3, 130
CALL_LIMIT_S, QUICK_CALL_LIMIT_S = 440.0, 150.0  # a build before it leaves both under 8 and 3 minutes
GRACE_S = 15.0  # from SIGINT to SIGKILL: what a bench needs to unwind
_OUTPUT_CHARACTERS = 4000  # of a section that is not done, the last ones
_SOURCES = {".py", ".pyi", ".cpp", ".h", ".inl", ".cu", ".toml", ".txt"}
_PEERS = ("fsdp2", "torchao", "deepspeed")
_ON_HOST, _HALF, _STREAMED = "optimizer+gradients", "optimizer:0.5+gradients", "optimizer+gradients+params"
_AHEAD = f"{_STREAMED}:ahead"
_UNIFIED = "optimizer:unified optimizer:unified=0.5,host=0.5"
_ACTIVATIONS = f"{_ON_HOST}+activations {_ON_HOST}+activations:int8"
_TEST_PARTS = 4  # each fits a call, also on the slowest of hosts
_TEST_WORKERS = 8  # at most, and a core for each two: processes share the card
_QUICK_TESTS = ("test_cuda_device", "test_copies", "test_stream_rules", "test_together")

Reader = Callable[[Path], Any]


@dataclasses.dataclass(frozen=True)
class Section:
    """One child process: `command` writes `{out}`, of which `read` makes the section's `key` in the result."""

    name: str
    limit_s: float
    command: tuple[str, ...]
    key: str = "bench"
    read: Reader = lambda path: json.loads(path.read_text())


def sections(device: str, *, quick: bool, tiny: bool, host_budget: str | None) -> list[Section]:
    """All sections for this kind of device, in their order: what others are judged by comes first."""
    flags = ["--quick"] if quick or tiny else []
    budget = f"--host-budget {host_budget}" if host_budget else ""

    def bench(name: str, limit_s: float, arguments: str) -> Section:
        command = [sys.executable, "-m", "offload", "bench", *arguments.split(), *flags, "--json", "{out}"]
        return Section(name, limit_s, tuple(command))

    def train(name: str, limit_s: float, arguments: str) -> Section:
        return bench(name, limit_s, f"train --device {device} {budget} {arguments}")

    def peers(limit_s: float, size: str, arguments: str) -> list[Section]:
        """Each in a process of its own: one that takes too much memory is not to take the others with it."""
        return [train(f"peers-{size}-{peer}", limit_s, f"{arguments} --offload --beside {peer}") for peer in _PEERS]

    shared = [
        *tests(device, quick=quick),
        bench("link", 90, f"link --device {device}"),
        bench("adamw", 80, "adamw"),
        bench("pool", 40, "pool"),
        bench("step", 50, f"step --device {device}"),
        bench("swap", 60, f"swap --device {device}"),
        bench("update", 60, f"update --device {device}"),
        bench("unified", 60, f"unified --device {device}"),
        bench("save-on-cpu", 90, f"activations --device {device}"),
    ]
    resident = "--beside compute resident --offload"
    capped = "--device-cap 24"
    if tiny:
        shape = "--size tiny --tokens 64 128 --micro-batch 64 --steps 2"
        small = "--size tiny --tokens 64 --micro-batch 32 --steps 2 --no-checkpointing"
        return [
            *shared,
            train("activations", 60, f"{small} {resident} {_ACTIVATIONS}"),
            train("train-tiny", 60, f"{shape} {resident} {_ON_HOST} {_HALF} {_UNIFIED} {_STREAMED} {_AHEAD}"),
            *([] if device == "cpu" else [train("capped-tiny", 60, f"{capped} {shape} {resident} {_STREAMED}")]),
            *peers(60, "tiny", shape),
            bench("largest", 60, f"largest --device {device} --size tiny --device-budget 1MiB --host-budget 4MiB"),
        ]
    # A small vocabulary: with a large one the logits of a micro-batch decide what fits.
    model = "--vocabulary 32768 --micro-batch 8192"
    kept = "--vocabulary 32768 --micro-batch 4096 --no-checkpointing"
    two, five = "--tokens 8192 32768", "--tokens 4096 8192 16384 32768 65536"
    largest = f"largest --device {device} --size 8b {budget}"
    if quick:
        return [
            *shared,
            train("activations", 100, f"--size 1b --tokens 8192 {kept} --steps 2 {resident} {_ACTIVATIONS}"),
            train("train-1b", 120, f"--size 1b {two} {model} --steps 2 {resident} {_ON_HOST} {_HALF} {_STREAMED}"),
            *peers(90, "1b", f"--size 1b {two} {model} --steps 2"),
            bench("largest", 40, f"{largest} --derive-only"),
        ]
    large, hosts = f"--size 8b {model} --steps 2", 380  # seconds, in which 95 GiB are pinned, too
    return [
        *shared,
        train("activations", 150, f"--size 1b --tokens 16384 {kept} --steps 5 {resident} {_ACTIVATIONS}"),
        train("train-1b", 280, f"--size 1b {five} {model} --steps 3 {resident} {_ON_HOST} {_HALF} {_STREAMED}"),
        train("train-1b-unified", 150, f"--size 1b {two} {model} --steps 2 {resident} {_UNIFIED}"),
        train("train-1b-ahead", 150, f"--size 1b {two} {model} --steps 5 {resident} {_STREAMED} {_AHEAD}"),
        train("train-8b", hosts, f"{large} {five} {resident} {_ON_HOST}"),
        train("train-8b-hybrid", hosts, f"{large} {two} {resident} {_HALF}"),
        train("train-8b-streamed", hosts, f"{large} {two} {resident} {_STREAMED}"),
        train(
            "capped-8b", 280, f"{capped} --size 8b --tokens 8192 16384 32768 {model} --steps 2 {resident} {_STREAMED}"
        ),
        # With activations on the host too; resident, what it would be compared with does not fit the largest cards.
        train(
            "capped-8b-activations",
            280,
            f"{capped} --size 8b --tokens 8192 {kept} --steps 3 --beside compute --offload {_STREAMED}+activations",
        ),
        *peers(120, "1b", f"--size 1b {two} {model} --steps 3"),
        *peers(300, "8b", f"--size 8b {two} {model} --steps 2"),
        bench("largest", 240, largest),
    ]


def tests(device: str, *, quick: bool) -> list[Section]:
    """All tests in parts; with `quick` those of the CUDA path's own parts."""
    # Beside these are compat and ecosystem, which need packages of their own.
    files = sorted(path for folder in ("python", "layout") for path in (ROOT / "tests" / folder).rglob("test_*.py"))
    if quick:
        parts = {"tests": [path for path in files if path.stem in _QUICK_TESTS]}
    else:
        parts = {f"tests-{number + 1}": files[number::_TEST_PARTS] for number in range(_TEST_PARTS)}
    require = () if device == "cpu" else ("OFFLOAD_REQUIRE_GPU=1",)
    workers = max(1, min(_TEST_WORKERS, len(os.sched_getaffinity(0)) // 2))
    beside = ("-n", str(workers), "--dist", "loadfile") if importlib.util.find_spec("xdist") else ()
    # Threads of several processes that spin while they wait would take each other's cores.
    settings = ("OFFLOAD_POISON=1", "OMP_WAIT_POLICY=PASSIVE", "GOMP_SPINCOUNT=0", *require)
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--skip-missing", *beside)
    command = ("env", *settings, *pytest)
    return [
        Section(name, 100 if quick else 400, (*command, "--junitxml", "{out}", *map(str, paths)), "tests", read_tests)
        for name, paths in parts.items()
    ]


def read_tests(path: Path) -> dict[str, Any]:
    """Counts by outcome, and the names of the tests that did not pass.

    A test that was running when the section was stopped has no outcome in the file and counts as passed.
    """
    root = ElementTree.parse(path).getroot()
    outcomes: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": 0, "not_passed": []}
    for case in root.iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[outcome] += 1
        if outcome == "failed":
            outcomes["not_passed"].append(f"{case.get('classname')}::{case.get('name')}")
    return outcomes


# --- one section ------------------------------------------------------------------------------------------------


def run(section: Section) -> dict[str, Any]:
    """Runs it to its end or its limit: `state` (done, failed, stopped), `seconds`, and what it wrote."""
    environment = {**os.environ}
    environment.pop("OFFLOAD_POISON", None)  # filling memory with NaN takes time
    if section.key != "tests":  # there pools of unified memory are made, which torch refuses with it
        # The 8 B model resident fills most of the largest cards: no room for a fragmented cache.
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "out", Path(folder) / "log"
        command = [argument.replace("{out}", str(out)) for argument in section.command]
        began = time.monotonic()
        with log.open("wb") as output:
            # A session of its own: a signal reaches what the child has started, too.
            child = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
            try:
                code: int | None = child.wait(section.limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(child)
        record: dict[str, Any] = {
            "state": "stopped" if code is None else "done" if code == 0 else "failed",
            "exit_code": child.returncode,
            "seconds": round(time.monotonic() - began, 1),
            "limit_s": section.limit_s,
            "command": " ".join(section.command),
        }
        # A child that was killed while it wrote leaves half a file, or none.
        with contextlib.suppress(OSError, ValueError, ElementTree.ParseError):
            record[section.key] = section.read(out)
        if record["state"] != "done":
            record["output"] = log.read_text(errors="replace")[-_OUTPUT_CHARACTERS:]
        elif section.key not in record:
            record |= {"state": "failed", "output": "it ended well and wrote nothing"}
        return record


def _end(child: subprocess.Popen[bytes]) -> None:
    """Stops the child and all that it started: first so that it can write what it has."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)


# --- the file ---------------------------------------------------------------------------------------------------


def describe(device: str, *, quick: bool, tiny: bool) -> dict[str, Any]:
    """What the figures depend on. Asked of a child: a CUDA context here would take memory from the benches."""
    ask = "import json; from offload.cli._bench import environment; print(json.dumps(environment()))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, cwd=ROOT)
    environment = json.loads(done.stdout.splitlines()[-1])
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return {
        **environment,
        "device": device,
        "quick": quick,
        "tiny": tiny,
        "commit": commit,
        "dirty": None if changes is None else changes != "",
        "sources": _digest(),
    }


def _git(*arguments: str) -> str | None:
    """None where this is no checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _digest() -> str:
    """Of the sources: a commit does not tell two states of an edited tree apart, and an archive has none."""
    digest = hashlib.sha256()
    for folder in ("csrc", "kernels", "python", "tests", "benches"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in _SOURCES and path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def default_file(environment: dict[str, Any]) -> Path:
    machine = re.sub(r"[^a-z0-9]+", "-", (environment["accelerator"] or "cpu").lower()).strip("-")
    kind = "".join(f"-{name}" for name in ("quick", "tiny") if environment[name])
    return ROOT / f"benches/results/{environment['date'][:10]}-{machine}-acceptance{kind}-{environment['sources']}.json"


def load(path: Path, environment: dict[str, Any]) -> dict[str, Any]:
    """What the file holds, or an empty report. Raises ValueError for a file of other sources, machine or day."""
    if not path.exists():
        return {"schema_version": SCHEMA_VERSION, "kind": "acceptance", "environment": environment, "sections": {}}
    report: dict[str, Any] = json.loads(path.read_text())
    before = report.get("environment", {})
    same = ("sources", "device", "quick", "tiny", "accelerator", "cpu", "cpu_count", "torch")
    different = [name for name in same if before.get(name) != environment[name]]
    if before.get("date", "")[:10] != environment["date"][:10]:
        different.append("date")
    if different:
        raise ValueError(f"{path} differs in {', '.join(different)} from this run: move it, or name another with --out")
    return report


def save(path: Path, report: dict[str, Any]) -> None:
    """Replaces the file as a whole: whoever is stopped in between leaves the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(report, indent=1) + "\n")
    beside.replace(path)


# --- the call ---------------------------------------------------------------------------------------------------


def choose(available: Sequence[Section], names: str | None) -> list[Section]:
    """The sections of these names, or groups: `train` is train-1b and train-8b. Raises ValueError."""
    if names is None:
        return list(available)
    wanted = names.split(",")
    chosen = [s for s in available if any(s.name == name or s.name.startswith(f"{name}-") for name in wanted)]
    known = {name for s in available for name in (s.name, s.name.partition("-")[0])}
    for name in wanted:
        if not any(s.name == name or s.name.startswith(f"{name}-") for s in chosen):
            raise ValueError(f"--sections {name}: there are {', '.join(sorted(known))}")
    return chosen


def work(chosen: Sequence[Section], report: dict[str, Any], path: Path, limit_s: float, *, again: bool) -> int:
    """Runs what is to be run and fits the call's time; returns the exit code."""
    began = time.monotonic()
    held = report["sections"]
    todo = [s for s in chosen if again or held.get(s.name, {}).get("state") != "done"]
    todo.sort(key=lambda section: section.name in held)  # one that keeps failing is not to take the others' time
    left = []
    for section in todo:
        if section.limit_s + GRACE_S > limit_s - (time.monotonic() - began):
            left.append(section.name)
            continue
        print(f"{section.name}: at most {section.limit_s:.0f} s", flush=True)
        held[section.name] = record = run(section)
        save(path, report)
        print(f"{section.name}: {record['state']} in {record['seconds']:.1f} s", flush=True)
    failed = [s.name for s in chosen if held.get(s.name, {}).get("state") in ("failed", "stopped")]
    for words, names in (("failed or stopped", failed), ("left for the next call", left)):
        if names:
            print(f"{words}: {', '.join(names)}")
    print(path)
    return EXIT_FAILED if failed else EXIT_LEFT if left else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N or cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes and few tests")
    parser.add_argument("--tiny", action="store_true", help="models that show that they run; on the CPU always")
    parser.add_argument("--sections", default=None, metavar="A,B", help="these, or groups of them (default: all)")
    parser.add_argument("--again", action="store_true", help="also what the file holds already")
    parser.add_argument(
        "--host-budget",
        default=None,
        metavar="SIZE",
        help="as '110GiB' (default: measured, which is too little on a machine whose memory grows as it is used)",
    )
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FILE", help="(default: benches/results/DAY-CARD-...)"
    )
    options = parser.parse_args(argv)
    for sign in (signal.SIGINT, signal.SIGTERM):  # a shell ignores the first for what it starts in the background
        signal.signal(sign, signal.default_int_handler)
    try:
        tiny = options.tiny or options.device == "cpu"
        available = sections(options.device, quick=options.quick, tiny=tiny, host_budget=options.host_budget)
        chosen = choose(available, options.sections)
        environment = describe(options.device, quick=options.quick, tiny=tiny)
        path = options.out or default_file(environment)
        report = load(path, environment)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    limit_s = QUICK_CALL_LIMIT_S if options.quick else CALL_LIMIT_S
    try:
        return work(chosen, report, path, limit_s, again=options.again)
    except KeyboardInterrupt:
        print("gpu_acceptance: stopped; what had ended is in", path, file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
