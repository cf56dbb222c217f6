"""kernels/update.cu has the bits of the native core and of single torch operations, alone and under training.

On the CPU it is the same source, compiled as C++; on CUDA it is the binary that training launches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import offload
from offload import _native, _native_state
from offload._adagrad import AdagradHyper, adagrad_step_
from offload._adamw import FORMATS, AdamWHyper, adamw_step_, round_to_weight
from offload._grad_factors import scaled
from offload._kernels import Found, Kernels
from offload._lion import LionHyper, lion_step_
from training import RESIDENT, Run, assert_same_bits, batches, loss_of, make_model, train

pytestmark = pytest.mark.usefixtures("device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEP = 3


@dataclass(frozen=True)
class Rule:
    """An optimizer: its hyperparameters, the moments that it keeps and its step in torch operations."""

    hyper: Any
    moments: tuple[str, ...]
    torch_step: Callable[..., None]


ADAMW = AdamWHyper(1e-2, 0.9, 0.999, 1e-8, 0.1, decoupled=True, maximize=False)
ADAM = AdamWHyper(1e-2, 0.8, 0.99, 0.0, 0.1, decoupled=False, maximize=True)
LION = LionHyper(1e-3, 0.9, 0.99, 0.1, maximize=False)
ADAGRAD = AdagradHyper(1e-2, 0.1, 1e-10, 0.01, maximize=False)
CASES: dict[str, tuple[str, Rule]] = {
    "AdamW": ("adamw", Rule(ADAMW, ("exp_avg", "exp_avg_sq"), adamw_step_)),
    "Adam, L2, eps 0, maximize": ("adamw", Rule(ADAM, ("exp_avg", "exp_avg_sq"), adamw_step_)),
    "Lion": ("lion", Rule(LION, ("exp_avg",), lion_step_)),
    "Lion, maximize": ("lion", Rule(LionHyper(1e-3, 0.8, 0.95, 0.0, True), ("exp_avg",), lion_step_)),
    "Adagrad": ("adagrad", Rule(ADAGRAD, ("exp_avg_sq",), adagrad_step_)),
    "Adagrad, no decay": ("adagrad", Rule(AdagradHyper(1e-2, 0.0, 1e-10, 0.0, True), ("exp_avg_sq",), adagrad_step_)),
}
each_case = pytest.mark.parametrize(("name", "rule"), CASES.values(), ids=CASES)


class Guarded:
    """`values` in memory on the default device that is aligned to one element only, with patterns on both sides."""

    MARGIN = 3

    def __init__(self, values: Tensor) -> None:
        size = values.numel() + 2 * self.MARGIN
        self._around = torch.arange(size, dtype=torch.float32).to(values.dtype)
        self.tensor = self._around[self.MARGIN : size - self.MARGIN]
        self.tensor.copy_(values)

    def intact(self) -> bool:
        expected = torch.arange(self._around.numel(), dtype=torch.float32).to(self._around.dtype)
        ends = [slice(None, self.MARGIN), slice(-self.MARGIN, None)]
        return all(torch.equal(self._around[end], expected[end]) for end in ends)


@dataclass
class States:
    """What one update reads and writes, on the CPU."""

    gradient: Tensor
    master: Tensor
    moments: dict[str, Tensor]
    weight_dtype: torch.dtype

    @classmethod
    def random(cls, count: int, gradient_dtype: torch.dtype, weight_dtype: torch.dtype, seed: int = 0) -> States:
        generator = torch.Generator("cpu").manual_seed(seed)

        def normal(spread: float) -> Tensor:
            """Magnitudes over many binades, zeros among them."""
            values = torch.randn(count, generator=generator, device="cpu")
            values *= torch.exp(spread * torch.randn(count, generator=generator, device="cpu"))
            return values * (torch.rand(count, generator=generator, device="cpu") > 0.05)

        moments = {"exp_avg": normal(2.0), "exp_avg_sq": normal(2.0).square()}
        return cls(normal(4.0).to(gradient_dtype), normal(1.0), moments, weight_dtype)

    def by_kernel(self, kernels: Kernels, name: str, rule: Rule, grad_scale: float | Tensor) -> dict[str, Tensor]:
        guarded = {"gradient": Guarded(self.gradient), "master": Guarded(self.master)}
        guarded |= {key: Guarded(self.moments[key]) for key in rule.moments}
        if self.weight_dtype != torch.float32:
            poison = torch.full_like(self.master, float("nan"), dtype=self.weight_dtype)
            guarded["weight"] = Guarded(poison)
        tensors = {key: guard.tensor for key, guard in guarded.items()}
        kernels.update_(
            name,
            tensors["master"],
            tensors.get("weight"),
            {key: tensors[key].data_ptr() if key in tensors else 0 for key in ("exp_avg", "exp_avg_sq")},
            tensors["gradient"],
            rule.hyper.scalars(STEP),
            grad_scale,
        )
        assert all(guard.intact() for guard in guarded.values())
        gradient = tensors.pop("gradient").cpu()
        assert torch.equal(integers(gradient), integers(self.gradient)), "the gradient was written to"
        return {key: tensor.cpu() for key, tensor in tensors.items()}

    def by_native_core(self, rule: Rule, grad_scale: float) -> dict[str, Tensor]:
        written = {"master": self.master.clone(), **{key: self.moments[key].clone() for key in rule.moments}}
        if self.weight_dtype != torch.float32:
            written["weight"] = torch.empty_like(self.master, dtype=self.weight_dtype)
        address = {key: tensor.data_ptr() for key, tensor in written.items()}
        _native.update_states(
            gradient=self.gradient.data_ptr(),
            gradient_format=FORMATS[self.gradient.dtype],
            master=address["master"],
            master_format=_native.MASTER_FLOAT32,
            weight=address.get("weight", 0),
            weight_format=FORMATS[self.weight_dtype],
            exp_avg=address.get("exp_avg", 0),
            exp_avg_sq=address.get("exp_avg_sq", 0),
            count=self.master.numel(),
            scalars=rule.hyper.native_scalars(STEP),
            factors=[(_native.FACTOR_MULTIPLY_WIDE, grad_scale)],
        )
        return written

    def by_torch_operations(self, rule: Rule, grad_scale: float) -> dict[str, Tensor]:
        """On the default device."""
        place = torch.get_default_device()
        written = {"master": self.master, **{key: self.moments[key] for key in rule.moments}}
        written = {key: tensor.to(place, copy=True) for key, tensor in written.items()}
        gradient = scaled(self.gradient.to(place), grad_scale)
        rule.torch_step(*written.values(), gradient, rule.hyper.scalars(STEP))
        if self.weight_dtype != torch.float32:
            written["weight"] = round_to_weight(written["master"], self.weight_dtype)
        return {key: tensor.cpu() for key, tensor in written.items()}


def integers(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_same_values(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Equal bits; a NaN equals any NaN: processors differ in the one that they make."""
    assert one.keys() == other.keys()
    for key in one:
        same = (integers(one[key]) == integers(other[key])) | (one[key].isnan() & other[key].isnan())
        assert same.all(), f"{key} differs at {(~same).nonzero().flatten()[:5].tolist()}"


