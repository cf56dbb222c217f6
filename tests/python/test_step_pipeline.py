"""StepPipeline through the native boundary: bits, order, late factors, faults, fork, exit."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from offload import _native
from offload._errors import DeviceError, InvalidArgument, StateError

# Every subprocess ends within seconds; only one that hangs gets here.
HANG_S = 100

FORMATS = {
    torch.float32: _native.FLOAT32,
    torch.bfloat16: _native.BFLOAT16,
    torch.float16: _native.FLOAT16,
}

SCALARS = _native.AdamWScalars(
    weight_scale=1 - 1e-3,
    l2=0.0,
    one_minus_beta1=0.1,
    beta2=0.999,
    one_minus_beta2=0.001,
    step_size=3e-3,
    eps=1e-8,
)

Factor = tuple[int, int, float]


@dataclass
class Parameter:
    """One parameter's memory: host states, the working weight and what stands for device memory."""

    gradient: Tensor
    master: Tensor  # fp32, or the int16 remainder of a split master
    weight: Tensor  # the master itself for a fp32 parameter
    exp_avg: Tensor
    exp_avg_sq: Tensor
    on_device: Tensor

    @classmethod
    def make(cls, count: int, dtype: torch.dtype = torch.float32, split: bool = False) -> Parameter:
        generator = torch.Generator().manual_seed(count)
        master = torch.randn(count, generator=generator)
        weight = master.to(dtype)  # not a copy when the dtype is the same
        if split:
            remainder = torch.empty(count, dtype=torch.int16)
            _native.split_master(master.data_ptr(), weight.data_ptr(), remainder.data_ptr(), count)
            master = remainder
        return cls(
            gradient=torch.randn(count, generator=generator).to(dtype),
            master=master,
            weight=weight,
            exp_avg=torch.randn(count, generator=generator) * 0.1,
            exp_avg_sq=torch.rand(count, generator=generator) * 0.01,
            on_device=torch.full((count,), float("nan"), dtype=dtype),
        )

    @property
    def states(self) -> list[Tensor]:
        return [self.master, self.weight, self.exp_avg, self.exp_avg_sq]

    @property
    def addresses(self) -> dict[str, int]:
        """What add_slot and update_states both take."""
        return {
            "master": self.master.data_ptr(),
            "master_format": _native.MASTER_SPLIT if self.master.dtype == torch.int16 else _native.MASTER_FLOAT32,
            "weight": 0 if self.weight is self.master else self.weight.data_ptr(),
            "weight_format": FORMATS[self.weight.dtype],
            "exp_avg": self.exp_avg.data_ptr(),
            "exp_avg_sq": self.exp_avg_sq.data_ptr(),
            "count": self.exp_avg.numel(),
        }

    def slot(self, pipeline: _native.StepPipeline, name: str = "w", uploaded: bool = True) -> int:
        return pipeline.add_slot(
            name=name,
            upload_source=self.weight.data_ptr(),
            device_weight=self.on_device.data_ptr() if uploaded else 0,
            weight_bytes=self.weight.numel() * self.weight.element_size(),
            **self.addresses,
        )

    def job(
        self,
        slot: int,
        ticket: _native.Ticket | None = None,
        factors: tuple[Factor, ...] = (),
    ) -> tuple[int, int, int, list[_native.Ticket], _native.AdamWScalars, tuple[Factor, ...]]:
        tickets = [] if ticket is None else [ticket]
        return (slot, self.gradient.data_ptr(), FORMATS[self.gradient.dtype], tickets, SCALARS, factors)

    def update(self, factors: tuple[tuple[int, float], ...] = ()) -> None:
        """The same step in one call, without a pipeline."""
        _native.update_states(
            gradient=self.gradient.data_ptr(),
            gradient_format=FORMATS[self.gradient.dtype],
            scalars=SCALARS,
            factors=factors,
            threads=1,
            **self.addresses,
        )


class Machine:
    def __init__(self, chunk_elements: int = 1000) -> None:
        self.device = _native.HostDevice()
        self.pipeline = _native.StepPipeline(_native.TransferQueue(self.device), chunk_elements=chunk_elements)


def same(left: Parameter, right: Parameter) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.states, right.states, strict=True))


@pytest.mark.parametrize("count", [1, 999, 1000, 40_001])
@pytest.mark.parametrize("chunk_elements", [7, 20_000, 1 << 22])
@pytest.mark.parametrize(
    ("dtype", "split"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)],
)
def test_chunks_give_the_bits_of_one_update(count: int, chunk_elements: int, dtype: torch.dtype, split: bool) -> None:
    parameter, expected = (Parameter.make(count, dtype, split) for _ in range(2))
    machine = Machine(chunk_elements)
    tickets = machine.pipeline.submit([parameter.job(parameter.slot(machine.pipeline))])
    machine.pipeline.wait(tickets)
    expected.update()
    assert same(parameter, expected)
    assert torch.equal(parameter.on_device, expected.weight)


