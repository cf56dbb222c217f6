"""The fault matrix: a small training on the driver double, with one fault in it, for every way a driver can fail.

Each fault must end in an error of ours or be visible, without a hang, a leak or a broken rule of the driver; training
goes on with the bits of an undisturbed one or is refused; weights that can be read are those of a step; and afterwards
a new training in the same process works. docs/reliability.md tells the rules and counts, which are checked here.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from programs import Ended, Program, Programs

from fault_table import (
    ENDS,
    LOAD_ENTRIES,
    SWEPT_ENTRIES,
    UNREGISTER,
    Case,
    cuda_cases,
    driver_cases,
    give_back_cases,
    host_cases,
    sweep,
)
from faulty_training import STEPS, Outcome, count_calls, run_batch

ROOT = Path(__file__).resolve().parents[2]

# Far beyond what a training takes on a busy machine: only a hang gets there.
DEADLINE_S = 100

GROUPS: dict[str, list[Case]] = {
    "loading the driver": driver_cases(),
    "on the device": cuda_cases(),
    "giving back": give_back_cases(),
    "on `HostDevice`": host_cases(),
}
# A fault of these changes what the rest of the process sees: the driver as it is loaded, memory left registered.
ONE_A_PROCESS = (*LOAD_ENTRIES, UNREGISTER, "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2")


class Batch(NamedTuple):
    """Trainings one after another in a process of their own."""

    group: str
    cases: Sequence[Case]
    device_kind: str = "cuda"


def start(target: Any, *arguments: Any) -> tuple[BaseProcess, Any]:
    """Runs `target(*arguments, connection)` in a new process; forked from a server, which has imported torch once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch._dynamo", "offload._wrap"])  # what is slow to import
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, sender), daemon=True)
    process.start()
    sender.close()
    return process, receiver


def receive(process: BaseProcess, receiver: Any) -> Any:
    """What the process sends next, or what became of it instead."""
    try:
        if receiver.poll(DEADLINE_S):
            return receiver.recv()
        process.kill()
        return f"no end within {DEADLINE_S} s"
    except EOFError:
        process.join()
        return f"the process died with {process.exitcode}"


def run(library: str, batch: Batch) -> list[tuple[Case, Outcome | str]]:
    """Every case with its outcome, or with what is wrong where there is none; at the end the training without fault."""
    fresh = Case("a fresh training afterwards", None, "went on", "", batch.cases[-1].may_leak)
    cases = (*batch.cases, fresh)
    process, receiver = start(run_batch, library, [(case.fault, case.may_leak) for case in cases], batch.device_kind)
    results = [(case, receive(process, receiver)) for case in cases]
    process.join()
    return results


def batches_of(calls: dict[str, int]) -> list[Batch]:
    batches = [
        *(Batch("loading the driver", [case]) for case in GROUPS["loading the driver"]),
        Batch("on the device", GROUPS["on the device"]),
        *(Batch("giving back", [case]) for case in GROUPS["giving back"]),
        Batch("on `HostDevice`", GROUPS["on `HostDevice`"], "host"),
    ]
    for entry in SWEPT_ENTRIES:
        cases = sweep(entry, calls[entry])
        batches += [Batch(entry, [case]) for case in cases] if entry in ONE_A_PROCESS else [Batch(entry, cases)]
    return batches


class Matrix(NamedTuple):
    calls: dict[str, int]  # of each entry, in a training without a fault
    results: dict[str, list[tuple[Case, Outcome | str]]]  # by group or swept entry
    fresh: list[tuple[str, Case, Outcome | str]]


