"""HostDevice, TransferQueue and Ticket through the native boundary: order, faults, bandwidth, signals, fork, exit."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from offload import _native
from offload._errors import DeviceError, InvalidArgument

# Every subprocess ends in well under a second; only one that hangs gets here.
HANG_S = 60


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Link:
    """A device, its queue, and two pieces of memory to copy between."""

    def __init__(self, **options: object) -> None:
        self.device = _native.HostDevice(**options)  # type: ignore[arg-type]
        self.queue = _native.TransferQueue(self.device)
        self.source = torch.arange(64, dtype=torch.int32)
        self.destination = torch.full((64,), -1, dtype=torch.int32)

    def to_host(self, first: int = 0, count: int = 64, after: _native.Ticket | None = None) -> _native.Ticket:
        destination, source = self.destination[first:], self.source[first:]
        return self.queue.submit_to_host(destination.data_ptr(), source.data_ptr(), 4 * count, after=after)


def test_a_copy_moves_the_bytes_and_is_counted() -> None:
    link = Link()
    assert link.to_host().wait()
    assert torch.equal(link.destination, link.source)
    assert link.queue.stats() == {
        "to_host_bytes": 256,
        "to_host_count": 1,
        "to_device_bytes": 0,
        "to_device_count": 0,
    }
    assert link.device.kind == "cpu"


def test_a_held_lane_keeps_its_copies_and_leaves_the_other_lane_alone() -> None:
    link = Link()
    link.device.hold("to_host")
    held = link.to_host()
    other = torch.zeros(64, dtype=torch.int32)
    link.queue.submit_to_device(other.data_ptr(), link.source.data_ptr(), nbytes(other)).wait()
    assert torch.equal(other, link.source)
    assert not held.done
    assert link.device.pending_count("to_host") == 1
    assert int(link.destination.max()) == -1
    link.device.release("to_host")
    assert held.wait()
    assert torch.equal(link.destination, link.source)
    assert link.device.pending_count("to_host") == 0


def test_the_nth_copy_fails_with_its_facts_and_the_others_run() -> None:
    link = Link()
    link.device.fail_copy("to_host", 2)
    first, second, third = (link.to_host(first, 8) for first in (0, 8, 16))
    assert first.wait()
    with pytest.raises(DeviceError, match=r"copy 2 of lane to_host \(32 bytes\)"):
        second.wait()
    assert third.wait()
    assert link.destination[:24].tolist() == [*range(8), *[-1] * 8, *range(16, 24)]
    assert second.done


def test_a_copy_behind_a_failed_ticket_fails_alone() -> None:
    link = Link()
    gate = _native.Ticket.pending()
    behind, later = link.to_host(0, 8, after=gate), link.to_host(8, 8)
    assert not behind.done
    assert not later.done
    gate.fail("the source is gone")
    with pytest.raises(DeviceError, match="the source is gone"):
        behind.wait()
    assert later.wait()


def test_bandwidth_is_counted_on_the_clock() -> None:
    clock = _native.ManualClock()
    link = Link(clock=clock, to_host_bytes_per_s=1e9)  # a byte a nanosecond
    first, second = link.to_host(0, 10), link.to_host(10, 10)
    clock.advance(39)
    assert not first.done
    clock.advance(1)
    assert first.wait()
    clock.advance(39)
    assert not second.done
    clock.advance(1)
    assert second.wait()
    assert clock.now_ns() == 80


def test_wait_times_out_and_is_ended_by_another_thread() -> None:
    ticket = _native.Ticket.pending()
    assert ticket.wait(timeout_s=0) is False
    thread = threading.Thread(target=ticket.complete)  # runs only if wait() lets the GIL go
    thread.start()
    assert ticket.wait() is True
    thread.join()
    assert _native.Ticket().done


def test_wait_on_stream_waits_and_raises() -> None:
    link = Link()
    link.queue.wait_on_stream(0, link.to_host())
    assert torch.equal(link.destination, link.source)
    link.device.fail_copy("to_host", 1)
    with pytest.raises(DeviceError, match="copy 1"):
        link.queue.wait_on_stream(0, link.to_host())


def test_bad_arguments_are_refused() -> None:
    link = Link()
    with pytest.raises(InvalidArgument, match="no lane 'up'"):
        link.device.hold("up")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="null source"):
        link.queue.submit_to_host(link.destination.data_ptr(), 0, 4)
    with pytest.raises(InvalidArgument, match="timeout_s"):
        _native.Ticket.pending().wait(timeout_s=-1)
    with pytest.raises(InvalidArgument, match="to_device_bytes_per_s"):
        _native.HostDevice(to_device_bytes_per_s=float("nan"))


def test_destroying_the_queue_ends_what_is_in_flight() -> None:
    clock = _native.ManualClock()
    link = Link(clock=clock, to_host_bytes_per_s=1)  # 256 s on a clock that stands still
    slow = link.to_host()
    link.device.hold("to_host")
    held = link.to_host()
    del link.queue
    assert slow.wait()
    assert held.wait()
    assert torch.equal(link.destination, link.source)


PRELUDE = """
import ctypes, gc, os, sys
from offload import _native
from offload._errors import StateError
device = _native.HostDevice()
queue = _native.TransferQueue(device)
memory = (ctypes.c_char * 64)()
address = ctypes.addressof(memory)
device.hold("to_host")
device.hold("to_device")
ticket = queue.submit_to_host(address, address + 32, 32)
"""


@pytest.mark.parametrize(
    "block",
    ["ticket.wait()", "ticket.wait(timeout_s=1e6)", "queue.wait_on_stream(0, ticket)"],
)
def test_ctrl_c_interrupts_a_wait(block: str) -> None:
    script = f"""{PRELUDE}
try:
    print("waiting", flush=True)
    {block}
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "waiting\n"
        child.send_signal(signal.SIGINT)
        try:
            output, _ = child.communicate(timeout=HANG_S)
        finally:
            child.kill()
    assert output == "interrupted\n"
    assert child.returncode == 0


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_interpreter_exits_with_copies_in_flight_and_held() -> None:
    # In a cycle with themselves, so that only the collector, in an order of its own, ends them. The memory is
    # theirs until then, hence in the cycle, too.
    assert run(f"{PRELUDE}\nring = [device, queue, ticket, memory]\nring.append(ring)\nprint('end')") == "end\n"


def test_a_forked_child_refuses_the_parents_lanes_and_exits() -> None:
    output = run(f"""{PRELUDE}
pid = os.fork()
if pid == 0:
    for call in (
        ticket.wait,
        lambda: queue.submit_to_host(address, address + 32, 32),
        lambda: device.release("to_host"),
        lambda: device.pending_count("to_host"),
    ):
        try:
            call()
        except StateError as error:
            print("belongs to the parent process" in str(error))
    own = _native.TransferQueue(_native.HostDevice())
    print(own.submit_to_device(address, address + 32, 32).wait(), flush=True)
    del device, queue, ticket, own
    gc.collect()
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
device.release("to_host")
print(ticket.wait())
""")
    assert output.split() == ["True"] * 5 + ["7", "True"]
