"""Activations in int8 and fp8: the kernels, the torch operations and a search over the levels agree bit for bit, and
what must stay exact does.

On the CPU the kernels are kernels/activations.cu compiled as C++; on CUDA they are what training launches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import offload
from activation_models import assert_equal_runs, assert_nothing_left, region_of, train
from offload import _activation_format, _activations
from offload._activation_format import ActivationFormat
from offload._kernels import Found, Kernels
from test_kernels import Guarded, integers
from training import HOST, batches, loss_of, make_model, same_bits

pytestmark = pytest.mark.usefixtures("device")

FORMS = ("int8", "fp8")
BLOCK = 256
SPECIAL = {"int8": (0x7F, 0x81, 0x80), "fp8": (0x78, 0xF8, 0x7F)}  # infinity, -infinity, NaN
each_form = pytest.mark.parametrize("form", FORMS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def counted(activation_kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Activations are rounded by the kernels: the names of those that were launched."""
    launched: list[str] = []

    def launch(name: str, *arguments: Any) -> None:
        launched.append(name)
        activation_kernels._launch(name, *arguments)

    monkeypatch.setattr(_activation_format, "find_kernels", lambda *_: Found(Kernels(launch), None))
    yield launched


def without_kernels(run: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_activation_format, "find_kernels", lambda *_: Found(None, "the test wants none"))
        return run()


def by_kernels(kernels: Kernels, form: str, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and what comes back, on the CPU; of memory that is aligned to its elements only."""
    count = values.numel()
    given = Guarded(values)
    codes = Guarded(torch.full((count,), 0xAA, dtype=torch.uint8))
    scales = Guarded(torch.full((-(-count // BLOCK),), float("nan")))
    back = Guarded(torch.full((count,), float("nan"), dtype=values.dtype))
    kernels.encode(form, given.tensor, codes.tensor, scales.tensor)
    kernels.decode(form, codes.tensor, scales.tensor, back.tensor)
    assert all(guarded.intact() for guarded in (given, codes, scales, back))
    assert torch.equal(integers(given.tensor.cpu()), integers(values)), "the values were written to"
    return codes.tensor.cpu(), scales.tensor.cpu(), back.tensor.cpu()


def by_torch_operations(form: Any, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, on the default device."""
    here = values.to(torch.get_default_device())
    format_ = without_kernels(lambda: ActivationFormat(form, here.device))
    packed = format_.pack(here)
    codes, scales = _activation_format._parts(packed, values.numel())
    return codes.cpu(), scales.cpu(), format_.unpack(packed, values.numel(), values.dtype).cpu()


def levels_of(form: str) -> tuple[Tensor, Tensor]:
    """The codes of finite values and their levels in float64, from the words of [Note: activation formats]."""
    if form == "int8":
        levels = torch.arange(-126, 127, device="cpu")
        return levels & 0xFF, levels.double()
    codes = torch.cat([torch.arange(0x78, device="cpu"), torch.arange(0x80, 0xF8, device="cpu")])
    exponent, mantissa = (codes >> 3) & 0xF, codes & 7
    magnitude = torch.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * torch.exp2(exponent.double() - 10))
    return codes, torch.where(codes >= 0x80, -magnitude, magnitude)


