"""Native Lion and Adagrad: the same bits on every ISA and in every placement, and what the published formulas say.

The oracle is AdamW's: bit for bit the sequence in single torch operations. torch.optim.Adagrad itself fuses operations
and takes a square root that is not correctly rounded, so its first step may be some units in the last place away.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload import InvalidArgument, _native
from offload._adagrad import AdagradHyper, adagrad_step_
from offload._lion import LionHyper, lion_step_
from test_adamw_native import COUNTS, FORMATS, ISAS, MASTERS, bits, same_bits, split, ulp
from training import HOST, RESIDENT, Run, assert_same_bits, loss_of, make_model, train

LION = LionHyper(lr=1e-3, beta1=0.9, beta2=0.99, weight_decay=0.1, maximize=False)
ADAGRAD = AdagradHyper(lr=1e-2, lr_decay=0.1, eps=1e-10, weight_decay=0.01, maximize=False)
STEP = 3

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "Lion": lambda p: offload.Lion(p, lr=1e-3, weight_decay=0.1),
    "Lion maximize": lambda p: offload.Lion(p, lr=1e-3, betas=(0.8, 0.95), maximize=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adagrad decays": lambda p: torch.optim.Adagrad(
        p, lr=1e-2, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.5, maximize=True
    ),
}


def wrapped_run(model: nn.Module, make: Make, placement: dict[str, str], **loop: Any) -> Run:
    model = copy.deepcopy(model)
    model, wrapped = offload.wrap(model, make(model.parameters()), **placement)
    return train(model, wrapped, **loop)


# --- the native step ----------------------------------------------------------------------------------------


def lion_reference(p: Tensor, m: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """[Note: the Lion sequence], one torch operation for one rounding."""
    p = p * (1 - LION.lr * LION.weight_decay)
    direction = torch.sign(m * LION.beta1 + g * (1 - LION.beta1))
    return p - LION.lr * direction, m * LION.beta2 + g * (1 - LION.beta2)


def adagrad_reference(p: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """[Note: the Adagrad sequence], likewise."""
    g = g + ADAGRAD.weight_decay * p
    v = v + g * g
    root = v.double().sqrt().float()  # rounded correctly
    return p - (ADAGRAD.lr / (1 + (STEP - 1) * ADAGRAD.lr_decay)) * g / (root + ADAGRAD.eps), v


RULES: dict[str, tuple[Any, str, Callable[..., tuple[Tensor, Tensor]], Callable[..., None]]] = {
    "lion": (LION, "exp_avg", lion_reference, lion_step_),
    "adagrad": (ADAGRAD, "exp_avg_sq", adagrad_reference, adagrad_step_),
}


def normal(count: int, seed: int) -> Tensor:
    """Magnitudes over many binades; zeros are among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) * torch.exp(2 * torch.randn(count, generator=generator))
    return values * (torch.rand(count, generator=generator) > 0.05)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", MASTERS)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_bits_equal_the_sequence_in_torch_operations(rule: str, dtype: torch.dtype, kind: str, isa: str) -> None:
    hyper, argument, reference, _ = RULES[rule]
    for count in COUNTS:
        gradient = normal(count, count).to(dtype)
        master, moment = normal(count, count + 1), normal(count, count + 2).abs()
        expected, expected_moment = reference(master, moment, gradient.float() * 0.25)
        weight = None if kind == "float32" else torch.zeros(count, dtype=getattr(torch, kind.partition("+")[2], None))
        remainder = None
        if kind == "split":
            weight, remainder = split(master)
        held = master if remainder is None else remainder
        _native.update_states(
            gradient=gradient.data_ptr(),
            gradient_format=FORMATS[dtype],
            master=held.data_ptr(),
            master_format=_native.MASTER_SPLIT if kind == "split" else _native.MASTER_FLOAT32,
            weight=0 if weight is None else weight.data_ptr(),
            weight_format=_native.FLOAT32 if weight is None else FORMATS[weight.dtype],
            **{"exp_avg": 0, "exp_avg_sq": 0, argument: moment.data_ptr()},
            count=count,
            scalars=hyper.native_scalars(STEP),
            factors=[(_native.FACTOR_MULTIPLY_WIDE, 0.25)],
            isa=isa,
            threads=2,
        )
        assert same_bits(moment, expected_moment)
        if kind == "split":
            assert weight is not None and remainder is not None
            for ours, theirs in zip((weight, remainder), split(expected), strict=True):
                assert torch.equal(bits(ours), bits(theirs)) if ours.is_floating_point() else torch.equal(ours, theirs)
            continue
        assert same_bits(master, expected)
        if weight is not None:
            half_up = weight.dtype == torch.bfloat16
            assert same_bits(weight, split(expected)[0] if half_up else expected.to(weight.dtype))


