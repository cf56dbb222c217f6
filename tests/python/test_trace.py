"""`offload.trace` around training: what it records is what happened, it changes nothing, and it leaves nothing."""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from programs import Programs
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.checkpoint import checkpoint

import offload
from offload import _copy_lanes, _native, _trace, _trace_file
from offload._clocks import ClockSampler
from offload._trace_records import LANES, WORK_LANES
from training import HOST, RESIDENT, assert_same_bits, batches, loss_of, make_model, train, wrapped_run
from what_lives import collect

pytestmark = pytest.mark.usefixtures("device")

STREAMED = {**HOST, "params": "host"}


def wrapped(seed: int = 0, placement: dict[str, str] = HOST, **options: Any) -> tuple[nn.Module, Any]:
    model = make_model(seed=seed, **options)
    return offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)


def step(model: nn.Module, optimizer: Any, *, micro_batches: int = 1) -> None:
    for tokens in batches(micro_batches):
        loss_of(model, tokens).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def alone() -> None:
    """No model that another test has dropped is waiting for the garbage collector: it would be traced too."""
    collect()


def settle(optimizer: Any) -> None:
    """Nothing is on its way: neither updates nor the weights that the next forward begins with."""
    optimizer.synchronize()
    for upload in optimizer._engine.streaming.window.last_upload.values():
        upload.wait()


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def names(trace: offload.trace, lane: str) -> Counter[str]:
    return Counter(span.name for span in trace.data.lane(lane))


# --- it changes nothing, and records what happened ----------------------------------------------------------


@pytest.mark.parametrize("placement", [HOST, STREAMED, RESIDENT], ids=["host", "streamed", "resident"])
def test_traced_training_has_the_same_bits(placement: dict[str, str]) -> None:
    model = make_model(dtype=torch.bfloat16)
    plain = wrapped_run(model, placement, steps=3)
    with offload.trace() as trace:
        traced = wrapped_run(model, placement, steps=3)
    assert_same_bits(plain, traced)
    assert trace.report.steps == 2 and trace.data.lost_count == 0


@pytest.mark.parametrize(
    "placement", [HOST, STREAMED, {**HOST, "activations": "host"}], ids=["host", "streamed", "activations"]
)
def test_every_byte_that_moved_is_recorded(placement: dict[str, str]) -> None:
    model, optimizer = wrapped(placement=placement)
    step(model, optimizer)
    settle(optimizer)
    before = optimizer.stats().transfers
    with offload.trace() as trace:
        for _ in range(2):
            step(model, optimizer, micro_batches=2)
        settle(optimizer)
    after = optimizer.stats().transfers
    for lane in ("to_host", "to_device"):
        moved = sum(span.nbytes for span in trace.data.lane(lane))
        assert moved == after[f"{lane}_bytes"] - before[f"{lane}_bytes"] > 0
    # One update a parameter and step: each is smaller than a chunk.
    updated = names(trace, "host_update")
    assert updated == {name: 2 for name, _ in model.named_parameters()}
    assert trace.report.micro_batches == 2


