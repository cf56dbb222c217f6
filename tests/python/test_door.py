"""Bad input at the door: the error names the value and what is legal, and nothing was changed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload import _activations, _engine, _native, _state_store, _weight_cache, _wrap
from plain_optimizers import plain_optimizer
from training import HOST, RESIDENT, assert_same_bits, batches, loss_of, make_model, same_bits, train, wrapped_run
from what_lives import open_files, pool_bytes, thread_numbers


def untouched(model: nn.Module) -> None:
    for module in model.modules():
        assert not module._forward_pre_hooks
    for p in model.parameters():
        assert not p._post_accumulate_grad_hooks and type(p) is nn.Parameter


def refused(error: type[Exception], match: str, model: nn.Module, optim: Any, **options: Any) -> None:
    with pytest.raises(error, match=match):
        offload.wrap(model, optim, **options)
    untouched(model)


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), **options)


def test_optimizer_of_another_model() -> None:
    refused(offload.InvalidArgument, "not the model's", make_model(), adamw(make_model()))


def test_no_optimizer() -> None:
    refused(offload.InvalidArgument, "no optimizer", make_model(), [])
    refused(offload.InvalidArgument, "optimizer 0 is a str", make_model(), ["adamw"])


def test_model_and_optimizer_the_wrong_way_round() -> None:
    model = nn.Sequential(nn.Linear(2, 2))  # has a length and items, as a list of optimizers has
    with pytest.raises(offload.InvalidArgument, match="model is a AdamW: give a torch.nn.Module"):
        offload.wrap(adamw(model), model)  # type: ignore[call-overload]
    untouched(model)


@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
def test_flags_that_change_the_arithmetic(flag: str) -> None:
    model = make_model()
    refused(offload.InvalidArgument, flag, model, adamw(model, **{flag: True}))


def test_empty_groups() -> None:
    model = make_model()
    optimizer = adamw(model)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": []})
    refused(offload.InvalidArgument, "group 1 .* is empty", model, optimizer)
    optimizer.param_groups[0]["params"] = []
    refused(offload.InvalidArgument, "has only empty groups", model, optimizer)


def test_a_model_without_parameters() -> None:
    model = nn.Sequential(nn.ReLU())
    refused(offload.InvalidArgument, "this Sequential has no parameters", model, adamw(make_model()))


def test_parameter_in_two_optimizers() -> None:
    model = make_model()
    refused(offload.InvalidArgument, "two optimizers", model, [adamw(model), adamw(model)])


def test_wrapping_twice() -> None:
    model = make_model()
    model, wrapped = offload.wrap(model, adamw(model), **HOST)
    with pytest.raises(offload.StateError, match="wrapped already"):
        offload.wrap(model, adamw(model))
    with pytest.raises(offload.StateError, match="wrapped already"):
        offload.wrap(make_model(), wrapped)


@pytest.mark.parametrize("what", ["weights", "part", "frozen", "buffer", "gaps"])
@pytest.mark.parametrize("placement", [HOST, HOST | {"params": "host"}], ids=["host", "streamed"])
def test_weights_in_one_memory(what: str, placement: dict[str, str]) -> None:
    """The second of them would not see the update of the first; where the device updates in place it does."""

    def model() -> nn.Module:
        model = make_model()
        if what == "part":
            model.norm.bias = nn.Parameter(model.embedding.weight.data[0])
        elif what == "buffer":
            model.norm.register_buffer("part", model.norm.weight.data[2:4])
        elif what == "gaps":
            model.norm.register_buffer("part", model.norm.weight.data[::7])
        else:
            model.head.weight = nn.Parameter(model.embedding.weight.data, requires_grad=what == "weights")
        return model

    names = {"part": "norm.bias|embedding.weight", "buffer": "norm.weight|norm.part", "gaps": "norm.part"}
    match = f"({names.get(what, 'head.weight|embedding.weight')}) and .* share memory"
    one = model()
    refused(offload.InvalidArgument, match, one, adamw(one), **placement)
    plain = model()
    found = train(*offload.wrap(one, adamw(one, lr=1e-2), **RESIDENT))
    assert_same_bits(found, train(plain, plain_optimizer("AdamW", list(plain.parameters()))))


def test_weights_side_by_side_in_one_memory() -> None:
    def model() -> nn.Module:
        model = make_model()
        memory = torch.linspace(0, 1, 48)
        model.norm.weight, model.norm.bias = nn.Parameter(memory[:24]), nn.Parameter(memory[24:])
        around = torch.linspace(0, 1, 4 * 40)
        model.head.bias = nn.Parameter(around[1:41])
        model.register_buffer("ends", around.as_strided((2, 2), (80, 41)))  # begins before it and ends behind it
        return model

    runs = []
    for placement in (HOST, HOST | {"params": "host"}, RESIDENT):
        one = model()
        runs.append(train(*offload.wrap(one, adamw(one), **placement)))
    assert_same_bits(runs[0], runs[2])
    assert_same_bits(runs[1], runs[2])


@pytest.mark.parametrize("of_first", ["device", "host"])
def test_a_streamed_weight_of_another_wrapped_model(of_first: str) -> None:
    """Both may keep it on the device: then each trains it as plain models do."""

    def pair() -> tuple[nn.Module, nn.Module, torch.optim.AdamW, torch.optim.AdamW]:
        first, second = make_model(), make_model(seed=1)
        second.embedding.weight = first.embedding.weight
        own = [p for p in second.parameters() if p is not first.embedding.weight]
        return first, second, adamw(first, lr=1e-2), torch.optim.AdamW(own, lr=1e-2)

    def trained(placement: dict[str, str]) -> list[torch.Tensor]:
        first, second, of_one, of_other = pair()
        wrapped = [
            offload.wrap(first, of_one, **placement)[1],
            offload.wrap(second, of_other, **placement)[1],
        ]
        for tokens in batches(3):
            (loss_of(first, tokens) + loss_of(second, tokens)).backward()
            for one in wrapped:
                one.step()
                one.zero_grad()
        return [p.detach().clone() for model in (first, second) for p in model.parameters()]

    first, second, of_one, of_other = pair()
    first, wrapped = offload.wrap(first, of_one, **HOST, params=of_first)
    with pytest.raises(offload.StateError, match="embedding.weight is a weight of a TinyLM that is wrapped already"):
        offload.wrap(second, of_other, **HOST, params="host")
    if of_first == "host":
        with pytest.raises(offload.StateError, match="pass params='device' for both"):
            offload.wrap(second, of_other, **RESIDENT)
    loss_of(first, next(batches(1))).backward()
    wrapped.step()
    assert all(map(same_bits, trained(HOST), trained(RESIDENT)))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_the_original_optimizer_refuses_to_step_to_save_and_to_load(kind: type[torch.optim.Optimizer]) -> None:
    """It has no states: what it saved would be empty, and nothing would use what it loaded."""
    model = make_model()
    optimizer = kind(model.parameters(), lr=1e-2)
    before = optimizer.state_dict()
    _, wrapped = offload.wrap(model, optimizer, **HOST)
    train(model, wrapped, steps=2)
    saved = wrapped.state_dict()
    for call in (optimizer.step, optimizer.state_dict, lambda: optimizer.load_state_dict(before)):
        with pytest.raises(offload.StateError, match=rf"this {kind.__name__} was given .* that wrap returned"):
            call()
    wrapped.load_state_dict(saved)
    offload.unwrap(model, wrapped)
    assert optimizer.state_dict()["state"].keys() == saved["state"].keys()
    optimizer.load_state_dict(saved)


def test_a_refused_wrap_leaves_nothing_for_the_garbage_collector(tmp_path: Path) -> None:
    """Also where the refusal comes after the engine was made: its threads, files and pages go with the call."""
    model = make_model()
    model.head.weight.data = torch.empty(80, 24)[::2]
    before = thread_numbers(), open_files(), pool_bytes()
    gc.disable()
    try:
        refused(offload.InvalidArgument, "are not dense", model, adamw(model), optimizer="disk", disk_path=tmp_path)
        assert (thread_numbers(), open_files(), pool_bytes()) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("part", ["weights", "states"])
def test_a_refusal_of_pages_leaves_nothing_for_the_garbage_collector(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may refuse what the budget allows."""

    def refuse(*_: Any, **__: Any) -> None:
        raise offload.OutOfHostMemory("the system refuses to map")

    what = _weight_cache.WeightCache if part == "weights" else _state_store.StateStore
    monkeypatch.setattr(what, "__init__", refuse)
    model = make_model()
    before = thread_numbers(), open_files(), pool_bytes()
    gc.disable()
    try:
        places = {"optimizer": "disk", "params": "disk", "disk_path": tmp_path}
        refused(offload.OutOfHostMemory, "refuses to map", model, adamw(model), **places)
        assert (thread_numbers(), open_files(), pool_bytes()) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("number", ["cpu:0", "cpu"])
