"""grad_dtype="fp32": gradients of 16-bit weights add up in fp32, wherever they live."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from deepspeed_training import HostAdamW, config_of
from offload import _grad_dtype
from offload._adamw import round_to_weight
from training import (
    HOST,
    RESIDENT,
    assert_offloaded,
    assert_same_bits,
    batches,
    loss_of,
    make_model,
    same_bits,
    wrapped_run,
)

pytestmark = pytest.mark.usefixtures("device")
needs_grad_dtype = pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype")

PLACEMENTS: dict[str, dict[str, Any]] = {
    "resident": RESIDENT,
    "host": HOST,
    "streamed": {**HOST, "params": "host"},
    "states on the host": {**HOST, "gradients": "device"},
    "a share": {**HOST, "optimizer": 0.5},
}
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
COUNT = 5


def wrap(model: nn.Module, placement: dict[str, Any], **options: Any) -> tuple[nn.Module, offload.OffloadOptimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return offload.wrap(model, optimizer, grad_dtype="fp32", **placement, **options)


def wide_sums(model: nn.Module, micro_batches: list[Tensor]) -> list[Tensor]:
    """Each micro-batch's own gradients, widened one by one and added here."""
    parameters = list(model.parameters())
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    for tokens in micro_batches:
        for total, gradient in zip(sums, torch.autograd.grad(loss_of(model, tokens), parameters), strict=True):
            total += gradient.float()
    return sums


@needs_grad_dtype
@DTYPES
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_sums_are_those_of_widened_gradients(placement: dict[str, Any], dtype: torch.dtype) -> None:
    model = make_model(dtype)
    plain = copy.deepcopy(model)
    data = list(batches(COUNT))
    expected = wide_sums(plain, data)
    for tokens in data:
        loss_of(plain, tokens).backward()
    assert not all(same_bits(p.grad.float(), wide) for p, wide in zip(plain.parameters(), expected, strict=True)), (
        "16-bit sums are others"
    )
    model, optimizer = wrap(model, placement)
    for tokens in data:
        loss_of(model, tokens).backward()
    for parameter, wide in zip(model.parameters(), expected, strict=True):
        assert parameter.grad.dtype == torch.float32 and same_bits(parameter.grad + 0.0, wide)
    # Plain again, gradients included.
    offload.unwrap(model, optimizer)
    for parameter, wide in zip(model.parameters(), expected, strict=True):
        assert type(parameter.grad) is Tensor and same_bits(parameter.grad, wide.to(dtype))
        parameter.grad = None
        assert parameter.grad_dtype == dtype
    loss_of(model, data[0]).backward()
    assert {p.grad.dtype for p in model.parameters()} == {dtype}


@needs_grad_dtype
@DTYPES
@pytest.mark.parametrize("name", [name for name in PLACEMENTS if name != "resident"])
def test_placements_train_alike(name: str, dtype: torch.dtype) -> None:
    model = make_model(dtype, tied=True)
    options = {"grad_dtype": "fp32"}
    resident = wrapped_run(model, {**RESIDENT, **options}, micro_batches=3)
    other = wrapped_run(model, {**PLACEMENTS[name], **options}, micro_batches=3)
    assert_same_bits(resident, other)
    if name in ("host", "streamed"):
        assert_offloaded(other.optimizer)
    narrow = wrapped_run(model, PLACEMENTS[name], micro_batches=3)
    assert any(not same_bits(narrow.weights[key], value) for key, value in other.weights.items())


@needs_grad_dtype
@DTYPES
def test_training_is_adamw_over_wide_sums(dtype: torch.dtype) -> None:
    """The oracle is plain torch: no hook, no HostGrad, and the sums are taken by hand."""
    model = make_model(dtype)
    plain = copy.deepcopy(model)
    model, optimizer = wrap(model, HOST)
    parameters = list(plain.parameters())
    masters = [p.detach().cpu().float() for p in parameters]
    adamw = HostAdamW(masters, lr=1e-2, weight_decay=1e-2)
    data = list(batches(4 * COUNT))
    for start in range(0, len(data), COUNT):
        micro_batches = data[start : start + COUNT]
        for master, total in zip(masters, wide_sums(plain, micro_batches), strict=True):
            master.grad = total.cpu()
        adamw.step()
        with torch.no_grad():
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.copy_(round_to_weight(master, dtype))
        for tokens in micro_batches:
            loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, weight), other in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert same_bits(weight, other), name


