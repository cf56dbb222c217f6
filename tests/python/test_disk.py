"""The disk tier from Python: bytes against a model, typed errors, processes that share, fork or die."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload import InvalidArgument, StateError, StorageError, _native
from offload._disk import DiskRange, DiskStore, probe_disk

BLOCK = _native.DISK_ALIGNMENT
EXT4, TMPFS = 0xEF53, 0x01021994
LOCK = ".offload-lock"


def honest_calls() -> _native.FailingSystemCalls:
    """The kernel's calls, on a file system that passes for a disk wherever the tests run."""
    calls = _native.FailingSystemCalls()
    calls.pretend_file_system(EXT4)
    return calls


SETTINGS = [(backend, direct) for backend in ("threads", "io_uring") for direct in (True, False)]


@pytest.fixture(params=SETTINGS, ids=lambda one: f"{one[0]}-{'direct' if one[1] else 'buffered'}")
def setting(request: pytest.FixtureRequest) -> tuple[_native.DiskBackend, bool]:
    """(backend, direct): a sandbox may have no io_uring, a file system no O_DIRECT."""
    backend, direct = request.param
    with tempfile.TemporaryDirectory() as directory:
        (facts,) = DiskStore(directory, calls=honest_calls()).stats()
    if backend == "io_uring" and facts["backend"] != "io_uring":
        pytest.skip(f"this kernel gives no io_uring: {facts['uring_refusal']}")
    if direct and not facts["direct"]:
        pytest.skip(f"this file system has no O_DIRECT: {facts['direct_refusal']}")
    return backend, direct


@pytest.fixture
def pool() -> _native.HostPool:
    return _native.HostPool(slab_bytes=1 << 20)


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path, block_bytes=BLOCK, calls=honest_calls())


def write(store: DiskStore, pool: _native.HostPool, where: DiskRange, data: bytes, start: int = 0) -> _native.Ticket:
    buffer = store.buffer(pool, len(data))
    memoryview(buffer)[: len(data)] = data
    return store.submit_write(where, buffer, start, len(data))


def read(store: DiskStore, pool: _native.HostPool, where: DiskRange) -> bytes:
    buffer = store.buffer(pool, where.nbytes)
    store.submit_read(where, buffer).wait()
    return bytes(memoryview(buffer)[: where.nbytes])


# --- bytes --------------------------------------------------------------------------------------------------

BLOCKS = 9
TAIL = 100  # bytes in the last block

operation = st.tuples(st.sampled_from(["write", "read"]), st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS))


def pieces(first: int, count: int) -> tuple[int, int]:
    """(start, bytes) of `count` blocks from `first`, cut at the end of the range."""
    start = first * BLOCK
    return start, min(count * BLOCK, (BLOCKS - 1) * BLOCK + TAIL - start)


# `setting` is a value, which no example changes.
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(operation, max_size=30), st.integers(1, 3), st.integers(0, 2**32))
def test_reads_give_what_a_byte_array_would(
    setting: tuple[_native.DiskBackend, bool], operations: list[tuple[str, int, int]], path_count: int, seed: int
) -> None:
    backend, direct = setting
    values = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        paths = [os.path.join(directory, str(index)) for index in range(path_count)]
        for path in paths:
            os.mkdir(path)
        store = DiskStore(
            paths, block_bytes=BLOCK, queue_depth=3, thread_count=2, backend=backend, direct=direct,
            calls=honest_calls(),
        )  # fmt: skip
        pool = _native.HostPool(slab_bytes=1 << 20)
        store.allocate(values.randrange(3 * BLOCK))  # ranges begin on any path
        where = store.allocate((BLOCKS - 1) * BLOCK + TAIL)
        model = bytearray(values.randbytes(where.nbytes))
        tickets = [write(store, pool, where, bytes(model))]
        reads: list[tuple[_native.HostBuffer, bytes]] = []
        for kind, first, count in operations:  # nothing is waited for: order is the store's to keep
            start, nbytes = pieces(first, count)
            if kind == "write":
                data = values.randbytes(nbytes)
                model[start : start + nbytes] = data
                tickets.append(write(store, pool, where, data, start))
            else:
                buffer = store.buffer(pool, nbytes)
                tickets.append(store.submit_read(where, buffer, start, nbytes))
                reads.append((buffer, bytes(model[start : start + nbytes])))
        for ticket in tickets:
            ticket.wait()
        for buffer, expected in reads:
            assert bytes(memoryview(buffer)[: len(expected)]) == expected
        assert read(store, pool, where) == model
        assert all(facts["direct"] is direct and facts["backend"] == backend for facts in store.stats())
        del store
        assert [os.listdir(path) for path in paths] == [[]] * path_count


def test_a_dropped_buffer_is_not_reused_before_its_transfer_ended(store: DiskStore) -> None:
    pool = _native.HostPool(budget_bytes=1 << 20, slab_bytes=1 << 20)
    where = store.allocate(64 * BLOCK)
    for value in range(20):  # each takes a third of the pool, and nobody keeps it
        data = bytes([value]) * where.nbytes
        write(store, pool, where, data)
    assert read(store, pool, where) == data