@pytest.mark.parametrize("placement", [HOST, STREAMED], ids=["host", "streamed"])
def test_what_the_hooks_of_a_trace_take_is_counted(
    placement: dict[str, str], alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(0, 1000)  # each hook reads this clock when it begins and ends, so it takes 1000
    monkeypatch.setattr(_trace, "time", SimpleNamespace(monotonic_ns=lambda: next(ticks)))
    model, optimizer = wrapped(placement=placement)
    with offload.trace() as trace:
        step(model, optimizer)
        settle(optimizer)
    more = 1 if placement is STREAMED else 0  # what the engine does between two units' backwards is neither's
    forward, backward, around_step = 3 + 6 * (3 + more), 6 * (1 + more) + 1, 2
    assert trace.data.recording_ns == 1000 * (forward + backward + around_step)


def test_units_compute_in_order_and_copies_have_their_names() -> None:
    model, optimizer = wrapped(placement=STREAMED)
    with offload.trace() as trace:
        step(model, optimizer)
        optimizer.synchronize()
    order = ["embedding", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]
    compute = [span.name for span in trace.data.lane("compute")]
    assert compute == [*order, *(f"{name} backward" for name in reversed(order))]
    assert names(trace, "phase") == {"forward": 1, "backward": 1, "optim.step": 1}
    for inner in trace.data.lane("compute"):
        assert any(p.begin_ns <= inner.begin_ns and inner.end_ns <= p.end_ns for p in trace.data.lane("phase"))
    gradients = [span for span in trace.data.lane("to_host") if span.kind == "gradients"]
    assert {span.name for span in gradients} <= set(order)
    # A unit travels as one storage: the first of its parameters names it.
    assert names(trace, "to_device")["blocks.1.norm.weight"] >= 1


@pytest.mark.parametrize("leave_late", [False, True], ids=["at once", "late"])
def test_gradients_have_the_names_of_their_units(leave_late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older torch refers to a gradient while its hooks run: it leaves with the next one, or at the end of backward."""
    monkeypatch.setattr(_copy_lanes, "_SMALL_BYTES", 0)  # each is a copy of its own
    latest: list[Any] = []

    def refer(parameter: torch.Tensor) -> None:
        latest[:] = [parameter.grad]

    model = make_model()
    for parameter in model.parameters() if leave_late else ():
        parameter.register_post_accumulate_grad_hook(refer)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **HOST)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: latest.clear())
    with offload.trace() as trace:
        step(model, optimizer)
        optimizer.synchronize()
    gradients = Counter(span.name for span in trace.data.lane("to_host") if span.kind == "gradients")
    units = Counter(re.sub(r"^(blocks\.\d|[a-z]+)\..*", r"\1", name) for name, _ in model.named_parameters())
    assert gradients == units


@pytest.mark.parametrize(("placement", "added"), [(HOST, 1), (STREAMED, 2)], ids=["host", "streamed"])
def test_a_unit_is_timed_with_few_hooks_and_then_with_none(placement: dict[str, str], added: int) -> None:
    """Each is Python that compute has driven out of the caches."""
    model, optimizer = wrapped(placement=placement)
    plain, calls = hook_count(model), [hook.call for *_, hook in optimizer._hooks.modules]
    units = len(optimizer._hooks.modules)
    with offload.trace() as trace:
        assert hook_count(model) == plain + added * units + 3  # those of the model's own forward
        step(model, optimizer)
        step(model, optimizer)
    assert hook_count(model) == plain and [hook.call for *_, hook in optimizer._hooks.modules] == calls
    compute = trace.data.lane("compute")
    assert len(compute) == 2 * 2 * units
    assert all(one.end_ns <= other.begin_ns for one, other in itertools.pairwise(compute))


@pytest.mark.usefixtures("alone")
def test_host_memory_follows_the_pool() -> None:
    model, optimizer = wrapped()
    step(model, optimizer)
    with offload.trace() as trace:
        step(model, optimizer)
        optimizer.synchronize()
    last: dict[str, int] = {}
    for sample in trace.data.memory:
        if sample.tier == "host":
            last[sample.kind] = sample.nbytes
    present = optimizer.stats().host_bytes
    assert {kind: size for kind, size in last.items() if size} == {kind: size for kind, size in present.items() if size}
    assert max(s.nbytes for s in trace.data.memory if s.kind == "gradients") > last["gradients"] == 0


@pytest.mark.cpu_only
def test_states_on_disk_show_reads_and_writes(tmp_path: Path, disk_calls: Any) -> None:
    model, optimizer = wrapped(placement={"optimizer": "disk", "gradients": "host", "disk_path": str(tmp_path)})
    before = optimizer.stats().disk
    with offload.trace() as trace:
        for _ in range(2):
            step(model, optimizer)
        optimizer.synchronize()
    after = optimizer.stats().disk
    assert (
        sum(span.nbytes for span in trace.data.lane("disk_write")) == after["written_bytes"] - before["written_bytes"]
    )
    assert names(trace, "disk_write") == {name: 2 for name, _ in model.named_parameters()}
    assert {"disk": {"states and weights": optimizer.plan.disk.total}}.items() <= trace.report.memory.items()
    offload.unwrap(model, optimizer)


def test_another_class_of_optimizer_shows_its_own_step() -> None:
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), optimizer="host")
    with offload.trace() as trace:
        for _ in range(2):
            step(model, optimizer)
    assert len([s for s in trace.data.lane("host_update") if s.nbytes == 0]) == 2
    assert trace.report.exposed_s["host_update"] > 0


def test_recomputed_forwards_lie_in_their_backward() -> None:
    class Recomputing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    model = Recomputing()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **HOST)
    with offload.trace() as trace:
        model(torch.ones(2, 8, requires_grad=True)).sum().backward()
        optimizer.step()
    assert names(trace, "compute")["blocks.0"] == 2 and names(trace, "compute")["blocks.0 backward"] == 1
    assert _native.trace_label() == (0, 0)


def test_evaluation_has_no_backward() -> None:
    model, _ = wrapped()
    with offload.trace() as trace, torch.no_grad():
        loss_of(model, next(batches(1)))
    assert [span.name for span in trace.data.lane("phase")] == ["forward"]
    assert trace.report.steps == 0 and "No step" in trace.report.verdict


# --- its limits ---------------------------------------------------------------------------------------------


def test_steps_end_the_recording() -> None:
    model, optimizer = wrapped()
    plain = hook_count(model)
    with offload.trace(steps=2) as trace:
        for _ in range(2):
            assert _native.trace_is_on()
            step(model, optimizer)
        assert not _native.trace_is_on() and hook_count(model) == plain
        step(model, optimizer)
    assert len(trace.data.lane("step")) == 2 and trace.report.steps == 1


def test_records_beyond_the_limit_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_trace, "MOST_RECORDS", 0)
    model, optimizer = wrapped()
    with offload.trace() as trace:
        for _ in range(2):
            step(model, optimizer)
    assert not trace.data.lane("to_host") and trace.data.lost_count > 0
    assert len(trace.data.lane("step")) == 1  # what would come after is lost too, so nothing comes
    assert "records were lost" in str(trace.report) and "recording ended with step 1" in str(trace.report)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "2"])
def test_wrong_steps_are_refused(steps: Any) -> None:
    with pytest.raises(offload.InvalidArgument, match="positive whole number"):
        offload.trace(steps=steps)


def test_a_path_that_cannot_be_written_is_refused_before_anything(tmp_path: Path) -> None:
    for options in ({"path": tmp_path}, {"path": tmp_path / "no" / "trace.json"}, {"html": tmp_path / "no" / "page"}):
        with pytest.raises(offload.InvalidArgument, match="folder that exists"):
            offload.trace(**options)
    with pytest.raises(offload.InvalidArgument, match="html=3: give the path of a file"):
        offload.trace(html=3)  # type: ignore[arg-type]


def test_one_trace_at_a_time() -> None:
    with offload.trace() as outer:
        with pytest.raises(offload.StateError, match="runs already"), offload.trace():
            pass
        assert _native.trace_is_on()  # the outer one goes on
        with pytest.raises(offload.StateError, match="not over"):
            outer.report  # noqa: B018
        with pytest.raises(offload.StateError, match="once"):
            outer.__enter__()
    with pytest.raises(offload.StateError, match="once"), outer:
        pass
    with offload.trace():
        assert _native.trace_is_on()


# --- what comes and goes inside -----------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_a_model_wrapped_inside_is_traced_and_unwrapped_is_plain() -> None:
    with offload.trace() as trace:
        model, optimizer = wrapped()
        step(model, optimizer)
        model, _ = offload.unwrap(model, optimizer)
        assert hook_count(model) == 0
        loss_of(model, next(batches(1))).backward()
    assert names(trace, "compute")["blocks.0"] == 1  # not of the plain model
    assert len(trace.data.models) == 1


@pytest.mark.usefixtures("alone")
def test_several_models_are_on_one_timeline() -> None:
    one, other = wrapped(), wrapped(seed=1)
    with offload.trace() as trace:
        for _ in range(2):
            step(*one)
            step(*other)
    assert [span.name for span in trace.data.lane("step")] == ["step 1", "step 2"]  # of who stepped first
    assert names(trace, "compute")["blocks.0"] == 4 and names(trace, "phase")["optim.step"] == 4
    assert len(trace.data.models) == 2


@pytest.mark.parametrize("depth", [1, 2], ids=["one unit", "units"])
def test_a_model_dropped_inside_dies_there_and_stays_in_the_trace(depth: int) -> None:
    with offload.trace() as trace:
        model, optimizer = wrapped(depth=depth)
        step(model, optimizer)
        engine = weakref.ref(optimizer._engine)
        del model, optimizer
        collect()  # with Python 3.13 once is not enough
        assert engine() is None
        again = wrapped(depth=depth)
        step(*again)
    assert names(trace, "phase")["forward"] == 2 and names(trace, "phase")["backward"] == 2
    assert len(trace.data.lane("step")) == 2  # the next optimizer ends steps


@pytest.mark.usefixtures("alone")
def test_an_optimizer_whose_model_was_dropped_is_not_traced() -> None:
    model, optimizer = wrapped()
    del model
    gc.collect()
    with offload.trace() as trace:
        assert optimizer._hooks.model() is None
    assert trace.data.models == ()


def test_an_exception_inside_leaves_files_and_no_hooks(tmp_path: Path) -> None:
    model, optimizer = wrapped(placement=STREAMED)
    plain = hook_count(model)
    with pytest.raises(ZeroDivisionError), offload.trace(tmp_path / "trace.json") as trace:
        step(model, optimizer)
        loss_of(model, next(batches(1)))
        _ = 1 / 0
    assert offload.trace.load(tmp_path / "trace.json").report.steps == trace.report.steps == 1
    assert hook_count(model) == plain and not _native.trace_is_on()
    train(model, optimizer, steps=1)


def test_a_trace_that_cannot_begin_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the system has no thread for it."""

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ClockSampler, "start", refuse)
    model, _ = wrapped()
    shared = _global_optimizer_pre_hooks, _global_optimizer_post_hooks
    plain, before = hook_count(model), [dict(hooks) for hooks in shared]
    with pytest.raises(RuntimeError, match="new thread"), offload.trace():
        pass
    assert hook_count(model) == plain and [dict(hooks) for hooks in shared] == before
    assert not _native.trace_is_on()


def test_a_graph_from_inside_may_run_backward_outside() -> None:
    model, optimizer = wrapped()
    with offload.trace() as trace:
        loss = loss_of(model, next(batches(1)))
    loss.backward()
    optimizer.step()
    assert not [span for span in trace.data.spans if "backward" in span.name]


def test_a_failed_backward_is_forgotten() -> None:
    model, optimizer = wrapped()
    with offload.trace() as trace:
        output = model(next(batches(1))[:, :-1])
        output.register_hook(lambda _: None)
        model.blocks[1].down.weight.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            output.sum().backward()
        model.blocks[1].down.weight._backward_hooks.clear()
        optimizer.zero_grad()
        step(model, optimizer)
    assert names(trace, "phase") == {"forward": 2, "backward": 1, "optim.step": 1}


def test_a_forked_child_is_not_traced_and_writes_nothing(tmp_path: Path) -> None:
    _ = wrapped()  # the parent's: a trace of the child must not touch it
    path = tmp_path / "trace.json"
    with offload.trace(path):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if not _native.trace_is_on() and _trace.active() is None:
                    with offload.trace():  # its own
                        code = 0 if _native.trace_is_on() else 1
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert _native.trace_is_on()
    assert path.exists()


@pytest.mark.cpu_only
def test_the_process_may_end_inside(programs: Programs) -> None:
    script = """
import torch, offload
from training import batches, loss_of, make_model
model = make_model()
adamw = torch.optim.AdamW(model.parameters())
model, optimizer = offload.wrap(model, adamw, device="cpu", optimizer="host", params="host")
trace = offload.trace()
trace.__enter__()
loss_of(model, next(batches(1))).backward()
optimizer.step()
"""
    ended = programs.run(script)
    assert (ended.status, ended.err) == (0, "")


# --- files --------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded() -> offload.trace:
    model, optimizer = wrapped(placement=STREAMED)
    with offload.trace() as trace:
        for _ in range(3):
            step(model, optimizer)
        optimizer.synchronize()
    return trace


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_saved_trace_is_read_back(recorded: offload.trace, tmp_path: Path, name: str) -> None:
    recorded.save(tmp_path / name)
    loaded = offload.trace.load(tmp_path / name)
    assert len(loaded.data.spans) == len(recorded.data.spans)
    for ours, theirs in zip(recorded.data.spans, loaded.data.spans, strict=True):
        assert abs(ours.begin_ns - theirs.begin_ns) <= 1  # the format's numbers are no finer in a quarter of a year
        assert (ours.lane, ours.name, ours.nbytes, ours.kind) == (theirs.lane, theirs.name, theirs.nbytes, theirs.kind)
    assert loaded.data.memory == recorded.data.memory and loaded.data.models == recorded.data.models
    assert loaded.data.recording_ns == recorded.data.recording_ns > 0
    assert loaded.report.steps == 2
    assert loaded.report.step_s == pytest.approx(recorded.report.step_s)


def test_the_file_is_what_perfetto_reads(recorded: offload.trace, tmp_path: Path) -> None:
    recorded.save(tmp_path / "trace.json")
    values = json.loads((tmp_path / "trace.json").read_text())
    events = values["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["tid"] for event in spans} == set(tracks)
    assert all(event["dur"] >= 0 and event["name"] for event in spans)
    assert {event["cat"] for event in spans} <= set(LANES) and {"to_host", "to_device"} <= {e["cat"] for e in spans}
    counters = {event["name"] for event in events if event["ph"] == "C"}
    assert {"host memory", "device memory"} <= counters


@pytest.mark.parametrize("text", ["", "{}", '{"traceEvents": []}', "[1]", '{"offload": {"version": 99}}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(offload.InvalidArgument, match=r"other\.json"):
        offload.trace.load(tmp_path / "other.json")


@pytest.mark.cpu_only
def test_it_is_on_the_time_axis_of_torch_profiler(tmp_path: Path) -> None:
    model, optimizer = wrapped()
    step(model, optimizer)
    profile, joined = tmp_path / "profile.json", tmp_path / "joined.json"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(1).sum()  # what the profiler sets up first
        with torch.profiler.record_function("around"), offload.trace() as trace:
            step(model, optimizer)
    profiler.export_chrome_trace(str(profile))
    trace.save(joined, profiler=profile)
    events = _trace_file.read_json(joined)["traceEvents"]
    (around,) = [event for event in events if event.get("name") == "around" and event.get("ph") == "X"]
    ours = [event for event in events if event.get("cat") in (*WORK_LANES, "phase")]
    assert ours
    tolerance_us = 1000  # of two clocks that are read one after the other; a wrong base is off by hours
    for event in ours:
        assert around["ts"] - tolerance_us <= event["ts"]
        assert event["ts"] + event["dur"] <= around["ts"] + around["dur"] + tolerance_us
    # What torch.profiler has of the same: our forward is around its operations, and alone the file is on that axis too.
    trace.save(tmp_path / "alone.json")
    alone = _trace_file.read_json(tmp_path / "alone.json")
    assert alone["baseTimeNanoseconds"] == _trace_file.read_json(profile)["baseTimeNanoseconds"]
    assert offload.trace.load(joined).report.steps == 1


@pytest.mark.cpu_only
def test_a_profile_of_another_run_is_refused(recorded: offload.trace, tmp_path: Path) -> None:
    other = {"traceEvents": [{"ph": "X", "name": "old", "ts": 5.0, "dur": 1.0}], "baseTimeNanoseconds": 0}
    (tmp_path / "old.json").write_text(json.dumps(other))
    with pytest.raises(offload.InvalidArgument, match="of another run"):
        recorded.save(tmp_path / "joined.json", profiler=tmp_path / "old.json")
    (tmp_path / "none.json").write_text("3")
    with pytest.raises(offload.InvalidArgument, match="no trace of torch.profiler"):
        recorded.save(tmp_path / "joined.json", profiler=tmp_path / "none.json")
    assert not (tmp_path / "joined.json").exists()