def test_updates_go_on_while_the_upload_lane_is_held() -> None:
    machine = Machine()
    parameter, resident, expected = Parameter.make(2500), Parameter.make(10), Parameter.make(2500)
    machine.device.hold("to_device")
    slots = parameter.slot(machine.pipeline), resident.slot(machine.pipeline, uploaded=False)
    ticket, last = machine.pipeline.submit([parameter.job(slots[0]), resident.job(slots[1])])
    assert last.wait()  # uploads nothing: done with its update, which comes after the other's
    expected.update()
    assert same(parameter, expected)
    assert not ticket.done
    assert machine.device.pending_count("to_device") == 3
    assert bool(parameter.on_device.isnan().all())
    assert machine.pipeline.stats()["blocked_ns"] == 0
    machine.device.release("to_device")
    machine.pipeline.wait([ticket])
    assert torch.equal(parameter.on_device, expected.weight)
    stats = machine.pipeline.stats()
    assert stats["job_count"] == 2
    assert stats["update_ns"] > 0 == stats["exposed_ns"], "both updates had ended before anybody was blocked"


def test_a_factor_is_read_when_its_job_runs() -> None:
    machine = Machine()
    parameter, expected = Parameter.make(3000), Parameter.make(3000)
    coefficient = torch.ones(1)
    slot = parameter.slot(machine.pipeline)
    factors = (
        (_native.FACTOR_MULTIPLY, coefficient.data_ptr(), 0.0),
        (_native.FACTOR_DIVIDE, 0, 3.0),
    )
    machine.pipeline.hold()
    tickets = machine.pipeline.submit([parameter.job(slot, factors=factors)])
    coefficient.fill_(0.37)
    machine.pipeline.release()
    machine.pipeline.wait(tickets)
    expected.update(factors=((_native.FACTOR_MULTIPLY, coefficient.item()), (_native.FACTOR_DIVIDE, 3.0)))
    assert same(parameter, expected)


def test_a_job_waits_for_its_gradient_and_the_ones_behind_for_it() -> None:
    machine = Machine()
    first, second = Parameter.make(100), Parameter.make(200)
    before = Parameter.make(200)
    gate = _native.Ticket.pending()
    jobs = [first.job(first.slot(machine.pipeline), gate), second.job(second.slot(machine.pipeline))]
    tickets = machine.pipeline.submit(jobs)
    assert not tickets[1].done
    assert same(second, before)
    gate.complete()
    machine.pipeline.wait(tickets)
    before.update()
    assert same(second, before)


def test_a_failed_gradient_leaves_every_later_state_as_it_was() -> None:
    machine = Machine()
    good, bad, behind = (Parameter.make(300) for _ in range(3))
    gate = _native.Ticket.pending()
    gate.fail("link lost")
    tickets = machine.pipeline.submit(
        [
            good.job(good.slot(machine.pipeline, "layers.0/weight")),
            bad.job(bad.slot(machine.pipeline, "layers.1/weight"), gate),
            behind.job(behind.slot(machine.pipeline, "layers.2/weight")),
        ]
    )
    for ticket in tickets[1:]:
        with pytest.raises(DeviceError, match=r"parameter 'layers\.1/weight'.*link lost"):
            machine.pipeline.wait([ticket])
    assert tickets[0].wait()
    untouched = Parameter.make(300)
    assert same(bad, untouched)
    assert same(behind, untouched)
    assert bool(bad.on_device.isnan().all())
    with pytest.raises(StateError, match=r"layers\.1/weight"):
        machine.pipeline.submit([good.job(0)])


def test_a_job_waits_for_every_ticket() -> None:
    """The bytes of a factor may land after the gradient's."""
    machine = Machine()
    parameter, before = Parameter.make(10), Parameter.make(10)
    factor = _native.Ticket.pending()
    job = parameter.job(parameter.slot(machine.pipeline))
    tickets = machine.pipeline.submit([(*job[:3], [_native.Ticket(), factor], *job[4:])])
    assert not tickets[0].wait(timeout_s=0.05)
    assert same(parameter, before)
    factor.complete()
    machine.pipeline.wait(tickets)
    before.update()
    assert same(parameter, before)