# --- errors -------------------------------------------------------------------------------------------------


def scratch_files() -> Iterator[str]:
    """Paths of the open scratch files, whose own names are gone."""
    for name in os.listdir("/proc/self/fd"):
        link = f"/proc/self/fd/{name}"
        if os.path.lexists(link) and ".offload-scratch" in os.readlink(link):
            yield link


def test_a_flipped_bit_is_a_storage_error_and_a_new_write_heals_it(store: DiskStore, pool: _native.HostPool) -> None:
    where = store.allocate(2 * BLOCK)
    write(store, pool, where, b"a" * where.nbytes).wait()
    (path,) = scratch_files()
    with open(path, "r+b", buffering=0) as file:
        file.seek(BLOCK + 7)
        file.write(b"b")
        os.fsync(file.fileno())
    with pytest.raises(StorageError, match=f"at offset {BLOCK} of .*offload-scratch.*checksum differs.*checkpoint"):
        read(store, pool, where)
    write(store, pool, where, b"c" * where.nbytes).wait()
    assert read(store, pool, where) == b"c" * where.nbytes


@pytest.mark.parametrize(
    ("call", "code", "text"),
    [
        ("open", errno.EROFS, "read-only"),
        ("open", errno.EACCES, "right to write"),
        ("open", errno.EMFILE, "ulimit -n"),
        ("unlink", errno.EIO, "failing"),
        ("file_system", errno.EIO, "failing"),
        ("set_lock", errno.ENOLCK, "locking"),
        ("allocate", errno.ENOSPC, "Free space"),
        ("allocate", errno.EDQUOT, "quota"),
        ("pwrite", errno.EIO, "dmesg"),
    ],
)
def test_refusals_name_the_path_and_the_remedy(
    tmp_path: Path, pool: _native.HostPool, call: str, code: int, text: str
) -> None:
    calls = honest_calls()
    calls.fail(call, 1, code)
    with pytest.raises(StorageError) as refusal:
        DiskStore(tmp_path, direct=call == "pwrite", calls=calls).allocate(1)
    assert refusal.value.errno == code
    assert str(tmp_path) in str(refusal.value) and text in str(refusal.value)
    store = DiskStore(tmp_path, calls=calls)  # the next attempt works, and tidies up
    where = store.allocate(10)
    write(store, pool, where, b"0123456789").wait()
    assert read(store, pool, where) == b"0123456789"
    assert os.listdir(tmp_path) == [LOCK]


@pytest.mark.parametrize("kind", ["write", "read"])
def test_a_failed_transfer_is_told_to_its_ticket(
    setting: tuple[_native.DiskBackend, bool], tmp_path: Path, pool: _native.HostPool, kind: str
) -> None:
    backend, direct = setting
    calls = honest_calls()
    store = DiskStore(tmp_path, block_bytes=BLOCK, backend=backend, direct=direct, calls=calls)
    where = store.allocate(3 * BLOCK)
    write(store, pool, where, b"a" * where.nbytes).wait()
    calls.fail(f"uring_{kind}" if backend == "io_uring" else f"p{kind}", 1, errno.EIO)
    with pytest.raises(StorageError, match=r"bytes at offset \d+ of .*Input/output error \(EIO\).*dmesg") as failure:
        if kind == "read":
            read(store, pool, where)
        write(store, pool, where, b"b" * where.nbytes).wait()
    assert failure.value.errno == errno.EIO
    if kind == "write":
        with pytest.raises(StorageError, match="last write of that block had failed"):
            read(store, pool, where)
        write(store, pool, where, b"a" * where.nbytes).wait()
    assert read(store, pool, where) == b"a" * where.nbytes
    assert store.stats()[0]["failed_count"] == 1 + (kind == "write")


