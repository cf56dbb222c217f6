"""The threads of the native core in a Python process."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

from driver_double import DriverDouble

from offload import _native

HANG_S = 60.0
FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP}


def blocked_signals() -> dict[str, list[int]]:
    """The masks of all threads of the core, by name. Not of those that have yet to run: they begin with all blocked."""
    found: dict[str, list[int]] = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            status = (task / "status").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        mask = int(fields["SigBlk"], 16)
        if fields["Name"].startswith("offload-") and not all(mask >> (number - 1) & 1 for number in FAULTS):
            found.setdefault(fields["Name"], []).append(mask)
    return found


def test_signals_are_left_to_the_applications_threads(driver_double: DriverDouble, tmp_path: Path) -> None:
    """A program that blocks a signal, to wait for it, must not lose it to a thread of ours."""
    memory = ctypes.create_string_buffer(64)
    address = ctypes.addressof(memory)
    calls = _native.FailingSystemCalls()
    calls.pretend_file_system(0xEF53)
    owners: list[object] = [_native.BlockFile([os.fsencode(tmp_path)], backend="threads", thread_count=1, calls=calls)]
    for device in (_native.HostDevice(), _native.CudaDevice(driver_path=driver_double.path)):
        queue = _native.TransferQueue(device)
        assert queue.submit_to_host(address, address + 32, 32).wait()
        owners.append(queue)
    pipeline = _native.StepPipeline(_native.TransferQueue(_native.HostDevice()))
    slot = pipeline.add_slot(
        name="w", master=address, master_format=_native.MASTER_FLOAT32, weight=0, weight_format=_native.FLOAT32,
        exp_avg=address, exp_avg_sq=address, count=1, upload_source=address, device_weight=0, weight_bytes=4,
    )  # fmt: skip
    assert pipeline.discard([slot]).wait()
    owners.append(pipeline)
    assert _native.parallel_sum_for_test(10_000)
    names = {"offload-disk", "offload-to_host", "offload-step"}
    if _native.shared_thread_count() > 1:
        names.add("offload-worker")
    deadline = time.monotonic() + HANG_S
    # Pageable memory: an issuer and an ender on the double, which are named alike.
    while not names <= (threads := blocked_signals()).keys() or len(threads["offload-to_host"]) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    asynchronous = set(signal.valid_signals()) - FAULTS - {signal.SIGKILL, signal.SIGSTOP}
    for name, masks in threads.items():
        for mask in masks:
            assert {number for number in asynchronous if not mask >> (number - 1) & 1} == set(), name
            assert {number for number in FAULTS if mask >> (number - 1) & 1} == set(), name