def test_a_failed_upload_names_the_parameter() -> None:
    machine = Machine(chunk_elements=100)
    parameter = Parameter.make(300)
    machine.device.fail_copy("to_device", 2)  # a chunk in the middle
    tickets = machine.pipeline.submit([parameter.job(parameter.slot(machine.pipeline, "head/bias"))])
    with pytest.raises(DeviceError, match="parameter 'head/bias': its upload failed"):
        machine.pipeline.wait(tickets)


def test_bad_jobs_are_refused_before_anything_runs() -> None:
    machine = Machine()
    parameter, before = Parameter.make(10), Parameter.make(10)
    slot = parameter.slot(machine.pipeline)
    good = parameter.job(slot)
    one_moment = machine.pipeline.add_slot(
        name="w", upload_source=0, device_weight=0, weight_bytes=0, **{**parameter.addresses, "exp_avg_sq": 0}
    )
    bad_jobs: list[object] = [
        (7, *good[1:]),
        (slot, 0, *good[2:]),
        (*good[:2], 9, *good[3:]),
        (*good[:3], None, *good[4:]),
        (*good[:3], [None], *good[4:]),
        (*good[:4], 1.0, good[5]),
        (*good[:5], [(5, 0, 1.0)]),
        (*good[:5], [(0, 0)]),
        good[:3],
        (one_moment, *good[1:]),  # AdamW needs both
    ]
    for bad in bad_jobs:
        with pytest.raises(InvalidArgument):
            machine.pipeline.submit([good, bad])  # type: ignore[list-item]
    wrong_slots = [
        ("a split master needs", {"master_format": _native.MASTER_SPLIT}),
        ("beside a fp32 master", {"weight": parameter.master.data_ptr()}),
        ("got null", {"master": 0}),
        ("got null", {"exp_avg": 0, "exp_avg_sq": 0}),
        ("must be a MASTER_ code", {"master_format": 3}),
    ]
    for message, change in wrong_slots:
        with pytest.raises(InvalidArgument, match=message):
            machine.pipeline.add_slot(
                name="w",
                upload_source=0,
                device_weight=0,
                weight_bytes=40,
                **(parameter.addresses | change),
            )
    assert machine.pipeline.stats()["job_count"] == 0
    assert same(parameter, before)


def test_destroying_the_pipeline_finishes_its_jobs() -> None:
    machine = Machine()
    parameter, expected = Parameter.make(50_000), Parameter.make(50_000)
    slot = parameter.slot(machine.pipeline)
    tickets = machine.pipeline.submit([parameter.job(slot), parameter.job(slot)])
    del machine
    assert all(ticket.wait() for ticket in tickets)
    expected.update()
    expected.update()
    assert same(parameter, expected)
    assert torch.equal(parameter.on_device, expected.weight)


PRELUDE = """
import ctypes, gc, os, sys
from offload import _native
from offload._errors import StateError
memory = (ctypes.c_float * 64)()
address = ctypes.addressof(memory)
transfers = _native.TransferQueue(_native.HostDevice())
pipeline = _native.StepPipeline(transfers)
slot = pipeline.add_slot(
    name="w", master=address, master_format=0, weight=0, weight_format=0, exp_avg=address + 64,
    exp_avg_sq=address + 128, count=16, upload_source=address, device_weight=address + 192, weight_bytes=64,
)
scalars = _native.AdamWScalars(
    weight_scale=1, l2=0, one_minus_beta1=0.1, beta2=0.9, one_minus_beta2=0.1, step_size=0.1, eps=1e-8
)
job = (slot, address, 0, [_native.Ticket()], scalars, ())
pipeline.hold()
tickets = pipeline.submit([job])
"""


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_interpreter_exits_with_a_held_pipeline() -> None:
    # In a cycle with themselves, so that only the collector, in an order of its own, ends them.
    assert run(f"{PRELUDE}\nring = [transfers, pipeline, tickets, memory]\nring.append(ring)\nprint('end')") == "end\n"


def test_a_forked_child_refuses_the_parents_pipeline_and_exits() -> None:
    output = run(f"""{PRELUDE}
pid = os.fork()
if pid == 0:
    for call in (lambda: pipeline.submit([job]), lambda: pipeline.wait(tickets), pipeline.release):
        try:
            call()
        except StateError as error:
            print("belongs to the parent process" in str(error), flush=True)
    del pipeline, transfers, tickets
    gc.collect()
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
pipeline.release()
pipeline.wait(tickets)
print(pipeline.stats()["job_count"])
""")
    assert output.split() == ["True"] * 3 + ["7", "1"]


def test_ctrl_c_interrupts_wait() -> None:
    script = f"""{PRELUDE}
try:
    print("waiting", flush=True)
    pipeline.wait(tickets)
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
