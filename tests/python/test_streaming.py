"""Streamed parameters: training with params="host" equals resident training bit for bit, in bounded device memory."""

from __future__ import annotations

import contextlib
import copy
import os
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload._pending import PendingParameter
from test_memory import Allocations
from training import (
    HOST,
    RESIDENT,
    Block,
    assert_same_bits,
    batches,
    loss_of,
    make_model,
    same_bits,
    train,
    wrapped_run,
)
from what_lives import all_gone

pytestmark = pytest.mark.usefixtures("device")

PARAMS = {**RESIDENT, "params": "host"}
ALL = {**HOST, "params": "host"}
STREAMED = pytest.mark.parametrize("placement", [ALL, PARAMS], ids=["all on the host", "params alone"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def streamed(model: nn.Module, placement: dict[str, str] = ALL, **options: Any) -> tuple[nn.Module, Any]:
    return offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement, **options)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    with offload.full_params(model):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


@DTYPES
@STREAMED
@pytest.mark.parametrize("loop", [{}, {"micro_batches": 3}, {"clip": None}], ids=["clip", "accumulate", "plain"])
def test_streamed_equals_resident(placement: dict[str, str], dtype: torch.dtype, loop: dict[str, Any]) -> None:
    model = make_model(dtype)
    run = wrapped_run(model, placement, **loop)
    assert_same_bits(run, wrapped_run(model, RESIDENT, **loop))
    stats = run.optimizer.stats()
    assert run.optimizer.plan.params == "host" and stats.host_bytes["weights"] > 0
    assert stats.transfers["to_device_bytes"] > 6 * sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("prefetch", [1, 2, 9])
@pytest.mark.parametrize("lazy", [True, False])
def test_no_setting_changes_a_bit(prefetch: int, lazy: bool) -> None:
    model = make_model(torch.bfloat16, depth=5)
    assert_same_bits(
        wrapped_run(model, ALL | {"prefetch": prefetch, "lazy": lazy, "master": "fp32"}), wrapped_run(model, RESIDENT)
    )


@STREAMED
def test_tied_and_frozen(placement: dict[str, str]) -> None:
    model = make_model(torch.bfloat16, tied=True)
    for p in model.blocks[1].parameters():
        p.requires_grad_(False)
    run = wrapped_run(model, placement, micro_batches=2)
    assert_same_bits(run, wrapped_run(model, RESIDENT, micro_batches=2))
    assert run.model.head.weight is run.model.embedding.weight
    frozen = {id(p) for p in run.model.blocks[1].parameters()}
    assert not frozen & run.optimizer._engine.states.keys()


def test_named_units() -> None:
    model = make_model(depth=4)
    run = wrapped_run(model, ALL | {"units": [nn.Linear, "embedding"]})
    assert_same_bits(run, wrapped_run(model, RESIDENT))
    blocks = wrapped_run(model, ALL)
    assert run.optimizer.stats().peak_weight_bytes < blocks.optimizer.stats().peak_weight_bytes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_between_steps(mode: Any) -> None:
    def run(placement: dict[str, str]) -> list[float]:
        model, optimizer = streamed(make_model(), placement)
        losses = []
        for tokens in batches(5):
            model.train()
            loss_of(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with mode():
                losses += [loss_of(model, tokens).item(), loss_of(model, tokens).item()]
        return losses

    assert run(ALL) == run(PARAMS) == run(RESIDENT)


def test_the_loop_of_an_unrelated_optimizer() -> None:
    """By a power of two any device scales exactly, whether it fuses that with the addition or not."""

    def run(placement: dict[str, str]) -> Any:
        model = make_model()
        return train(*offload.wrap(model, torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.9), **placement))

    assert_same_bits(run(ALL), run(RESIDENT))
    with pytest.raises(offload.InvalidArgument, match=r"SGD on the device.*optimizer='host'"):
        run(PARAMS)


class Passes(nn.Module):
    """A forward that takes another way through the blocks in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(5))

    def forward(self, x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
        for index in order:
            x = self.blocks[index](x)
        return x


def test_another_order_in_every_pass() -> None:
    orders = [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (0, 2, 4), (1, 1, 3), (0, 1, 2, 3, 4), (2,), (3, 4, 0, 3)]

    def run(placement: dict[str, str]) -> list[float]:
        torch.manual_seed(0)
        model, optimizer = streamed(Passes(), placement)
        losses = []
        for order in orders * 2:
            loss = model(torch.ones(2, 16), order).square().mean()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return losses

    assert run(ALL) == run(RESIDENT)


# --- bytes --------------------------------------------------------------------------------------------------


class Largest(Allocations):
    """Also the most that was live at once: `peak`, above what was there at the start."""

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        live = 0
        self.peak = 0
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            self.peak = max(self.peak, live)


@pytest.mark.cpu_only
@pytest.mark.parametrize("prefetch", [1, 2])
def test_peak_device_bytes_follow_the_formula(prefetch: int) -> None:
    """Slots times the largest unit, and activations of 1 KiB a block. Frozen: gradients on their way come and go."""
    model = nn.Sequential(*(nn.Linear(256, 256).requires_grad_(False) for _ in range(8)))
    unit = 4 * (256 * 256 + 256)
    model.append(nn.Linear(256, 1))
    model, optimizer = streamed(model, prefetch=prefetch, poison=False)
    x = torch.ones(1, 256, requires_grad=True)

    def step() -> None:
        model(x).sum().backward()
        x.grad = None
        optimizer.step()
        optimizer.zero_grad()
        optimizer.synchronize()

    step()
    step()
    optimizer._engine.streaming.empty()
    with Largest() as allocations:
        step()
        optimizer._engine.streaming.empty()
    slots = 1 + prefetch
    assert slots * unit <= allocations.peak <= slots * unit + 64 * 1024, str(optimizer.memory_summary())
    assert optimizer.plan.device.weights == slots * unit == optimizer.stats().peak_weight_bytes
    assert optimizer.plan.resident.weights == 8 * unit + 4 * 257


def test_between_steps_nothing_but_the_first_units_is_on_the_device() -> None:
    model, optimizer = streamed(make_model(depth=6))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert optimizer.stats().device_bytes["weights"] == 0
    for tokens in batches(2):
        loss_of(model, tokens).backward()
        assert optimizer.stats().device_bytes["weights"] == 0
        optimizer.step()
        assert 0 < optimizer.stats().device_bytes["weights"] < 0.5 * weights
        optimizer.zero_grad()


def test_dropping_the_model_frees_everything() -> None:
    model, optimizer = streamed(make_model())
    loss_of(model, next(batches(1))).backward()
    optimizer.step()
    left = [*(weakref.ref(p) for p in model.parameters()), weakref.ref(optimizer._engine)]
    del model, optimizer
    assert all_gone(left)


# --- values -------------------------------------------------------------------------------------------------


@DTYPES
def test_absent_weights_cannot_be_read_or_written(dtype: torch.dtype) -> None:
    model, optimizer = streamed(make_model(dtype))
    weight = model.blocks[0].up.weight
    assert weight.shape == (48, 24) and weight.dtype == dtype and weight.requires_grad and weight.grad is None
    reads: list[Any] = [
        lambda: weight + 1, lambda: weight.detach(), lambda: weight.data, lambda: weight.clone(), lambda: weight[0],
        lambda: weight.untyped_storage(), lambda: weight.data_ptr(), lambda: weight.norm(), lambda: weight.tolist(),
        lambda: torch.stack([weight]), lambda: torch._foreach_norm([weight]), lambda: weight.fill_(0),
        lambda: weight.half(), lambda: weight.to(torch.float64),
    ]  # fmt: skip
    for read in reads:
        with pytest.raises(offload.StateError, match=r"blocks\.0\.up\.weight|embedding\.weight") as raised:
            read()
        assert "offload.full_params(model)" in str(raised.value)
    assert "Parameter containing" in repr(weight)
    loss_of(model, next(batches(1))).backward()
    optimizer.step()


@STREAMED
@DTYPES
def test_full_params_takes_writes_back(placement: dict[str, str], dtype: torch.dtype) -> None:
    def run(placement: dict[str, str]) -> Any:
        def write(step: int, model: nn.Module, optimizer: Any) -> None:
            with offload.full_params(model), torch.no_grad():
                if step == 1:
                    model.blocks[0].up.weight[:2] *= 0.5
                if step == 2:
                    model.blocks[1].up.weight.data.mul_(0.5)
                if step == 3:
                    model.blocks[2].down.weight.data = model.blocks[2].down.weight.data * 0.5
            if step == 2:
                optimizer.resync()

        return wrapped_run(make_model(dtype), placement, each_step=write)

    written = run(placement)
    assert_same_bits(written, run(RESIDENT))
    assert written.losses != wrapped_run(make_model(dtype), RESIDENT).losses


@STREAMED
@pytest.mark.parametrize("changed", [torch.Tensor.double, torch.Tensor.half, lambda value: value[:2].clone()])
def test_one_weight_that_cannot_go_home_keeps_no_other_from_it(placement: dict[str, str], changed: Any) -> None:
    """Writes through `.data` show at the end of full_params alone."""
    model, _ = streamed(make_model(), placement)
    before = values(model)
    bad = model.get_parameter("blocks.1.up.weight")
    refusal = r"blocks\.1\.up\.weight: became .*; its place is for torch\.float32 of shape \(48, 24\)"
    with pytest.raises(offload.StateError, match=refusal), offload.full_params(model):
        for p in model.parameters():
            if p is bad:
                p.data = changed(p.data)
            else:
                p.data.mul_(2)
    bad.data = before["blocks.1.up.weight"].t().contiguous().t() * 2  # in other strides than its own
    loss_of(model, next(batches(1)))
    assert bad.is_contiguous()
    assert all(same_bits(value, before[name] * 2) for name, value in values(model).items())
    loss_of(model, next(batches(1))).backward()


@STREAMED
def test_what_a_failed_state_dict_has_copied_is_not_saved_later(placement: dict[str, str]) -> None:
    """No hook tells that it has ended, so its copies are there until values change."""
    model, optimizer = streamed(make_model(), placement)
    block: Any = model.get_submodule("blocks.0")

    def fail(*_: Any) -> None:
        raise LookupError

    def end_of_state_dict() -> None:
        handle = model.get_submodule("head").register_state_dict_post_hook(fail)
        with pytest.raises(LookupError):
            model.state_dict()
        handle.remove()

    def saved() -> torch.Tensor:
        return block.state_dict()["up.weight"].clone()

    loss_of(model, next(batches(1))).backward()
    before = saved()
    end_of_state_dict()
    optimizer.step()
    after = saved()
    assert not same_bits(after, before) and same_bits(after, values(model)["blocks.0.up.weight"])
    end_of_state_dict()
    with offload.full_params(model):
        block.up.weight.data.mul_(2)
    assert same_bits(saved(), after * 2)
    end_of_state_dict()
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})
    end_of_state_dict()
    block.load_state_dict({name: value * 2 for name, value in block.state_dict().items()})
    assert same_bits(saved(), after * 8)
    optimizer.step()
    with pytest.raises(offload.StateError, match="is on the host or on disk"):
        block.up.weight.sum()


@STREAMED
@DTYPES
def test_values_of_a_wrapped_model(placement: dict[str, str], dtype: torch.dtype) -> None:
    model, optimizer = streamed(make_model(dtype, tied=True), placement)
    loss_of(model, next(batches(1))).backward()
    optimizer.step()
    expected = values(model)
    state = model.state_dict()
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.embedding.weight
    for name, p in twin.named_parameters():
        assert type(p) is nn.Parameter and p.requires_grad
        assert same_bits(p.detach(), expected[name])
        assert same_bits(state[name].to(p.device), expected[name])
    twin(next(batches(1)))
    twin.bfloat16()

    model.load_state_dict({name: value * 2 for name, value in state.items()})
    for name, value in values(model).items():
        assert same_bits(value, expected[name] * 2)
    assert optimizer.stats().device_bytes["weights"] == 0
    model.blocks[1].load_state_dict({n: v.clone() for n, v in twin.to(dtype).blocks[1].state_dict().items()})
    model.load_state_dict({name: value * 3 for name, value in state.items()}, assign=True)
    assert all(same_bits(value, expected[name] * 3) for name, value in values(model).items())
    model, plain = offload.unwrap(model, optimizer)
    assert type(plain) is torch.optim.AdamW
    for name, p in model.named_parameters():
        assert type(p) is nn.Parameter and same_bits(p.detach(), expected[name] * 3)
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
    for module in model.modules():
        hooks = {key: value for key, value in vars(module).items() if key.endswith("hooks")}
        assert not any(hooks.values()), hooks


@STREAMED
@DTYPES
@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_a_checkpoint_goes_on_with_the_same_bits(placement: dict[str, str], dtype: torch.dtype, first: str) -> None:
    def steps(model: nn.Module, optimizer: Any, seed: int) -> None:
        for tokens in batches(3, seed=seed):
            loss_of(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = streamed(make_model(dtype), placement)
    steps(model, optimizer, 1)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, 2)
    other, resumed = streamed(make_model(dtype, seed=9), placement)
    if first == "model":
        other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    if first == "optimizer":
        other.load_state_dict(saved[0])
    again = resumed.state_dict()["state"][0]
    assert "master" not in again or same_bits(again["master"], saved[1]["state"][0]["master"])
    steps(other, resumed, 2)
    one, two = values(model), values(other)
    assert all(same_bits(one[name], two[name]) for name in one)


def test_optimizer_states_alone_leave_the_weights() -> None:
    """As on the device: a loaded master counts where the model's weight is its value."""
    saved = wrapped_run(make_model(torch.bfloat16), RESIDENT).optimizer.state_dict()

    def run(placement: dict[str, str]) -> Any:
        model, optimizer = streamed(make_model(torch.bfloat16), placement)
        optimizer.load_state_dict(saved)
        return train(model, optimizer)

    assert_same_bits(run(ALL), run(RESIDENT))


@pytest.mark.parametrize("early", [True, False])
@STREAMED
def test_a_hook_of_the_model_uses_its_weights(placement: dict[str, str], early: bool) -> None:
    """Registered before `wrap` or after it."""

    def decayed(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.01 * torch.stack([p.square().sum() for p in module.parameters()]).sum()

    runs = []
    for options in (RESIDENT, placement):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if early:
            model.register_forward_hook(decayed)
        model, optimizer = offload.wrap(model, optimizer, **options)
        if not early:
            model.register_forward_hook(decayed)
        runs.append(train(model, optimizer))
    assert_same_bits(*runs)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_for_each_weight_steps_in_backward(kind: type[torch.optim.Optimizer]) -> None:
    """As torch's documentation has it. What runs next in backward needs other weights of the unit."""
    runs = []
    for placement in (RESIDENT, HOST, ALL):
        model = make_model()
        parameters = list(model.parameters())
        each = [kind([p], lr=1e-2) for p in parameters]
        model, wrapped = offload.wrap(model, each, **placement)
        optimizers = dict(zip(parameters, wrapped, strict=True))

        def step(p: torch.Tensor, optimizers: dict[Any, Any] = optimizers) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        handles = [p.register_post_accumulate_grad_hook(step) for p in parameters]
        losses = []
        for tokens in batches(3):
            loss = loss_of(model, tokens)
            loss.backward()
            losses.append(loss.detach())
        runs.append([*losses, *values(model).values()])
        for handle in handles:  # which have the weights: torch 2.6 does not see such a cycle
            handle.remove()
    assert all(same_bits(one, other) for run in runs for one, other in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_no_unit_comes_back_for_a_backward_that_is_over(fails: bool) -> None:
    """A thread of autograd may let go of a backward some time after its caller has gone on."""
    model, optimizer = streamed(make_model())
    tokens = next(batches(1))
    kept: list[Any] = []

    def keep(_: torch.Tensor) -> None:
        kept.append(optimizer._engine.streaming._backward())
        if fails:
            raise RuntimeError("in a hook")

    for _ in range(2):
        handle = model.blocks[0].up.weight.register_post_accumulate_grad_hook(keep)
        with pytest.raises(RuntimeError, match="in a hook") if fails else contextlib.nullcontext():
            loss_of(model, tokens).backward()
        handle.remove()
        optimizer.step()
        assert all(type(p) is PendingParameter for p in model.parameters())
        optimizer.zero_grad()
    assert len(kept) == 2 and kept[0] is not kept[1] and None not in kept


def test_a_penalty_on_weights_inside_full_params() -> None:
    def run(placement: dict[str, str]) -> list[float]:
        model, optimizer = streamed(make_model(), placement)
        losses = []
        for tokens in batches(3):
            loss = loss_of(model, tokens)
            with offload.full_params(model):
                loss = loss + sum(p.pow(3).sum() for p in model.parameters())
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return losses

    assert run(ALL) == run(RESIDENT)


@pytest.mark.cpu_only
def test_a_forked_child_has_no_weights() -> None:
    model, _ = streamed(make_model())
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for use in (model.state_dict, lambda: copy.deepcopy(model), lambda: loss_of(model, next(batches(1)))):
                with pytest.raises(offload.StateError, match="process"):
                    use()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_no_step_inside_full_params() -> None:
    model, optimizer = streamed(make_model())
    loss_of(model, next(batches(1))).backward()
    with offload.full_params(model), pytest.raises(offload.StateError, match="leave the context first"):
        optimizer.step()
    optimizer.step()


# --- failures -----------------------------------------------------------------------------------------------


def test_double_backward_is_refused() -> None:
    model, _ = streamed(make_model())
    with pytest.raises(offload.StateError, match=r"create_graph=True.*params='device'"):
        loss_of(model, next(batches(1))).backward(create_graph=True)


@pytest.mark.cpu_only
@pytest.mark.parametrize("lane", ["to_device", "to_host"])
def test_a_failed_copy_is_told_and_nothing_is_left(lane: str) -> None:
    model, optimizer = streamed(make_model())
    tokens = next(batches(1))
    expected = loss_of(model, tokens).item()
    optimizer._engine.streaming.empty()
    if lane == "to_device":
        optimizer._engine.device.fail_copy("to_device", 2)
        with pytest.raises(offload.DeviceError):
            loss_of(model, tokens)
        assert loss_of(model, tokens).item() == expected  # nothing had changed
    else:
        loss = loss_of(model, tokens)
        optimizer._engine.device.fail_copy("to_host", 1)
        with pytest.raises(offload.OffloadError):
            loss.backward()
            optimizer.step()
            loss_of(model, tokens)
        with pytest.raises(offload.StateError, match="earlier update failed"):
            optimizer.step()
    offload.unwrap(model, optimizer)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    loss_of(model, tokens).backward()
