"""`optimizer="unified"`: the device updates states that lie on the host, with the bits of other placements."""

from __future__ import annotations

import copy
import dataclasses
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from driver_double import DriverDouble
from torch import Tensor, nn

import offload
from offload import _engine, _native, _native_state, _wrap
from offload._config import Config
from offload._kernels import Found, Kernels
from offload._parameter_size import ParameterSize
from offload._plan import Plan, TierBytes, make_plan
from offload._wrap_checks import check_reach
from training import HOST, RESIDENT, Run, assert_same_bits, batches, loss_of, make_model, same_bits, train, wrapped_run
from what_lives import collect

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:optimizer='unified'"),
]

UNIFIED: dict[str, Any] = {"optimizer": "unified", "gradients": "device"}
BIG = 2**50


def plan_of(kind: Any = None, *, count: int = 100, **options: Any) -> Plan:
    parameters = [ParameterSize("a", count, 2, "bfloat16"), ParameterSize("b", 10, 4, "float32")]
    placement = {"optimizer": "unified", "gradients": "device", **options}
    return make_plan(
        parameters,
        Config(**placement),
        device_kind="cuda",
        device_bytes=BIG,
        host_bytes=BIG,
        memory_kind=kind,
    )


def steps(model: nn.Module, optimizer: Any, count: int = 3, seed: int = 1) -> None:
    for tokens in batches(count, seed=seed):
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def states_of(optimizer: Any) -> list[Tensor]:
    """The live tensors of every state that has elements."""
    states = optimizer._engine.states.values()
    parts = [part for state in states for moment in state.moments.values() for part in moment.tensors()]
    parts += [part for state in states for part in (state.master, state.remainder) if part is not None]
    return [part for part in parts if part.numel() > 0]


# --- the plan -----------------------------------------------------------------------------------------------


@pytest.mark.cpu_only
def test_states_are_on_the_host_and_gradients_are_not() -> None:
    plan = plan_of("ats")
    assert (plan.optimizer, plan.params, plan.master) == ("unified", "device", "split")
    assert plan.device == TierBytes(weights=240, gradients=240)
    assert plan.host == TierBytes(working=200, master=240, moments=880)
    assert plan.unified_states == {"a", "b"} and not plan.keeps_state("a") and plan.updates_on_device("a")
    assert "updated by the device" in plan.explain()
    assert plan_of(host_budget=1320).host == plan.host
    with pytest.raises(offload.OutOfHostMemory, match=r"1\.29 KiB needed, 1\.29 KiB available"):
        plan_of(host_budget=1319)
    streamed = plan_of(params="host", gradients="host")
    assert streamed.host == TierBytes(working=200, master=240, moments=880, gradients=240)
    assert plan_of(activations="host", host_budget=3320).activation_host_bytes == 1500  # 3/4 of what is left


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (None, "on the host and updated by the device$"),
        ("integrated", "one memory for both"),
        # Moments 880, remainders 200; the host's copies of the weights are written too, 240.
        ("ats", r"reads 1\.05 KiB and writes 1\.29 KiB a step over the coherent link"),
        ("hmm", "a card of the kind 'hmm' reads"),
        ("discrete", "a card of the kind 'discrete' reads .* update copies 480 B beside it.* advised against for all"),
    ],
)
def test_the_kind_of_device_decides_the_advice(kind: Any, words: str) -> None:
    assert len([line for line in plan_of(kind).reason if line.startswith("unified: 1.09 KiB")]) == 1
    assert re.search(words, plan_of(kind).explain(), re.MULTILINE)


@pytest.mark.cpu_only
def test_auto_never_takes_it() -> None:
    for gradients in ("auto", "device", "host"):
        plan = plan_of("ats", optimizer="auto", gradients=gradients, device_budget=600)
        assert plan.optimizer == "host" and plan.unified_states == frozenset()


@pytest.mark.cpu_only
def test_only_states_can_be_there() -> None:
    with pytest.raises(offload.InvalidArgument, match="gradients='unified'"):
        Config(gradients="unified")  # type: ignore[arg-type]
    with pytest.raises(offload.InvalidArgument, match="legal values are .*'unified'"):
        Config(optimizer="unifed")  # type: ignore[arg-type]
    for optimizer in ("unified", {"unified": 0.5, "host": 0.5}):
        with pytest.raises(offload.InvalidArgument, match="with params='disk': the device does not update weights"):
            Config(optimizer=optimizer, params="disk", disk_path="/tmp")  # type: ignore[arg-type]


# --- the bits -----------------------------------------------------------------------------------------------

