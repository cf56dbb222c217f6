"""unwrap leaves a plain model and a plain optimizer, and nothing of ours: threads, hooks, bytes and objects counted."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload import _native
from training import HOST, RESIDENT, TinyLM, batches, loss_of, make_model, same_bits
from what_lives import collect, open_files, pool_bytes, threads

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def nothing_of_other_tests() -> None:
    collect()
    _native.end_shared_threads()  # native tests use them, too


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    collect()
    gc.disable()
    yield
    gc.enable()


def hooks_of(model: nn.Module) -> dict[str, Any]:
    """Every hook of every module and parameter, by where it is."""
    found = {
        f"{name}.{key}": dict(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if "hooks" in key and isinstance(value, dict)
    }
    for name, parameter in model.named_parameters():
        found[f"{name}._backward_hooks"] = dict(parameter._backward_hooks or {})
        found[f"{name}._post_accumulate_grad_hooks"] = dict(parameter._post_accumulate_grad_hooks or {})
        found[f"{name}.__dict__"] = dict(vars(parameter))
        found[f"{name}.__class__"] = type(parameter)
    return found


def optimizer_hooks(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {key: dict(value) for key, value in vars(optimizer).items() if "hooks" in key}


def one_step(model: nn.Module, optimizer: Any, seed: int = 1) -> None:
    loss_of(model, next(batches(1, seed=seed))).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()


class WideLM(TinyLM):
    """Wide enough for its updates to run on the shared threads."""

    def __init__(self) -> None:
        super().__init__(vocabulary=40, width=192, depth=2)


@pytest.mark.parametrize("placement", [HOST, RESIDENT], ids=["host", "resident"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_of_ours_remains(dtype: torch.dtype, placement: dict[str, str], no_garbage_collection: None) -> None:
    model: nn.Module = make_model(dtype)
    calls: list[str] = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append("user"))
    plain = torch.optim.AdamW(model.parameters(), lr=1e-2)
    parameters, groups = list(model.parameters()), plain.param_groups
    before = hooks_of(model), optimizer_hooks(plain), threads("offload"), pool_bytes(), open_files()

    model, optimizer = offload.wrap(model, plain, **placement)
    one_step(model, optimizer)
    assert hooks_of(model) != before[0] and optimizer_hooks(plain) != before[1]
    optimizer.synchronize()
    if placement is HOST:
        assert len(threads("offload")) >= 3 and pool_bytes() > before[3]
    engine = weakref.ref(optimizer._engine)
    loss_of(model, next(batches(1))).backward()  # gradients are away when unwrap comes
    model, original = offload.unwrap(model, optimizer)

    assert original is plain and type(original) is torch.optim.AdamW and original.param_groups is groups
    assert engine() is None, "the engine outlives unwrap, though the user may keep the old optimizer"
    assert (hooks_of(model), optimizer_hooks(plain)) == before[:2]
    assert threads("offload") == before[2]
    assert (pool_bytes(), open_files()) == before[3:]
    assert all(one is two for one, two in zip(parameters, model.parameters(), strict=True))
    for parameter in model.parameters():
        assert type(parameter) is nn.Parameter and type(parameter.grad) is Tensor
        assert parameter.is_leaf and parameter.requires_grad
        for value in plain.state[parameter].values():
            assert type(value) is Tensor
    assert calls == ["user", "user"]
    with pytest.raises(offload.StateError, match="was unwrapped"):
        optimizer.state_dict()


def test_shared_threads_end_with_the_last_engine_and_come_back() -> None:
    def wrapped() -> tuple[nn.Module, offload.OffloadOptimizer]:
        torch.manual_seed(0)
        model = WideLM()
        return offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)

    # The caller takes part in a loop: a pool of n has n - 1 threads of its own.
    workers = ["offload-worker"] * (_native.shared_thread_count() - 1)
    first, second = wrapped(), wrapped()
    for model, optimizer in (first, second):
        one_step(model, optimizer)
        optimizer.synchronize()
    assert threads("offload-worker") == workers
    offload.unwrap(*first)
    assert threads("offload-worker") == workers
    offload.unwrap(*second)
    assert threads("offload-worker") == []

    model, optimizer = wrapped()
    one_step(model, optimizer)
    optimizer.synchronize()
    assert threads("offload-worker") == workers
    del model, optimizer
    collect()
    assert threads("offload-worker") == [], "an engine that is dropped ends them, too"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_the_middle_of_accumulation_with_a_step_in_flight(dtype: torch.dtype) -> None:
    """The plain pair goes on as a stock pair does that was given the same weights, gradients and states."""
    model = make_model(dtype)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
    resident = make_model(dtype)
    resident, other = offload.wrap(resident, torch.optim.AdamW(resident.parameters(), lr=1e-2), **RESIDENT)
    one_step(model, optimizer)
    one_step(resident, other)
    moments = copy.deepcopy(other.state_dict()["state"])  # fp32
    model, plain = offload.unwrap(model, optimizer)  # that update may still run, and gradients were not cleared

    stock_model = make_model(dtype)
    stock_model.load_state_dict(resident.state_dict())
    stock = torch.optim.AdamW(stock_model.parameters(), lr=1e-2)
    for state, one, two in zip(moments.values(), stock_model.parameters(), resident.parameters(), strict=True):
        one.grad = two.grad.clone()
        stock.state[one] = {
            "step": state["step"],
            "exp_avg": state["exp_avg"].to(dtype),
            "exp_avg_sq": state["exp_avg_sq"].to(dtype),
        }
    for seed in (2, 3):
        one_step(model, plain, seed)
        one_step(stock_model, stock, seed)
    for one, two in zip(model.parameters(), stock_model.parameters(), strict=True):
        assert same_bits(one.detach(), two.detach()) and same_bits(one.grad, two.grad)
        for key, value in plain.state[one].items():
            assert same_bits(value, stock.state[two][key]), key


@pytest.mark.parametrize("before", [True, False], ids=["before wrap", "after wrap"])
def test_schedulers_act_on_the_plain_optimizer(before: bool, recwarn: pytest.WarningsRecorder) -> None:
    model = make_model()
    plain = torch.optim.AdamW(model.parameters(), lr=0.8)
    scheduler = torch.optim.lr_scheduler.StepLR(plain, 1, gamma=0.5) if before else None
    model, optimizer = offload.wrap(model, plain, **HOST)
    scheduler = scheduler or torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    one_step(model, optimizer)
    scheduler.step()
    model, plain = offload.unwrap(model, optimizer)
    one_step(model, plain)
    scheduler.step()
    assert plain.param_groups[0]["lr"] == 0.2
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_again_and_again_changes_no_bit_of_an_fp32_run() -> None:
    def run(rewrap: bool) -> list[Tensor]:
        model = make_model()
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer = offload.wrap(model, optimizer, **HOST)
        for seed in range(6):
            one_step(model, optimizer, seed)
            if rewrap:
                model, optimizer = offload.unwrap(model, optimizer)
                model, optimizer = offload.wrap(model, optimizer, **(HOST if seed % 2 else RESIDENT))
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    for one, two in zip(run(True), run(False), strict=True):
        assert same_bits(one, two)


def test_states_taken_before_outlive_the_pool() -> None:
    """The way to carry fp32 moments and masters of a 16-bit model over: the pool's pages go with the last tensor."""
    mapped = pool_bytes()
    model = make_model(torch.bfloat16)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
    one_step(model, optimizer)
    exact = optimizer.state_dict()
    expected = copy.deepcopy(exact["state"])
    model, plain = offload.unwrap(model, optimizer)
    for index, state in exact["state"].items():
        for key, value in state.items():
            assert same_bits(value, expected[index][key])
    model, optimizer = offload.wrap(model, plain, **RESIDENT)
    optimizer.load_state_dict(exact)
    del exact, state, value
    for index, state in optimizer.state_dict()["state"].items():
        assert all(same_bits(state[key], expected[index][key]) for key in state)
    offload.unwrap(model, optimizer)
    assert pool_bytes() == mapped