def test_the_cpu_has_no_number(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors say "cpu" whatever was asked for: the engine has to look for them there."""
    monkeypatch.setattr(_activations, "MIN_BYTES", 1)
    model = make_model()
    run = wrapped_run(model, {**HOST, "activations": "host", "device": number})
    assert run.optimizer.stats().activations["offloaded_bytes"] > 0
    with offload.offload_activations(keep=0, device=number) as activations:
        loss_of(model, next(batches(1))).backward()
    assert activations.stats()["offloaded_bytes"] > 0


@pytest.mark.parametrize("first, second", [("host", "device"), ("device", "host"), ("host", "host")])
def test_weights_come_and_go_for_one_model_alone(first: str, second: str) -> None:
    for outer_first in (True, False):
        model = make_model()
        parts = [model, model.blocks[1]] if outer_first else [model.blocks[1], model]
        kept = offload.wrap(parts[0], adamw(parts[0]), params=first, **HOST)
        with pytest.raises(offload.StateError, match=r"norm.weight is a weight of a (TinyLM|Block) that is wrapped"):
            offload.wrap(parts[1], adamw(parts[1]), params=second, **HOST)
        train(*kept) if outer_first else offload.unwrap(*kept)


@pytest.mark.parametrize("absent", ["cuda:77", "tpu", "meta"])
def test_device_that_does_not_exist(absent: str) -> None:
    model = make_model()
    refused(offload.InvalidArgument, absent, model, adamw(model), device=absent)


def test_model_on_several_devices() -> None:
    model = make_model()
    model.head.to("meta")
    refused(offload.InvalidArgument, "head.weight is on the meta device", model, adamw(model))


def test_memory_that_cannot_be_pinned_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback is visible: a warning with the driver's words and stats; training goes on with the same bits."""

    def refusing(device: torch.device) -> Any:
        host_device = _native.HostDevice()
        host_device.fail_pin(1)
        return host_device

    monkeypatch.setattr(_engine, "open_device", refusing)
    model = make_model()
    with pytest.warns(UserWarning, match="pageable host memory.*fail_pin") as warned:
        model, optimizer = offload.wrap(model, adamw(model, lr=1e-2), pin=True, device="cpu", **HOST)
    assert [one.filename for one in warned if one.category is UserWarning] == [__file__]
    assert not optimizer.stats().pinned and "fail_pin" in str(optimizer.stats().pageable_reason)
    refused_run = train(model, optimizer)
    monkeypatch.undo()
    assert_same_bits(refused_run, wrapped_run(make_model(), {**HOST, "pin": True}))


def test_budgets_too_small() -> None:
    model = make_model()
    refused(offload.InvalidArgument, "KiB", model, adamw(model), device_budget="10KiB")
    refused(offload.OutOfHostMemory, "KiB", model, adamw(model), host_budget="20KiB", **HOST)


def test_unknown_and_illegal_options() -> None:
    model = make_model()
    refused(offload.InvalidArgument, "optimizer", model, adamw(model), optimiser="host")
    refused(offload.InvalidArgument, "moon", model, adamw(model), optimizer="moon")
    refused(offload.InvalidArgument, "params", model, adamw(model), params="disk")
    refused(offload.InvalidArgument, "prefetch", model, adamw(model), params="host", prefetch=0)


def test_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = make_model()
    refused(offload.InvalidArgument, "WORLD_SIZE=2", model, adamw(model))


def test_data_parallel_model() -> None:
    model = nn.DataParallel(make_model())
    refused(offload.InvalidArgument, "DataParallel", model, adamw(model))


def test_models_that_cannot_be_wrapped() -> None:
    model = make_model()
    with pytest.raises(offload.InvalidArgument, match="torch.nn.Module"):
        offload.wrap("model", adamw(model))  # type: ignore[arg-type]
    meta = make_model().to("meta")
    refused(offload.InvalidArgument, "meta device", meta, adamw(meta))
    complex_model = nn.Linear(2, 2).to(torch.complex64)
    refused(offload.InvalidArgument, "complex64", complex_model, adamw(complex_model))
    double = nn.Linear(2, 2).double()
    refused(offload.InvalidArgument, "float64", double, adamw(double))


@pytest.mark.parametrize("made", ["scripted", "traced"])
def test_script_modules_with_parameters(made: str) -> None:
    part = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    compiled = torch.jit.script(part) if made == "scripted" else torch.jit.trace(part, torch.zeros(1, 4))
    refused(offload.InvalidArgument, "the model is a torch.jit.ScriptModule", compiled, adamw(compiled))
    model = nn.Sequential(nn.Linear(4, 4), compiled)
    with pytest.raises(offload.InvalidArgument, match=r"^1 is a torch.jit.ScriptModule .*; wrap the module"):
        offload.wrap(model, adamw(model), **HOST)
    assert not model._forward_pre_hooks and not model[0]._forward_pre_hooks


@pytest.mark.parametrize("placement", [HOST, {**HOST, "params": "host"}, {**HOST, "activations": "host"}])
def test_script_modules_without_parameters(placement: dict[str, Any]) -> None:
    """As the activations of some models are: they are trained, saved and loaded through like any other."""

    def run(**options: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        gate = torch.jit.script(nn.Sequential(nn.SiLU(), nn.BatchNorm1d(8, affine=False)))
        model = nn.Sequential(nn.Linear(8, 8), gate, nn.Linear(8, 8), nn.Sequential(gate, nn.Linear(8, 4)))
        model, optimizer = offload.wrap(model, adamw(model, lr=1e-2), **options)
        for _ in range(4):
            model(torch.randn(16, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.load_state_dict(model.state_dict(), assign=True)
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        return [value.clone() for value in model.state_dict().values()]

    for one, other in zip(run(**placement), run(**RESIDENT), strict=True):
        assert torch.equal(one, other)


def test_tensors_that_cannot_be_trained_or_have_no_shape() -> None:
    lazy = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(offload.InvalidArgument, match="0.weight has no shape yet.*one forward"):
        offload.wrap(lazy, adamw(lazy), **HOST)
    with torch.inference_mode():
        model = make_model()
    for placement in (HOST, {**HOST, "params": "host"}):
        refused(offload.InvalidArgument, "made inside torch.inference_mode", model, adamw(model), **placement)
        refused(offload.InvalidArgument, "made inside torch.inference_mode", model, None, params="host")


@pytest.mark.parametrize("given", [torch.optim.AdamW, 3, "a scheduler"])
def test_what_is_no_optimizer(given: Any) -> None:
    model = make_model()
    if given == "a scheduler":
        given = torch.optim.lr_scheduler.StepLR(adamw(model), 1)
    refused(offload.InvalidArgument, "^optim=.*: give a torch.optim.Optimizer, a list of them, or None", model, given)


@pytest.mark.parametrize("placement", [HOST, {**HOST, "params": "host"}])
def test_full_params_takes_the_models_parameters_alone(placement: dict[str, Any]) -> None:
    model = make_model()
    model, optimizer = offload.wrap(model, adamw(model), **placement)
    for given, message in (
        (["head.weight"], r"parameter 0 given to full_params, a str, is none of this TinyLM's"),
        ([model.head.weight, nn.Parameter(torch.ones(3))], r"parameter 1 .*, of shape \(3,\), is none"),
    ):
        with pytest.raises(offload.InvalidArgument, match=message), offload.full_params(model, given):  # type: ignore[arg-type]
            pass
    with pytest.raises(offload.InvalidArgument, match="model is a str"), offload.full_params("model"):  # type: ignore[arg-type]
        pass
    with offload.full_params(model, model.head.weight):
        model.head.weight.detach().add_(0)
    loss_of(model, next(batches(1))).backward()
    with pytest.raises(offload.InvalidArgument, match="grad_scale='half': give a number"):
        optimizer.step(grad_scale="half")
    optimizer.step()


def test_predictions_are_of_modules_on_hardware() -> None:
    for ask in (offload.estimate, offload.predict):
        with pytest.raises(offload.InvalidArgument, match="model is a NoneType"):
            ask(None)
        with pytest.raises(offload.InvalidArgument, match="hardware=3: give the name of a preset"):
            ask(make_model(), hardware=3)


def test_sparse_gradients_name_the_parameter() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1))
    model, optimizer = offload.wrap(model, adamw(model), **HOST)
    with pytest.raises(offload.InvalidArgument, match=r"0\.weight.*sparse"):
        model(torch.tensor([1, 2])).sum().backward()
        optimizer.step()


def test_nan_gradients_spread_as_in_torch() -> None:
    model = make_model()
    model, optimizer = offload.wrap(model, adamw(model, lr=1e-2), **HOST)
    loss_of(model, next(batches(1))).backward()
    weight = model.blocks[0].up.weight
    weight.grad[0, 0] = float("nan")
    optimizer.step()
    assert weight[0, 0].isnan() and not weight[1:].isnan().any() and not weight[0, 1:].isnan().any()


def test_add_param_group_after_wrap() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.blocks.parameters(), lr=1e-2)
    model, wrapped = offload.wrap(model, optimizer, **HOST)
    wrapped.add_param_group({"params": list(model.embedding.parameters()), "lr": 1e-3})
    before = model.embedding.weight.detach().clone()
    loss_of(model, next(batches(1))).backward()
    wrapped.step()
    assert not torch.equal(before, model.embedding.weight)
    with pytest.raises(offload.InvalidArgument, match="amsgrad"):
        wrapped.add_param_group({"params": list(model.norm.parameters()), "amsgrad": True})
    assert len(wrapped.param_groups) == 2


UNTRAINABLE: dict[str, tuple[Callable[[], nn.Parameter], str]] = {
    "no values": (lambda: nn.Parameter(torch.ones(3, device="meta")), "is on meta: this model trains on"),
    "no shape": (lambda: nn.UninitializedParameter(), "has no shape yet"),
    "float64": (lambda: nn.Parameter(torch.ones(3).double()), "float64 cannot be trained"),
    "not dense": (lambda: nn.Parameter(torch.ones(4, 4)[::2]), "are not dense"),
    "too large": (lambda: nn.Parameter(torch.ones(1 << 22)), "the host budget cannot hold"),
}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("make, message", UNTRAINABLE.values(), ids=UNTRAINABLE.keys())
def test_a_refused_group_leaves_nothing(
    kind: type[torch.optim.Optimizer], make: Callable[[], nn.Parameter], message: str
) -> None:
    """Also of the parameters before the one that is refused."""

    def run(refuses: bool) -> tuple[Any, dict[str, int]]:
        model = make_model()
        model, optimizer = offload.wrap(model, kind(model.blocks.parameters(), lr=1e-2), **HOST, host_budget="8MiB")
        if refuses:
            with pytest.raises(offload.OffloadError, match=message):
                optimizer.add_param_group({"params": [model.head.weight, make()]})
        assert len(optimizer.param_groups) == 1
        return train(model, optimizer, clip=None), optimizer.stats().host_bytes

    (refused_run, its_bytes), (plain_run, plain_bytes) = run(True), run(False)
    assert_same_bits(refused_run, plain_run)
    assert its_bytes == plain_bytes


MALFORMED: dict[str, tuple[Any, str]] = {
    "no groups": ({"state": {}, "param_groups": None}, "needs a list of dicts with 'params'"),
    "groups of numbers": ({"state": {}, "param_groups": [1]}, "needs a list of dicts with 'params'"),
    "groups without parameters": ({"state": {}, "param_groups": [{}]}, "needs a list of dicts with 'params'"),
    "a list of states": ({"state": [], "param_groups": [{"params": [0]}]}, "and a dict as 'state'"),
    "a number as a state": ({"state": {0: 3}, "param_groups": [{"params": [0]}]}, "has 3 for a parameter"),
}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("state, message", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_no_state_is_not_loaded(kind: type[torch.optim.Optimizer], state: Any, message: str) -> None:
    model = nn.Linear(3, 2, bias=False)
    _, optimizer = offload.wrap(model, kind(model.parameters(), lr=1e-2), **HOST)
    with pytest.raises(offload.InvalidArgument, match=message):
        optimizer.load_state_dict(state)


def test_arguments_of_the_optimizers_methods(tmp_path: Path) -> None:
    model = make_model()
    model, optimizer = offload.wrap(model, adamw(model), **HOST)
    loss_of(model, next(batches(1))).backward()
    for scale in (torch.ones((), device="meta"), torch.tensor(1j), torch.ones(2)):
        with pytest.raises(offload.InvalidArgument, match="grad_scale is torch.* give a number, or one real element"):
            optimizer.step(grad_scale=scale)
    weight = model.head.weight
    for parameter, values in ((None, {}), ("head.weight", {}), (weight, None)):
        with pytest.raises(offload.InvalidArgument, match="write_state was given a .*: give a parameter and a dict"):
            optimizer.write_state(parameter, values)  # type: ignore[arg-type]
    with pytest.raises(offload.InvalidArgument, match="head.weight: its state became 3; it must be a dict"):
        optimizer.state[weight] = 3
    with pytest.raises(offload.InvalidArgument, match="is in no group of this optimizer"):
        optimizer.state[nn.Parameter(torch.ones(3))] = {}
    with pytest.raises(offload.InvalidArgument, match="full_params was given 3"), offload.full_params(model, 3):  # type: ignore[arg-type]
        pass
    for call in (offload.save_checkpoint, offload.load_checkpoint):
        with pytest.raises(offload.InvalidArgument, match="optimizer 0 is a str: give torch.optim.Optimizer"):
            call(tmp_path, model, ["adamw"], tag="one")  # type: ignore[operator]
    optimizer.step()


def test_auto_offloads_the_least_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_wrap, "_measure", lambda *_: None)  # else a card keeps what fits of the states
    count = sum(p.numel() for p in make_model().parameters())
    placements = []
    for budget in (20 * count, 9 * count, 5 * count):
        model = make_model()
        _, optimizer = offload.wrap(model, adamw(model), device_budget=budget)
        placements.append((optimizer.plan.optimizer, optimizer.plan.gradients))
        assert optimizer.plan.reason
    assert placements == [("device", "device"), ("host", "device"), ("host", "host")]