PLACEMENTS: dict[str, dict[str, Any]] = {
    "gradients stay": {},
    "gradients leave": {"gradients": "host"},
    "streamed": {"gradients": "host", "params": "host"},
}


FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "split": (torch.bfloat16, {}),
    "bf16, fp32 masters": (torch.bfloat16, {"master": "fp32"}),
    "bf16 masters": (torch.bfloat16, {"master": "bf16"}),
    "fp16": (torch.float16, {}),
}


@pytest.fixture(params=["torch", "kernel"])
def updates(request: pytest.FixtureRequest, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """What updates the states: separate torch operations, or the kernel."""
    found = Found(kernels, None) if request.param == "kernel" else Found(None, "the test wants none")
    monkeypatch.setattr(_native_state, "find_kernels", lambda _: found)


@pytest.mark.usefixtures("updates")
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("loop", [{"clip": 0.3}, {"micro_batches": 3}], ids=["clip", "accumulate"])
def test_bits_equal_host_and_resident(
    form: tuple[torch.dtype, dict[str, Any]], placement: dict[str, Any], loop: dict[str, Any]
) -> None:
    model = make_model(form[0])
    unified = wrapped_run(model, UNIFIED | placement | form[1], **loop)
    assert_same_bits(unified, wrapped_run(model, RESIDENT | form[1], **loop))
    assert_same_bits(unified, wrapped_run(model, HOST | form[1], **loop))
    stats, plan = unified.optimizer.stats(), unified.optimizer.plan
    assert "moments" not in stats.device_bytes and stats.update_s == 0  # the host updated nothing
    assert stats.host_bytes["moments"] >= plan.host.moments == 8 * plan.trainable_count
    if "gradients" not in placement:
        assert stats.host_peak_bytes["gradients"] == 0


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, offload.Lion])
def test_the_other_native_classes(kind: Any) -> None:
    def run(placement: dict[str, Any]) -> Run:
        model = make_model(torch.bfloat16)
        return train(*offload.wrap(model, kind(model.parameters(), lr=1e-2), **placement))

    assert_same_bits(run(UNIFIED), run(HOST))


@pytest.mark.usefixtures("updates")
@pytest.mark.parametrize("moments", ["bf16", "int8"])
def test_small_moments(moments: str) -> None:
    model = make_model(torch.bfloat16)
    unified = wrapped_run(model, UNIFIED | {"moments": moments})
    assert_same_bits(unified, wrapped_run(model, HOST | {"moments": moments}))
    assert unified.optimizer.stats().host_bytes["moments"] >= unified.optimizer.plan.host.moments


def test_a_parameter_that_the_plan_did_not_know() -> None:
    def run(placement: dict[str, Any]) -> list[Tensor]:
        model = make_model(torch.bfloat16)
        late = model.head.weight.requires_grad_(False)
        rest = [p for p in model.parameters() if p is not late]
        model, optimizer = offload.wrap(model, torch.optim.AdamW(rest, lr=1e-2), **placement)
        steps(model, optimizer)
        late.requires_grad_(True)
        optimizer.add_param_group({"params": [late]})
        steps(model, optimizer)
        return [p.detach().clone() for p in model.parameters()]

    assert all(same_bits(one, other) for one, other in zip(run(UNIFIED), run(RESIDENT), strict=True))


def test_classes_that_make_their_own_states_are_refused() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(offload.InvalidArgument, match=r"SGD cannot have unified states.*optimizer='host'"):
        offload.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **UNIFIED)
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())


# --- states that come and go --------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["checkpoint", "state_dict"])
@pytest.mark.parametrize("saved_from", [UNIFIED, HOST], ids=["unified", "host"])
def test_a_load_fills_the_states_where_they_lie(source: str, saved_from: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(torch.bfloat16)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **saved_from)
    steps(model, optimizer)
    # The bits of this moment, although training goes on while they are written.
    save = offload.save_checkpoint(tmp_path, model, optimizer, tag="saved", async_save=True)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, seed=2)
    save.wait()
    other = make_model(torch.bfloat16, seed=5)
    other, resumed = offload.wrap(other, torch.optim.AdamW(other.parameters(), lr=1e-2), **UNIFIED)
    places = [part.data_ptr() for part in states_of(resumed)]
    if source == "checkpoint":
        offload.load_checkpoint(tmp_path, other, resumed)
    else:
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
    assert [part.data_ptr() for part in states_of(resumed)] == places
    assert all(part.device.type == "cpu" for part in states_of(resumed))
    steps(other, resumed, seed=2)
    expected = model.state_dict()
    assert all(same_bits(value, expected[name]) for name, value in other.state_dict().items())
    for index, state in resumed.state_dict()["state"].items():
        ours = optimizer.state_dict()["state"][index]
        assert all(same_bits(value.cpu(), ours[key].cpu()) for key, value in state.items())