def assert_all_agree(states: States, kernels: Kernels, name: str, rule: Rule, grad_scale: float = 1.0) -> None:
    written = states.by_kernel(kernels, name, rule, grad_scale)
    assert_same_values(written, states.by_kernel(kernels, name, rule, torch.tensor(grad_scale)))  # read where it lies
    assert_same_values(written, states.by_native_core(rule, grad_scale))
    assert_same_values(written, states.by_torch_operations(rule, grad_scale))


# --- one step -----------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("gradient_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_bits_of_every_mixture_of_formats(
    kernels: Kernels, name: str, rule: Rule, gradient_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    for grad_scale in (1.0, 1 / 192):
        states = States.random(5003, gradient_dtype, weight_dtype)
        if rule.hyper is ADAM:
            states.moments["exp_avg_sq"] += 1e-3  # zero over zero is no bit to compare
        assert_all_agree(states, kernels, name, rule, grad_scale)


def test_every_tail_of_a_block(kernels: Kernels) -> None:
    name, rule = CASES["AdamW"]
    edges = (255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049, 3 * 1024 + 300)
    for count in (*range(34), *range(61, 1024, 131), *edges):
        assert_all_agree(States.random(count, torch.bfloat16, torch.bfloat16, seed=count), kernels, name, rule)


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_gradient_of_a_16_bit_format(kernels: Kernels, name: str, rule: Rule, dtype: torch.dtype) -> None:
    states = States.random(2**16, dtype, dtype)
    states.gradient = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cpu").to(torch.int16).view(dtype)
    assert_all_agree(states, kernels, name, rule)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_the_working_weight(kernels: Kernels, dtype: torch.dtype) -> None:
    """A learning rate of 0 keeps the master: ties, subnormals, overflow and what is not finite are rounded."""
    hyper = LionHyper(0.0, 0.9, 0.99, 0.0, maximize=False)
    patterns = torch.arange(-(2**31), 2**31, 40_009, dtype=torch.int64, device="cpu").to(torch.int32)
    ties = torch.arange(-(2**31), 2**31, 2**12, dtype=torch.int64, device="cpu").to(torch.int32)
    for pattern in (patterns, ties[::7], ties[1::7] - 1, ties[2::7] + 1):
        states = States.random(pattern.numel(), dtype, dtype)
        states.master = pattern.contiguous().view(torch.float32)
        states.gradient.zero_()
        assert_all_agree(states, kernels, "lion", Rule(hyper, ("exp_avg",), lion_step_))


