"""States of optimizers that run as their own class: taken over, saved, loaded, given back, counted and refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from over_masters import OverMasters, assert_states_equal, is_refused, tier_of
from training import HOST, RESIDENT, batches, loss_of, make_model, same_bits

pytestmark = pytest.mark.usefixtures("device")
PLACEMENTS = pytest.mark.parametrize("placement", [HOST, RESIDENT], ids=["host", "device"])


class LoadsItself(torch.optim.Optimizer):
    """Its sums are in fp64, which torch's load narrows, and had another name in older versions."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    total = self.state[p].setdefault("total", torch.zeros_like(p, dtype=torch.float64))
                    total.mul_(0.9).add_(p.grad)
                    p.sub_(total.mul(group["lr"]).to(p.dtype))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        indices = (index for group in state_dict["param_groups"] for index in group["params"])
        for index, p in zip(indices, (p for group in self.param_groups for p in group["params"]), strict=True):
            saved = state_dict["state"].get(index)
            if saved is not None:
                total = saved["total"] if "total" in saved else saved["sum"]
                self.state[p] = {"total": total.to(p.device, torch.float64, copy=True)}


KINDS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "AdamW amsgrad fused": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, fused=True),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2, t0=1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "loads itself": LoadsItself,
}


def steps(model: nn.Module, optimizer: Any, data: Iterable[Tensor]) -> None:
    for tokens in data:
        loss_of(model, tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().cpu().clone() for p in model.parameters()]


@pytest.mark.cpu_only  # one run crosses tiers, which round alike on the CPU alone
@pytest.mark.parametrize("name", KINDS)
def test_states_go_in_at_wrap_and_out_at_unwrap(name: str) -> None:
    """fp32: stock, offloaded, resident and stock again, each going on from the last, is stock all along."""
    make = KINDS[name]
    model = make_model(depth=1)
    stock = copy.deepcopy(model)
    stock_optimizer = make(stock.parameters())
    optimizer = make(model.parameters())
    for round_, placement in enumerate((None, HOST, RESIDENT, None)):
        steps(stock, stock_optimizer, batches(2, seed=round_))
        if placement is None:
            steps(model, optimizer, batches(2, seed=round_))
        else:
            _, wrapped = offload.wrap(model, optimizer, **placement)
            steps(model, wrapped, batches(2, seed=round_))
            assert_states_equal(wrapped.state_dict(), stock_optimizer.state_dict())
            assert not optimizer.state
            _, unwrapped = offload.unwrap(model, wrapped)
            assert unwrapped is optimizer
        assert_states_equal(weights(model), weights(stock))
        assert_states_equal(optimizer.state_dict(), stock_optimizer.state_dict())


@PLACEMENTS
def test_unwrap_of_a_16_bit_model_gives_the_states_of_stock(placement: dict[str, str]) -> None:
    model = make_model(torch.bfloat16, depth=1)
    stock_model = copy.deepcopy(model)
    stock = KINDS["AdamW amsgrad"](stock_model.parameters())
    steps(stock_model, stock, batches(1))
    model, wrapped = offload.wrap(model, KINDS["AdamW amsgrad"](model.parameters()), **placement)
    steps(model, wrapped, batches(1))
    _, plain = offload.unwrap(model, wrapped)
    for p, q in zip(model.parameters(), stock_model.parameters(), strict=True):
        assert plain.state[p].keys() == stock.state[q].keys()
        for key, value in plain.state[p].items():
            assert (value.dtype, value.device) == (stock.state[q][key].dtype, stock.state[q][key].device), key
    steps(model, plain, batches(1))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@PLACEMENTS