def by_search(form: str, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest of all levels in float64, the even code of two; as the kernels take x / scale: rounded to fp32."""
    codes_of, levels = levels_of(form)
    codes, scales, back = [], [], []
    for block in values.float().split(BLOCK):
        finite = block[block.isfinite()].abs()
        largest = float(finite.max()) if finite.numel() else 0.0
        scale = 0.0
        if largest >= 2.0**-100:
            exact = largest / 126 if form == "int8" else 2.0 ** (torch.tensor(largest).frexp()[1].item() - 8)
            word = torch.tensor(exact, dtype=torch.float32, device="cpu").view(torch.int32)
            scale = float((word & ~0xFF if form == "int8" else word).view(torch.float32))
        reciprocal = torch.tensor(0.0 if scale == 0 else 1 / scale, dtype=torch.float32, device="cpu")
        level = (torch.where(block.isfinite(), block, 0.0) * reciprocal).double()
        distance = (level[:, None] - levels).abs()
        nearest = distance == distance.amin(1, keepdim=True)
        # Of two: the even one; of the zeros, that of the value's own sign.
        rank = nearest * (4 - 2 * (codes_of & 1) + (codes_of >= 0x80).eq(level.signbit()[:, None]))
        chosen = rank.argmax(1)
        code, value = codes_of[chosen], levels[chosen] * scale
        for special, number in zip(SPECIAL[form], (torch.inf, -torch.inf, torch.nan), strict=True):
            is_it = block.isnan() if number != number else block == number
            code, value = code.masked_fill(is_it, special), value.masked_fill(is_it, number)
        codes.append(code.to(torch.uint8))
        scales.append(scale)
        back.append(value.float().to(values.dtype))
    return torch.cat(codes), torch.tensor(scales, device="cpu"), torch.cat(back)


def assert_all_agree(kernels: Kernels, form: str, values: Tensor) -> None:
    results = [run(form, values) for run in (lambda *a: by_kernels(kernels, *a), by_torch_operations, by_search)]
    for codes, scales, back in results[1:]:
        assert torch.equal(codes, results[0][0])
        assert torch.equal(scales.view(torch.int32), results[0][1].view(torch.int32))
        assert same_values(back, results[0][2])
    assert torch.equal(integers(results[0][2]), integers(results[1][2])), "NaN or zero of other bits"


def same_values(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def normal(count: int, spread: float, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    values = torch.randn(count, generator=generator, device="cpu")
    return values * torch.exp(spread * torch.randn(count, generator=generator, device="cpu"))


# --- the bits -----------------------------------------------------------------------------------------------


@each_form
@each_dtype
def test_random_values_of_many_binades(activation_kernels: Kernels, form: str, dtype: torch.dtype) -> None:
    for spread in (0.0, 1.0, 4.0):
        assert_all_agree(activation_kernels, form, normal(5003, spread).to(dtype))


@each_form
def test_every_tail(activation_kernels: Kernels, form: str) -> None:
    for count in (*range(1, 34), 255, 256, 257, 511, 512, 513, 2047, 2048, 2049, 2048 * 2 + 300):
        assert_all_agree(activation_kernels, form, normal(count, 1.0, seed=count).to(torch.bfloat16))


@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_a_16_bit_format(activation_kernels: Kernels, form: str, dtype: torch.dtype) -> None:
    """In order and strewn: blocks of one binade, and blocks of all."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cpu").to(torch.int16)
    strewn = patterns[(torch.arange(2**16, device="cpu") * 40_503) % 2**16]
    for values in (patterns, strewn):
        assert_all_agree(activation_kernels, form, values.view(dtype))


@each_form
@each_dtype
def test_blocks_of_what_is_special(activation_kernels: Kernels, form: str, dtype: torch.dtype) -> None:
    inf, nan, tiny = float("inf"), float("nan"), torch.finfo(dtype).tiny
    blocks = [
        [0.0, -0.0],
        [nan] * 3,
        [inf, -inf, nan],
        [inf, 1.0, -0.5, nan, 0.25],
        [tiny / 4, -tiny / 2, tiny],
        [2.0**-100, 2.0**-101, 2.0**-107],
        [2.0**-100 * (1 - 2.0**-8), 1e-38],
        [torch.finfo(dtype).max, -torch.finfo(dtype).max, 1.0],
        [126.0, 0.5, 1.5, 2.5, -0.5, -125.5],
        [255.9, 248.0, 240.0, 247.9],
    ]
    rows = [torch.tensor(block, device="cpu").repeat(BLOCK)[:BLOCK] for block in blocks]
    assert_all_agree(activation_kernels, form, torch.cat(rows).to(dtype))


@each_form
def test_what_comes_back_is_near_and_comes_back_again(activation_kernels: Kernels, form: str) -> None:
    values = normal(64 * BLOCK, 1.0)
    codes, scales, back = by_kernels(activation_kernels, form, values)
    error = (back - values).abs()
    largest = values.view(-1, BLOCK).abs().amax(1).repeat_interleave(BLOCK)
    half_step = largest / 252 if form == "int8" else torch.maximum(values.abs() * 2.0**-4, largest * 2.0**-17)
    assert (error <= half_step * 1.0001).all()  # the reciprocal of a scale is rounded
    again = by_kernels(activation_kernels, form, back)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales)