def test_subnormals_are_kept(kernels: Kernels) -> None:
    states = States.random(4099, torch.float32, torch.float32)
    states.gradient *= 1e-38
    states.moments = {key: moment * 1e-38 for key, moment in states.moments.items()}
    written = states.by_kernel(kernels, "adamw", CASES["AdamW"][1], 1.0)
    tiny = torch.finfo(torch.float32).tiny
    for key in ("exp_avg", "exp_avg_sq"):
        assert ((written[key] != 0) & (written[key].abs() < tiny)).any(), f"no subnormal in {key}"
    assert_all_agree(states, kernels, *CASES["AdamW"])


def test_the_kernel_runs_on_the_current_stream(kernels: Kernels, device: torch.device) -> None:
    """Behind work that takes its time there: anywhere else it would read the poison."""
    master, exp_avg, poison = torch.zeros(1000), torch.zeros(1000), torch.full((1000,), float("nan"))
    stream = contextlib.nullcontext()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        stream = torch.cuda.stream(torch.cuda.Stream(device))
    with stream:
        if device.type == "cuda":
            torch.cuda._sleep(50_000_000)
        poison.fill_(1.0)
        moments = {"exp_avg": exp_avg.data_ptr(), "exp_avg_sq": 0}
        kernels.update_("lion", master, None, moments, poison, LION.scalars(STEP))
        assert torch.equal(master.cpu(), torch.full((1000,), -LION.lr, device="cpu"))


# --- under training -----------------------------------------------------------------------------------------


class Counted(Kernels):
    """Counts the updates that went through the kernel."""

    def __init__(self, launch: Any) -> None:
        super().__init__(launch)
        self.count = 0

    def update_(self, *arguments: Any) -> None:
        self.count += 1
        super().update_(*arguments)


@pytest.fixture
def counted(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """States on the device are updated by the kernel, but for `without_kernels`."""
    launch = Counted(kernels._launch)
    monkeypatch.setattr(_native_state, "find_kernels", lambda _: Found(launch, None))
    yield launch


def without_kernels(run: Callable[[], Run]) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native_state, "find_kernels", lambda _: Found(None, "the test wants none"))
        return run()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, maximize=True),
    "Lion": lambda p: offload.Lion(p, lr=1e-3, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.5),
}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "resident": RESIDENT,
    "mixed": {"optimizer": 0.5, "gradients": "host"},
    "streamed": {"optimizer": 0.5, "gradients": "host", "params": "host"},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_has_the_bits_of_torch_operations(
    counted: Counted, optimizer: str, placement: str, dtype: torch.dtype
) -> None:
    def run(options: dict[str, Any]) -> Run:
        model = make_model(dtype, depth=2)
        return train(*offload.wrap(model, OPTIMIZERS[optimizer](model.parameters()), **options), micro_batches=2)

    expected = without_kernels(lambda: run(RESIDENT))
    assert counted.count == 0
    assert_same_bits(run(PLACEMENTS[placement]), expected)
    assert counted.count > 0