@pytest.mark.parametrize("rule", RULES)
def test_the_step_in_torch_operations_is_the_same_sequence(rule: str) -> None:
    hyper, _, reference, step_ = RULES[rule]
    master, moment, gradient = normal(1000, 1), normal(1000, 2).abs(), normal(1000, 3)
    expected = reference(master, moment, gradient)
    step_(master, moment, gradient, hyper.scalars(STEP))
    assert same_bits(master, expected[0]) and same_bits(moment, expected[1])


def test_a_step_of_torch_optim_adagrad_within_four_units_in_the_last_place() -> None:
    start = normal(20_000, 1)
    parameter = nn.Parameter(start.clone())
    stock = torch.optim.Adagrad([parameter], lr=1e-2, lr_decay=0.1, weight_decay=0.01, foreach=False)
    master, total = start.clone(), torch.zeros(20_000)
    for step in range(1, 101):
        parameter.grad = normal(20_000, step)
        stock.step()
        adagrad_step_(master, total, parameter.grad, ADAGRAD.scalars(step))
        if step == 1:
            scale = torch.stack([start.abs(), parameter.detach().abs()]).amax(0)
            assert ((master.double() - parameter.detach().double()).abs() / ulp(scale)).max() <= 4  # 2 was seen
    travelled = (parameter.detach() - start).abs().max()
    assert (master - parameter.detach()).abs().max() <= 4e-5 * travelled  # 9.5e-6 was seen


# --- in wrap ------------------------------------------------------------------------------------------------

usefixtures = pytest.mark.usefixtures("device")


@usefixtures
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_placement_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    model = make_model(dtype, depth=1)
    resident = wrapped_run(model, OPTIMIZERS[name], RESIDENT, micro_batches=2)
    assert not same_bits(resident.weights["head.weight"], model.head.weight.detach())
    states = resident.optimizer.state_dict()["state"]
    for placement in (
        HOST,
        {"optimizer": "host", "gradients": "device", "master": "fp32"},
        {**HOST, "params": "host"},
    ):
        offloaded = wrapped_run(model, OPTIMIZERS[name], placement, micro_batches=2)
        assert_same_bits(offloaded, resident)
        assert offloaded.optimizer.plan.optimizer == "host"
        for index, state in offloaded.optimizer.state_dict()["state"].items():
            assert state.keys() == states[index].keys()
            assert all(same_bits(value.cpu(), states[index][key].cpu()) for key, value in state.items())


@usefixtures
@pytest.mark.parametrize("name", ["Lion", "Lion maximize"])
def test_wrapped_lion_has_the_bits_of_lion_alone_on_fp32(name: str) -> None:
    model = make_model(depth=1)
    plain_model = copy.deepcopy(model)
    plain = train(plain_model, OPTIMIZERS[name](plain_model.parameters()))
    assert_same_bits(wrapped_run(model, OPTIMIZERS[name], HOST), plain)


@usefixtures
def test_wrapped_adagrad_trains_as_torchs() -> None:
    model = make_model(depth=1)
    plain_model = copy.deepcopy(model)
    plain = train(plain_model, torch.optim.Adagrad(plain_model.parameters(), lr=1e-2, foreach=False), steps=20)
    ours = wrapped_run(model, OPTIMIZERS["Adagrad"], HOST, steps=20)
    assert ours.losses == pytest.approx(plain.losses, rel=1e-4)  # 20 steps of some units in the last place each


@usefixtures
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_are_saved_resumed_and_given_back(name: str, dtype: torch.dtype) -> None:
    model = make_model(dtype, depth=1)
    whole = wrapped_run(model, OPTIMIZERS[name], HOST, steps=4)
    first = wrapped_run(model, OPTIMIZERS[name], HOST, steps=4)
    saved, weights = copy.deepcopy(first.optimizer.state_dict()), copy.deepcopy(first.model.state_dict())
    resumed_model = make_model(dtype, seed=9, depth=1)
    resumed_model, resumed = offload.wrap(resumed_model, OPTIMIZERS[name](resumed_model.parameters()), **RESIDENT)
    resumed_model.load_state_dict(weights)
    resumed.load_state_dict(saved)
    assert_same_bits(train(resumed_model, resumed, steps=3), train(whole.model, whole.optimizer, steps=3))

    plain_model, plain = offload.unwrap(first.model, first.optimizer)
    stock = OPTIMIZERS[name](plain_model.parameters())
    assert type(plain) is type(stock)
    stock.load_state_dict(saved)  # the layout is that of the class
    for parameter in plain_model.parameters():
        ours, theirs = plain.state[parameter], stock.state[parameter]
        assert ours.keys() == theirs.keys() - {"master"}
        for key, value in ours.items():
            assert same_bits(value, theirs[key].to(value.dtype))
    train(plain_model, plain, steps=1)


