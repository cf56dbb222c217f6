"""`optimizer="unified"`: the device updates states that lie on the host's side, with the bits of other placements."""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from driver_double import DriverDouble
from torch import Tensor, nn

import offload
from offload import _engine, _native, _native_state, _state_homes, _wrap
from offload._config import Config
from offload._kernels import Found, Kernels
from offload._parameter_size import ParameterSize
from offload._plan import Plan, TierBytes, make_plan
from offload._state_homes import StateHomes
from offload._unified import Placement
from offload._unified_states import UnifiedStates
from training import HOST, RESIDENT, Run, assert_same_bits, batches, loss_of, make_model, same_bits, train, wrapped_run
from what_lives import collect

pytestmark = pytest.mark.usefixtures("device")

UNIFIED: dict[str, Any] = {"optimizer": "unified", "gradients": "device"}
BIG = 2**50


def plan_of(kind: Any = None, *, device_bytes: int = BIG, count: int = 100, **options: Any) -> Plan:
    parameters = [ParameterSize("a", count, 2, "bfloat16"), ParameterSize("b", 10, 4, "float32")]
    placement = {"optimizer": "unified", "gradients": "device", **options}
    return make_plan(
        parameters,
        Config(**placement),
        device_kind="cuda",
        device_bytes=device_bytes,
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
    return [part for part in [*parts, *(s.master for s in states)] if part is not None and part.numel() > 0]


# --- the plan -----------------------------------------------------------------------------------------------


@pytest.mark.cpu_only
def test_states_are_a_tier_of_their_own_within_the_host_budget() -> None:
    plan = plan_of("ats")
    assert (plan.optimizer, plan.params, plan.master) == ("unified", "device", "fp32")
    assert plan.device == TierBytes(weights=240, gradients=240) and plan.host == TierBytes()
    assert plan.unified == TierBytes(master=400, moments=880)
    assert plan.keeps_state("a") and "unified" in plan.explain().splitlines()[0]
    assert plan_of(host_budget=1280).unified == plan.unified
    with pytest.raises(offload.OutOfHostMemory, match=r"1\.25 KiB needed, 1\.25 KiB available.*\n.*unified"):
        plan_of(host_budget=1279)
    streamed = plan_of(params="host", gradients="host")
    assert streamed.host == TierBytes(working=240, gradients=240) and streamed.unified == plan.unified
    assert plan_of(activations="host", host_budget=3280).activation_host_bytes == 1500  # 3/4 of what is left


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (None, "on the host's side and updated by the device$"),
        ("integrated", "one memory for both"),
        ("ats", "reads and writes 2.50 KiB a step over the coherent link"),
        ("hmm", "advised against on a card of the kind 'hmm', which reads and writes 2.50 KiB a step"),
        ("discrete", "advised against on a card of the kind 'discrete'.*optimizer='host' copies 480 B"),
    ],
)
def test_the_kind_of_device_decides_the_advice(kind: Any, words: str) -> None:
    assert len([line for line in plan_of(kind).reason if line.startswith("unified memory: 1.25 KiB")]) == 1
    assert re.search(words, plan_of(kind).explain(), re.MULTILINE)


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", ["discrete", "hmm", "ats", "integrated"])
def test_on_a_card_that_is_not_coherent_they_must_fit_its_free_memory(kind: Any) -> None:
    device_budget = 2000  # of the user's; what the driver has free is another matter
    plan_of(kind, device_bytes=1760, device_budget=device_budget)
    if kind in ("discrete", "hmm"):
        words = r"1\.25 KiB of states and 480 B.*1\.72 KiB.*optimizer='host'"
        with pytest.raises(offload.InvalidArgument, match=words):
            plan_of(kind, device_bytes=1759, device_budget=device_budget)
    else:
        plan_of(kind, device_bytes=1759, device_budget=device_budget)


@pytest.mark.cpu_only
def test_auto_never_takes_it() -> None:
    for gradients in ("auto", "device", "host"):
        plan = plan_of("ats", optimizer="auto", gradients=gradients, device_budget=600)
        assert plan.optimizer == "host" and plan.unified == TierBytes()


@pytest.mark.cpu_only
def test_only_states_can_be_there() -> None:
    with pytest.raises(offload.InvalidArgument, match="gradients='unified'"):
        Config(gradients="unified")  # type: ignore[arg-type]
    with pytest.raises(offload.InvalidArgument, match="legal values are .*'unified'"):
        Config(optimizer="unifed")  # type: ignore[arg-type]


# --- the bits -----------------------------------------------------------------------------------------------