def test_a_scale_given_to_the_step_and_weights_written_between(counted: Counted) -> None:
    def run() -> Run:
        model = make_model(torch.bfloat16, depth=1)
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **RESIDENT)
        losses = []
        for tokens in batches(4):
            loss = loss_of(model, tokens)
            (loss * 64).backward()
            optimizer.step(grad_scale=1 / 192)
            optimizer.zero_grad()
            losses.append(loss.item())
            with torch.no_grad():
                model.head.weight[:1].mul_(0.5)
        return Run(losses, [], model.state_dict(), optimizer, model)

    assert_same_bits(run(), without_kernels(run))
    assert counted.count > 0


class Operations(TorchDispatchMode):
    """The torch operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(operation))
        return operation(*args, **(kwargs or {}))


def test_a_step_is_nothing_but_the_kernel(counted: Counted) -> None:
    """A scale included: no torch operation, so no memory for what lies in between."""
    model = make_model(torch.bfloat16, depth=1)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **RESIDENT)
    loss_of(model, next(batches(1))).backward()
    with Operations() as operations:
        optimizer.step(grad_scale=0.5)
    ours = {name for name in operations.names if not name.startswith("profiler.")}  # torch marks every step()
    assert ours <= {"aten.detach.default"}
    assert counted.count == len(list(model.parameters()))


def test_weights_and_gradients_of_any_strides(counted: Counted) -> None:
    """Parameters that are dense but not contiguous, empty ones, and gradients laid out in another order."""

    def run() -> Run:
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        turned = nn.Parameter(torch.randn(4, 7).t())
        nothing = nn.Parameter(torch.empty(0, 3))
        model = nn.ModuleDict({"conv": conv})
        model.register_parameter("turned", turned)
        model.register_parameter("nothing", nothing)
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **RESIDENT)
        for step in range(3):
            generator = torch.Generator("cpu").manual_seed(step)
            for parameter in model.parameters():
                gradient = torch.randn(parameter.shape, generator=generator, device="cpu")
                parameter.grad = gradient.to(parameter.device).contiguous()
            optimizer.step()
        return Run([], [], model.state_dict(), optimizer, model)

    assert_same_bits(run(), without_kernels(run))
    assert counted.count > 0


def test_states_saved_under_the_kernel_load_without_it(counted: Counted) -> None:
    def run(switch: bool) -> Run:
        model = make_model(torch.bfloat16, depth=1)
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **RESIDENT)
        train(model, optimizer, steps=2)
        saved, weights = optimizer.state_dict(), model.state_dict()
        if not switch:
            return train(model, optimizer, steps=2)

        def resumed() -> Run:
            other = make_model(torch.bfloat16, depth=1, seed=5)
            other.load_state_dict(weights)
            other, again = offload.wrap(other, torch.optim.AdamW(other.parameters(), lr=1e-2), **RESIDENT)
            again.load_state_dict(saved)
            return train(other, again, steps=2)

        return without_kernels(resumed)

    assert_same_bits(run(True), run(False))


def test_a_launch_that_fails_ends_training(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(torch.bfloat16, depth=1)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **RESIDENT)
    train(model, optimizer, steps=1)

    def refuse(*arguments: Any) -> None:
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(counted, "_launch", refuse)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        train(model, optimizer, steps=1)
    with pytest.raises(offload.StateError, match=r"an earlier update failed.*CUDA_ERROR_ILLEGAL_ADDRESS"):
        optimizer.step()


def test_stats_say_what_updates_the_states(counted: Counted) -> None:
    def fallbacks() -> tuple[str, ...]:
        model = make_model(depth=1)
        _, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **RESIDENT)
        return optimizer.stats().fallbacks

    line = "the device updates states by separate torch operations: no compiler"
    assert not any("torch operations" in fallback for fallback in fallbacks())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native_state, "find_kernels", lambda _: Found(None, "no compiler"))
        assert line in fallbacks()
