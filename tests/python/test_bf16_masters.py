"""bf16 weights that are their own masters: the same bits in every place, what rounding does, the ways in and out.

The oracle of the native core is the step and the rounding in torch operations: no code is shared.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import offload
from offload import InvalidArgument, _native
from offload._adagrad import AdagradHyper, adagrad_step_
from offload._adamw import FORMATS, round_to_weight
from offload._moments import MOMENT_BLOCK, RandomWords, round_stochastically_
from test_adamw_native import ISAS
from test_small_moments import RULES, SEED, STEP, STREAMED, assert_same
from test_small_moments import Case as Float32Case
from training import HOST, RESIDENT, Run, assert_same_bits, make_model, same_bits, train

MOMENTS = ("fp32", "bf16", "int8")
ADAGRAD = AdagradHyper(lr=1e-2, lr_decay=0.1, eps=1e-10, weight_decay=0.1, maximize=False)
ALL_RULES = {**RULES, "adagrad": (ADAGRAD, adagrad_step_, ("exp_avg_sq",))}


class Case(Float32Case):
    """One parameter in bf16 that is its own master, its gradient, and the moments of a rule in one format."""

    rules = ALL_RULES
    master_format, weight_format = _native.MASTER_BFLOAT16, _native.BFLOAT16

    def __init__(self, form: str, rule: str, count: int, gradient_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(form, rule, count, gradient_dtype)
        self.master = self.master.bfloat16()

    def reference(self, step: int = STEP) -> Case:
        weight, self.master = self.master, self.master.float()
        super().reference(step)
        round_stochastically_(weight, self.master, RandomWords(SEED, step), "master")
        self.master = weight
        return self


# --- the native core ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("form", MOMENTS)
def test_bits_equal_the_step_in_torch_operations(form: str, rule: str, dtype: torch.dtype, isa: str) -> None:
    for count in (0, 1, 31, 257, 5003):
        case = Case(form, rule, count, dtype)
        expected = case.clone().reference()
        assert_same(case.step(isa), expected)


@settings(max_examples=25, deadline=None)
@given(
    form=st.sampled_from(MOMENTS),
    rule=st.sampled_from(sorted(ALL_RULES)),
    count=st.integers(0, 1200) | st.integers(32_000, 98_500),
    threads=st.integers(1, 4),
    cut=st.floats(0, 1),
)
def test_bits_do_not_depend_on_isa_threads_or_cuts(form: str, rule: str, count: int, threads: int, cut: float) -> None:
    case = Case(form, rule, count)
    expected = case.clone().step("scalar")
    middle = int(cut * count)
    if form == "int8":
        middle -= middle % MOMENT_BLOCK
    for isa in ISAS:
        assert_same(case.clone().step(isa, threads), expected)
        parts = case.clone().part(0, middle, isa)
        assert_same(parts.part(middle, count, isa) if middle < count else parts, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_rounding_is_between_the_neighbours_and_unbiased(isa: str) -> None:
    """Without gradient and moments a step multiplies the weight by 1 - lr * weight_decay."""
    case = Case("fp32", "adamw", 4096)
    case.gradient.zero_()
    for moment in case.moments:
        moment.fill(0.0)
    begin = case.master.clone()
    exact = begin.float() * torch.tensor(1.0 - 1e-2 * 0.1)
    above, below = exact.abs() * (1 + 2**-7), exact.abs() * (1 - 2**-7)
    total = torch.zeros(4096, dtype=torch.float64)
    for step in range(1, 401):
        case.master.copy_(begin)
        case.step(isa, step=step)
        seen = case.master.float().abs()
        assert ((below <= seen) & (seen <= above)).all()
        total += case.master.double()
    # The mean of 400 lies within 6 deviations of at most half a unit, 2^-8 of the value.
    assert ((total / 400 - exact).abs() <= 6 * 2**-8 * exact.abs() / 20).all()
    assert float((total / 400 * exact.sign()).sum() / exact.abs().sum()) == pytest.approx(1, abs=1e-4)


def test_the_bits_of_masters_and_moments_are_not_the_same() -> None:
    """A moment that is rounded up must not say that its weight is."""
    words, device = RandomWords(SEED, STEP), torch.device("cpu")
    drawn = torch.stack([words.bits(0, 100_000, name, device) for name in ("exp_avg", "exp_avg_sq", "master")])
    assert (torch.corrcoef(drawn.double()) - torch.eye(3)).abs().max() < 0.02
    assert all(abs(float(row.double().mean()) / 32767.5 - 1) < 0.01 for row in drawn)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_shows(isa: str) -> None:
    case = Case("fp32", "adamw", 600)
    case.gradient[300] = float("nan")
    case.master[301] = float("inf")
    expected = case.clone().reference()
    case.step(isa)
    assert case.master[300].isnan() and case.master[301].isinf() and case.master.isfinite().sum() == 598
    assert same_bits(case.master, expected.master)


def test_a_weight_beside_it_is_refused() -> None:
    case = Case("fp32", "adamw", 64)
    before = case.clone()
    arguments: dict[str, Any] = {"gradient": case.gradient.data_ptr(), "gradient_format": _native.BFLOAT16}
    arguments |= {"master": case.master.data_ptr(), "weight": case.master.data_ptr(), "count": 64}
    arguments |= {"master_format": _native.MASTER_BFLOAT16, "weight_format": _native.BFLOAT16}
    for moment in case.moments:
        arguments |= moment.native()
    with pytest.raises(InvalidArgument, match="weight must be null"):
        _native.update_states(**arguments, scalars=case.hyper.native_scalars(1))
    pipeline = _native.StepPipeline(_native.TransferQueue(_native.HostDevice()))
    del arguments["gradient"], arguments["gradient_format"]
    with pytest.raises(InvalidArgument, match="weight is null"):
        pipeline.add_slot(name="weight", upload_source=0, device_weight=0, weight_bytes=0, **arguments)
    assert_same(case, before)


# --- in wrap ------------------------------------------------------------------------------------------------

usefixtures = pytest.mark.usefixtures("device")
MAKERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "lion": lambda p: offload.Lion(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


def wrapped_run(model: nn.Module, placement: dict[str, Any], rule: str = "adamw", **loop: Any) -> Run:
    model = copy.deepcopy(model)
    model, wrapped = offload.wrap(model, MAKERS[rule](model.parameters()), **{"master": "bf16", **placement})
    return train(model, wrapped, **loop)


@usefixtures
@pytest.mark.parametrize(
    ("rule", "moments"), [("adamw", form) for form in MOMENTS] + [("lion", "int8"), ("adagrad", "fp32")]
)
def test_every_placement_gives_the_same_bits(rule: str, moments: str) -> None:
    model = make_model(torch.bfloat16, depth=1)
    form = {"moments": moments}
    resident = wrapped_run(model, {**RESIDENT, **form}, rule, micro_batches=2)
    states = resident.optimizer.state_dict()["state"]
    for placement in (HOST, {"optimizer": 0.5, "gradients": "host"}, STREAMED, {**HOST, "lazy": False}):
        offloaded = wrapped_run(model, {**placement, **form}, rule, micro_batches=2)
        assert_same_bits(offloaded, resident)
        assert offloaded.optimizer.stats().host_bytes["moments"] > 0
        for index, state in offloaded.optimizer.state_dict()["state"].items():
            assert state["master"].dtype == torch.bfloat16
            assert all(same_bits(value.cpu(), states[index][key].cpu()) for key, value in state.items())


@usefixtures
def test_bits_follow_the_order_in_memory() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 5), nn.Flatten(), nn.Linear(16, 4))
    model = model.to(torch.bfloat16, memory_format=torch.channels_last)

    def run(placement: dict[str, str]) -> dict[str, Tensor]:
        ours = copy.deepcopy(model)
        ours, optimizer = offload.wrap(ours, MAKERS["adamw"](ours.parameters()), master="bf16", **placement)
        for step in range(4):
            images = torch.randn(2, 3, 5, 5, generator=torch.Generator("cpu").manual_seed(step), device="cpu")
            ours(images.to(ours[0].weight.device, torch.bfloat16)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: value.cpu().clone() for name, value in ours.state_dict().items()}

    resident, offloaded = run(RESIDENT), run(HOST)
    assert all(same_bits(value, offloaded[name]) for name, value in resident.items())


@usefixtures
def test_losses_stay_near_those_of_fp32_and_the_seed_decides_the_bits() -> None:
    model = make_model(torch.bfloat16, depth=1)
    exact = wrapped_run(model, {**HOST, "master": "auto"}, steps=20)
    first = wrapped_run(model, HOST, steps=20)
    assert_same_bits(first, wrapped_run(model, HOST, steps=20))
    other = wrapped_run(model, {**HOST, "rounding_seed": 1}, steps=20)
    assert first.losses != exact.losses and first.losses != other.losses
    assert first.losses[-1] == pytest.approx(exact.losses[-1], rel=0.02)


@usefixtures
def test_a_small_learning_rate_still_moves_the_weights() -> None:
    """Rounded to nearest they would all stand still: a step of 1e-5 is far below half a unit of a weight of 1."""
    weight = torch.ones(64, 64, dtype=torch.bfloat16)
    model = nn.Linear(64, 64, bias=False)
    model.weight = nn.Parameter(weight)
    model, optimizer = offload.wrap(
        model, torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0), master="bf16", **HOST
    )
    for _ in range(50):
        model(torch.ones(1, 64, dtype=torch.bfloat16, device=model.weight.device)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = float(1 - model.weight.detach().double().mean())
    # 50 steps of 1e-5; below 1 a unit is 2^-8, so its mean over 4096 weights has a deviation of 2e-5.
    assert moved == pytest.approx(50e-5, abs=1e-4)


@usefixtures
@pytest.mark.parametrize(("moments", "state"), [("fp32", 8), ("bf16", 4), ("int8", 2)])
@pytest.mark.parametrize("placement", [HOST, RESIDENT], ids=["host", "resident"])
def test_bytes_are_planned_and_kept(moments: str, state: int, placement: dict[str, str]) -> None:
    run = wrapped_run(make_model(torch.bfloat16, depth=1), {**placement, "moments": moments}, steps=1)
    sizes = [p.numel() for p in run.model.parameters()]
    scales = sum(8 * math.ceil(size / MOMENT_BLOCK) for size in sizes) if moments == "int8" else 0
    plan, stats = run.optimizer.plan, run.optimizer.stats()
    assert plan.master == "bf16" and "rounded stochastically: lossy" in plan.explain()
    if placement is HOST:  # a working weight of two bytes, and nothing beside it but moments
        assert plan.host.total - plan.host.gradients == (2 + state) * sum(sizes) + scales
        assert stats.host_bytes["master"] == plan.host.master == 0
        assert plan.host.moments <= stats.host_bytes["moments"] <= plan.host.moments + 256 * 4 * len(sizes)
    else:
        assert plan.device.moments == state * sum(sizes) + scales == stats.device_bytes["moments"]
        assert stats.device_bytes["master"] == plan.device.master == 0


@usefixtures
@pytest.mark.parametrize("lazy", [True, False])
def test_weights_that_are_written_are_the_masters(lazy: bool) -> None:
    """Other weights that are swapped in and out leave training as it was; what stays written is where it goes on."""
    model = make_model(torch.bfloat16, depth=1)

    def swapped(step: int, model: nn.Module, optimizer: Any) -> None:
        kept = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5)
            for p, value in zip(model.parameters(), kept, strict=True):
                p.copy_(value)

    def scaled(step: int, model: nn.Module, optimizer: Any) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.75)

    for placement in (HOST, RESIDENT):
        plain = wrapped_run(model, {**placement, "lazy": lazy})
        assert_same_bits(wrapped_run(model, {**placement, "lazy": lazy}, each_step=swapped), plain)
    assert_same_bits(
        wrapped_run(model, {**HOST, "lazy": lazy}, each_step=scaled), wrapped_run(model, RESIDENT, each_step=scaled)
    )


@usefixtures
@pytest.mark.parametrize("master", ["fp32", "split", "bf16"])
@pytest.mark.parametrize("saved_master", ["fp32", "split", "bf16"])
def test_states_move_between_formats(saved_master: str, master: str, tmp_path: Path) -> None:
    model = make_model(torch.bfloat16, depth=1)
    form = {"moments": "int8"}
    first = wrapped_run(model, {**HOST, **form, "master": saved_master}, steps=4)
    saved, weights = copy.deepcopy(first.optimizer.state_dict()), copy.deepcopy(first.model.state_dict())
    offload.save_checkpoint(tmp_path, first.model, first.optimizer, tag="a", async_save=True).wait()
    runs = []
    for placement in (HOST, RESIDENT, STREAMED):
        for by_checkpoint in (False, True):
            resumed = make_model(torch.bfloat16, seed=9, depth=1)
            resumed, optimizer = offload.wrap(
                resumed, torch.optim.AdamW(resumed.parameters()), **{**placement, **form, "master": master}
            )
            if by_checkpoint:
                offload.load_checkpoint(tmp_path, resumed, optimizer)
            else:
                resumed.load_state_dict(weights)
                optimizer.load_state_dict(saved)
            for name, value in resumed.state_dict().items():
                assert same_bits(value.cpu(), weights[name].cpu())
            names = [name for name, _ in resumed.named_parameters()]
            for name, state in zip(names, optimizer.state_dict()["state"].values(), strict=True):
                assert same_bits(round_to_weight(state["master"].float(), torch.bfloat16).cpu(), weights[name].cpu())
            runs.append(train(resumed, optimizer, steps=3))
    for run in runs[1:]:
        assert_same_bits(run, runs[0])
    if {saved_master, master} <= {"fp32", "split"} or master == saved_master:
        assert_same_bits(runs[0], train(first.model, first.optimizer, steps=3))


@usefixtures
@pytest.mark.parametrize("placement", [{"optimizer": "device"}, {"optimizer": 0.5}], ids=str)
def test_states_of_weights_that_are_away_are_read_and_saved(placement: dict[str, Any], tmp_path: Path) -> None:
    """A state on the device has its master where the weight is, and that comes and goes."""
    first = wrapped_run(make_model(torch.bfloat16, depth=1), {**STREAMED, **placement}, steps=3)
    saved = copy.deepcopy(first.optimizer.state_dict())
    for (name, p), state in zip(first.model.named_parameters(), saved["state"].values(), strict=True):
        for master in (state["master"], first.optimizer.state[p]["master"]):
            assert same_bits(master, first.weights[name]), name
    saving = offload.save_checkpoint(tmp_path, first.model, first.optimizer, tag="a", async_save=True)
    runs = [train(first.model, first.optimizer, steps=2)]
    saving.wait()
    for by_checkpoint in (False, True):
        model = make_model(torch.bfloat16, seed=9, depth=1)
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), master="bf16", **RESIDENT)
        if by_checkpoint:
            offload.load_checkpoint(tmp_path, model, optimizer)
        else:
            model.load_state_dict(first.weights)
            optimizer.load_state_dict(saved)
        runs.append(train(model, optimizer, steps=2))
    for run in runs[1:]:
        assert_same_bits(run, runs[0])


@usefixtures
def test_an_exported_checkpoint_has_the_weights(tmp_path: Path) -> None:
    run = wrapped_run(make_model(torch.bfloat16, depth=1), HOST, steps=2)
    offload.save_checkpoint(tmp_path / "saved", run.model, run.optimizer, tag="a")
    path = offload.export_checkpoint(tmp_path / "saved", tmp_path / "model.safetensors", dtype="fp32")
    from safetensors.torch import load_file

    exported = load_file(path)
    assert all(same_bits(exported[name], value.float().cpu()) for name, value in run.weights.items())


@usefixtures
def test_unwrap_gives_a_plain_pair() -> None:
    run = wrapped_run(make_model(torch.bfloat16, depth=1), HOST, steps=3)
    model, plain = offload.unwrap(run.model, run.optimizer)
    assert all(same_bits(model.state_dict()[name], value) for name, value in run.weights.items())
    train(model, plain, steps=1)


@usefixtures
def test_what_it_is_not_for_is_refused() -> None:
    bf16, fp16 = make_model(torch.bfloat16, depth=1), make_model(torch.float16, depth=1)
    with pytest.raises(InvalidArgument, match="master='bf16': SGD runs as itself, over fp32 masters; .*'auto'"):
        offload.wrap(bf16, torch.optim.SGD(bf16.parameters()), master="bf16", **HOST)
    with pytest.raises(InvalidArgument, match="master='bf16' needs bfloat16 and parameter '.*' is float16"):
        offload.wrap(fp16, torch.optim.AdamW(fp16.parameters()), master="bf16", **HOST)
    with pytest.raises(InvalidArgument, match="master='bf16' with optimizer='disk': .*optimizer='host'"):
        offload.wrap(bf16, torch.optim.AdamW(bf16.parameters()), master="bf16", optimizer="disk", disk_path="/tmp")
    assert all(type(p) is nn.Parameter for model in (bf16, fp16) for p in model.parameters())


@usefixtures
def test_fp32_weights_are_exact_all_the_same() -> None:
    model = make_model(depth=1)
    assert_same_bits(wrapped_run(model, HOST), wrapped_run(model, {**HOST, "master": "auto"}))