def test_saved_and_resumed(name: str, dtype: torch.dtype, placement: dict[str, str]) -> None:
    """Loaded with weights_only into a fresh wrap, on either tier: the bits of a run that never stopped."""
    make = KINDS[name]
    model = make_model(dtype, depth=1)
    if is_refused(name, placement):
        with pytest.raises(offload.InvalidArgument, match="fused=True"):
            offload.wrap(model, make(model.parameters()), **placement)
        return
    model, optimizer = offload.wrap(model, make(model.parameters()), **placement)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    steps(model, optimizer, batches(2))
    scheduler.step()
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
    steps(model, optimizer, batches(2, seed=5))

    here = torch.get_default_device().type
    for other in (HOST, RESIDENT) if here == "cpu" else (placement,):
        resumed_model = make_model(dtype, depth=1, seed=9)
        resumed_model, resumed = offload.wrap(resumed_model, make(resumed_model.parameters()), **other)
        steps(resumed_model, resumed, batches(1, seed=7))  # what it kept is replaced
        schedule = torch.optim.lr_scheduler.StepLR(resumed, 1, gamma=0.5)
        groups, group = resumed.param_groups, resumed.param_groups[0]
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        untouched = copy.deepcopy(saved[1])
        resumed.load_state_dict(saved[1])
        resumed_model.load_state_dict(saved[0])
        schedule.load_state_dict(saved[2])
        assert resumed.param_groups is groups and groups[0] is group
        assert group["lr"] == optimizer.param_groups[0]["lr"]
        steps(resumed_model, resumed, batches(2, seed=5))
        assert_states_equal(weights(resumed_model), weights(model))
        assert_states_equal(resumed.state_dict(), optimizer.state_dict())
        assert_states_equal(saved[1], untouched)


@PLACEMENTS
def test_a_checkpoint_of_stock_torch(placement: dict[str, str]) -> None:
    """Of a bf16 model: its bf16 states go on in fp32, its weights are the masters."""
    model = make_model(torch.bfloat16, depth=1)
    stock = KINDS["SGD momentum"](model.parameters())
    steps(model, stock, batches(2))
    checkpoint = copy.deepcopy(stock.state_dict())

    plain_model = copy.deepcopy(model)
    plain = OverMasters(plain_model, lambda m: KINDS["SGD momentum"](m.parameters()), tier_of(placement, model))
    plain.inner.load_state_dict(copy.deepcopy(checkpoint))
    steps(plain_model, plain, batches(2, seed=5))

    model, wrapped = offload.wrap(model, KINDS["SGD momentum"](model.parameters()), **placement)
    wrapped.load_state_dict(checkpoint)
    assert all(value["momentum_buffer"].dtype == torch.float32 for value in wrapped.state.values())
    steps(model, wrapped, batches(2, seed=5))
    assert_states_equal(weights(model), weights(plain_model))


