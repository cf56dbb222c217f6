"""What training loops do to gradients, through the engine: plain torch's bits, and the update that they ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload import _copy_lanes
from offload._host_grad import HostGrad
from training import HOST, RESIDENT, assert_offloaded, batches, loss_of, make_model, same_bits

pytestmark = pytest.mark.usefixtures("device")

Edit = Callable[[nn.Module], Any]


def _edit_through_a_view(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad.view(-1)[0] = 0.25
        p.grad[..., -1].mul_(0.5)


def _replace(model: nn.Module) -> None:
    for index, p in enumerate(model.parameters()):
        if index % 2:
            p.grad = p.grad * 2
        elif index % 3 == 0:
            p.grad = None


def _scale_thrice(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad.mul_(0.3).div_(7).mul_(torch.tensor(1.7))


def _transposed(model: nn.Module) -> None:
    weight = model.blocks[0].up.weight
    weight.grad = (weight.grad * 1.5).t().contiguous().t()


EDITS: dict[str, Edit] = {
    "norm 1": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=1.0),
    "norm 2": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.1),
    "norm inf": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.001, norm_type=float("inf")),
    "norm 3": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=3.0),
    "norm, no foreach": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=False),
    "norm, foreach": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=True),
    "twice": lambda model: [nn.utils.clip_grad_norm_(model.parameters(), clip) for clip in (0.3, 0.1)],
    "value": lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e-3),
    "scale thrice": _scale_thrice,
    "edit through a view": _edit_through_a_view,
    "replace": _replace,
    "transposed": _transposed,
    "data": lambda model: [p.grad.data.add_(0.01) for p in model.parameters()],
    "zero some": lambda model: [p.grad.zero_() for p in list(model.parameters())[::2]],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EDITS)
def test_the_update_uses_the_edited_gradient(name: str, dtype: torch.dtype) -> None:
    def run(placement: dict[str, str]) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
        model = make_model(dtype)
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        gradients = []
        for tokens in batches(3):
            loss_of(model, tokens).backward()
            EDITS[name](model)
            gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()], gradients, optimizer

    weights, gradients, optimizer = run(HOST)
    expected_weights, expected_gradients, _ = run(RESIDENT)
    assert_offloaded(optimizer)
    for one, other in zip(gradients + weights, expected_gradients + expected_weights, strict=True):
        assert type(one) is torch.Tensor and same_bits(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_in_fp32_are_torchs_own(dtype: torch.dtype) -> None:
    """Of gradients of several sizes and strides, taken when asked for (at first) and on the way out (from then on)."""

    def run(placement: dict[str, str]) -> list[torch.Tensor]:
        model = make_model(dtype)
        for block in model.blocks:
            block.up.weight.data = block.up.weight.t().contiguous().t()
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        norms = []
        for tokens in batches(3):
            loss_of(model, tokens).backward()
            norms += torch._foreach_norm(optimizer.gradients(), 2.0, torch.float32)
            norms += [torch.linalg.vector_norm(g, 2.0, dtype=torch.float32) for g in optimizer.gradients()]
            if placement is HOST:
                assert all(type(g) is HostGrad for g in optimizer.gradients())
            optimizer.step()
            optimizer.zero_grad()
        return norms

    for one, other in zip(run(HOST), run(RESIDENT), strict=True):
        assert one.dtype is torch.float32 and same_bits(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grad_norm_is_that_of_resident_gradients(dtype: torch.dtype) -> None:
    """Without gradients, with some, of two dtypes, edited and scaled; what torch returns of them may be edited."""

    def run(placement: dict[str, str]) -> list[torch.Tensor]:
        model = make_model(dtype)
        model.blocks[0].float()
        model.blocks[0].register_forward_pre_hook(lambda _, args: (args[0].float(),))
        model.blocks[0].register_forward_hook(lambda _, args, output: output.to(dtype))
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        norms = [optimizer.grad_norm()]
        for number, tokens in enumerate(batches(3)):
            if number < 2:
                loss_of(model, tokens).backward()
            else:
                model.blocks[0](torch.ones(1, 4, model.norm.weight.numel(), dtype=dtype)).sum().backward()
            norms.append(optimizer.grad_norm())
            for norm in torch._foreach_norm([optimizer.gradients()[0]], 2.0, torch.float32):
                norm.mul_(3.0)
            norms.append(optimizer.grad_norm())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            norms.append(optimizer.grad_norm())
            optimizer.gradients()[0].add_(1.0)
            norms.append(optimizer.grad_norm())
            optimizer.step()
            optimizer.zero_grad()
        return norms

    ours, theirs = run(HOST), run(RESIDENT)
    assert ours[0] == 0.0
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype is torch.float32 and one.dim() == 0 and same_bits(one, other)


def test_user_hooks_before_and_after_ours() -> None:
    def run(placement: dict[str, str]) -> tuple[list[torch.Tensor], list[float]]:
        model = make_model()
        seen: list[float] = []
        weight = model.blocks[0].up.weight
        weight.register_hook(lambda gradient: gradient * 3)
        weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.sum().item()))
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)

        def halve(p: torch.Tensor) -> None:
            p.grad.mul_(0.5)

        weight.register_post_accumulate_grad_hook(halve)
        weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.sum().item()))
        for tokens in batches(3):
            loss_of(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()], seen

    weights, seen = run(HOST)
    expected, expected_seen = run(RESIDENT)
    assert seen == expected_seen
    for one, other in zip(weights, expected, strict=True):
        assert same_bits(one, other)


@pytest.mark.parametrize("placement", [HOST, {**HOST, "params": "host"}])
def test_gradients_of_parameters_that_are_trained_later_leave_too(placement: dict[str, str]) -> None:
    """Torch takes no hook of a gradient that is not asked for: from the first step with it on."""

    def run(placement: dict[str, str]) -> tuple[list[list[bool]], list[torch.Tensor]]:
        model = make_model()
        model.blocks[1].requires_grad_(False)
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        left = []
        for number, tokens in enumerate(batches(5)):
            if number == 1:
                model.blocks[1].requires_grad_(True)
            loss_of(model, tokens).backward()
            left.append([isinstance(p.grad, HostGrad) for p in model.blocks[1].parameters()])
            optimizer.step()
            optimizer.zero_grad()
        return left, [value.clone() for value in model.state_dict().values()]

    left, weights = run(placement)
    assert [any(some) for some in left[:2]] == [False, False]
    assert [all(every) for every in left[2:]] == [True, True, True]
    for one, other in zip(weights, run(RESIDENT)[1], strict=True):
        assert same_bits(one, other)


def test_gradients_that_are_not_the_optimizers_stay_plain() -> None:
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.blocks.parameters(), lr=1e-2), **HOST)
    loss_of(model, next(batches(1))).backward()
    assert type(model.embedding.weight.grad) is torch.Tensor
    assert isinstance(model.blocks[0].up.weight.grad, HostGrad)
    before = model.embedding.weight.detach().clone()
    optimizer.step()
    assert same_bits(model.embedding.weight.detach(), before)


def test_a_step_reads_what_the_gradient_was_at_the_call() -> None:
    """Edits between step() and the update belong to the next step: with the sequencer held, nothing leaks in."""

    def run(hold: bool, edit: bool) -> list[torch.Tensor]:
        model = make_model()
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
        loss_of(model, next(batches(1))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if hold:
            optimizer._engine.pipeline.hold()
        optimizer.step()
        if edit:
            for p in model.parameters():
                p.grad.mul_(100.0)
                p.grad.add_(1.0)
            optimizer.zero_grad(set_to_none=False)
            optimizer.zero_grad()
        if hold:
            optimizer._engine.pipeline.release()
        return [p.detach().clone() for p in model.parameters()]

    for one, other in zip(run(True, True), run(False, False), strict=True):
        assert same_bits(one, other)


def test_a_plain_gradient_may_be_overwritten_right_after_step() -> None:
    """Gradients on the device are the user's own tensors: they have left before step() returns."""
    model = make_model()
    other = make_model()
    results = []
    for candidate, overwrite in ((model, True), (other, False)):
        candidate, optimizer = offload.wrap(
            candidate, torch.optim.AdamW(candidate.parameters(), lr=1e-2), optimizer="host", gradients="device"
        )
        loss_of(candidate, next(batches(1))).backward()
        optimizer._engine.pipeline.hold()
        optimizer.step()
        if overwrite:
            for p in candidate.parameters():
                p.grad.fill_(float("nan"))
        optimizer._engine.pipeline.release()
        results.append([p.detach().clone() for p in candidate.parameters()])
    for one, two in zip(*results, strict=True):
        assert same_bits(one, two)


