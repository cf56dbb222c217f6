"""Devices, TransferQueue and Ticket through the native boundary: order, faults, bandwidth, signals, fork, exit.

What every device keeps runs on HostDevice and on CudaDevice over the driver double.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from driver_double import DriverDouble
from torch import Tensor

from offload import _native
from offload._errors import DeviceError, InvalidArgument

# Every subprocess ends in well under a second; only one that hangs gets here.
HANG_S = 100


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Link:
    """A device, its queue, and two pieces of memory to copy between."""

    def __init__(self, device: _native.Device) -> None:
        self.device = device
        self.queue = _native.TransferQueue(self.device)
        self.source = torch.arange(64, dtype=torch.int32)
        self.destination = torch.full((64,), -1, dtype=torch.int32)

    def to_host(self, first: int = 0, count: int = 64, after: _native.Ticket | None = None) -> _native.Ticket:
        destination, source = self.destination[first:], self.source[first:]
        return self.queue.submit_to_host(destination.data_ptr(), source.data_ptr(), 4 * count, after=after)


class HostLink(Link):
    device: _native.HostDevice

    def __init__(self, **options: object) -> None:
        super().__init__(_native.HostDevice(**options))  # type: ignore[arg-type]
        self.hold, self.release = self.device.hold, self.device.release


class CudaLink(Link):
    def __init__(self, double: DriverDouble) -> None:
        super().__init__(_native.CudaDevice(driver_path=double.path))
        self.hold, self.release = double.hold, double.release


AnyLink = HostLink | CudaLink


@pytest.fixture(params=["cpu", "cuda"])
def link(request: pytest.FixtureRequest, driver_double: DriverDouble) -> AnyLink:
    return HostLink() if request.param == "cpu" else CudaLink(driver_double)


def test_a_copy_moves_the_bytes_and_is_counted(link: AnyLink) -> None:
    assert link.to_host().wait()
    assert torch.equal(link.destination, link.source)
    assert link.queue.stats() == {
        "to_host_bytes": 256,
        "to_host_count": 1,
        "to_device_bytes": 0,
        "to_device_count": 0,
    }
    assert link.device.kind == ("cpu" if isinstance(link, HostLink) else "cuda")


def test_a_submission_makes_the_ticket_it_is_given_the_copys_and_keeps_the_block(link: AnyLink) -> None:
    pool = _native.HostPool(budget_bytes=1 << 20)
    ticket = _native.Ticket()
    for lane, submit in (("to_host", link.queue.submit_to_host), ("to_device", link.queue.submit_to_device)):
        buffer = pool.acquire(256, "staging")
        ends = (buffer.address, link.source.data_ptr())
        link.hold(lane)
        assert submit(*(ends if lane == "to_host" else ends[::-1]), 256, 0, None, ticket, buffer) is ticket
        assert not ticket.done
        del buffer
        assert pool.stats()["waiting_bytes"] == 256
        link.release(lane)
        assert ticket.wait()
        assert pool.stats()["waiting_bytes"] == 0


def test_a_refused_submission_leaves_the_ticket_and_the_block_alone(link: AnyLink) -> None:
    pool = _native.HostPool(budget_bytes=1 << 20)
    buffer, ticket = pool.acquire(256, "staging"), _native.Ticket.pending()
    with pytest.raises(InvalidArgument, match="null source"):
        link.queue.submit_to_host(buffer.address, 0, 256, 0, None, ticket, buffer)
    assert not ticket.done
    del buffer
    assert pool.stats()["waiting_bytes"] == 0


@pytest.mark.parametrize("lane", ["to_host", "to_device"])
def test_a_batch_is_several_copies_with_one_ticket(link: AnyLink, lane: str) -> None:
    places = [(link.destination[first:].data_ptr(), link.source[first:].data_ptr(), 4 * 8) for first in (0, 40, 16)]
    link.hold(lane)
    ticket = link.queue.submit_batch(lane, places)  # type: ignore[arg-type]
    assert not ticket.done and int(link.destination.max()) == -1
    link.release(lane)
    assert ticket.wait()
    copied = [*range(0, 8), *range(16, 24), *range(40, 48)]
    assert [value for value in link.destination.tolist() if value >= 0] == copied
    assert link.destination[copied].tolist() == copied
    assert link.queue.stats()[f"{lane}_count"] == 3 and link.queue.stats()[f"{lane}_bytes"] == 96
    with pytest.raises(InvalidArgument, match="null source"):
        link.queue.submit_batch(lane, [places[0], (places[1][0], 0, 4)])  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="no lane 'up'"):
        link.queue.submit_batch("up", places)  # type: ignore[arg-type]


def test_a_held_lane_keeps_its_copies_and_leaves_the_other_lane_alone(link: AnyLink) -> None:
    link.hold("to_host")
    held = link.to_host()
    other = torch.zeros(64, dtype=torch.int32)
    link.queue.submit_to_device(other.data_ptr(), link.source.data_ptr(), nbytes(other)).wait()
    assert torch.equal(other, link.source)
    assert not held.done
    assert int(link.destination.max()) == -1
    link.release("to_host")
    assert held.wait()
    assert torch.equal(link.destination, link.source)


def test_pending_copies_are_counted_by_lane() -> None:
    link = HostLink()
    link.hold("to_host")
    held = link.to_host()
    assert link.device.pending_count("to_host") == 1
    assert link.device.pending_count("to_device") == 0
    link.release("to_host")
    assert held.wait()
    assert link.device.pending_count("to_host") == 0


def test_the_nth_copy_fails_with_its_facts_and_the_others_run() -> None:
    link = HostLink()
    link.device.fail_copy("to_host", 2)
    first, second, third = (link.to_host(first, 8) for first in (0, 8, 16))
    assert first.wait()
    with pytest.raises(DeviceError, match=r"copy 2 of lane to_host \(32 bytes\)"):
        second.wait()
    assert third.wait()
    assert link.destination[:24].tolist() == [*range(8), *[-1] * 8, *range(16, 24)]
    assert second.done


def test_a_copy_behind_a_failed_ticket_fails_alone(link: AnyLink) -> None:
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
    link = HostLink(clock=clock, to_host_bytes_per_s=1e9)  # a byte a nanosecond
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


def test_a_limit_set_later_is_of_the_copies_that_start_from_then_on() -> None:
    clock = _native.ManualClock()
    link = HostLink(clock=clock)
    assert link.to_host(0, 10).wait()
    link.device.limit("to_host", 1e9)
    limited = link.to_host(10, 10)
    clock.advance(39)
    assert not limited.done
    clock.advance(1)
    assert limited.wait()
    link.device.limit("to_host", 0)
    assert link.to_host(20, 10).wait()
    with pytest.raises(InvalidArgument, match="to_host_bytes_per_s is -1"):
        link.device.limit("to_host", -1)


def test_wait_times_out_and_is_ended_by_another_thread() -> None:
    ticket = _native.Ticket.pending()
    assert ticket.wait(timeout_s=0) is False
    thread = threading.Thread(target=ticket.complete)  # runs only if wait() lets the GIL go
    thread.start()
    assert ticket.wait() is True
    thread.join()
    assert _native.Ticket().done


def test_wait_on_stream_waits_and_raises(link: AnyLink) -> None:
    link.queue.wait_on_stream(0, link.to_host())
    assert torch.equal(link.destination, link.source)
    gate = _native.Ticket.pending()
    gate.fail("the source is gone")
    with pytest.raises(DeviceError, match="the source is gone"):
        link.queue.wait_on_stream(0, link.to_host(after=gate))


def test_bad_arguments_are_refused() -> None:
    link = HostLink()
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
    link = HostLink(clock=clock, to_host_bytes_per_s=1)  # 256 s on a clock that stands still
    slow = link.to_host()
    link.device.hold("to_host")
    held = link.to_host()
    del link.queue
    assert slow.wait()
    assert held.wait()
    assert torch.equal(link.destination, link.source)


HOST_DEVICE = """
device = _native.HostDevice()
hold, release = device.hold, device.release
refused = [lambda: release("to_host"), lambda: device.pending_count("to_host")]
"""

CUDA_DEVICE = """
sys.path.insert(0, {tests!r})
from driver_double import DriverDouble
double = DriverDouble({path!r})
device = _native.CudaDevice(driver_path=double.path)
hold, release = double.hold, double.release
refused = [lambda: _native.CudaDevice(driver_path=double.path), device.facts]
"""

LANES = """
import ctypes, gc, os, sys
from offload import _native
from offload._errors import StateError
{device}
queue = _native.TransferQueue(device)
memory = (ctypes.c_char * 64)()
address = ctypes.addressof(memory)
hold("to_host")
hold("to_device")
ticket = queue.submit_to_host(address, address + 32, 32)
"""


@pytest.fixture(params=["cpu", "cuda"])
def prelude(request: pytest.FixtureRequest, driver_double_library: Path) -> str:
    """The start of a program: two lanes, both held, and a copy on its way."""
    cuda = CUDA_DEVICE.format(tests=str(Path(__file__).parents[1]), path=str(driver_double_library))
    return LANES.format(device=HOST_DEVICE if request.param == "cpu" else cuda)


@pytest.mark.parametrize(
    "block",
    ["ticket.wait()", "ticket.wait(timeout_s=1e6)", "queue.wait_on_stream(0, ticket)"],
)
def test_ctrl_c_interrupts_a_wait(block: str, prelude: str) -> None:
    script = f"""{prelude}