@PLACEMENTS
def test_a_class_brings_states_up_to_date_as_it_loads(placement: dict[str, str]) -> None:
    model = make_model(torch.bfloat16, depth=1)
    model, optimizer = offload.wrap(model, LoadsItself(model.parameters()), **placement)
    steps(model, optimizer, batches(2))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, batches(2, seed=5))

    for state in saved[1]["state"].values():
        state["sum"] = state.pop("total")
    resumed_model = make_model(torch.bfloat16, depth=1, seed=9)
    resumed_model, resumed = offload.wrap(resumed_model, LoadsItself(resumed_model.parameters()), **placement)
    resumed_model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert all(state["total"].dtype == torch.float64 for state in resumed.state.values())
    steps(resumed_model, resumed, batches(2, seed=5))
    assert_states_equal(weights(resumed_model), weights(model))
    assert_states_equal(resumed.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize(
    ("master", "words"),
    [
        (torch.zeros(3), r"has shape \(3,\)"),
        (torch.full((24,), torch.nan), "contains NaN"),
        (torch.zeros(24, dtype=torch.int64), "is torch.int64 on cpu"),
        (5.0, "is float"),
    ],
)
def test_state_dicts_that_cannot_be_loaded_change_nothing(master: Any, words: str) -> None:
    model, optimizer = offload.wrap(
        model := make_model(torch.bfloat16, depth=1), KINDS["SGD momentum"](model.parameters()), **HOST
    )
    steps(model, optimizer, batches(1))
    before = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(before)
    wrong["param_groups"][0]["lr"] = 5.0
    wrong["state"][1]["master"] = master
    with pytest.raises(offload.InvalidArgument, match=rf"blocks\.0\.norm\.weight: master {words}"):
        optimizer.load_state_dict(wrong)
    assert_states_equal(optimizer.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("placement", [HOST, RESIDENT, HOST | {"params": "host"}], ids=["host", "device", "streamed"])
@pytest.mark.parametrize("how", ["deleted", "not loaded", "loaded without masters"])
def test_a_state_without_a_master_starts_from_the_weight(
    how: str, placement: dict[str, str], dtype: torch.dtype
) -> None:
    """As a pair that is wrapped then, and as native optimizers: low bits of the old master are forgotten."""
    model: nn.Module = make_model(dtype, depth=1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer = offload.wrap(model, optimizer, **placement)
    steps(model, optimizer, batches(3))
    other: nn.Module = make_model(dtype, seed=3, depth=1)
    other.load_state_dict(model.state_dict())
    fresh: Any = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    saved = copy.deepcopy(optimizer.state_dict())
    if how == "deleted":
        for parameter in model.parameters():
            del optimizer.state[parameter]
    else:
        saved["state"] = {
            index: {"momentum_buffer": state["momentum_buffer"].to(dtype)}
            for index, state in saved["state"].items()
            if how != "not loaded"
        }
        optimizer.load_state_dict(saved)
        fresh.load_state_dict(saved)
    other, fresh = offload.wrap(other, fresh, **placement)
    for each, its_own in ((model, optimizer), (other, fresh)):
        steps(each, its_own, batches(2))
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert same_bits(one, two)
    assert_states_equal(optimizer.state_dict()["state"], fresh.state_dict()["state"])


@PLACEMENTS
def test_groups_have_no_more_keys_after_a_load_and_another_wrap(placement: dict[str, str]) -> None:
    """A load brings defaults up to date; plain torch leaves the groups that are there alone."""
    model: nn.Module = make_model(depth=1)
    optimizer: Any = torch.optim.Adafactor(model.parameters(), lr=1e-2)
    keys = set(optimizer.param_groups[0])
    for _ in range(2):
        model, optimizer = offload.wrap(model, optimizer, **placement)
        steps(model, optimizer, batches(1))
        assert set(optimizer.param_groups[0]) == keys
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        model, optimizer = offload.unwrap(model, optimizer)
    assert set(optimizer.param_groups[0]) == keys


@pytest.mark.cpu_only  # the reference computes on the device, whatever the tier
@PLACEMENTS
def test_add_param_group(placement: dict[str, str]) -> None:
    """Through the class's own method, so with its checks and defaults; a refused group leaves no trace."""

    class Strict(torch.optim.SGD):
        def add_param_group(self, group: dict[str, Any]) -> None:
            if group.get("lr", 0) > 1:
                raise ValueError("lr of at most 1")
            group.setdefault("note", "mine")
            super().add_param_group(group)

    def run(offloaded: bool) -> list[Tensor]:
        model: nn.Module = make_model(depth=1)
        optimizer: Any = Strict(model.blocks.parameters(), lr=0.05, momentum=0.9)
        if offloaded:
            model, optimizer = offload.wrap(model, optimizer, **placement)
        steps(model, optimizer, batches(1))
        optimizer.add_param_group({"params": list(model.embedding.parameters()), "lr": 0.01})
        steps(model, optimizer, batches(2))
        assert [group["note"] for group in optimizer.param_groups] == ["mine", "mine"]
        refused = {"params": list(model.head.parameters()), "lr": 2.0}
        with pytest.raises(ValueError, match="at most 1"):
            optimizer.add_param_group(refused)
        if offloaded:
            with pytest.raises(offload.InvalidArgument, match="differentiable"):
                optimizer.add_param_group(refused | {"lr": 0.5, "differentiable": True})
        assert len(optimizer.param_groups) == 2
        return weights(model)

    assert_states_equal(run(offloaded=True), run(offloaded=False))


@PLACEMENTS
def test_what_is_counted(placement: dict[str, str]) -> None:
    model, optimizer = offload.wrap(
        model := make_model(torch.bfloat16), KINDS["SGD momentum"](model.parameters()), **placement
    )
    steps(model, optimizer, batches(2))
    count = sum(p.numel() for p in model.parameters())
    stats, plan = optimizer.stats(), optimizer.plan
    tiers = [stats.host_bytes, stats.device_bytes]
    here, there = tiers if placement is HOST else tiers[::-1]
    assert here["torch_states"] == 4 * count and "torch_states" not in there
    assert here["master"] >= 4 * count > there.get("master", 0) and not here.get("moments")
    assert stats.steps == 2 and stats.update_s > 0 and stats.hidden_share == 0
    assert any("SGD" in text and "inside step()" in text for text in stats.fallbacks)
    assert any("SGD" in line and "two fp32 moments" in line for line in plan.reason)
    assert plan.master == "fp32"
    assert (plan.host if placement is HOST else plan.device).master == 4 * count
    if placement is HOST:
        assert stats.transfers["to_host_bytes"] >= 4 * count and stats.transfers["to_device_bytes"] >= 4 * count


def test_nothing_is_left_after_unwrap() -> None:
    model, wrapped = offload.wrap(model := make_model(), KINDS["SGD momentum"](model.parameters()), **HOST)
    steps(model, wrapped, batches(2))
    pool = wrapped._engine.pool
    _, plain = offload.unwrap(model, wrapped)
    assert pool.stats()["live_count"] == 0
    # What torch's schedulers look at, and what a fresh optimizer has.
    assert set(vars(plain)) - {"_opt_called"} == set(vars(KINDS["SGD momentum"](model.parameters())))
    assert not plain._optimizer_step_pre_hooks
    with pytest.raises(offload.StateError, match="unwrapped"):
        wrapped.step()


# --- the door -----------------------------------------------------------------------------------------------


class Nested(torch.optim.SGD):
    """Sharpness-aware minimisation and Lookahead are built so."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.base = torch.optim.SGD(self.param_groups, lr=0.1)


class Cached(torch.optim.SGD):
    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.decayed = {id(p): p.dim() > 1 for group in self.param_groups for p in group["params"]}


class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Any) -> Any:
        closure()
        return closure()


class SavesItself(torch.optim.SGD):
    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (torch.optim.LBFGS, "LBFGS is not supported: its step evaluates the model"),
        (NeedsClosure, "NeedsClosure is not supported: its step evaluates the model"),
        (torch.optim.SparseAdam, "SparseAdam is not supported: it takes sparse"),
        (SavesItself, "SavesItself is not supported: it has a state_dict"),
        (Nested, "attribute 'base' holds the model's parameters"),
        (Cached, "attribute 'decayed' holds the model's parameters"),
        (lambda p: torch.optim.SGD(p, lr=0.1, differentiable=True), "differentiable=True"),
        (lambda p: torch.optim.NAdam(p, capturable=True), "capturable=True"),
    ],
)
def test_classes_that_are_refused(make: Any, match: str) -> None:
    model = make_model(depth=1)
    with pytest.raises(offload.InvalidArgument, match=match):
        offload.wrap(model, make(list(model.parameters())), **HOST)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.cpu_only  # offload.AdamW itself refuses other parameters
def test_the_standalone_adamw_is_refused() -> None:
    model = make_model(depth=1)
    with pytest.raises(offload.InvalidArgument, match=r"use torch\.optim\.AdamW"):
        offload.wrap(model, offload.AdamW(model.parameters()), **HOST)


def test_sparse_gradients_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1))
    model, optimizer = offload.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), **RESIDENT)
    model(torch.tensor([1, 2])).sum().backward()
    before = weights(model)
    with pytest.raises(offload.InvalidArgument, match=r"0\.weight.*sparse"):
        optimizer.step()
    assert all(same_bits(one, other) for one, other in zip(weights(model), before, strict=True))