def test_unwrap_gives_what_a_resident_run_gives() -> None:
    def run(placement: dict[str, Any]) -> tuple[list[Tensor], dict[int, Any]]:
        model = make_model(torch.bfloat16)
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        steps(model, optimizer)
        model, plain = offload.unwrap(model, optimizer)
        steps(model, plain, seed=2)
        return [p.detach() for p in model.parameters()], plain.state_dict()["state"]

    unified, resident = run(UNIFIED), run(RESIDENT)
    assert all(same_bits(one, other) for one, other in zip(unified[0], resident[0], strict=True))
    for index, state in resident[1].items():
        assert all(same_bits(value, unified[1][index][key]) for key, value in state.items())


def test_weights_written_between_steps_are_the_master() -> None:
    def run(placement: dict[str, Any]) -> Run:
        kept: dict[str, Tensor] = {}

        def write(step: int, model: nn.Module, optimizer: Any) -> None:
            with torch.no_grad(), offload.full_params(model):
                for name, parameter in model.named_parameters():
                    if step % 2 == 0:  # as an EMA is looked at: what comes back is what was
                        kept[name] = parameter.clone()
                        parameter.zero_()
                        parameter.copy_(kept[name])
                    else:
                        parameter[:1].mul_(0.5)

        return wrapped_run(make_model(torch.bfloat16), placement, each_step=write)

    for placement in PLACEMENTS.values():
        assert_same_bits(run(UNIFIED | placement), run(RESIDENT))


def test_other_storage_for_a_parameter() -> None:
    def run(placement: dict[str, Any]) -> Run:
        def move(step: int, model: nn.Module, optimizer: Any) -> None:
            model.head.weight.data = model.head.weight.data * 0.5

        return wrapped_run(make_model(torch.bfloat16), placement, each_step=move)

    assert_same_bits(run(UNIFIED), run(RESIDENT))


# --- when ---------------------------------------------------------------------------------------------------


@pytest.mark.cpu_only
def test_compute_goes_on_and_who_reads_the_states_waits() -> None:
    """The mark behind the update tells that the host may read; it stays behind what is held."""
    model = make_model(torch.bfloat16)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **UNIFIED)
    tokens = next(batches(1))
    loss_of(model, tokens).backward()
    engine = optimizer._engine
    engine.device.hold("to_host")
    optimizer.step()
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())  # none is pending
    loss_of(model, tokens).backward()
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.append(optimizer.state_dict()["state"]))
    reader.start()
    assert not found and not any(engine._tickets[key].done for key in engine.states)
    engine.device.release("to_host")
    reader.join()
    assert found[0].keys() == dict(enumerate(model.parameters())).keys()