def test_paths_that_cannot_hold_data(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="none.*Create the directory") as missing:
        DiskStore(tmp_path / "none")
    assert missing.value.errno == errno.ENOENT
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="must be a directory"):
        DiskStore(tmp_path / "file")
    calls = _native.FailingSystemCalls()
    calls.pretend_file_system(TMPFS)
    with pytest.raises(StorageError, match="tmpfs, which is host memory"):
        DiskStore(tmp_path, calls=calls)
    with pytest.raises(StorageError, match="ENOSPC"):
        DiskStore(tmp_path, calls=honest_calls()).allocate(1 << 59)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda store, pool: store.allocate(-1), "negative"),
        (lambda store, pool: store.submit_read(DiskRange(0, 10), store.buffer(pool, 10), 0, 11), "leaves its range"),
        (lambda store, pool: store.submit_read(DiskRange(0, 10), store.buffer(pool, 10), 1), "multiple of block_bytes"),
        (lambda store, pool: store.submit_read(DiskRange(0, 9000), store.buffer(pool, 9000), 0, 5000), "multiple of"),
        (lambda store, pool: store.submit_write(DiskRange(0, 10), pool.acquire(10, "staging")), "DiskStore.buffer"),
        (lambda store, pool: store.submit_write(DiskRange(0, BLOCK), store.buffer(pool, BLOCK)), "passes the end"),
        (lambda store, pool: _native.HostPool().acquire(1, "staging", 3), "alignment=3"),
        (lambda store, pool: DiskStore([]), "disk_path is empty"),
        (lambda store, pool: DiskStore("/tmp", backend="libaio"), "'auto', 'io_uring' and 'threads'"),
    ],
)
def test_bad_input(store: DiskStore, pool: _native.HostPool, call: Callable[..., Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        call(store, pool)


def test_a_block_that_was_never_written_has_no_bytes(store: DiskStore, pool: _native.HostPool) -> None:
    where = store.allocate(10)
    with pytest.raises(StateError, match="never written"):
        read(store, pool, where)


# --- which back-end -----------------------------------------------------------------------------------------


def test_probe_says_how_a_directory_serves(tmp_path: Path) -> None:
    if "tmpfs" in _file_system(tmp_path):
        with pytest.raises(StorageError, match="tmpfs"):
            probe_disk(tmp_path)
        return
    facts = probe_disk(tmp_path)
    assert facts.directory == str(tmp_path) and facts.free_bytes > 0
    assert (facts.backend == "io_uring") == (facts.uring_refusal is None)
    assert facts.direct == (facts.direct_refusal is None)
    assert os.listdir(tmp_path) == []


def _file_system(path: Path) -> str:
    return subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=True).stdout


def test_the_environment_names_a_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_DISK_BACKEND", "threads")
    (facts,) = DiskStore(tmp_path, calls=honest_calls()).stats()
    assert facts["backend"] == "threads" and facts["uring_refusal"] == "not asked for"
    monkeypatch.setenv("OFFLOAD_DISK_BACKEND", "libaio")
    with pytest.raises(InvalidArgument, match="OFFLOAD_DISK_BACKEND=libaio"):
        DiskStore(tmp_path, calls=honest_calls())


def test_a_blocked_io_uring_is_shown(tmp_path: Path) -> None:
    calls = honest_calls()
    calls.fail("uring_setup", 1, errno.EPERM)
    (facts,) = DiskStore(tmp_path, calls=calls).stats()
    assert facts["backend"] == "threads" and "seccomp" in facts["uring_refusal"]
    calls.fail("uring_setup", 1, errno.ENOSYS)
    with pytest.raises(StorageError, match="no io_uring"):
        DiskStore(tmp_path, backend="io_uring", calls=calls)


# --- processes ----------------------------------------------------------------------------------------------

HOLDER = """
import sys
from offload import _native
from offload._disk import DiskStore
calls = _native.FailingSystemCalls()
calls.pretend_file_system(0xEF53)
store = DiskStore(sys.argv[1], calls=calls)
store.allocate(1 << 20)
print("ready", flush=True)
sys.stdin.read()
"""


def test_two_processes_cannot_use_one_path_and_a_killed_one_leaves_it_free(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        with pytest.raises(StorageError, match=f"in use by process {holder.pid}") as refusal:
            DiskStore(tmp_path, calls=honest_calls())
        assert refusal.value.errno == errno.EBUSY
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert os.listdir(tmp_path) == [LOCK], "no data stays behind, whatever the end"
    store = DiskStore(tmp_path, calls=honest_calls())
    store.allocate(1)
    del store
    assert os.listdir(tmp_path) == []


def test_a_file_of_a_dead_process_is_removed_and_no_other(tmp_path: Path) -> None:
    for name in (".offload-scratch-1-0", "offload-scratch", "mine"):
        (tmp_path / name).write_bytes(b"x")
    store = DiskStore(tmp_path, calls=honest_calls())
    assert sorted(os.listdir(tmp_path)) == [LOCK, "mine", "offload-scratch"]
    del store


FORKED = """
import os, sys
from offload import StateError, StorageError, _native
from offload._disk import DiskStore
calls = _native.FailingSystemCalls()
calls.pretend_file_system(0xEF53)
store, pool = DiskStore(sys.argv[1], calls=calls), _native.HostPool()
where = store.allocate(5000)
buffer = store.buffer(pool, 5000)
memoryview(buffer)[:5000] = bytes(range(250)) * 20
store.submit_write(where, buffer).wait()
child = os.fork()
if child == 0:
    for call in (lambda: store.allocate(1), store.stats):
        try:
            call()
        except StateError as error:
            assert "forked child" in str(error)
        else:
            os._exit(1)
    try:
        DiskStore(sys.argv[1], calls=calls)
    except StorageError as error:
        assert f"in use by process {os.getppid()}" in str(error)
    else:
        os._exit(2)
    del store
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
memoryview(buffer)[:5000] = bytes(5000)
store.submit_read(where, buffer).wait()
assert bytes(memoryview(buffer)[:5000]) == bytes(range(250)) * 20
try:
    second = DiskStore(sys.argv[1], calls=calls)  # still ours, after the child closed its copies
finally:
    print("done")
"""


def test_a_forked_child_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    code = textwrap.dedent(FORKED)
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=100, check=False
    )
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
    assert os.listdir(tmp_path) == [], "the end of the interpreter closes files that nobody closed"