@usefixtures
def test_adagrad_begins_with_its_initial_value_at_the_first_step_and_in_later_groups() -> None:
    model = make_model(depth=1)
    groups = [list(model.blocks.parameters()), list(model.embedding.parameters())]
    stock = torch.optim.Adagrad(groups[0], lr=1e-2, initial_accumulator_value=0.5)
    model, wrapped = offload.wrap(model, stock, **HOST)
    wrapped.add_param_group({"params": groups[1]})
    states = wrapped.state
    assert all((states[p]["sum"] == 0.5).all() and states[p]["step"] == 0 for group in groups for p in group)
    loss_of(model, torch.arange(12).view(2, 6)).backward()
    wrapped.step()
    assert all((wrapped.state[p]["sum"] >= 0.5).all() and wrapped.state[p]["step"] == 1 for p in groups[1])


@usefixtures
@pytest.mark.parametrize("placement", [HOST, RESIDENT], ids=["host", "device"])
def test_adagrad_begins_with_its_initial_value_where_a_later_group_was_frozen(placement: dict[str, str]) -> None:
    """Its state is made by the first step that it has a gradient in."""
    model = make_model()
    rest = [p for p in model.parameters() if p is not model.norm.weight]
    optimizer = torch.optim.Adagrad(rest, lr=1e-2, initial_accumulator_value=0.5)
    model, wrapped = offload.wrap(model, optimizer, **placement)
    late = model.norm.weight.requires_grad_(False)
    wrapped.add_param_group({"params": [late]})
    late.requires_grad_(True)
    loss_of(model, torch.arange(8).view(2, 4)).backward()
    assert late.grad is not None
    expected = 0.5 + late.grad.square()
    wrapped.step()
    assert late.grad.any() and same_bits(wrapped.state[late]["sum"], expected)


@usefixtures
@pytest.mark.parametrize(("name", "moments"), [("Lion", 1), ("Adagrad", 1)])
@pytest.mark.parametrize("placement", [HOST, RESIDENT], ids=["host", "resident"])
def test_one_moment_is_planned_and_kept(name: str, moments: int, placement: dict[str, str]) -> None:
    run = wrapped_run(make_model(torch.bfloat16, depth=1), OPTIMIZERS[name], placement, steps=1)
    count = sum(p.numel() for p in run.model.parameters())
    tier = "host" if placement is HOST else "device"
    assert getattr(run.optimizer.plan, tier).moments == 4 * moments * count
    kept = getattr(run.optimizer.stats(), f"{tier}_bytes")["moments"]
    assert 4 * moments * count <= kept < 8 * count  # blocks of the pool are rounded up


@usefixtures
def test_states_and_groups_of_another_optimizer_are_refused() -> None:
    def wrapped(make: Make) -> offload.OffloadOptimizer:
        return wrapped_run(make_model(depth=1), make, HOST, steps=1).optimizer

    lion, adagrad = wrapped(OPTIMIZERS["Lion"]), wrapped(OPTIMIZERS["Adagrad"])
    adamw = wrapped(lambda p: torch.optim.AdamW(p))
    with pytest.raises(InvalidArgument, match="has no 'betas'; Lion states can be loaded"):
        lion.load_state_dict(adagrad.state_dict())
    with pytest.raises(InvalidArgument, match="has no 'lr_decay'; Adagrad states can be loaded"):
        adagrad.load_state_dict(lion.state_dict())
    with pytest.raises(InvalidArgument, match="has no 'eps'; Adam and AdamW states can be loaded"):
        adamw.load_state_dict(lion.state_dict())
    broken = adagrad.state_dict()
    broken["state"] = {i: {k: v for k, v in s.items() if k != "sum"} for i, s in broken["state"].items()}
    with pytest.raises(InvalidArgument, match="has no 'sum'; Adagrad states can be loaded"):
        adagrad.load_state_dict(broken)


def test_lion_refuses_bad_settings_and_gradients() -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    for bad in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"betas": (0.9,)}, {"weight_decay": float("nan")}):
        with pytest.raises(InvalidArgument, match=f"{next(iter(bad))}="):
            offload.Lion([parameter], **bad)  # type: ignore[arg-type]
    parameter.grad = torch.zeros(2, 2).to_sparse()
    optimizer = offload.Lion([parameter])
    with pytest.raises(InvalidArgument, match="dense"):
        optimizer.step()
    assert not optimizer.state


def test_lion_alone_follows_the_published_formula() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 0.0], dtype=torch.float64))
    optimizer = offload.Lion([parameter], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    p, m = parameter.detach().clone(), torch.zeros(4, dtype=torch.float64)
    for gradient in ([1.0, -1.0, 0.0, 2.0], [-20.0, 1.0, 1.0, -0.5]):
        g = torch.tensor(gradient, dtype=torch.float64)
        parameter.grad = g.clone()
        assert optimizer.step(lambda: 7) == 7
        p = p - 0.1 * (torch.sign(0.9 * m + 0.1 * g) + 0.5 * p)
        m = 0.99 * m + 0.01 * g
        torch.testing.assert_close(parameter.detach(), p, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], m, rtol=1e-14, atol=1e-15)
