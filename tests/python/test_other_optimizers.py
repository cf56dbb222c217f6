"""Optimizers that run as their own class: the bits of that class in plain torch over fp32 masters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload._adamw import round_to_weight
from over_masters import Make, OverMasters, assert_states_equal, is_refused, plain_run, tier_of, wrapped_run
from training import HOST, RESIDENT, assert_same_bits, batches, loss_of, make_model, same_bits, train

pytestmark = pytest.mark.usefixtures("device")

# What is on the host computes there: on an accelerator its bits are the CPU's.
OPTIMIZER_ON_HOST = {"optimizer": "host", "gradients": "device"}
GRADIENTS_ON_HOST = {"optimizer": "device", "gradients": "host"}
Class = Callable[[Any], torch.optim.Optimizer]


class Prodigious(torch.optim.Optimizer):
    """Keeps numbers in its groups, in itself and in its state beside the parameters; centres gradients in place."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "d": 1e-3, "k": 0})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        self.state["total"] = self.state.get("total", torch.zeros((), device=self.param_groups[0]["params"][0].device))  # type: ignore[index]
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.grad.sub_(p.grad.mean())
                group["d"] = max(group["d"], float(p.grad.abs().max()) / (10 + self.calls))
                self.state["total"] += p.grad.sum()  # type: ignore[index]
                state = self.state[p]
                if not state:
                    state["moment"] = torch.zeros_like(p)
                    state["history"] = []
                state["moment"].lerp_(p.grad, 0.1)
                state["history"] = [*state["history"][-1:], p.grad.abs().mean()]
                p.data.add_(state["moment"] * state["history"][0].sign(), alpha=-group["lr"] * group["d"] * 100)


class Mine(torch.optim.AdamW):
    pass


OPTIMIZERS: dict[str, Class] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, maximize=False),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2, t0=2),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "subclass of AdamW": lambda p: Mine(p, lr=1e-2),
    "a user's own": Prodigious,
}


def over_all(make: Class) -> Make:
    return lambda model: make(model.parameters())


def assert_same_training(make: Class, dtype: torch.dtype, *placements: dict[str, str]) -> None:
    """With clipping and accumulation: weights, losses, norms, states, masters and groups have the same bits."""
    model, over = make_model(dtype, depth=1), over_all(make)
    loop: dict[str, Any] = {"steps": 3, "micro_batches": 2}
    for placement in placements:
        plain = plain_run(model, over, placement, **loop)
        assert not same_bits(plain.weights["blocks.0.up.weight"], model.blocks[0].up.weight.detach())
        run = wrapped_run(model, over, placement, **loop)
        assert_same_bits(run, plain)
        ours = run.optimizer.state_dict()
        masters = {i: s.pop("master") for i, s in ours["state"].items() if isinstance(s, dict) and "master" in s}
        ours["state"] = {key: value for key, value in ours["state"].items() if not isinstance(value, dict) or value}
        assert_states_equal(ours, plain.optimizer.inner.state_dict())
        assert len(masters) == (0 if dtype == torch.float32 else len(plain.optimizer.pairs))
        for index, master in masters.items():
            assert same_bits(master, plain.optimizer.pairs[index][1].detach())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_the_class_in_plain_torch(name: str, dtype: torch.dtype) -> None:
    placements = [RESIDENT] if is_refused(name, HOST) else [HOST, RESIDENT]
    assert_same_training(OPTIMIZERS[name], dtype, *placements)


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW amsgrad", "a user's own"])
def test_every_placement_and_float16(name: str) -> None:
    assert_same_training(OPTIMIZERS[name], torch.float16, HOST, RESIDENT)
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_training(OPTIMIZERS[name], dtype, OPTIMIZER_ON_HOST, GRADIENTS_ON_HOST)