@pytest.mark.cpu_only
def test_a_streamed_weight_is_updated_after_its_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device writes to the bytes that uploads read: the update of each comes behind its own."""
    model = make_model(torch.bfloat16)
    placement = UNIFIED | {"gradients": "host", "params": "host"}
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
    steps(model, optimizer, count=1)
    loss_of(model, next(batches(1))).backward()
    engine = optimizer._engine
    order: list[Any] = []
    monkeypatch.setattr(engine.streaming, "uploads_of", lambda parameter: [id(parameter)])
    monkeypatch.setattr(engine, "transfers", Mock(wraps=engine.transfers))
    engine.transfers.wait_on_stream.side_effect = lambda stream, upload: order.append(upload)
    update = _native_state.NativeState.update_on_device

    def updated(state: Any, *rest: Any) -> None:
        order.append(state)
        update(state, *rest)

    monkeypatch.setattr(_native_state.NativeState, "update_on_device", updated)
    optimizer.step()
    assert order == [one for state in engine.states.values() for one in (id(state.parameter), state)]
    monkeypatch.undo()
    assert engine.latest_update(list(model.parameters())) is not None  # which the next uploads wait for


def test_a_step_that_fails_ends_training(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was launched before may still run: the states are given up when it has ended."""
    launched: list[str] = []

    def launch(name: str, *rest: Any) -> None:
        if len(launched) == 5:
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
        launched.append(name)
        kernels._launch(name, *rest)

    monkeypatch.setattr(_native_state, "find_kernels", lambda _: Found(Kernels(launch), None))
    model = make_model(torch.bfloat16)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **UNIFIED)
    loss_of(model, next(batches(1))).backward()
    with pytest.raises(RuntimeError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        optimizer.step()
    engine = optimizer._engine
    assert launched == ["adamw"] * 5 and engine._tickets.keys() == engine.states.keys()
    with pytest.raises(offload.StateError, match=r"an earlier update failed.*CUDA_ERROR_ILLEGAL_ADDRESS"):
        optimizer.step()
    offload.unwrap(model, optimizer)


# --- the driver's memory ------------------------------------------------------------------------------------


@pytest.fixture(params=["discrete", "hmm", "ats", "integrated"])
def guise(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def double(driver_double: DriverDouble, guise: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[DriverDouble]:
    """The engine over the double: its device computes in torch on the CPU."""
    driver_double.set_kind(guise)
    monkeypatch.setenv("OFFLOAD_CUDA_DRIVER", driver_double.path)
    monkeypatch.setattr(_engine, "open_device", lambda _: _native.CudaDevice(driver_path=driver_double.path))
    monkeypatch.setattr(_wrap, "_memory_kind_of", lambda _: guise)
    yield driver_double
    collect()  # errors hold states in cycles
    assert driver_double.misuses() == (0, "")


def wrapped_on(guise: str, model: nn.Module, **options: Any) -> tuple[nn.Module, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if guise in ("ats", "integrated"):
        return offload.wrap(model, optimizer, **UNIFIED, **options)
    with pytest.warns(UserWarning, match=f"optimizer='unified'.*of the kind '{guise}'.*advised against") as met:
        wrapped = offload.wrap(model, optimizer, **UNIFIED, **options)
    assert [one.filename for one in met if one.category is UserWarning] == [__file__]
    return wrapped


@pytest.mark.cpu_only
@pytest.mark.usefixtures("updates")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_guise_trains_with_the_same_bits(double: DriverDouble, guise: str, dtype: torch.dtype) -> None:
    model = make_model(dtype)
    run = train(*wrapped_on(guise, copy.deepcopy(model), pin=True), steps=3)
    pool = run.optimizer.stats().pool
    assert pool["pinned_bytes"] == pool["mapped_bytes"] > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_engine, "open_device", lambda _: _native.HostDevice())
        assert_same_bits(run, wrapped_run(model, RESIDENT, steps=3))
        assert_same_bits(run, wrapped_run(model, HOST, steps=3))


@pytest.mark.cpu_only
def test_no_warning_for_a_part(double: DriverDouble, guise: str, recwarn: pytest.WarningsRecorder) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    _, wrapped = offload.wrap(model, optimizer, optimizer={"unified": 0.5, "host": 0.5}, gradients="device", pin=True)
    assert not [one for one in recwarn if "unified" in str(one.message)]
    assert any(line.startswith("unified: ") for line in wrapped.plan.reason)


FACTS = offload.unified.MemoryFacts(
    device="cuda:0",
    kind="discrete",
    integrated=False,
    managed_memory=True,
    concurrent_managed_access=True,
    pageable_memory_access=False,
    uses_host_page_tables=False,
    direct_access_from_host=False,
    host_native_atomics=False,
    reads_page_locked_memory=True,
    host_numa_node=None,
)
POOL = {"mapped_bytes": 4096, "pinned_bytes": 4096, "pin_refusal": ""}


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("facts", "pool", "words"),
    [
        ({}, {}, None),
        ({"reads_page_locked_memory": False}, {}, "does not read page-locked memory at the host's addresses"),
        ({}, {"pinned_bytes": 1024}, r"does not read 3\.00 KiB that are not page-locked \(pin=False\)"),
        ({}, {"pinned_bytes": 0, "pin_refusal": "no locks"}, r"does not read 4\.00 KiB .* \(no locks\)"),
        ({"pageable_memory_access": True}, {"pinned_bytes": 0}, None),
        ({"pageable_memory_access": True, "reads_page_locked_memory": False}, {}, None),
    ],
)
def test_what_the_device_cannot_read_is_refused(facts: dict[str, Any], pool: dict[str, Any], words: str | None) -> None:
    found = dataclasses.replace(FACTS, **facts)
    if words is None:
        check_reach(found, POOL | pool)
        return
    with pytest.raises(offload.DeviceError, match=f"optimizer='unified': cuda:0 {words}; pass optimizer='host'"):
        check_reach(found, POOL | pool)


def test_a_card_that_cannot_read_them_leaves_the_model_as_it_was(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":
        return  # it reads all memory
    monkeypatch.setattr(_wrap, "classify", lambda _: dataclasses.replace(FACTS, reads_page_locked_memory=False))
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(offload.DeviceError, match="does not read page-locked memory"):
        offload.wrap(model, torch.optim.AdamW(model.parameters()), **UNIFIED)
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    assert all(type(p) is nn.Parameter for p in model.parameters())
