"""Training loops of plain PyTorch over gradients that are on the host: the same bits as without."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from grad_store import HostStore, as_the_optimizer_reads, attach, cell_of, same_bits
from offload._grad_cell import Owner
from offload._host_grad import HostGrad

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Net(nn.Module):
    """Convolution in channels_last, tied embedding and head, a frozen layer and one that a step may not use."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.norm = nn.LayerNorm(8)
        self.sometimes = nn.Linear(8, 8)
        self.scalar = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, image: Tensor, tokens: Tensor, use_all: bool = True) -> Tensor:
        x = self.conv(image.contiguous(memory_format=torch.channels_last)).mean((2, 3)) + self.embed(tokens)
        x = self.norm(self.frozen(torch.tanh(x))) * self.scalar
        return self.head(x + self.sometimes(x) if use_all else x)


def pair(dtype: torch.dtype, *, delayed: bool = True) -> tuple[Net, Net, HostStore]:
    torch.manual_seed(3)
    plain = Net().to(dtype)
    held = copy.deepcopy(plain)
    held.head.weight = held.embed.weight
    store = HostStore(delayed=delayed)
    attach(held, store)
    return plain, held, store


def backward(model: Net, seed: int, scale: float = 1.0, use_all: bool = True) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(5, 3, 7, 7, generator=generator).to(model.scalar.dtype)
    tokens = torch.randint(0, 11, (5,), generator=generator)
    (model(image, tokens, use_all).float().square().mean() * scale).backward()


def gradients(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    for name, parameter in model.named_parameters():
        yield name, parameter, parameter.grad


def assert_same_gradients(plain: nn.Module, held: nn.Module, *, expect_held: bool = True) -> None:
    for (name, _, expected), (_, parameter, gradient) in zip(gradients(plain), gradients(held), strict=True):
        assert (expected is None) == (gradient is None), name
        if expected is None or gradient is None:
            continue
        if expect_held:
            assert isinstance(gradient, HostGrad), name
        assert gradient.stride() == expected.stride() and gradient.device == parameter.device
        assert same_bits(expected, gradient), name
        if isinstance(gradient, HostGrad):
            step = cell_of(gradient).for_step()
            assert same_bits(expected, as_the_optimizer_reads(step, parameter.shape)), f"{name}: what the step reads"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefetch", [False, True])
def test_four_micro_batches_add_up(dtype: torch.dtype, prefetch: bool) -> None:
    plain, held, store = pair(dtype)
    for micro_batch in range(4):
        backward(plain, micro_batch)
        if prefetch:
            for _, _, gradient in gradients(held):
                if gradient is not None:
                    cell_of(gradient).prefetch()
        backward(held, micro_batch)
    assert all(cell_of(g).owner is Owner.HOST for _, _, g in gradients(held) if g is not None)
    assert (store.prefetch_count > 0) == prefetch
    assert_same_gradients(plain, held)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf"), 3.0])
@pytest.mark.parametrize("foreach", [True, False, None])
def test_clip_grad_norm(dtype: torch.dtype, norm_type: float, foreach: bool | None) -> None:
    plain, held, store = pair(dtype)
    for step in range(2):
        for model in (plain, held):
            model.zero_grad()
            for micro_batch in range(2):
                backward(model, 2 * step + micro_batch, scale=50.0)
        before = store.to_device_count
        expected, actual = (
            nn.utils.clip_grad_norm_(model.parameters(), 0.05, norm_type, foreach=foreach) for model in (plain, held)
        )
        assert same_bits(expected, actual)
        if step > 0:  # the norms came with the gradients, and the scales wait; a scalar's scale is applied at once
            assert store.to_device_count == before + 1
        assert_same_gradients(plain, held)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("foreach", [True, False, None])
def test_clip_grad_value(dtype: torch.dtype, foreach: bool | None) -> None:
    plain, held, _ = pair(dtype)
    for model in (plain, held):
        backward(model, 0)
        nn.utils.clip_grad_value_(model.parameters(), 1e-3, foreach=foreach)
    assert_same_gradients(plain, held)


@pytest.mark.parametrize("clip", [False, True])
def test_grad_scaler_with_a_step_that_overflows(clip: bool) -> None:
    plain, held, _ = pair(torch.float32)
    scales: dict[Net, list[float]] = {}
    for model in (plain, held):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=3000.0, growth_interval=2)
        scales[model] = []
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            image = torch.randn(5, 3, 7, 7, generator=generator)
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(image, torch.tensor([1, 2, 3, 4, 5])).float().square().mean()
            if step == 2:
                loss = loss * 1e38
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            scaler.step(optimizer)
            if step < 4:
                scaler.update()
                optimizer.zero_grad()
            scales[model].append(scaler.get_scale())
    assert scales[plain] == scales[held]
    assert any(after < before for before, after in itertools.pairwise(scales[plain])), "no step overflowed"
    assert_same_gradients(plain, held)
    assert all(same_bits(p, q) for p, q in zip(plain.parameters(), held.parameters(), strict=True))