PLACEMENTS: dict[str, dict[str, Any]] = {
    "gradients stay": {},
    "gradients leave": {"gradients": "host"},
    "streamed": {"gradients": "host", "params": "host"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("loop", [{"clip": 0.3}, {"micro_batches": 3}], ids=["clip", "accumulate"])
@pytest.mark.filterwarnings("ignore:optimizer='unified'")
def test_bits_equal_host_and_resident(dtype: torch.dtype, placement: dict[str, Any], loop: dict[str, Any]) -> None:
    model = make_model(dtype)
    unified = wrapped_run(model, UNIFIED | placement, **loop)
    assert_same_bits(unified, wrapped_run(model, RESIDENT, **loop))
    assert_same_bits(unified, wrapped_run(model, HOST, **loop))
    stats, plan = unified.optimizer.stats(), unified.optimizer.plan
    assert stats.unified_bytes == {"master": plan.unified.master, "moments": plan.unified.moments}
    assert stats.unified_bytes["moments"] == 8 * plan.trainable_count
    assert "moments" not in stats.device_bytes and stats.host_bytes["moments"] == 0
    assert stats.pool["budget_bytes"] == plan.host_capacity - plan.unified.total
    assert "unified moments" in str(stats) and stats.to_dict()["unified_bytes"] == stats.unified_bytes


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, offload.Lion])
@pytest.mark.filterwarnings("ignore:optimizer='unified'")
def test_the_other_native_classes(kind: Any) -> None:
    def run(placement: dict[str, Any]) -> Run:
        model = make_model(torch.bfloat16)
        return train(*offload.wrap(model, kind(model.parameters(), lr=1e-2), **placement))

    assert_same_bits(run(UNIFIED), run(HOST))


@pytest.mark.parametrize("moments", ["bf16", "int8"])
@pytest.mark.filterwarnings("ignore:optimizer='unified'")
def test_small_moments(moments: str) -> None:
    model = make_model(torch.bfloat16)
    unified = wrapped_run(model, UNIFIED | {"moments": moments})
    assert_same_bits(unified, wrapped_run(model, HOST | {"moments": moments}))
    stats, plan = unified.optimizer.stats(), unified.optimizer.plan
    assert stats.unified_bytes["moments"] == plan.unified.moments


@pytest.mark.filterwarnings("ignore:optimizer='unified'")
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
    with pytest.raises(offload.InvalidArgument, match=r"SGD cannot have its states in unified.*optimizer='host'"):
        offload.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **UNIFIED)
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())


# --- states that come and go --------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["checkpoint", "state_dict"])
@pytest.mark.parametrize("saved_from", [UNIFIED, HOST], ids=["unified", "host"])
@pytest.mark.filterwarnings("ignore:optimizer='unified'")
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
    assert resumed.stats().unified_bytes["moments"] == resumed.plan.unified.moments > 0
    steps(other, resumed, seed=2)
    expected = model.state_dict()
    assert all(same_bits(value, expected[name]) for name, value in other.state_dict().items())
    for index, state in resumed.state_dict()["state"].items():
        ours = optimizer.state_dict()["state"][index]
        assert all(same_bits(value.cpu(), ours[key].cpu()) for key, value in state.items())


@pytest.mark.filterwarnings("ignore:optimizer='unified'")
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


# --- the driver's memory ------------------------------------------------------------------------------------


