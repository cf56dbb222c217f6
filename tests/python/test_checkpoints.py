"""optimizer.state_dict() and load_state_dict(): torch's own layout, fp32, in place, all or nothing."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from test_memory import Allocations
from training import HOST, RESIDENT, TinyLM, batches, loss_of, make_model, same_bits, train

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLACEMENTS = {"host": HOST, "resident": RESIDENT, "fp32 master": {**HOST, "master": "fp32"}}


def wrapped(
    dtype: torch.dtype = torch.float32, placement: dict[str, Any] = HOST, *, seed: int = 0, lr: float = 1e-2
) -> tuple[TinyLM, offload.OffloadOptimizer]:
    model = make_model(dtype, seed=seed)
    return offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=lr), **placement)


def steps(model: nn.Module, optimizer: Any, count: int = 3, seed: int = 1) -> None:
    for tokens in batches(count, seed=seed):
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def bits_of(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Everything that training depends on, copied."""
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        bits |= {f"{index}.{key}": value.clone() for key, value in state.items()}
    return bits


def assert_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert same_bits(one[name], other[name]), name


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layout_is_torchs_with_fp32_moments(dtype: torch.dtype, placement: dict[str, Any]) -> None:
    model, optimizer = wrapped(dtype, placement)
    tier = torch.device("cpu") if placement["optimizer"] == "host" else next(model.parameters()).device
    assert optimizer.state_dict()["state"] == {}
    steps(model, optimizer)
    ours = optimizer.state_dict()
    plain = make_model(dtype)
    stock = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    steps(plain, stock)
    theirs = stock.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in ours["state"].items():
        like = theirs["state"][index]
        assert state.keys() - like.keys() == (set() if dtype == torch.float32 else {"master"})
        assert same_bits(state["step"], like["step"])
        for key in state.keys() - {"step"}:
            assert state[key].dtype == torch.float32 and state[key].device == tier
            assert state[key].shape == like["exp_avg"].shape


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mmap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loading_is_in_place_and_moves_nothing(dtype: torch.dtype, mmap: bool, tmp_path: Path) -> None:
    model, optimizer = wrapped(dtype)
    steps(model, optimizer)
    expected = bits_of(model, optimizer)
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    assert path.stat().st_size < 20_000 + sum(value.nbytes for value in expected.values()) * 1.3
    saved = torch.load(path, weights_only=True, mmap=mmap)

    other, resumed = wrapped(dtype, seed=5, lr=3.0)
    steps(other, resumed, count=1, seed=2)
    groups, parameters = resumed.param_groups, list(other.parameters())
    group = groups[0]
    addresses = [
        [value.data_ptr() for key, value in state.items() if key.startswith("exp_avg")]
        for state in resumed.state.values()
    ]
    weights = [p.data_ptr() for p in parameters]
    before = resumed.stats()
    with Allocations() as allocations:
        resumed.load_state_dict(saved["optimizer"])
    assert allocations.left < 1000
    other.load_state_dict(saved["model"])
    after = resumed.stats()
    assert after.transfers == before.transfers and after.host_bytes == before.host_bytes
    assert resumed.param_groups is groups and groups[0] is group and group["lr"] == 1e-2
    assert all(one is two for one, two in zip(group["params"], other.parameters(), strict=True))
    assert weights == [p.data_ptr() for p in other.parameters()]
    assert addresses == [
        [value.data_ptr() for key, value in state.items() if key.startswith("exp_avg")]
        for state in resumed.state.values()
    ]
    assert_bits(bits_of(other, resumed), expected)
    steps(model, optimizer, seed=3)
    steps(other, resumed, seed=3)
    assert_bits(bits_of(other, resumed), bits_of(model, optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stock_torch_loads_what_we_save(dtype: torch.dtype) -> None:
    model, optimizer = wrapped(dtype)
    steps(model, optimizer)
    plain = make_model(dtype, seed=4)
    stock = torch.optim.AdamW(plain.parameters(), lr=5.0)
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    plain.load_state_dict(saved["model"])
    stock.load_state_dict(saved["optimizer"])
    for parameter, state in zip(plain.parameters(), saved["optimizer"]["state"].values(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert same_bits(stock.state[parameter][key], state[key].to(dtype))
    steps(plain, stock)
    assert stock.param_groups[0]["lr"] == 1e-2
    assert {state["step"].item() for state in stock.state.values()} == {6.0}


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_we_load_what_stock_torch_saves(dtype: torch.dtype, placement: dict[str, Any]) -> None:
    """The same as wrapping the stock pair itself, also into an optimizer whose masters have low bits of their own."""
    plain = make_model(dtype)
    stock = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    steps(plain, stock)
    saved = copy.deepcopy({"model": plain.state_dict(), "optimizer": stock.state_dict()})
    model, optimizer = wrapped(dtype, placement, lr=1e-3)
    steps(model, optimizer, seed=8)
    optimizer.load_state_dict(saved["optimizer"])
    model.load_state_dict(saved["model"])
    steps(model, optimizer, seed=2)
    direct, direct_optimizer = offload.wrap(plain, stock, **placement)
    steps(direct, direct_optimizer, seed=2)
    assert_bits(bits_of(model, optimizer), bits_of(direct, direct_optimizer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_a_state_without_master_or_none_at_all_forgets_the_low_bits(
    dtype: torch.dtype, placement: dict[str, Any]
) -> None:
    """Weights stay as they are, so nothing but the load itself can tell the masters."""
    model, optimizer = wrapped(dtype, placement)
    steps(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        del state["master"]
    del saved["state"][1]
    optimizer.load_state_dict(saved)
    parameters = list(model.parameters())
    assert parameters[1] not in optimizer.state
    for state, parameter in zip(optimizer.state.values(), [parameters[0], *parameters[2:]], strict=True):
        assert same_bits(state["master"], parameter.detach().float())


def test_adam_states_and_hyperparameters_load_as_in_torch() -> None:
    plain = make_model()
    adam = torch.optim.Adam(plain.parameters(), lr=3e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, foreach=False)
    steps(plain, adam, count=1)
    _, optimizer = wrapped()
    optimizer.load_state_dict(copy.deepcopy(adam.state_dict()))
    group = optimizer.param_groups[0]
    expected = {"lr": 3e-3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    if "decoupled_weight_decay" in group:  # torch 2.6 has none
        expected["decoupled_weight_decay"] = True
    assert {name: group[name] for name in expected} == expected
    assert group["foreach"] is None, "how torch runs the update is not part of the training"
    reference = torch.optim.AdamW(make_model().parameters())
    reference.load_state_dict(adam.state_dict())
    assert {name: reference.param_groups[0][name] for name in expected} == expected


def first_state(saved: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = saved["state"][0]
    return state


def nan_in(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda saved: first_state(saved)[key].view(-1)[-1:].fill_(float("nan"))  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no groups": (lambda s: s.pop("param_groups"), "needs the keys 'state' and 'param_groups'"),
    "no states": (lambda s: s.pop("state"), "needs the keys 'state' and 'param_groups'"),
    "more groups": (lambda s: s["param_groups"].append(s["param_groups"][0]), r"groups of \[22, 22\] parameters"),
    "fewer parameters": (lambda s: s["param_groups"][0]["params"].pop(), r"groups of \[21\] parameters"),
    "a group of SGD": (lambda s: s["param_groups"][0].pop("betas"), "group 0 of the loaded state has no 'betas'"),
    "betas of another kind": (lambda s: s["param_groups"][0].update(betas=0.9), "group 0 of the loaded state"),
    "amsgrad": (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad"),
    "amsgrad state": (lambda s: first_state(s).update(max_exp_avg_sq=torch.zeros(40, 24)), "amsgrad"),
    "a state of SGD": (
        lambda s: s["state"].update({0: {"momentum_buffer": torch.zeros(40, 24)}}),
        r"embedding\.weight: the loaded state has no 'step'",
    ),
    "no moment": (lambda s: first_state(s).pop("exp_avg_sq"), "no 'exp_avg_sq'"),
    "no step": (lambda s: first_state(s).pop("step"), "no 'step'"),
    "step is NaN": (lambda s: first_state(s).update(step=torch.tensor(float("nan"))), "step is nan"),
    "step below zero": (lambda s: first_state(s).update(step=-1), "step is -1"),
    "half a step": (lambda s: first_state(s).update(step=torch.tensor(1.5)), "step is 1.5"),
    "a step for each": (lambda s: first_state(s).update(step=torch.ones(3)), "step is tensor"),
    "wrong shape": (lambda s: first_state(s).update(exp_avg=torch.zeros(24, 40)), r"shape \(24, 40\), not \(40, 24\)"),
    "wrong shape of the master": (lambda s: first_state(s).update(master=torch.zeros(3)), r"master has shape \(3,\)"),
    "integers": (lambda s: first_state(s).update(exp_avg=torch.zeros(40, 24, dtype=torch.int8)), "int8"),
    "no tensor": (lambda s: first_state(s).update(exp_avg=[0.0]), "exp_avg is list"),
    "meta": (lambda s: first_state(s).update(exp_avg=torch.zeros(40, 24, device="meta")), "on meta"),
    "NaN moment": (nan_in("exp_avg"), "exp_avg contains NaN"),
    "NaN master": (nan_in("master"), "master contains NaN"),
    "a state of no parameter": (lambda s: s["state"].update({99: first_state(s)}), "99 that is in none"),
    "the last state": (
        lambda s: s["state"][21].pop("exp_avg"),
        r"head\.weight: the loaded state has no 'exp_avg'",
    ),
}


@pytest.mark.parametrize("placement", [HOST, RESIDENT], ids=["host", "resident"])
def test_what_cannot_be_loaded_is_refused_and_changes_nothing(placement: dict[str, Any]) -> None:
    model, optimizer = wrapped(torch.bfloat16, placement)
    steps(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["exp_avg"].add_(1)
        state["step"] = torch.tensor(9.0)
    saved["param_groups"][0]["lr"] = 0.5
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    before = bits_of(model, optimizer)
    for name, (spoil, message) in REFUSED.items():
        spoiled = copy.deepcopy(saved)
        spoil(spoiled)
        with pytest.raises(offload.InvalidArgument, match=message):
            optimizer.load_state_dict(spoiled)
        assert optimizer.state_dict()["param_groups"] == groups, name
        assert_bits(bits_of(model, optimizer), before)
    with pytest.raises(offload.InvalidArgument, match="no optimizer state"):
        optimizer.load_state_dict(None)  # type: ignore[arg-type]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_wrap_refuses_the_same_states_and_changes_nothing() -> None:
    model = make_model()
    stock = torch.optim.AdamW(model.parameters())
    steps(model, stock, count=1)
    stock.state[model.head.weight]["exp_avg"].fill_(float("nan"))
    with pytest.raises(offload.InvalidArgument, match=r"head\.weight: exp_avg contains NaN"):
        offload.wrap(model, stock, **HOST)
    assert len(stock.state) == 22
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_load_over_the_host_budget_changes_nothing() -> None:
    """A frozen parameter has no state until one is loaded, and then there is no room for it."""
    model = make_model()
    model.embedding.weight.requires_grad_(False)
    saved_model = make_model()
    stock = torch.optim.AdamW(saved_model.parameters())
    steps(saved_model, stock, count=1)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
    steps(model, optimizer)
    before = bits_of(model, optimizer)

    def refuse(*_: Any) -> None:
        raise offload.OutOfHostMemory("no room")

    optimizer._engine.homes._pool = type("FullPool", (), {"acquire": refuse})()
    with pytest.raises(offload.OutOfHostMemory):
        optimizer.load_state_dict(stock.state_dict())
    assert_bits(bits_of(model, optimizer), before)


def test_hooks_are_called_wherever_they_were_registered() -> None:
    model = make_model()
    stock = torch.optim.AdamW(model.parameters(), lr=1e-2)
    calls: list[tuple[str, Any]] = []
    stock.register_state_dict_post_hook(lambda o, s: calls.append(("saved", o)))
    model, optimizer = offload.wrap(model, stock, **HOST)
    optimizer.register_state_dict_pre_hook(lambda o: calls.append(("saving", o)))

    def halve(o: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append(("loading", o))
        state_dict["param_groups"] = [{**group, "lr": group["lr"] / 2} for group in state_dict["param_groups"]]
        return state_dict

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(("loaded", o)))
    steps(model, optimizer)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert calls == [(name, optimizer) for name in ("saving", "saved", "loading", "loaded")]
    assert saved["param_groups"][0]["lr"] == 1e-2 and optimizer.param_groups[0]["lr"] == 5e-3
    _, plain = offload.unwrap(model, optimizer)
    calls.clear()
    plain.state_dict()
    assert calls == [("saving", plain), ("saved", plain)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_copy_of_the_states_outlives_later_steps(dtype: torch.dtype) -> None:
    """As in torch the tensors are live, so what saves in the background copies them first."""
    model, optimizer = wrapped(dtype)
    steps(model, optimizer, count=2)
    loss_of(model, next(batches(1))).backward()
    optimizer._engine.pipeline.hold()
    optimizer.step()
    optimizer._engine.pipeline.release()
    live = optimizer.state_dict()  # waits for the update
    snapshot = copy.deepcopy(live)
    expected = bits_of(model, optimizer)
    steps(model, optimizer)
    for index, state in snapshot["state"].items():
        for key, value in state.items():
            assert same_bits(value, expected[f"{index}.{key}"]), (index, key)
    now = optimizer.state_dict()["state"]
    for index, state in live["state"].items():
        assert state["exp_avg"].data_ptr() == now[index]["exp_avg"].data_ptr()
        assert not same_bits(state["exp_avg"], expected[f"{index}.exp_avg"])


def test_saving_in_the_middle_of_accumulation_leaves_the_gradients() -> None:
    """Gradients are not saved, as in torch; the run goes on as if nobody had saved."""

    def run(save: bool) -> dict[str, Tensor]:
        model, optimizer = wrapped(torch.bfloat16)
        file = io.BytesIO()
        for step, tokens in enumerate(batches(8)):
            loss_of(model, tokens).backward()
            if save:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
                optimizer.load_state_dict(optimizer.state_dict())
            if step % 4 == 3:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        return bits_of(model, optimizer)

    assert_bits(run(True), run(False))


LOADERS: dict[str, Callable[[nn.Module, dict[str, Tensor], Path], Any]] = {
    "load_state_dict": lambda model, state, _: model.load_state_dict(state),
    "assign": lambda model, state, _: model.load_state_dict(state, assign=True),
    "assign parameters": lambda model, state, _: model.load_state_dict(
        {name: nn.Parameter(value) for name, value in state.items()}, assign=True
    ),
    "copy_": lambda model, state, _: copy_each(model, state),
    "safetensors": lambda model, state, folder: through_safetensors(model, state, folder),
}


@torch.no_grad()
def copy_each(model: nn.Module, state: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(state[name])


def through_safetensors(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import load_model, save_model

    saved = make_model(next(model.parameters()).dtype, seed=3)
    saved.load_state_dict(state)
    save_model(saved, str(folder / "model.safetensors"))
    assert load_model(model, folder / "model.safetensors") == (set(), [])


@pytest.mark.parametrize("placement", [HOST, RESIDENT], ids=["host", "resident"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS.keys())
def test_weights_loaded_after_wrap_equal_wrapping_the_loaded_model(
    loader: Any, dtype: torch.dtype, placement: dict[str, Any], tmp_path: Path
) -> None:
    weights = {name: value.clone() for name, value in make_model(dtype, seed=7).state_dict().items()}
    model, optimizer = wrapped(dtype, placement)
    parameters = list(model.parameters())
    loader(model, weights, tmp_path)
    assert all(one is two for one, two in zip(parameters, model.parameters(), strict=True))
    expected, expected_optimizer = wrapped(dtype, placement, seed=7)
    one, two = train(model, optimizer), train(expected, expected_optimizer)
    assert one.losses == two.losses
    assert_bits(bits_of(model, optimizer), bits_of(expected, expected_optimizer))


class Recurrent(nn.Module):
    """Its recurrent layer has a list of its weights beside the parameters, and computes with that."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


@pytest.mark.parametrize("placement", [HOST, {**HOST, "params": "host"}], ids=["host", "streamed"])
def test_a_recurrent_layer_trains_on_after_weights_were_assigned(placement: dict[str, Any]) -> None:
    def losses(assign: bool) -> list[float]:
        torch.manual_seed(0)
        model, x = Recurrent(), torch.randn(2, 3, 4)
        saved = {name: value * 0.5 for name, value in copy.deepcopy(model.state_dict()).items()}
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=0.1), **placement)
        model.load_state_dict(saved, assign=assign)
        found = []
        for _ in range(3):
            loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    assert losses(assign=True) == losses(assign=False)


def test_assigning_to_a_submodule_while_an_update_runs_keeps_ties_and_parameters() -> None:
    model = make_model(tied=True)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
    loss_of(model, next(batches(1))).backward()
    optimizer.step()
    value = torch.full((40, 24), 0.25)
    model.head.load_state_dict({"weight": value}, assign=True)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.embedding.weight, value)
    value.fill_(7.0)
    assert model.head.weight.max() == 0.25


def test_safetensors_of_the_model_while_an_update_runs(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, optimizer = wrapped(torch.bfloat16)
    loss_of(model, next(batches(1))).backward()
    optimizer.step()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_file(tmp_path / "weights.safetensors")
    optimizer.synchronize()
    assert_bits(loaded, dict(model.state_dict()))