def test_unscale_defers_and_needs_no_upload_once_learned() -> None:
    _, held, store = pair(torch.float32)
    backward(held, 0)
    vectors = [p.grad for p in held.parameters() if p.grad is not None and p.dim() > 0]
    found_inf = torch.zeros(())
    torch._amp_foreach_non_finite_check_and_unscale_(vectors, found_inf, torch.tensor(1 / 3))
    held.zero_grad()
    backward(held, 1)
    vectors = [p.grad for p in held.parameters() if p.grad is not None and p.dim() > 0]
    before = store.to_device_count
    inverse_scale = torch.tensor(1 / 3)
    torch._amp_foreach_non_finite_check_and_unscale_(vectors, found_inf, inverse_scale)
    inverse_scale.fill_(7.0)  # the factor was copied at the call
    assert store.to_device_count == before
    assert all(len(cell_of(g).for_step().factors) == 1 for g in vectors)
    plain, _, _ = pair(torch.float32)
    backward(plain, 1)
    expected = [p.grad for p in plain.parameters() if p.grad is not None and p.dim() > 0]
    torch._amp_foreach_non_finite_check_and_unscale_(expected, torch.zeros(()), torch.tensor(1 / 3))
    assert all(same_bits(left, right) for left, right in zip(expected, vectors, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_gradients_that_are_not_finite(value: float) -> None:
    plain, held, _ = pair(torch.float32)
    for model in (plain, held):
        backward(model, 0, scale=value)
    assert_same_gradients(plain, held)
    found = []
    for model in (plain, held):
        found.append(torch.zeros(()))
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found[-1], torch.tensor(0.5))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert found[0] == found[1] == 1
    assert_same_gradients(plain, held)
    with pytest.raises(RuntimeError, match="non-finite"):
        nn.utils.clip_grad_norm_(held.parameters(), 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_zero_grad_both_ways(set_to_none: bool, foreach: bool) -> None:
    plain, held, _ = pair(torch.float32)
    for model in (plain, held):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, foreach=foreach)
        backward(model, 0)
        optimizer.zero_grad(set_to_none=set_to_none)
    if not set_to_none:
        assert all(cell_of(g).owner is Owner.ZERO for _, _, g in gradients(held) if g is not None)
        assert_same_gradients(plain, held)
    for model in (plain, held):
        backward(model, 1)
        backward(model, 2)
    assert_same_gradients(plain, held)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_parameters_without_a_gradient_this_step(set_to_none: bool) -> None:
    plain, held, _ = pair(torch.float32)
    for model in (plain, held):
        backward(model, 0)
        model.zero_grad(set_to_none=set_to_none)
        backward(model, 1, use_all=False)
    assert (held.sometimes.weight.grad is None) == set_to_none
    assert held.frozen.weight.grad is None
    assert_same_gradients(plain, held)


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1, nesterov=True, momentum=0.9, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stock_optimizers_read_held_gradients(name: str, dtype: torch.dtype) -> None:
    plain, held, _ = pair(dtype)
    for model in (plain, held):
        optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
        for step in range(3):
            optimizer.zero_grad(set_to_none=step != 1)
            backward(model, 2 * step)
            backward(model, 2 * step + 1)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    assert all(same_bits(p, q) for p, q in zip(plain.parameters(), held.parameters(), strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
    held = copy.deepcopy(plain)
    attach(held, HostStore(delayed=True))
    for model in (plain, held):
        for seed in range(2):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), requires_grad=True)
            for _ in range(2):  # the shared block: reentrant checkpointing runs its hooks once for each use
                x = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant)
            x.square().sum().backward()
    assert_same_gradients(plain, held)


def test_anomaly_mode() -> None:
    plain, held, _ = pair(torch.float32)
    with torch.autograd.detect_anomaly(check_nan=True):
        for model in (plain, held):
            backward(model, 0)
            backward(model, 1)
    assert_same_gradients(plain, held)