@pytest.fixture(params=["discrete", "hmm", "ats", "integrated"])
def guise(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def double(driver_double: DriverDouble, guise: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[DriverDouble]:
    """The engine over the double: its device computes in torch on the CPU, so torch sees the states from there."""
    driver_double.set_kind(guise)
    monkeypatch.setenv("OFFLOAD_CUDA_DRIVER", driver_double.path)
    monkeypatch.setattr(_engine, "open_device", lambda _: _native.CudaDevice(driver_path=driver_double.path))
    monkeypatch.setattr(_state_homes, "UnifiedStates", lambda _: UnifiedStates(torch.device("cuda", 0), "host"))
    monkeypatch.setattr(_wrap, "_memory_kind_of", lambda _: guise)
    yield driver_double
    collect()  # errors hold states in cycles
    assert driver_double.live("managed") == 0
    assert driver_double.misuses() == (0, "")


def wrapped_on(guise: str, model: nn.Module, **options: Any) -> tuple[nn.Module, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if guise in ("ats", "integrated"):
        return offload.wrap(model, optimizer, **UNIFIED, **options)
    with pytest.warns(UserWarning, match=f"optimizer='unified'.*advised against.* of the kind '{guise}'") as met:
        wrapped = offload.wrap(model, optimizer, **UNIFIED, **options)
    assert [one.filename for one in met if one.category is UserWarning] == [__file__]
    return wrapped


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own_kernel", [False, True], ids=["torch", "kernel"])
def test_every_guise_trains_with_the_same_bits(
    double: DriverDouble, guise: str, dtype: torch.dtype, own_kernel: bool, kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if own_kernel:
        monkeypatch.setattr(_native_state, "find_kernels", lambda _: Found(kernels, None))
    model = make_model(dtype)
    run = train(*wrapped_on(guise, copy.deepcopy(model), pin=True), steps=3)
    parts = states_of(run.optimizer)
    hints = Placement(None, (), False, None) if guise == "integrated" else Placement("host", ("device",), False, None)
    assert len(parts) == sum(2 + (dtype != torch.float32) for _ in model.parameters())
    for part in parts:
        assert offload.unified.placement(part) == hints
        block = _native.UnifiedBlock.find(part.data_ptr(), part.nbytes)
        assert block is not None and block.kind == "managed"
        assert part.untyped_storage().nbytes() == part.nbytes  # what is copied of a state is that state
    assert double.live("managed") == 1  # one block, however many arrays
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_engine, "open_device", lambda _: _native.HostDevice())
        assert_same_bits(run, wrapped_run(model, RESIDENT, steps=3))
        assert_same_bits(run, wrapped_run(model, HOST, steps=3))


@pytest.mark.cpu_only
def test_the_memory_ends_with_the_states(double: DriverDouble, guise: str) -> None:
    model, optimizer = wrapped_on(guise, make_model())
    steps(model, optimizer)
    kept = next(iter(optimizer.state_dict()["state"].values()))["exp_avg"]
    value = kept.clone()
    offload.unwrap(model, optimizer)
    del optimizer
    gc.collect()
    assert double.live("managed") == 1 and same_bits(kept, value)
    del kept


@pytest.mark.cpu_only
@pytest.mark.parametrize("guise", ["discrete", "ats"], indirect=True)
@pytest.mark.parametrize("params", ["device", "host"])
def test_what_the_driver_has_no_room_for_changes_nothing(double: DriverDouble, guise: str, params: str) -> None:
    """The plan measured more than is free when the states are made."""
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    if guise == "ats":
        double.fail("cuMemAdvise", 1, 2)
        expected: Any = pytest.raises(offload.DeviceError, match="cuMemAdvise")
    else:
        double.set_free_bytes(1000)
        expected = pytest.raises(offload.InvalidArgument, match=r"bytes of managed memory.*1000 bytes free")
    with expected:
        wrapped_on(guise, model, params=params)
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    assert all(type(p) is nn.Parameter for p in model.parameters())


@pytest.mark.cpu_only
@pytest.mark.parametrize("guise", ["ats"], indirect=True)
def test_an_error_keeps_no_memory(double: DriverDouble, guise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds it holds the frames that it came through."""
    make, made = StateHomes.make, []

    def fail_at_last(homes: StateHomes, name: str, *rest: Any) -> Any:
        assert double.live("managed") == 1
        if len(made) == 5:
            raise offload.OutOfHostMemory("no room for the sixth")
        made.append(name)
        return make(homes, name, *rest)

    monkeypatch.setattr(StateHomes, "make", fail_at_last)
    with pytest.raises(offload.OutOfHostMemory, match="the sixth") as held:
        wrapped_on(guise, make_model())
    assert double.live("managed") == 0 and held.traceback


@pytest.mark.cpu_only
def test_arrays_come_from_one_block_while_it_lasts(double: DriverDouble, guise: str) -> None:
    memory = UnifiedStates(torch.device("cuda", 0), "host")
    memory.reserve(256 + 8)
    first, second = memory.take(torch.uint8, 3), memory.take(torch.int16, 4)
    assert second.data_ptr() - first.data_ptr() == 256 and memory.take(torch.float32, 0).numel() == 0
    third = memory.take(torch.float32, 5)
    blocks = [_native.UnifiedBlock.find(part.data_ptr(), part.nbytes) for part in (first, second, third)]
    assert all(blocks) and blocks[0].address == blocks[1].address != blocks[2].address  # type: ignore[union-attr]
    for value, part in enumerate((first, second, third)):
        part.fill_(value)
    assert [part.tolist() for part in (first, second, third)] == [[0] * 3, [1] * 4, [2.0] * 5]
    with pytest.raises(offload.InvalidArgument, match="9 bytes from byte 256 on are not inside a block of 264"):
        blocks[0].dlpack("host", offset=256, nbytes=9)  # type: ignore[union-attr]
    del blocks


@pytest.mark.filterwarnings("ignore:optimizer='unified'")
def test_on_a_card_the_states_lie_on_the_hosts_side(device: torch.device) -> None:
    model = make_model(torch.bfloat16)
    run = train(*offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **UNIFIED), steps=2)
    for part in states_of(run.optimizer):
        assert part.device == device
        if device.type == "cpu":
            assert _native.UnifiedBlock.find(part.data_ptr(), part.nbytes) is None  # memory like any other
        elif offload.unified.classify(device).concurrent_managed_access:
            placed = offload.unified.placement(part)
            assert placed.preferred_location in ("host", None) and "host" not in placed.accessed_by
            assert offload.unified.alias(part, "host").device.type == "cpu"