@needs_grad_dtype
@pytest.mark.parametrize("kind", ["gradients on the host", "gradients on the device", "Adagrad", "SGD"])
def test_the_plan_counts_and_other_optimizers_read_them(kind: str) -> None:
    placement = PLACEMENTS["states on the host"] if kind.endswith("device") else HOST
    model = make_model(torch.bfloat16)
    narrow, wide = (offload.estimate(model, grad_dtype=name, **placement) for name in (None, "fp32"))
    elements = sum(p.numel() for p in model.parameters())
    assert wide.host.gradients - narrow.host.gradients == 2 * elements
    assert wide.device.gradients - narrow.device.gradients == 2 * elements * kind.endswith("device")
    make: Any = {"Adagrad": torch.optim.Adagrad, "SGD": torch.optim.SGD}.get(kind, torch.optim.AdamW)

    def run(where: dict[str, Any]) -> dict[str, Tensor]:
        own = copy.deepcopy(model)
        # A power of two: SGD on the host and on a device agree whether they fuse its product with the addition or not.
        own, optimizer = offload.wrap(own, make(own.parameters(), lr=2.0**-7), grad_dtype="fp32", **where)
        for tokens in batches(4):
            loss_of(own, tokens).backward()
        held = optimizer.stats().host_bytes.get("gradients", 0)
        assert held > 2 * elements or where is not HOST, "more than 16-bit gradients would be"
        optimizer.step()
        return {name: value.clone() for name, value in own.state_dict().items()}

    expected = run(RESIDENT)
    assert all(same_bits(value, expected[name]) for name, value in run(placement).items())


@needs_grad_dtype
def test_gradients_that_are_there_are_widened_and_fp32_weights_left_alone() -> None:
    model = make_model(torch.bfloat16)
    model.norm.float()
    loss = sum(p.float().square().sum() for p in model.parameters())
    loss.backward()
    before = [p.grad.clone() for p in model.parameters()]
    model, optimizer = wrap(model, RESIDENT)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert same_bits(parameter.grad, gradient.float())
    offload.unwrap(model, optimizer)
    assert all(same_bits(p.grad, gradient) for p, gradient in zip(model.parameters(), before, strict=True))
    assert model.norm.weight.grad_dtype == torch.float32


@needs_grad_dtype
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_what_was_frozen_at_wrap_is_widened_too(placement: dict[str, Any]) -> None:
    model = make_model(torch.bfloat16)
    model.blocks[1].requires_grad_(False)
    plain = copy.deepcopy(model).requires_grad_(True)
    data = list(batches(COUNT))
    model, _ = wrap(model, placement)
    model.requires_grad_(True)
    for tokens in data:
        loss_of(model, tokens).backward()
    for parameter, wide in zip(model.parameters(), wide_sums(plain, data), strict=True):
        assert parameter.grad.dtype == torch.float32 and same_bits(parameter.grad + 0.0, wide)


@needs_grad_dtype
def test_a_frozen_weight_of_a_quantized_dtype_is_left_alone() -> None:
    model = make_model(torch.bfloat16)
    model.codes = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    _, optimizer = wrap(model, RESIDENT)
    assert any(p is model.codes for group in optimizer.param_groups for p in group["params"])
    loss_of(model, next(batches(1))).backward()
    optimizer.step()


@needs_grad_dtype
def test_a_refused_wrap_leaves_them_narrow() -> None:
    model = make_model(torch.bfloat16)
    with pytest.raises(offload.OutOfHostMemory):
        wrap(model, HOST, host_budget=offload.estimate(model, grad_dtype="fp32", **HOST).host.total // 2)
    loss_of(model, next(batches(1))).backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_torch_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        __version__ = "2.6.0"
        Tensor = object

    monkeypatch.setattr(_grad_dtype, "torch", Old)
    with pytest.raises(offload.InvalidArgument, match=r"grad_dtype='fp32': torch 2\.6\.0 has no Tensor\.grad_dtype"):
        wrap(make_model(torch.bfloat16), HOST)


@needs_grad_dtype
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_engine_adds_up_as_the_config_says(accumulation: int) -> None:
    config = config_of(
        accumulation=accumulation, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"},
        zero={"stage": 2, "offload_optimizer": {"device": "cpu"}},
    )  # fmt: skip
    engine, *_ = offload.initialize(model=make_model(), config=config)
    plain = make_model(torch.bfloat16)
    data = list(batches(accumulation))
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in plain.parameters()]
    for tokens in data:
        engine.backward(loss_of(engine, tokens))
        gradients = torch.autograd.grad(loss_of(plain, tokens) / accumulation, list(plain.parameters()))
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient.float()
    assert all(same_bits(p.grad + 0.0, wide) for p, wide in zip(engine.module.parameters(), sums, strict=True))
    engine.step()


@needs_grad_dtype
def test_gradients_are_not_converted() -> None:
    """By what converts no parameter, and would narrow these."""
    model = make_model(torch.bfloat16)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **HOST, grad_dtype="fp32")
    loss_of(model, next(batches(1))).backward()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(offload.StateError, match="the gradient of embedding.weight of a wrapped model would become"):
        model.to(torch.bfloat16)
    for p, gradient in zip(model.parameters(), before, strict=True):
        assert p.grad is not None and same_bits(p.grad, gradient)
    optimizer.step()
