"""`step(grad_scale=)`: gradients are scaled in fp32 on their way into the update, wherever it runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload._adamw import round_to_weight
from training import HOST, RESIDENT, batches, loss_of, make_model, same_bits

pytestmark = pytest.mark.usefixtures("device")

PLACEMENTS = {
    "host": HOST,
    "device gradients": {"optimizer": "host", "gradients": "device"},
    "resident": RESIDENT,
    "streamed": {**HOST, "params": "host"},
}
LOSS_SCALE = 1024.0
GRAD_SCALE = 0.3 / LOSS_SCALE


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


def train(model: nn.Module, optimizer: Any, grad_scale: float | torch.Tensor = GRAD_SCALE) -> dict[str, torch.Tensor]:
    for tokens in batches(4):
        (loss_of(model, tokens) * LOSS_SCALE).backward()
        before = None if model.norm.weight.grad is None else model.norm.weight.grad.clone()
        optimizer.step(grad_scale=grad_scale)
        assert before is not None and torch.equal(model.norm.weight.grad, before)
        optimizer.zero_grad()
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def over_masters(model: nn.Module, tier: torch.device) -> dict[str, torch.Tensor]:
    """The same in plain torch: SGD over fp32 masters on `tier`, whose gradients are scaled in fp32."""
    masters = [p.detach().to(tier, torch.float32) for p in model.parameters()]
    optimizer = sgd(masters)
    for tokens in batches(4):
        (loss_of(model, tokens) * LOSS_SCALE).backward()
        for master, p in zip(masters, model.parameters(), strict=True):
            assert p.grad is not None
            master.grad, p.grad = p.grad.to(tier, torch.float32) * GRAD_SCALE, None
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, model.parameters(), strict=True):
                p.copy_(round_to_weight(master, p.dtype))
    return dict(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_another_class_equals_plain_torch_over_scaled_gradients(
    placement: dict[str, str], dtype: torch.dtype, device: torch.device
) -> None:
    model = make_model(dtype)
    expected = over_masters(copy.deepcopy(model), torch.device("cpu") if placement["optimizer"] == "host" else device)
    weights = train(*offload.wrap(model, sgd(model.parameters()), **placement))
    for name, weight in expected.items():
        assert same_bits(weights[name], weight), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_native_update_scales_the_same_wherever_it_runs(dtype: torch.dtype) -> None:
    runs = []
    for placement in PLACEMENTS.values():
        model = make_model(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)  # an eps that makes scale matter
        runs.append(train(*offload.wrap(model, optimizer, **placement)))
    for run in runs[1:]:
        for name, weight in runs[0].items():
            assert same_bits(run[name], weight), name


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_what_a_loss_scale_keeps_above_zero_in_fp16_is_not_lost(placement: dict[str, str]) -> None:
    model = nn.Linear(4, 4, bias=False).half()
    nn.init.zeros_(model.weight)
    model, optimizer = offload.wrap(model, torch.optim.SGD(model.parameters(), lr=2.0**20), **placement)
    (model(torch.ones(1, 4, dtype=torch.float16)).sum().float() * 2.0**-10).backward()  # the gradient, scaled
    optimizer.step(grad_scale=2.0**-26)  # 2**-36 is zero in fp16
    expected = torch.full((4, 4), -(2.0**-16), dtype=torch.float16)
    assert same_bits(model.state_dict()["weight"], expected)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, sgd], ids=["native", "another class"])
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_a_tensor_scales_as_its_number_does(placement: dict[str, str], kind: Any, device: torch.device) -> None:
    numbers, tensors = (
        train(*offload.wrap(model, kind(model.parameters()), **placement), grad_scale=scale)
        for model, scale in (
            (make_model(torch.bfloat16), GRAD_SCALE),
            (make_model(torch.bfloat16), torch.tensor([GRAD_SCALE], dtype=torch.float64, device=device)),
        )
    )
    for name, weight in numbers.items():
        assert same_bits(tensors[name], weight), name


@pytest.mark.cpu_only
def test_a_step_does_not_wait_for_its_scale() -> None:
    """The update reads the value of the call, once the tensor has left the device; what is written to it later counts
    for later steps."""
    model, optimizer = offload.wrap(model := make_model(), torch.optim.AdamW(model.parameters(), eps=1e-3), **HOST)
    twin, expected = offload.wrap(twin := make_model(), torch.optim.AdamW(twin.parameters(), eps=1e-3), **HOST)
    (tokens,) = batches(1)
    loss_of(model, tokens).backward()
    loss_of(twin, tokens).backward()
    expected.step(grad_scale=GRAD_SCALE)
    scale = torch.tensor(GRAD_SCALE)
    optimizer._engine.device.hold("to_host")
    try:
        optimizer.step(grad_scale=scale)
        scale.fill_(float("nan"))
    finally:
        optimizer._engine.device.release("to_host")
    for name, weight in twin.state_dict().items():
        assert same_bits(model.state_dict()[name], weight), name


def test_a_scale_of_several_elements_is_refused_and_changes_nothing() -> None:
    model, optimizer = offload.wrap(model := make_model(), torch.optim.AdamW(model.parameters()), **HOST)
    loss_of(model, next(batches(1))).backward()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(offload.InvalidArgument, match=r"grad_scale is torch.float32 of shape \(2,\)"):
        optimizer.step(grad_scale=torch.ones(2))
    for name, weight in model.state_dict().items():
        assert same_bits(weight, before[name]), name
