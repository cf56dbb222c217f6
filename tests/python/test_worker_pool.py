"""The shared worker pool as a Python process meets it: forks, launchers, affinity masks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from offload import InvalidArgument, _native

COUNT = 10_000
SUM = COUNT * (COUNT - 1) // 2
SETTINGS = ("OFFLOAD_NUM_THREADS", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, timeout=100
    )


def thread_count(code: str = "", **environment: str) -> int:
    done = run_python(
        f"import os\n{code}\nfrom offload import _native\nprint(_native.default_thread_count())",
        **environment,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_loop_covers_every_index_once() -> None:
    assert _native.parallel_sum_for_test(0) == 0
    assert _native.parallel_sum_for_test(1) == 0
    assert _native.parallel_sum_for_test(COUNT) == SUM


FORK = f"""
import os
from offload import _native
assert _native.shared_thread_count() == 3
assert _native.parallel_sum_for_test({COUNT}) == {SUM}  # the parent's threads exist
for _ in range(3):
    child = os.fork()
    if child == 0:
        right = _native.parallel_sum_for_test({COUNT}) == {SUM}
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if _native.parallel_sum_for_test({COUNT}) == {SUM} else 1)
        _, status = os.waitpid(grandchild, 0)
        os._exit(0 if right and status == 0 else 1)
    assert _native.parallel_sum_for_test({COUNT}) == {SUM}  # the parent goes on meanwhile
    _, status = os.waitpid(child, 0)
    assert status == 0, status
print("done")
"""


def test_pool_works_in_forked_children_and_their_parent() -> None:
    done = run_python(FORK, OFFLOAD_NUM_THREADS="3")
    assert done.stdout.strip() == "done", done.stderr


def test_exit_with_sleeping_workers_does_not_hang() -> None:
    code = "from offload import _native; print(_native.parallel_sum_for_test(1000))"
    assert run_python(code, OFFLOAD_NUM_THREADS="4").stdout.strip() == "499500"


def test_affinity_mask_and_world_size_set_the_size_and_openmp_does_not() -> None:
    everything = thread_count()
    assert 1 <= everything <= len(os.sched_getaffinity(0))
    assert thread_count("os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])") == 1
    assert thread_count(OMP_NUM_THREADS="1") == everything
    assert thread_count(OMP_NUM_THREADS=str(everything + 5)) == everything
    assert thread_count(LOCAL_WORLD_SIZE="2") == max(everything // 2, 1)
    assert thread_count(LOCAL_WORLD_SIZE="4096") == 1
    assert thread_count(OFFLOAD_NUM_THREADS="7", LOCAL_WORLD_SIZE="2") == 7


@pytest.mark.parametrize("name", ["OFFLOAD_NUM_THREADS", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("value", ["0", "-1", "two", "2.5", "4 ", "99999999999999999999"])
def test_bad_settings_are_refused_by_name(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in SETTINGS:
        monkeypatch.delenv(setting, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidArgument, match=f"{name}={value} is not a whole number from 1 to"):
        _native.default_thread_count()