@each_form
def test_the_torch_operations_go_in_pieces(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    values = normal(5003, 1.0).to(torch.float16)
    whole = by_torch_operations(form, values)
    monkeypatch.setattr(_activation_format, "_CHUNK", 2 * BLOCK)
    for one, other in zip(by_torch_operations(form, values), whole, strict=True):
        assert torch.equal(one, other)


# --- what is rounded, and what is not -----------------------------------------------------------------------


class Saves(torch.autograd.Function):
    """Saves a tensor beside its input and shows in backward what came back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, saved: Tensor, seen: list[Tensor]) -> Tensor:
        ctx.save_for_backward(saved)
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.seen.append(ctx.saved_tensors[0])
        return gradient, None, None


class HalfOfAStorage(torch.autograd.Function):
    """A result whose storage holds something else too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        both = torch.cat([x, x * 1e9])
        return torch.empty(0, device=x.device).set_(both.untyped_storage(), 0, x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def seen_by_backward(
    device: torch.device, form: str, make: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """What a function saved, what its backward saw, and the region's counters."""
    seen: list[Tensor] = []
    x = normal(4096, 1.0).to(device).view(64, 64).requires_grad_()
    region = region_of(device, format=form)
    with region:
        saved = make(x * 1)
        expected = saved.detach().clone()
        loss = Saves.apply(x, saved, seen).sum()
    stats = region.stats()
    del saved
    loss.backward()
    assert_nothing_left(region)
    return expected, seen[0], stats


ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda x: x,
    "bf16": lambda x: x.to(torch.bfloat16),
    "fp16": lambda x: x.to(torch.float16),
    "transposed": lambda x: x.t(),
    "gaps": lambda x: x[:, 3:37],
    "permuted": lambda x: x.view(4, 16, 64).permute(2, 0, 1),
}
EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": lambda x: x.double(),
    "complex": lambda x: torch.view_as_complex(x.view(64, 32, 2)),
    "no gradient flows through it": lambda x: x.detach(),
    "integers": lambda x: x.detach().to(torch.int64),
    "a mask": lambda x: x > 0,
    "a number a row": lambda x: x.pow(2).mean(1, keepdim=True),
    "log probabilities": lambda x: x.log_softmax(1),
    "half of a storage": HalfOfAStorage.apply,
    "bits of another type": lambda x: x.view(torch.int32),
}


@each_form
@pytest.mark.parametrize("kind", ROUNDED)
def test_activations_are_rounded(device: torch.device, form: str, kind: str) -> None:
    expected, seen, stats = seen_by_backward(device, form, ROUNDED[kind])
    assert (seen.shape, seen.stride(), seen.dtype) == (expected.shape, ROUNDED[kind](_strides()).stride(), seen.dtype)
    assert not torch.equal(seen, expected)
    assert (seen - expected).abs().max() <= expected.abs().max() * (1 / 200 if form == "int8" else 1 / 8)
    assert stats["sent_bytes"] < stats["offloaded_bytes"] * 0.6


@pytest.mark.parametrize("kind", EXACT)
def test_what_must_be_exact_is(device: torch.device, kind: str) -> None:
    expected, seen, _ = seen_by_backward(device, "int8", EXACT[kind])
    assert torch.equal(seen, expected)


def _strides() -> Tensor:
    return torch.empty(64, 64)


def test_parts_of_one_tensor_leave_once_and_an_exact_alias_by_itself(device: torch.device) -> None:
    seen: list[Tensor] = []
    x = normal(3 * 4096, 1.0).to(device).view(64, 192).requires_grad_()
    region = region_of(device, format="fp8")
    with region:
        both = x * 1
        q, k, v = both.chunk(3, dim=1)
        loss = sum(Saves.apply(x, part, seen).sum() for part in (q, k, v, both, both.detach()))
    stats = region.stats()
    packed = ActivationFormat.packed_bytes(x.numel())
    assert (stats["offloaded_bytes"], stats["sent_bytes"]) == (2 * x.nbytes, packed + x.nbytes)
    assert packed == x.numel() * (1 + 4 / BLOCK)
    kept = both.detach().clone()
    del both, q, k, v
    loss.backward()
    exact, rounded, *parts = seen  # backward runs from the last
    assert torch.equal(exact, kept) and not torch.equal(rounded, kept)
    assert torch.equal(torch.cat(parts[::-1], dim=1), rounded)


def test_what_stays_on_the_device_is_exact(device: torch.device) -> None:
    seen: list[Tensor] = []
    x = normal(4096, 1.0).to(device).view(64, 64).requires_grad_()
    with region_of(device, format="int8", keep="1GiB"):
        loss = Saves.apply(x, y := x * 1, seen).sum()
    loss.backward()
    assert torch.equal(seen[0], y)


def test_what_compiled_code_saves_is_exact(device: torch.device) -> None:
    """Autograd sees no gradient of it: which of it is an activation is not known."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    region = region_of(device, format="int8")
    with region:
        loss = torch.compile(model, backend="aot_eager")(torch.ones(32, 64)).sum()
    loss.backward()
    stats = region.stats()
    assert stats["sent_bytes"] == stats["offloaded_bytes"] > 0


@each_form
def test_two_backward_passes_see_the_same(device: torch.device, form: str) -> None:
    x = normal(8192, 1.0).to(device).requires_grad_()
    region = region_of(device, format=form)
    with region:
        loss = ((x * 2).sin() * (x * 3).exp()).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert same_bits(first, second)


def test_a_write_to_what_came_back_is_told(device: torch.device) -> None:
    class Spoils(Saves):
        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
            ctx.saved_tensors[0].add_(1)
            return gradient, None, None

    x = normal(4096, 1.0).to(device).requires_grad_()
    with region_of(device, format="int8"):
        y = x * 1
        loss = Spoils.apply(x, y, []).sum() + Spoils.apply(x, y, []).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("begins_on_the_default", [False, True])
def test_what_one_stream_saved_is_packed_behind_it(device: torch.device, begins_on_the_default: bool) -> None:
    """It departs when another stream is the current one."""
    seen: list[Tensor] = []
    x = normal(1 << 16, 1.0).to(device).requires_grad_()
    default: Any = contextlib.nullcontext()
    other: Any = contextlib.nullcontext()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        other = torch.cuda.stream(torch.cuda.Stream(device))
    region = region_of(device, format="int8", keep=x.nbytes)
    first, second = (default, other) if begins_on_the_default else (other, default)
    with region:
        with first:
            if device.type == "cuda":
                torch.cuda._sleep(50_000_000)
            late = Saves.apply(x, x * 2, seen).sum()
        with second:
            early = Saves.apply(x, x * 3, seen).sum()
    assert region.stats()["offloaded_bytes"] == x.nbytes
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    (early + late).backward()
    assert same_values(seen[0].cpu(), (x * 3).detach().cpu())
    expected = by_torch_operations("int8", (x * 2).detach().cpu())[2]
    assert torch.equal(seen[1].cpu(), expected)


# --- under training -----------------------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize("name", ["tiny", "llama", "checkpointed", "convolutional"])
def test_training_by_kernels_has_the_bits_of_torch_operations(
    device: torch.device, counted: list[str], form: str, name: str
) -> None:
    region = region_of(device, format=form)
    run = train(name, region)
    assert {f"encode_{form}", f"decode_{form}"} == set(counted)
    stats = region.stats()
    assert 0 < stats["sent_bytes"] < 0.6 * stats["offloaded_bytes"]
    assert_nothing_left(region)
    assert region.fallbacks() == []
    plain = without_kernels(lambda: region_of(device, format=form))
    assert plain.fallbacks() == [f"activations are rounded to {form} by separate torch operations: the test wants none"]
    assert_equal_runs(run, train(name, plain))
    exact = train(name, contextlib.nullcontext())[0]
    assert run[0][0] == exact[0] and run[0] != exact  # the first forward has seen nothing rounded
    assert max(abs(a - b) for a, b in zip(run[0], exact, strict=True)) < 0.1


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrapped_models(device: torch.device, counted: list[str], form: Any, dtype: torch.dtype) -> None:
    def run(**options: Any) -> tuple[list[float], Any]:
        model = make_model(dtype, depth=3)
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST, **options)
        losses = []
        for tokens in batches(3):
            loss = loss_of(model, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_activations, "MIN_BYTES", 1)
        losses, optimizer = run(activations="host", activation_format=form)
        assert counted
        stats = optimizer.stats()
        sent, left = stats.activations["sent_bytes"], stats.activations["offloaded_bytes"]
        assert 0 < sent < left * (0.45 if dtype == torch.float32 else 0.75)  # the rest is exact
        assert f"activations are rounded to {form}: lossy" in optimizer.plan.explain()
        assert not any("rounded" in text for text in stats.fallbacks)
        plain, optimizer = without_kernels(lambda: run(activations="host", activation_format=form))
        assert any(f"activations are rounded to {form}" in text for text in optimizer.stats().fallbacks)
        exact, optimizer = run(activations="host")
        stats = optimizer.stats()
        assert stats.activations["sent_bytes"] == stats.activations["offloaded_bytes"] > 0
        assert "activations are rounded" not in optimizer.plan.explain()
    assert losses == plain != exact and losses[0] == exact[0]
    assert exact == run(activations="device")[0]


# --- the door -----------------------------------------------------------------------------------------------


def test_what_is_no_format_is_refused(device: torch.device) -> None:
    for name, make in {
        "format": lambda: offload.offload_activations(device, format="int4"),  # type: ignore[arg-type]
        "activation_format": lambda: offload.Config(activations="host", activation_format="int4"),  # type: ignore[arg-type]
    }.items():
        with pytest.raises(offload.InvalidArgument, match=f"{name}='int4': legal values are 'exact', 'int8', 'fp8'"):
            make()
    for place in ("device", "auto", 0.0):
        with pytest.raises(offload.InvalidArgument, match="none leave; pass activations='host'"):
            offload.Config(activations=place, activation_format="fp8")
