"""`optimizer=<share>`: which states stay on the device, and that no bit of training depends on it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload._config import Config
from offload._gradient_lanes import GradientLanes
from offload._kernels import Kernels
from offload._native_state import AdamWState
from offload._parameter_size import ParameterSize
from offload._plan import Plan, TierBytes, make_plan
from training import RESIDENT, Run, assert_same_bits, batches, loss_of, make_model, same_bits, train, wrapped_run

pytestmark = pytest.mark.usefixtures("device")

SHARES: tuple[Any, ...] = (
    0.0, 0.3, 0.7, 1.0, {"unified": 0.6, "host": 0.4}, {"device": 0.2, "unified": 0.4, "host": 0.4}
)  # fmt: skip
BIG = 2**50


def sizes(*counts: int, units: str = "") -> list[ParameterSize]:
    names = "abcdefgh"
    return [
        ParameterSize(names[i], count, 2, "bfloat16", unit=units[i] if units else names[i])
        for i, count in enumerate(counts)
    ]


def plan_of(parameters: list[ParameterSize], **options: Any) -> Plan:
    return make_plan(parameters, Config(**options), device_kind="cuda", device_bytes=BIG, host_bytes=BIG)


# --- the plan -----------------------------------------------------------------------------------------------


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("counts", "share", "kept"),
    [
        ([1] * 4, 0.5, "ab"),
        ([1] * 5, 0.8, "a"),  # 1 - 0.8 is a little less than a fifth
        ([9] * 4, 0.51, "a"),
        ([9, 1, 1, 1], 0.75, "bcd"),  # the first is more than may stay
        ([2, 9, 2], 0.5, "ac"),
        ([5, 5], 0.9, ""),
        ([0, 5, 5], 0.5, "b"),
    ],
)
def test_the_first_that_fit_stay(counts: list[int], share: float, kept: str) -> None:
    assert plan_of(sizes(*counts), optimizer=share, gradients="host").kept_states == set(kept)


@pytest.mark.cpu_only
def test_streamed_parameters_stay_by_units() -> None:
    model = sizes(1, 2, 2, 1, units="xyyz")

    def kept(share: float, params: str) -> frozenset[str]:
        return plan_of(model, optimizer=share, gradients="host", params=params).kept_states

    assert kept(0.5, "device") == {"a", "b"}
    assert kept(0.5, "host") == {"a", "d"}
    assert kept(0.16, "host") == {"a", "b", "c"}


@pytest.mark.cpu_only
def test_each_state_counts_where_it_is() -> None:
    plan = plan_of(sizes(10, 20, 10), optimizer=0.75, gradients="host")
    assert plan.optimizer == "mixed" and plan.kept_states == {"a"} and plan.master == "mixed"
    assert plan.device == TierBytes(weights=80, master=40, moments=80, gradients=20)
    assert plan.host == TierBytes(working=60, master=60, moments=240, gradients=60)
    for words in ("optimizer in part on the host", "states of 2 of 3 parameters are on the host, 75.0% of their bytes"):
        assert words in plan.explain()
    beside = plan_of(sizes(10, 20, 10), optimizer=0.75, gradients="device")
    assert (beside.device.gradients, beside.host.gradients) == (80, 60)


@pytest.mark.cpu_only
@pytest.mark.parametrize(("share", "place"), [(0.0, "device"), (1.0, "host"), (0.99, "host")])
def test_all_or_none_is_a_place(share: float, place: str) -> None:
    """Of four equal parameters none fits into a hundredth."""
    for gradients in ("host", "device"):
        plan = plan_of(sizes(1, 1, 1, 1), optimizer=share, gradients=gradients)
        named = plan_of(sizes(1, 1, 1, 1), optimizer=place, gradients=gradients)
        assert (plan.optimizer, plan.kept_states) == (place, frozenset())
        assert (plan.device, plan.host, plan.master) == (named.device, named.host, named.master)


@pytest.mark.cpu_only
def test_the_first_parameters_fill_the_device_then_unified_states() -> None:
    shares = {"host": 0.25, "unified": 0.5, "device": 0.25}
    plan = plan_of(sizes(1, 1, 1, 1), optimizer=shares, gradients="host")
    assert (plan.optimizer, plan.kept_states, plan.unified_states) == ("mixed", {"a"}, {"b", "c"})
    assert [plan.updates_on_device(name) for name in "abcd"] == [True, True, True, False]
    assert [plan.gradient_leaves(name) for name in "abcd"] == [False, False, False, True]
    assert plan.device == TierBytes(weights=8, master=4, moments=8, gradients=6)
    assert plan.host == TierBytes(working=6, master=6, moments=24, gradients=2)
    assert "unified: 20 B of states" in plan.explain()
    whole = plan_of(sizes(1, 1, 1, 1), optimizer={"unified": 1.0}, gradients="host")
    assert whole == plan_of(sizes(1, 1, 1, 1), optimizer="unified", gradients="host")
    assert whole.gradient_leaves("a") and whole.updates_on_device("one that came later")


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "shares",
    [
        {},
        {"host": 0.5},
        {"host": 0.5, "unified": 0.6},
        {"host": 1},
        {"host": 0.5, "disk": 0.5},
        {"host": 1.5, "device": -0.5},
    ],
    ids=str,
)
def test_shares_that_are_none_are_refused(shares: Any) -> None:
    words = r"optimizer=.*shares of 'device', 'unified', 'host', floats of 0.0 to 1.0 that add up to 1"
    with pytest.raises(offload.InvalidArgument, match=words):
        Config(optimizer=shares)


@pytest.mark.cpu_only
@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), 1, True])
def test_what_is_no_share_is_refused(share: Any) -> None:
    with pytest.raises(offload.InvalidArgument, match=r"optimizer=.*share, a float from 0.0 to 1.0"):
        Config(optimizer=share)


# --- the bits -----------------------------------------------------------------------------------------------


MODELS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "split": {"dtype": torch.bfloat16},
    "bf16, fp32 masters": {"dtype": torch.bfloat16, "master": "fp32"},
}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "gradients stay": {"gradients": "device"},
    "gradients leave": {"gradients": "host"},
    "streamed": {"gradients": "host", "params": "host"},
}
LOOPS: dict[str, dict[str, Any]] = {
    "clip": {"clip": 0.3},
    "accumulate": {"clip": 0.5, "micro_batches": 3},
    "zeroed": {"clip": None, "set_to_none": False},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_no_bit_depends_on_the_share(options: dict[str, Any], placement: dict[str, Any], loop: dict[str, Any]) -> None:
    options = dict(options)
    model = make_model(options.pop("dtype"))
    expected = wrapped_run(model, RESIDENT, **loop)
    for share in SHARES:
        run = wrapped_run(model, {**placement, **options, "optimizer": share}, **loop)
        assert_same_bits(run, expected)
        moments = [run.optimizer.stats().device_bytes.get("moments", 0), run.optimizer.stats().host_bytes["moments"]]
        stays = share.get("device", 0.0) if isinstance(share, dict) else 1 - share
        assert (moments[0] > 0, moments[1] > 0) == (stays > 0, stays < 1)


@pytest.mark.parametrize("options", [{"lazy": False}, {"poison": False}, {"params": "host", "prefetch": 3}], ids=str)
def test_other_options_beside_a_share(options: dict[str, Any]) -> None:
    model = make_model(torch.bfloat16, tied=True)
    for parameter in model.blocks[1].parameters():
        parameter.requires_grad_(False)
    run = wrapped_run(model, {"optimizer": 0.6, "gradients": "host", **options})
    assert_same_bits(run, wrapped_run(model, RESIDENT))
    assert run.optimizer.plan.optimizer == "mixed"


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, offload.Lion])
def test_the_other_native_classes(kind: Any) -> None:
    def run(share: Any) -> Run:
        model = make_model(torch.bfloat16)
        return train(*offload.wrap(model, kind(model.parameters(), lr=1e-2), optimizer=share, gradients="host"))

    expected = run(0.0)
    for share in SHARES[1:]:
        assert_same_bits(run(share), expected)


def test_fp16_scaler_with_a_skipped_step() -> None:
    def run(placement: dict[str, Any]) -> tuple[list[float], list[float], list[torch.Tensor]]:
        model = make_model()
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        kind = torch.get_default_device().type
        scaler = torch.amp.GradScaler(kind, init_scale=2.0**34, growth_interval=2)
        losses, scales = [], []
        for tokens in batches(24):
            with torch.autocast(kind, dtype=torch.float16):
                loss = loss_of(model, tokens)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
            scales.append(scaler.get_scale())
        return losses, scales, [p.detach().clone() for p in model.parameters()]

    losses, scales, weights = run(RESIDENT)
    assert min(scales) < scales[-1] < 2.0**34, "no step was skipped, or the scale never grew again"
    mixed = run({"optimizer": 0.5, "gradients": "host"})
    assert mixed[:2] == (losses, scales)
    assert all(same_bits(one, other) for one, other in zip(mixed[2], weights, strict=True))


def test_a_scale_given_to_the_step() -> None:
    def run(share: float) -> list[torch.Tensor]:
        model = make_model(torch.bfloat16)
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), optimizer=share, gradients="host")
        for tokens in batches(3):
            (loss_of(model, tokens) * 64).backward()
            optimizer.step(grad_scale=1 / 192)
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    assert all(same_bits(one, other) for one, other in zip(run(0.5), run(0.0), strict=True))


# --- what is where ------------------------------------------------------------------------------------------


def wrapped(dtype: torch.dtype = torch.bfloat16, *, seed: int = 0, **options: Any) -> tuple[nn.Module, Any]:
    model = make_model(dtype, seed=seed)
    placement = {"optimizer": 0.6, "gradients": "host", **options}
    return offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)


def steps(model: nn.Module, optimizer: Any, count: int = 3, seed: int = 1) -> None:
    for tokens in batches(count, seed=seed):
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_only_what_the_host_updates_leaves_and_is_pending() -> None:
    model, optimizer = wrapped()
    kept = optimizer.plan.kept_states
    names = [name for name, _ in model.named_parameters()]
    assert names[0] in kept and names[-1] not in kept
    loss_of(model, next(batches(1))).backward()
    assert {name for name, p in model.named_parameters() if type(p.grad) is torch.Tensor} == kept
    optimizer.step()
    assert {name for name, p in model.named_parameters() if type(p) is nn.Parameter} == kept
    optimizer.synchronize()
    stats, plan = optimizer.stats(), optimizer.plan
    assert (stats.device_bytes["moments"], stats.device_bytes["master"]) == (plan.device.moments, plan.device.master)
    assert plan.device.moments > 0 and stats.steps == 1
    assert stats.host_bytes["moments"] >= plan.host.moments > 0


def test_a_parameter_that_the_plan_did_not_know_goes_to_the_host() -> None:
    def run(placement: dict[str, Any]) -> list[torch.Tensor]:
        model = make_model(torch.bfloat16)
        late = list(model.embedding.parameters())
        late[0].requires_grad_(False)
        rest = [p for p in model.parameters() if p is not late[0]]
        model, optimizer = offload.wrap(model, torch.optim.AdamW(rest, lr=1e-2), **placement)
        steps(model, optimizer)
        late[0].requires_grad_(True)
        optimizer.add_param_group({"params": late, "lr": 1e-3})
        steps(model, optimizer)
        return [p.detach().clone() for p in model.parameters()]

    mixed, resident = run({"optimizer": 0.5, "gradients": "host"}), run(RESIDENT)
    assert all(same_bits(one, other) for one, other in zip(mixed, resident, strict=True))


def test_weights_written_between_steps() -> None:
    def run(placement: dict[str, Any]) -> Run:
        def shrink(step: int, model: nn.Module, optimizer: Any) -> None:
            with torch.no_grad(), offload.full_params(model):
                for parameter in model.parameters():
                    parameter[:1].mul_(0.5)

        return wrapped_run(make_model(torch.bfloat16), placement, each_step=shrink)

    expected = run(RESIDENT)
    assert_same_bits(run({"optimizer": 0.5, "gradients": "host"}), expected)
    assert_same_bits(run({"optimizer": 0.5, "gradients": "host", "params": "host"}), expected)


# --- states that come and go --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"optimizer": 0.2}, {"optimizer": "host"}, {"optimizer": "device"}, {"optimizer": {"unified": 0.5, "host": 0.5}}],
    ids=str,
)
def test_training_goes_on_with_another_share(dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    model, optimizer = wrapped(dtype)
    steps(model, optimizer)
    offload.save_checkpoint(tmp_path, model, optimizer, tag="saved")
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, seed=2)
    expected = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    for source in ("checkpoint", "state_dict"):
        other, resumed = wrapped(dtype, seed=5, **options)
        if source == "checkpoint":
            offload.load_checkpoint(tmp_path, other, resumed)
        else:
            other.load_state_dict(saved[0])
            resumed.load_state_dict(saved[1])
        steps(other, resumed, seed=2)
        for name, weight in other.state_dict().items():
            assert same_bits(weight, expected[0][name]), name
        for index, state in resumed.state_dict()["state"].items():
            assert state.keys() == expected[1][index].keys()
            assert all(same_bits(value.cpu(), expected[1][index][key].cpu()) for key, value in state.items())


def test_an_asynchronous_save_has_the_bits_of_its_step(tmp_path: Path) -> None:
    model, optimizer = wrapped()
    steps(model, optimizer)
    expected = copy.deepcopy(optimizer.state_dict()["state"])
    save = offload.save_checkpoint(tmp_path, model, optimizer, tag="saved", async_save=True)
    steps(model, optimizer, seed=2)
    save.wait()
    other, resumed = wrapped(optimizer=0.2)
    offload.load_checkpoint(tmp_path, other, resumed)
    for index, state in resumed.state_dict()["state"].items():
        assert all(same_bits(value.cpu(), expected[index][key].cpu()) for key, value in state.items())


def test_unwrap_gives_what_a_resident_run_gives() -> None:
    def run(**options: Any) -> tuple[list[torch.Tensor], dict[int, Any]]:
        model, optimizer = wrapped(torch.bfloat16, **options)
        steps(model, optimizer)
        model, plain = offload.unwrap(model, optimizer)
        steps(model, plain, seed=2)
        return [p.detach() for p in model.parameters()], plain.state_dict()["state"]

    mixed, resident = run(), run(optimizer="device")
    assert all(same_bits(one, other) for one, other in zip(mixed[0], resident[0], strict=True))
    for index, state in resident[1].items():
        assert all(same_bits(value, mixed[1][index][key]) for key, value in state.items())


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_classes_that_step_in_one_place_are_refused() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(offload.InvalidArgument, match=r"SGD cannot have a share.*optimizer='host'"):
        offload.wrap(model, optimizer, optimizer=0.5)
    offload.wrap(model, optimizer, optimizer=1.0)  # nothing was changed, and this is no share


def test_a_gradient_that_no_update_can_use_changes_nothing() -> None:
    model, optimizer = wrapped(torch.float32, gradients="device")
    steps(model, optimizer)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    loss_of(model, next(batches(1))).backward()
    weight = model.head.weight
    weight.grad = weight.grad.to_sparse()
    with pytest.raises(offload.InvalidArgument, match=r"head\.weight"):
        optimizer.step()
    assert all(same_bits(value, before[0][name]) for name, value in model.state_dict().items())
    for index, state in optimizer.state_dict()["state"].items():
        assert all(same_bits(value, before[1][index][key]) for key, value in state.items())


@pytest.mark.parametrize(
    "parts",
    [[(GradientLanes, "on_device")], [(AdamWState, "torch_step"), (Kernels, "update_")]],  # a card has kernels
    ids=["read", "update"],
)
def test_an_update_that_fails_on_the_device_is_told(
    parts: list[tuple[type, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's part runs by then, so weights are of two steps: nothing but unwrap is left."""
    model, optimizer = wrapped()
    steps(model, optimizer)
    loss_of(model, next(batches(1))).backward()

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory for the update")

    with monkeypatch.context() as patched:
        for part in parts:
            patched.setattr(*part, fail)
        with pytest.raises(RuntimeError, match="no memory"):
            optimizer.step()
    with pytest.raises(offload.StateError, match="an earlier update failed.*no memory"):
        loss_of(model, next(batches(1)))
    model, plain = offload.unwrap(model, optimizer)
    assert all(type(p) is nn.Parameter for p in model.parameters()) and not plain.state