try:
    print("waiting", flush=True)
    {block}
except KeyboardInterrupt:
    print("interrupted", flush=True)
    release("to_host")
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


def test_the_interpreter_exits_with_copies_in_flight_and_held(prelude: str) -> None:
    # In a cycle with themselves, so that only the collector, in an order of its own, ends them. The memory is
    # theirs until then, hence in the cycle, too.
    assert run(f"{prelude}\nring = [device, queue, ticket, memory]\nring.append(ring)\nprint('end')") == "end\n"


def test_the_interpreter_exits_with_lanes_that_nobody_destroys(prelude: str) -> None:
    # As after a reference that an extension lost: their threads run until the process ends.
    keep = "ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))"
    assert run(f"{prelude}\nfor kept in (device, queue, ticket, memory): {keep}\nprint('end')") == "end\n"


def test_a_forked_child_refuses_the_parents_lanes_and_exits(prelude: str) -> None:
    output = run(f"""{prelude}
pid = os.fork()
if pid == 0:
    for call in (
        ticket.wait,
        lambda: queue.submit_to_host(address, address + 32, 32),
        *refused,
    ):
        try:
            call()
        except StateError as error:
            print("belongs to the parent process" in str(error))
    own = _native.TransferQueue(_native.HostDevice())
    print(own.submit_to_device(address, address + 32, 32).wait(), flush=True)
    del device, queue, ticket, own, refused
    gc.collect()
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
release("to_host")
print(ticket.wait())
""")
    assert output.split() == ["True"] * 5 + ["7", "True"]