@pytest.mark.parametrize("count", [0, 1, 2])
def test_without_the_optimizers_that_wrap_returned(count: int) -> None:
    """A cell of a notebook that runs twice puts a new optimizer in the place of the wrapped one, and fails then."""
    model = make_model()
    parts = (model.embedding, model.blocks)[:count]
    plain: Any = [torch.optim.AdamW(part.parameters()) for part in parts]
    model, _ = offload.wrap(model, plain or None, **(HOST if count else {"params": "host"}))
    again: Any = torch.optim.AdamW(model.parameters())
    with pytest.raises(offload.StateError, match=r"wrapped already: call offload\.unwrap\(model\) first"):
        offload.wrap(model, again)
    unwrapped, optimizers = offload.unwrap(model)
    assert unwrapped is model
    assert optimizers == (tuple(plain) if count > 1 else plain[0] if plain else None)
    offload.wrap(model, again, **HOST)


def test_twice_or_with_the_wrong_optimizer_is_refused() -> None:
    model, other = make_model(), make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **HOST)
    other, other_optimizer = offload.wrap(other, torch.optim.AdamW(other.parameters()), **HOST)
    with pytest.raises(offload.InvalidArgument, match="pass all 1"):
        offload.unwrap(model, other_optimizer)
    for given, message in (
        ([optimizer, optimizer], "given OffloadOptimizer, OffloadOptimizer: pass all 1"),
        (None, "given no optimizer: pass all 1"),
        (3, "optim=3: give a torch.optim.Optimizer"),
    ):
        with pytest.raises(offload.InvalidArgument, match=message):
            offload.unwrap(model, given)
    with pytest.raises(offload.InvalidArgument, match="model is a OffloadOptimizer: give a torch.nn.Module"):
        offload.unwrap(optimizer, model)
    one_step(model, optimizer)
    offload.unwrap(model, optimizer)
    with pytest.raises(offload.StateError, match="not wrapped"):
        offload.unwrap(model, optimizer)
    offload.unwrap(other, other_optimizer)