@pytest.fixture(scope="module")
def matrix(driver_double_library: Path) -> Matrix:
    """All trainings, in as many processes at a time as there are cores."""
    library = str(driver_double_library)
    undisturbed, calls = receive(*start(count_calls, library, SWEPT_ENTRIES))
    assert (undisturbed.end, undisturbed.errors, undisturbed.problems) == ("went on", [], [])
    batches = batches_of(calls)
    result = Matrix(calls, {}, [])
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        for batch, outcomes in zip(batches, pool.map(lambda batch: run(library, batch), batches), strict=True):
            result.results.setdefault(batch.group, []).extend(outcomes[: len(batch.cases)])
            result.fresh.append((batch.group, *outcomes[-1]))
    return result


def check(case: Case, outcome: Outcome | str) -> Outcome:
    assert isinstance(outcome, Outcome), outcome
    assert outcome.problems == []
    assert outcome.end in ENDS[case.end], outcome.errors
    assert outcome.first_error in (("", "DeviceError") if case.error == "-" else (case.error,))
    assert set(outcome.leaked) <= set(case.may_leak)
    return outcome


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("group", "name"), [(group, case.name) for group, cases in GROUPS.items() for case in cases])
def test_fault(matrix: Matrix, group: str, name: str) -> None:
    case, result = next((case, result) for case, result in matrix.results[group] if case.name == name)
    outcome = check(case, result)
    if case.end.startswith("pageable"):
        assert outcome.pageable
        assert outcome.warned == (case.end == "pageable")
    if group == "giving back":
        assert tuple(outcome.leaked) == case.may_leak  # so the fault was there
    if outcome.end == "refused":
        # First what failed, then what it means and what to do.
        assert re.search("checkpoint", outcome.errors[-1][2])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("entry", SWEPT_ENTRIES)
def test_failing_call(matrix: Matrix, entry: str) -> None:
    for case, result in matrix.results[entry]:
        outcome = check(case, result)
        # Without an error nothing may have changed but what the driver did not take back, or what stats tell of.
        assert outcome.errors or outcome.end == "went on", case.name


@pytest.mark.timeout(600)
def test_a_fresh_training_works_after_every_fault(matrix: Matrix) -> None:
    assert len(matrix.fresh) > len(SWEPT_ENTRIES)
    for group, case, result in matrix.fresh:
        assert isinstance(result, Outcome), (group, result)
        assert (result.end, result.errors) == ("went on", []), group
        # Memory that is still registered cannot be registered again: then stats say so.
        assert result.problems == [] or "registrations" in case.may_leak, (group, result.problems)


@pytest.mark.timeout(600)
def test_the_document_has_the_counts_of_the_run(matrix: Matrix) -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = {match[1]: match[2] for match in re.finditer(r"^\| ([^|]+?) \| (.+) \|$", text, re.MULTILINE)}
    for group, cases in GROUPS.items():
        ends = Counter(case.end for case in cases)
        kinds = ("not wrapped", "pageable", "pageable later", "went on", "goes on or refuses", "refused")
        assert [int(cell) for cell in rows[group].split(" | ")] == [len(cases), *(ends[kind] for kind in kinds)]
    for entry in SWEPT_ENTRIES:
        assert int(rows[f"`{entry}`"]) == len(matrix.results[entry]), entry
    total = sum(len(results) for results in matrix.results.values())
    assert f"{total} faults" in text


# --- exit -------------------------------------------------------------------------------------------------

EXITS = ("step in flight", "context lost", "context lost with a step in flight", "lanes held", "driver refuses all")


@pytest.fixture(scope="module")
def exits(driver_double_library: Path, programs: Programs) -> dict[str, Ended]:
    """Processes that end with a wrapped model alive."""
    code = "from faulty_training import leave; leave(*sys.argv[1:])"
    return programs.run_all({what: Program(code, (str(driver_double_library), what)) for what in EXITS})


@pytest.mark.parametrize("what", EXITS)
def test_exit(exits: dict[str, Ended], what: str) -> None:
    status, out, errors = exits[what]
    if what == "lanes held":
        assert errors.startswith("offload: copies that had not ended 5 s after the program were given up")
        _, _, errors = errors.partition("\n")
    assert (status, out, errors) == (0, f"trained {STEPS} steps\n", "")