def test_hyperparameters_and_schedulers() -> None:
    """Several groups, a scheduler made before and one after wrap, and writes to groups between steps."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        groups = [
            {"params": list(model.embedding.parameters()), "lr": 3e-3, "weight_decay": 0.0},
            {"params": [p for n, p in model.named_parameters() if not n.startswith("embedding")], "momentum": 0.5},
        ]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.1)

    def change(step: int, _: nn.Module, optimizer: Any) -> None:
        optimizer.param_groups[1]["momentum"] = 0.5 + step / 20
        optimizer.param_groups[0]["maximize"] = step == 1

    model = make_model(torch.bfloat16, depth=1)
    plain_model, ours_model = copy.deepcopy(model), copy.deepcopy(model)
    plain = OverMasters(plain_model, make, torch.device("cpu"))
    schedulers = [torch.optim.lr_scheduler.StepLR(plain.inner, 2, gamma=0.5)]
    stock = make(ours_model)
    schedulers.append(torch.optim.lr_scheduler.StepLR(stock, 2, gamma=0.5))
    ours_model, wrapped = offload.wrap(ours_model, stock, **HOST)
    runs = [
        train(each, optimizer, scheduler=scheduler, each_step=change)
        for each, optimizer, scheduler in zip((plain_model, ours_model), (plain, wrapped), schedulers, strict=True)
    ]
    assert_same_bits(*runs)
    assert wrapped.param_groups[0]["lr"] == 3e-3 / 8
    late = torch.optim.lr_scheduler.LambdaLR(wrapped, lambda epoch: 0.5)
    assert wrapped.param_groups is stock.param_groups and late.get_last_lr()[0] == stock.param_groups[0]["lr"]


def test_optimizers_side_by_side() -> None:
    """Native AdamW and classes of torch, a part of the parameters each, stepped at different times."""

    def run(offloaded: dict[str, str] | None) -> list[Tensor]:
        model: nn.Module = make_model(depth=2)
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
        vectors = [p for p in model.blocks.parameters() if p.dim() < 2]
        adamw = offload.AdamW if offloaded is None else torch.optim.AdamW
        optimizers: Any = [
            adamw(model.embedding.parameters(), lr=1e-2),
            torch.optim.SGD([*vectors, *model.norm.parameters()], lr=0.05, momentum=0.9),
            Prodigious(model.head.parameters()),
            torch.optim.Muon(matrices, lr=1e-2) if hasattr(torch.optim, "Muon") else Prodigious(matrices),
        ]
        if offloaded is not None:
            model, optimizers = offload.wrap(model, optimizers, **offloaded)
        for index, tokens in enumerate(batches(4)):
            loss_of(model, tokens).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            for number, optimizer in enumerate(optimizers):
                if number != index:
                    optimizer.step()
                    optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    reference = run(RESIDENT if torch.get_default_device().type == "cuda" else None)
    for placement in (HOST, RESIDENT) if torch.get_default_device().type == "cpu" else (RESIDENT,):
        for one, other in zip(run(placement), reference, strict=True):
            assert same_bits(one, other)


@pytest.mark.parametrize("placement", [HOST, RESIDENT], ids=["host", "device"])
def test_frozen_tied_and_unused_parameters(placement: dict[str, str]) -> None:
    model = make_model(torch.bfloat16, depth=2, tied=True)
    for p in model.blocks[1].parameters():
        p.requires_grad_(False)

    def forget(_: int, model: nn.Module, optimizer: Any) -> None:
        model.norm.weight.requires_grad_(not model.norm.weight.requires_grad)

    make = over_all(OPTIMIZERS["SGD momentum"])
    run = wrapped_run(model, make, placement, each_step=forget)
    assert_same_bits(run, plain_run(model, make, placement, each_step=forget))
    for name, value in model.blocks[1].state_dict().items():
        assert same_bits(value, run.weights[f"blocks.1.{name}"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("placement", [HOST, RESIDENT], ids=["host", "device"])
def test_written_weights_are_the_masters(dtype: torch.dtype, placement: dict[str, str]) -> None:
    """By an in-place operation, through `.data` with resync(), and as new storage."""
    make = over_all(OPTIMIZERS["SGD momentum"])

    def write(step: int, model: nn.Module, optimizer: Any) -> None:
        weight = model.blocks[0].up.weight
        if step == 0:
            with torch.no_grad():
                weight[:2] *= 0.5
        elif step == 1:
            weight.data.mul_(0.25)
            if isinstance(optimizer, offload.OffloadOptimizer):
                optimizer.resync()
        elif step == 2:
            weight.data = weight.data * 2
        if isinstance(optimizer, OverMasters):
            for p, master in optimizer.pairs:
                changed = round_to_weight(master.detach(), p.dtype) != p.to(master.device)
                master.data[changed] = p.detach().float().to(master.device)[changed]

    model = make_model(dtype, depth=1)
    run = wrapped_run(model, make, placement, each_step=write)
    assert_same_bits(run, plain_run(model, make, placement, each_step=write))
    assert run.losses != plain_run(model, make, placement).losses


class Raising(torch.optim.SGD):
    """Updates the first group, and raises before the second when told to."""

    fail = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for index, group in enumerate(self.param_groups):
            if index == 1 and Raising.fail:
                raise ArithmeticError("in the middle")
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize("placement", [HOST, RESIDENT], ids=["host", "device"])
def test_a_step_that_raises_leaves_what_plain_torch_leaves(placement: dict[str, str]) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        first, *rest = model.parameters()
        return Raising([{"params": [first]}, {"params": rest}], lr=0.1)

    def run(model: nn.Module, optimizer: Any) -> list[Any]:
        seen: list[Any] = []
        for index, tokens in enumerate(batches(3)):
            loss = loss_of(model, tokens)
            loss.backward()
            Raising.fail = index == 1
            if Raising.fail:
                with pytest.raises(ArithmeticError, match="^in the middle$"):
                    optimizer.step()
            else:
                optimizer.step()
                optimizer.zero_grad()  # so the gradient of the failed step stays, and adds up
            seen.append(loss.item())
            seen += [p.detach().cpu().clone() for p in model.parameters()]
        return seen

    model = make_model(depth=1)
    plain = copy.deepcopy(model)
    expected = run(plain, OverMasters(plain, make, tier_of(placement, plain)))
    wrapped_model, wrapped = offload.wrap(model, make(model), **placement)
    assert_states_equal(run(wrapped_model, wrapped), expected)


class Rough(torch.optim.Optimizer):
    """Does what old optimizers do: new storage for parameters, edits and drops of gradients."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                if p.grad is not None:
                    p.grad = p.grad * 0.5 if index % 2 else p.grad
                    p.data = p.data - group["lr"] * p.grad.data
                    if index % 3 == 0:
                        p.grad = None