@pytest.mark.cpu_only
@pytest.mark.parametrize("lane", ["to_host", "to_device"])
@pytest.mark.parametrize("seen", [True, False], ids=["seen before", "seen by unwrap"])
def test_after_a_failed_update(lane: str, seen: bool) -> None:
    """unwrap tells of a failure that nobody was told of; after that it leaves a pair that takes a checkpoint."""
    model = make_model(torch.bfloat16)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
    one_step(model, optimizer)
    optimizer.zero_grad()
    checkpoint = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    engine, lanes = weakref.ref(optimizer._engine), weakref.ref(optimizer._engine.lanes)
    device = optimizer._engine.device
    device.hold("to_host")
    device.fail_copy(lane, 2)
    loss_of(model, next(batches(1))).backward()
    optimizer.step()
    device.release("to_host")
    del device
    if seen:
        with pytest.raises(offload.OffloadError):
            optimizer.synchronize()
    else:
        hooks = set(hooks_of(model))  # not the hooks themselves: they would keep the engine alive
        with pytest.raises(offload.OffloadError):
            offload.unwrap(model, optimizer)
        assert set(hooks_of(model)) == hooks, "unwrap raised and changed something"
        assert all(module._forward_pre_hooks for module in model.blocks)
    model, plain = offload.unwrap(model, optimizer)
    assert engine() is None and lanes() is None
    assert plain.state == {}
    assert all(type(p) is nn.Parameter and p.grad is None for p in model.parameters())

    model, optimizer = offload.wrap(model, plain, **HOST)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    expected = make_model(torch.bfloat16)
    expected, other = offload.wrap(expected, torch.optim.AdamW(expected.parameters(), lr=1e-2), **HOST)
    one_step(expected, other)
    other.zero_grad()
    for seed in (5, 6):
        one_step(model, optimizer, seed)
        one_step(expected, other, seed)
    for one, two in zip(model.parameters(), expected.parameters(), strict=True):
        assert same_bits(one.detach(), two.detach())


@pytest.mark.cpu_only
def test_a_failed_engine_dies_with_its_model() -> None:
    """Nothing can be trained on with it, so most are dropped without unwrap: the error must not keep them."""

    def fail() -> weakref.ref[Any]:
        model = make_model()
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
        loss_of(model, next(batches(1))).backward()
        optimizer._engine.device.fail_copy("to_device", 1)
        optimizer.step()
        with pytest.raises(offload.OffloadError):
            optimizer.synchronize()
        with pytest.raises(offload.StateError, match="an earlier update failed"):
            optimizer.synchronize()
        return weakref.ref(model)

    model = fail()
    gc.collect()
    assert model() is None


def test_inside_full_params_it_is_refused() -> None:
    """What was written there is on the device until the context ends."""
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), params="host", **HOST)
    with offload.full_params(model), torch.no_grad():
        model.head.weight.fill_(3.0)
        with pytest.raises(offload.StateError, match=r"offload.unwrap\(\) inside .* leave the context first"):
            offload.unwrap(model, optimizer)
    offload.unwrap(model, optimizer)
    assert bool((model.head.weight == 3.0).all())


def test_gradients_of_parameters_outside_the_model_become_plain() -> None:
    """Those of a group that was added, and of a part that the model has lost since."""
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
    outside, lost = nn.Parameter(torch.ones(5)), model.head.weight
    optimizer.add_param_group({"params": [outside]})
    (loss_of(model, next(batches(1))) + 2 * outside.sum()).backward()
    expected = lost.grad.clone()
    model.head = nn.Linear(24, 40, bias=False)
    _, stock = offload.unwrap(model, optimizer)
    for parameter, gradient in ((outside, torch.full((5,), 2.0)), (lost, expected)):
        assert type(parameter.grad) is Tensor and same_bits(parameter.grad, gradient)
        assert type(parameter) is nn.Parameter and not parameter._post_accumulate_grad_hooks
    stock.step()
