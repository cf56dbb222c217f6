"""Streamed fp32 weights under autocast: the saved casts are made again in backward, with the same bits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import offload
from offload import _activations, _weight_casts
from test_streaming import ALL, Largest, streamed
from training import RESIDENT, batches, loss_of, make_model, same_bits

pytestmark = pytest.mark.usefixtures("device")

EVERYTHING = {**ALL, "activations": "host"}
PLACEMENTS = pytest.mark.parametrize("placement", [ALL, EVERYTHING], ids=["params", "params and activations"])


@pytest.fixture(autouse=True)
def small_activations_leave_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_activations, "MIN_BYTES", 1)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights whose casts were packed."""
    weights: list[Tensor] = []
    make = _weight_casts.SavedCast.__init__

    def making(self: Any, streaming: Any, weight: Any, cast: Tensor) -> None:
        weights.append(weight)
        make(self, streaming, weight, cast)

    monkeypatch.setattr(_weight_casts.SavedCast, "__init__", making)
    return weights


def autocast(dtype: torch.dtype = torch.bfloat16, cache: bool = True) -> Any:
    return torch.autocast(torch.get_default_device().type, dtype, cache_enabled=cache)


class Layer(nn.Module):
    """A weight, used as `use` says."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...] = (16, 16)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) / 4)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight).relu()


def layers(use: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...] = (16, 16)) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(use, shape) for _ in range(4)))


def reshaped(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.to(torch.bfloat16).view(4, 4, 16).transpose(0, 1).reshape(16, 16).float()


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": nn.functional.linear,
    "matmul": lambda x, w: x @ w,
    "transposed": lambda x, w: x @ w.t(),
    "part": lambda x, w: x @ w.to(torch.bfloat16)[:, 3:].repeat(1, 2)[:, :16],
    "batched": lambda x, w: (x.expand(3, -1, -1) @ w).sum(0),
    "einsum": lambda x, w: torch.einsum("ij,kj->ik", x, w),
    "reshaped": reshaped,
    "twice": lambda x, w: nn.functional.linear(x, w) @ w,
    "elementwise": lambda x, w: x * w.to(torch.bfloat16),
}
CERTAIN = ("linear", "matmul", "batched", "elementwise")


def gradients(
    model: nn.Module, placement: dict[str, str], x: Tensor, context: Any, backwards: int = 1
) -> tuple[list[Tensor], Tensor]:
    model, _ = streamed(model, placement)
    with context:
        loss = model(x).float().square().sum()
    for left in reversed(range(backwards)):
        loss.backward(retain_graph=left > 0)
    return [torch.as_tensor(p.grad) * 1 for p in model.parameters()], loss.detach()


def assert_equal(one: tuple[list[Tensor], Tensor], other: tuple[list[Tensor], Tensor]) -> None:
    assert same_bits(one[1], other[1])
    for value, expected in zip(one[0], other[0], strict=True):
        assert same_bits(value, expected)


@PLACEMENTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("use", USES)
def test_a_use_of_a_weight_has_the_same_bits(
    placement: dict[str, str], use: str, dtype: torch.dtype, packed: list[Tensor]
) -> None:
    x = torch.randn(16, 16, requires_grad=True)
    # A weight that is used twice in a unit is cast twice there, as without the cache.
    cache = use != "twice"
    expected = gradients(layers(USES[use]), RESIDENT, x, autocast(dtype, cache))
    assert not packed
    assert_equal(gradients(layers(USES[use]), placement, x, autocast(dtype)), expected)
    assert len(packed) >= 4 or use not in CERTAIN


@PLACEMENTS
def test_convolutions_in_channels_last(placement: dict[str, str], packed: list[Tensor]) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(3))).to(memory_format=torch.channels_last)

    x = torch.randn(2, 4, 12, 12)
    expected = gradients(make(), RESIDENT, x, autocast())
    assert_equal(gradients(make(), placement, x, autocast()), expected)
    assert len(packed) == 3


@PLACEMENTS
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_backward_twice_and_the_cache(placement: dict[str, str], cache: bool, packed: list[Tensor]) -> None:
    x = torch.randn(4, 16, requires_grad=True)
    expected = gradients(layers(nn.functional.linear), RESIDENT, x, autocast(cache=cache), 2)
    assert_equal(gradients(layers(nn.functional.linear), placement, x, autocast(cache=cache), 2), expected)
    assert len(packed) == 4


@PLACEMENTS
def test_models_with_tied_and_frozen_weights(placement: dict[str, str], packed: list[Tensor]) -> None:
    def run(placement: dict[str, str]) -> list[float]:
        model = make_model(tied=True)
        model.blocks[1].requires_grad_(False)
        model, optimizer = streamed(model, placement)
        losses = []
        for tokens in batches(3):
            with autocast():
                loss = loss_of(model, tokens)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return losses

    assert run(placement) == run(RESIDENT)
    assert len(packed) == 3 * 5 and any(weight.shape == (40, 24) for weight in packed)


@PLACEMENTS
def test_autocast_inside_of_forward(placement: dict[str, str], packed: list[Tensor]) -> None:
    """As accelerate patches it: no autocast yet when the model is called."""

    class Inside(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with autocast():
                return super().forward(x)

    def run(placement: dict[str, str]) -> list[float]:
        model, optimizer = streamed(Inside(*layers(nn.functional.linear)), placement)
        losses = []
        for _ in range(3):
            loss = model(torch.ones(4, 16, requires_grad=True)).float().square().sum()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return losses

    assert run(placement) == run(RESIDENT)
    assert len(packed) == 12


def test_without_autocast_only_the_first_forward_has_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    pack = _weight_casts.WeightCasts.pack
    monkeypatch.setattr(_weight_casts.WeightCasts, "pack", lambda self, t: seen.append(t) or pack(self, t))
    model, _ = streamed(make_model())
    with torch.no_grad():
        loss_of(model, next(batches(1)))
    loss_of(model, next(batches(1)))
    first = len(seen)
    loss_of(model, next(batches(1)))
    assert len(seen) == first > 0
    with autocast():
        loss_of(model, next(batches(1)))
    assert len(seen) > first


# --- what was written to ------------------------------------------------------------------------------------


@PLACEMENTS
def test_a_step_between_forward_and_backward_is_refused(placement: dict[str, str]) -> None:
    model, optimizer = streamed(make_model(), placement)
    first, second = batches(2)
    with autocast():
        late = loss_of(model, first)
        loss_of(model, second).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


@PLACEMENTS
@pytest.mark.parametrize("when", ["before use", "after use"])
def test_a_cast_that_was_written_to(placement: dict[str, str], when: str) -> None:
    def use(x: Tensor, w: Tensor) -> Tensor:
        cast = w.to(torch.bfloat16)
        if when == "before use":
            cast.detach().mul_(2)
        y = x.to(torch.bfloat16) @ cast
        if when == "after use":
            cast.detach().mul_(2)
        return y

    def run(placement: dict[str, str]) -> tuple[list[Tensor], Tensor]:
        return gradients(layers(use), placement, torch.randn(4, 16).fill_(0.5), contextlib.nullcontext())

    if when == "before use":
        assert_equal(run(placement), run(RESIDENT))
    else:
        for where in (RESIDENT, placement):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                run(where)


def test_backward_after_unwrap() -> None:
    x = torch.ones(4, 16)
    expected, _ = gradients(layers(nn.functional.linear), RESIDENT, x, autocast())
    model, optimizer = streamed(layers(nn.functional.linear))
    with autocast():
        loss = model(x).float().square().sum()
    model, _ = offload.unwrap(model, optimizer)
    loss.backward()
    assert all(same_bits(p.grad, gradient) for p, gradient in zip(model.parameters(), expected, strict=True))


# --- the cache ----------------------------------------------------------------------------------------------


def test_several_calls_in_one_context_are_as_without_the_cache() -> None:
    """Their gradients add up in fp32, not in the dtype of autocast: the cache is off inside units."""

    def run(placement: dict[str, str], cache: bool) -> tuple[list[Tensor], float]:
        model, _ = streamed(make_model(), placement)
        with autocast(cache=cache):
            loss = sum(loss_of(model, tokens) for tokens in batches(3))
        loss.backward()
        return [torch.as_tensor(p.grad) * 1 for p in model.parameters()], loss.detach()

    assert_equal(run(ALL, True), run(RESIDENT, False))


class Fault(Exception):
    pass


@pytest.mark.parametrize("kind", [None, Fault, KeyboardInterrupt])
@pytest.mark.parametrize("cache", [True, False])
def test_the_cache_is_what_it_was_after_a_forward(cache: bool, kind: type[BaseException] | None) -> None:
    model, _ = streamed(make_model())
    inside = []

    def look(*_: Any) -> None:
        inside.append(torch.is_autocast_cache_enabled())
        if kind is not None:
            raise kind

    handle = model.blocks[1].up.register_forward_pre_hook(look)
    with autocast(cache=cache):
        with contextlib.nullcontext() if kind is None else pytest.raises(kind):
            loss_of(model, next(batches(1)))
        assert kind is KeyboardInterrupt or torch.is_autocast_cache_enabled() == cache
        handle.remove()
        loss_of(model, next(batches(1)))
        assert torch.is_autocast_cache_enabled() == cache
    assert inside == [False]


@pytest.mark.parametrize("kind", [Fault, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["nowhere", "around", "in the model's forward", "in a unit's forward"])
def test_what_ends_a_forward_leaves_the_cache_on(where: str, kind: type[BaseException]) -> None:
    """No hook is called after Ctrl-C. A context of autocast that were made then would keep the cache off for good."""

    def inside(model: nn.Module) -> Any:
        forward = model.forward

        def cast(*arguments: Any) -> Any:
            with autocast():
                return forward(*arguments)

        model.forward = cast  # as accelerate does

    def fail(*_: Any) -> None:
        raise kind

    model, _ = streamed(make_model())
    if where.startswith("in"):
        inside(model if "model" in where else model.blocks[1])
    handle = model.blocks[1].up.register_forward_pre_hook(fail)
    with pytest.raises(kind), autocast() if where == "around" else contextlib.nullcontext():
        loss_of(model, next(batches(1)))
    assert torch.is_autocast_cache_enabled()
    handle.remove()
    with autocast():
        loss_of(model, next(batches(1)))
        assert torch.is_autocast_cache_enabled()
    assert torch.is_autocast_cache_enabled()


# --- bytes --------------------------------------------------------------------------------------------------


class Checkpointed(nn.Sequential):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.cpu_only
@PLACEMENTS
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("kind", ["plain", "checkpointed", "checkpointed reentrant"])
def test_peak_device_bytes_under_autocast_follow_the_formula(
    placement: dict[str, str], cache: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots times the largest unit, and of one unit at a time: its cast, its gradient and the cast of that.

    Gradients go as they come: how many of them are on their way to the host depends on the machine.
    """
    monkeypatch.setattr(_activations, "IN_FLIGHT_BYTES", 0)
    width, count = 256, 12
    torch.manual_seed(0)
    parts = [nn.Linear(width, width, bias=False) for _ in range(count)]
    model = nn.Sequential(*parts) if kind == "plain" else Checkpointed(*parts)
    if kind != "plain":
        model.reentrant = kind.endswith("reentrant")
    unit, slots = 4 * width * width, 2
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    model, optimizer = streamed(model, placement, prefetch=slots - 1, poison=False, units=[nn.Linear])
    x = torch.ones(1, width, requires_grad=True)

    def step() -> None:
        with autocast(cache=cache):
            loss = model(x).float().sum()
        loss.backward()
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
    of_one_unit = 2 * (unit // 2) + unit  # its cast and the gradient in 16 bits, the gradient in 32
    bound = slots * unit + of_one_unit + 128 * 1024
    assert allocations.peak <= bound, f"{allocations.peak / unit} units\n{optimizer.memory_summary()}"
    assert bound < slots * unit + count * unit // 2, "all casts would fit"


def test_hooks_of_the_user_around_a_part_keep_their_tensors() -> None:
    """The innermost hooks are the ones that torch asks: what they keep is theirs, and it is whole."""
    torch.manual_seed(0)

    class Part(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[0](x)
            with saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
                x = self[1](x)
            return self[2](x)

    def run(placement: dict[str, str]) -> tuple[list[Tensor], Tensor]:
        return gradients(Part(*layers(nn.functional.linear)[:3]), placement, torch.ones(4, 16), autocast())

    assert_equal(run(ALL), run(RESIDENT))