@pytest.mark.parametrize("placement", [HOST, OPTIMIZER_ON_HOST, GRADIENTS_ON_HOST, RESIDENT], ids=str)
def test_classes_that_replace_storage_and_gradients(placement: dict[str, str]) -> None:
    """Gradients are not zeroed in between, so what the class left of them adds up."""

    def run(model: nn.Module, optimizer: Any) -> list[Any]:
        seen: list[Any] = []
        for tokens in batches(3):
            loss_of(model, tokens).backward()
            seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).cpu())
            optimizer.step()
            seen.append(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).cpu())
            seen += [p.detach().cpu().clone() for p in model.parameters()]
        return seen

    model = make_model(depth=1)
    plain = copy.deepcopy(model)
    expected = run(plain, Rough(plain.parameters()))
    model, optimizer = offload.wrap(model, Rough(model.parameters()), **placement)
    assert_states_equal(run(model, optimizer), expected)


def test_hooks_run_once_a_step() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    model, optimizer = offload.wrap(model := make_model(depth=1), Mine(model.parameters()), **HOST)
    called: list[Any] = []
    handles = [
        register_optimizer_step_pre_hook(lambda one, *_: called.append(one)),
        register_optimizer_step_post_hook(lambda one, *_: called.append(one)),
        optimizer.register_step_pre_hook(lambda one, *_: called.append(one)),
    ]
    loss_of(model, next(batches(1))).backward()
    optimizer.step()
    for handle in handles:
        handle.remove()
    assert called == [optimizer] * 3


@pytest.mark.cpu_only
def test_weights_are_pending_until_they_have_arrived() -> None:
    from offload._pending import PendingParameter

    model, optimizer = offload.wrap(model := make_model(torch.bfloat16), Prodigious(model.parameters()), **HOST)
    loss_of(model, next(batches(1))).backward()
    optimizer._engine.device.hold("to_device")
    optimizer.step()
    assert all(type(p) is PendingParameter for p in model.parameters())
    optimizer._engine.device.release("to_device")
    assert not model.blocks[0].up.weight.isnan().any()
    loss_of(model, next(batches(1)))
    assert all(type(p) is nn.Parameter for p in model.parameters())


@pytest.mark.cpu_only
@pytest.mark.parametrize("lane", ["to_host", "to_device"])
def test_a_failed_copy_names_the_parameter(lane: Any) -> None:
    model, optimizer = offload.wrap(model := make_model(), Prodigious(model.parameters()), **HOST)
    loss_of(model, next(batches(1))).backward()
    before = model.embedding.weight.detach().clone()
    if lane == "to_host":
        model.embedding.weight.grad = torch.ones(40, 24)  # a plain gradient leaves inside step()
    optimizer._engine.device.fail_copy(lane, 1)
    with pytest.raises(offload.DeviceError, match=r"embedding\.weight"):
        optimizer.step()
        optimizer.synchronize()
    if lane == "to_host":  # nothing was changed, and the step can be repeated
        assert same_bits(model.embedding.weight.detach(), before) and not optimizer.state
        optimizer.step()
    else:
        with pytest.raises(offload.StateError):
            optimizer.step()