@pytest.mark.cpu_only
def test_a_gradient_that_did_not_arrive_changes_nothing_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_copy_lanes, "_SMALL_BYTES", 0)  # a submission each
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
    device, states = optimizer._engine.device, optimizer._engine.states.values()
    masters = {state.name: state.master_value().clone() for state in states}
    device.hold("to_host")  # so that the failure is found by the update and not by a later backward hook
    device.fail_copy("to_host", 3)
    loss_of(model, next(batches(1))).backward()
    device.release("to_host")
    optimizer.step()
    with pytest.raises(offload.DeviceError, match="did not arrive") as caught:
        optimizer.synchronize()
    failed = [state for state in states if f"'{state.name}'" in str(caught.value)]
    assert len(failed) == 1
    assert same_bits(failed[0].master_value(), masters[failed[0].name])
    assert not any(moment.value().any() for moment in failed[0].moments.values())
    with pytest.raises(offload.StateError, match=failed[0].name):
        loss_of(model, next(batches(1)))


def test_training_goes_on_after_an_exception_in_backward() -> None:
    def run(placement: dict[str, str]) -> list[torch.Tensor]:
        model = make_model()
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        for step, tokens in enumerate(batches(4)):
            if step == 2:

                def fail(_: torch.Tensor) -> None:
                    raise ValueError("on purpose")

                handle = model.blocks[1].up.weight.register_hook(fail)
                with pytest.raises(ValueError, match="on purpose"):
                    loss_of(model, tokens).backward()
                handle.remove()
                optimizer.zero_grad()
            loss_of(model, tokens).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    for one, other in zip(run(HOST), run(RESIDENT), strict=True):
        assert same_bits(one, other)


def test_two_wrapped_models_share_the_workers() -> None:
    def losses(interleaved: bool) -> list[float]:
        trainings = []
        for seed in (0, 1):
            model = make_model(torch.bfloat16, seed=seed)
            trainings.append(offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST))
        found: dict[int, list[float]] = {0: [], 1: []}
        turns = [(step, which) for step in range(4) for which in (0, 1)]
        for step, which in turns if interleaved else sorted(turns, key=lambda turn: (turn[1], turn[0])):
            model, optimizer = trainings[which]
            loss = loss_of(model, next(batches(1, seed=step)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found[which].append(loss.item())
        return found[0] + found[1]

    assert losses(True) == losses(False)
