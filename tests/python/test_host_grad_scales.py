"""Scales that wait for the optimizer: torch's bits, or not deferred; and norms taken on the way out."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from grad_store import HostStore, as_the_optimizer_reads, cell_of, same_bits
from offload import _grad_face, _grad_factors
from offload._grad_cell import Owner
from offload._grad_factors import DIVIDE, MULTIPLY, MULTIPLY_RECIPROCAL
from offload._host_grad import hold

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SCALES: dict[str, Callable[[Tensor], object]] = {
    "mul_ float": lambda g: g.mul_(1 / 3),
    "mul_ int": lambda g: g.mul_(3),
    "mul_ tensor": lambda g: g.mul_(torch.tensor(1 / 3)),
    "mul_ tensor of its dtype": lambda g: g.mul_(torch.tensor(1 / 3, dtype=g.dtype)),
    "mul_ double tensor": lambda g: g.mul_(torch.tensor(1 / 3, dtype=torch.float64)),
    "mul_.Scalar": lambda g: torch.ops.aten.mul_.Scalar(g, 1 / 3),
    "div_ float": lambda g: g.div_(1.7),
    "div_ int": lambda g: g.div_(7),
    "div_ tensor": lambda g: g.div_(torch.tensor(1.7)),
    "true_divide_": lambda g: g.true_divide_(3.1),
    "*=": lambda g: g.__imul__(0.1),
    "_foreach_mul_ float": lambda g: torch._foreach_mul_([g], 1 / 3),
    "_foreach_mul_ tensor": lambda g: torch._foreach_mul_([g], torch.tensor(1 / 3)),
    "_foreach_mul_ list": lambda g: torch._foreach_mul_([g], [1 / 3]),
    "_foreach_div_ float": lambda g: torch._foreach_div_([g], 1.7),
    "_foreach_div_ tensor": lambda g: torch._foreach_div_([g], torch.tensor(1.7)),
    "_foreach_div_ list": lambda g: torch._foreach_div_([g], [7]),
    "unscale": lambda g: torch._amp_foreach_non_finite_check_and_unscale_(
        [g], torch.zeros(()), torch.tensor(1 / 65536.7)
    ),
    "not finite": lambda g: g.mul_(float("inf")),
    "zero": lambda g: g.div_(0.0),
    "complex path: bool": lambda g: g.mul_(True),
    "integer tensor": lambda g: g.mul_(torch.tensor(3)),
    "one element": lambda g: g.mul_(torch.tensor([1 / 3])),
}


def values(dtype: torch.dtype, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return (torch.randn(count, generator=generator) * torch.logspace(-9, 4, count)).to(dtype)


def held(value: Tensor, store: HostStore | None = None) -> Tensor:
    parameter = nn.Parameter(torch.zeros_like(value))
    parameter.grad = value.clone()
    hold(parameter, "weight", store or HostStore(delayed=True))
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize("name", SCALES)
def test_a_scale_gives_torchs_bits(name: str, dtype: torch.dtype) -> None:
    for count in (1, 5, 4099):
        plain = values(dtype, count)
        gradient = held(plain)
        SCALES[name](plain)
        SCALES[name](gradient)
        assert same_bits(plain, gradient)
        step = cell_of(gradient).for_step()
        if dtype != torch.float64:
            assert same_bits(plain, as_the_optimizer_reads(step, plain.shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scales_of_training_loops_wait(dtype: torch.dtype) -> None:
    """On the CPU all of these are plain fp32 arithmetic: one that did not wait would be a lost saving."""
    for name in ("mul_ float", "mul_ tensor", "div_ int", "_foreach_mul_ tensor", "_foreach_div_ float", "unscale"):
        store = HostStore()
        gradient = held(values(dtype, 64), store)
        gradient.norm(float("inf"))
        torch._foreach_norm([gradient], float("inf"))
        count = store.to_device_count
        SCALES[name](gradient)
        assert store.to_device_count == count, name
        assert len(cell_of(gradient).for_step().factors) == 1, name


def test_a_scale_without_a_matching_form_runs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_grad_factors, "_native_form", lambda *_: None)
    plain = values(torch.bfloat16, 64)
    gradient = held(plain)
    for tensor in (plain, gradient):
        tensor.mul_(1 / 3)
        torch._foreach_mul_([tensor], 1 / 3)
    assert cell_of(gradient).for_step().factors == []
    assert same_bits(plain, gradient)


def test_the_probe_tells_the_three_kinds_and_the_rounding_of_the_scale_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    operations: dict[str, Callable[[Tensor, Any], object]] = {
        "divide": lambda g, s: g.copy_(g.float() / s),
        "multiply": lambda g, s: g.copy_(g.float() * s),
        "reciprocal": lambda g, s: g.copy_(g.float() * (1 / torch.tensor(s, dtype=torch.float32))),
        "rounded scale": lambda g, s: g.copy_(g.float() * torch.tensor(s, dtype=g.dtype).float()),
        "rounded twice": lambda g, s: g.copy_((g * 3) * (s / 3)),
        "tail": lambda g, s: g.copy_(g.float() * s if g.numel() > 100 else g.float() * s * 1.01),
        "refused": lambda g, s: torch.ones(2) @ torch.ones(3),
    }
    forms = {}
    for name, operation in operations.items():
        monkeypatch.setitem(_grad_factors.SCALES, name, operation)
        forms[name] = _grad_factors._native_form(name, torch.bfloat16, torch.device("cpu"), (float,))
    assert forms == {
        "divide": (DIVIDE, torch.float32),
        "multiply": (MULTIPLY, torch.float32),
        "reciprocal": (MULTIPLY_RECIPROCAL, torch.float32),
        "rounded scale": (MULTIPLY, torch.bfloat16),
        "rounded twice": None,
        "tail": None,
        "refused": None,
    }


def test_the_probe_runs_on_the_gradients_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the current one it would make a context there, on a card that nobody asked for."""

    class Probed(Exception):
        pass

    class Piece:
        def __getitem__(self, _: slice) -> Piece:
            return self

        def to(self, device: torch.device, *, copy: bool) -> Tensor:
            raise Probed(device)

    monkeypatch.setattr(_grad_factors, "_probe_values", lambda _: Piece())
    second = torch.device("cuda", 1)
    with pytest.raises(Probed) as probed:
        _grad_factors._native_form("anything", torch.float32, second, (float,))
    assert probed.value.args == (second,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_applied_in_order_each_with_its_rounding(dtype: torch.dtype) -> None:
    plain = values(dtype, 999)
    gradient = held(plain)
    for tensor in (plain, gradient):
        torch._foreach_mul_([tensor], torch.tensor(1 / 1000))
        tensor.div_(3)
        tensor.mul_(0.7)
    assert len(cell_of(gradient).for_step().factors) == 3
    assert same_bits(plain, gradient)
    assert same_bits(plain, as_the_optimizer_reads(cell_of(gradient).for_step(), plain.shape))
    gradient.add_(1)
    assert cell_of(gradient).for_step().factors == []
    assert same_bits(plain.add_(1), gradient)


def test_pending_scales_are_capped() -> None:
    plain = values(torch.bfloat16, 99)
    gradient = held(plain)
    lengths = []
    for step in range(20):
        for tensor in (plain, gradient):
            tensor.mul_(1 + step / 7)
        lengths.append(len(cell_of(gradient).for_step().factors))
    assert max(lengths) == 8 and lengths[-1] < 8
    assert same_bits(plain, gradient)
    assert same_bits(plain, as_the_optimizer_reads(cell_of(gradient).for_step(), plain.shape))


def test_a_factor_is_copied_at_the_call_and_shared_by_the_list() -> None:
    store = HostStore(delayed=True)
    gradients = [held(values(torch.float32, 10 + index), store) for index in range(3)]
    coefficient = torch.tensor(0.3)
    count = store.to_host_count
    torch._foreach_mul_(gradients, coefficient)
    coefficient.data.fill_(100.0)  # does not change the version counter
    assert store.to_host_count == count + 1
    for index, gradient in enumerate(gradients):
        expected = values(torch.float32, 10 + index) * 0.3
        assert same_bits(expected, as_the_optimizer_reads(cell_of(gradient).for_step(), expected.shape))
        assert same_bits(expected, gradient)


def test_a_step_waits_for_its_factors() -> None:
    store = HostStore(delayed=True)
    gradient = held(values(torch.float32, 10), store)
    store.land()
    gradient.mul_(torch.tensor(0.5))
    step = cell_of(gradient).for_step()
    assert [ticket.done for ticket in step.tickets] == [True, False]
    for ticket in step.tickets:
        ticket.wait()
    assert same_bits(as_the_optimizer_reads(step, gradient.shape), values(torch.float32, 10) * 0.5)


def test_a_prefetched_copy_gets_the_scales_that_came_after_it() -> None:
    store = HostStore(delayed=True)
    gradient = held(values(torch.float32, 10), store)
    cell_of(gradient).prefetch()
    gradient.mul_(0.5)
    assert same_bits(gradient, values(torch.float32, 10) * 0.5)
    cell_of(gradient).prefetch()
    gradient.copy_(torch.ones(10))  # the prefetched copy is out of date
    assert same_bits(gradient, torch.ones(10))


def test_a_mixed_list_takes_torchs_one_path() -> None:
    """Where torch would treat the whole list differently, it is given the whole list."""
    store = HostStore(delayed=True)
    plain = [values(torch.bfloat16, 9), values(torch.float32, 12), values(torch.bfloat16, 9)]
    mixed = [held(plain[0], store), held(plain[1], store), plain[2].clone()]
    for tensors in (plain, mixed):
        torch._foreach_mul_(tensors, 0.3)
        torch._foreach_div_(tensors, [3.0, 5.0, 7.0])
        torch._foreach_add_(tensors, 1)
    assert all(same_bits(left, right) for left, right in zip(plain, mixed, strict=True))
    plain, mixed = plain[::2], mixed[::2]
    for left, right in zip(torch._foreach_norm(plain, 2.0), torch._foreach_norm(mixed, 2.0), strict=True):
        assert same_bits(left, right)


@pytest.mark.parametrize("order", [2.0, float("inf"), 1.5])
def test_a_norm_is_learned_and_then_taken_on_the_way_out(order: float) -> None:
    store = HostStore()
    torch._foreach_norm([held(values(torch.float32, 77), store)], order)
    assert (torch.ops.aten._foreach_norm.Scalar, order, None) in store.learned
    gradient = held(values(torch.float32, 78), store)
    count = store.to_device_count
    for _ in range(2):
        (norm,) = torch._foreach_norm([gradient], order)
        assert same_bits(norm, torch._foreach_norm([values(torch.float32, 78)], order)[0])
        norm.fill_(0)  # the caller's own
    assert store.to_device_count == count


class Operations(TorchDispatchMode):
    """How many run inside."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_norms_that_are_known_cost_no_operation_each() -> None:
    """On a card each would be a launch."""
    store = HostStore()
    gradients = [held(values(torch.float32, count), store) for count in range(5, 45)]
    expected = torch._foreach_norm(gradients, 2.0)
    operation = torch.ops.aten._foreach_norm.Scalar
    with Operations() as operations:  # which would see that one alone, and nothing of what serves it
        norms = _grad_face._foreach_norm(operation, (gradients, 2.0), {})
    assert operations.count < 5
    norms[0].fill_(-1.0)  # the caller's own, each
    for one, other in zip([*norms[1:], *torch._foreach_norm(gradients, 2.0)], expected[1:] + expected, strict=True):
        assert same_bits(one, other)


def test_of_a_sum_of_micro_batches_the_norms_that_nobody_asks_for_are_not_taken() -> None:
    store = HostStore()
    parameter = nn.Parameter(torch.zeros(65, dtype=torch.bfloat16))

    def taken(micro_batches: int, *, anew: bool = True) -> tuple[int, int]:
        """Norms taken of a sum, and uploads for the one that is asked for."""
        plain = torch.zeros_like(parameter)
        for number in range(micro_batches):
            plain += values(torch.bfloat16, 65) * (number + 1)
            if number == 0 and anew:
                parameter.grad = plain.clone()
            else:
                assert parameter.grad is not None
                parameter.grad += values(torch.bfloat16, 65) * (number + 1)
            hold(parameter, "weight", store)
        assert parameter.grad is not None
        uploads, expected = store.to_device_count, torch._foreach_norm([plain], 2.0, torch.float32)[0]
        assert same_bits(torch._foreach_norm([parameter.grad], 2.0, torch.float32)[0], expected)
        norms, store.widened_count = store.widened_count, 0
        return norms, store.to_device_count - uploads

    assert taken(3) == (1, 1)  # it is learned
    assert taken(3) == (1, 0)
    parameter.grad.zero_()  # type: ignore[union-attr]  # as zero_grad(set_to_none=False)
    assert taken(3, anew=False) == (1, 0)
    assert taken(1) == (1, 1)  # fewer, as at the end of an epoch: it is taken when asked for, and from now on
    assert taken(1) == (1, 0)
    assert taken(3) == (3, 0)


def test_a_norm_never_outlives_the_value_it_was_taken_of() -> None:
    store = HostStore()
    plain = values(torch.float32, 50)
    gradient = held(plain, store)

    def check() -> None:
        assert same_bits(torch._foreach_norm([plain], 2.0)[0], torch._foreach_norm([gradient], 2.0)[0])

    check()
    view: Tensor | None = None
    edits: tuple[Callable[[Tensor], object], ...] = (
        lambda g: g.mul_(0.3),
        lambda g: g.add_(1),
        lambda g: g.copy_(torch.arange(50.0)),
        lambda g: g.zero_(),
        lambda g: g.fill_(3),
        lambda g: g.__setitem__(3, 8),
        lambda g: torch._foreach_mul_([g], torch.tensor(0.1)),
    )
    for edit in edits:
        edit(plain)
        edit(gradient)
        check()
    view = gradient[4]
    check()
    view.fill_(100)
    plain[4] = 100
    check()
    assert cell_of(gradient).owner is Owner.DEVICE


def test_lists_take_the_code_path_of_plain_tensors_one_gradient_at_a_time() -> None:
    class CountingStore(HostStore):
        """Knows how many of the copies that it filled are alive."""

        def __init__(self) -> None:
            super().__init__()
            self.copies: list[weakref.ref[Tensor]] = []
            self.peak = 0

        def to_device(self, held: Any, out: Tensor) -> None:
            super().to_device(held, out)
            self.copies.append(weakref.ref(out))
            self.peak = max(self.peak, sum(copy() is not None for copy in self.copies))

    store = CountingStore()
    parameters = []
    for index in range(4):
        parameters.append(nn.Parameter(torch.zeros(9)))
        parameters[-1].grad = held(values(torch.float32, 9) + index, store)
    nn.utils.clip_grad_value_(parameters, 0.5)
    nn.utils.clip_grad_norm_(parameters, 0.1, 1.0)
    assert [key[0] for key in store.learned] == [torch.ops.aten._foreach_norm.Scalar]
    assert store.peak == 1
    states = [torch.ones(9) for _ in parameters]
    torch._foreach_lerp_(states, [p.grad for p in parameters], 0.5)
    assert store.peak == 1


def test_unscaling_is_not_lost_while_the_store_still_keeps_an_upload() -> None:
    """Asking for the norm brings a copy; while its lane refers to that, it is the owner and no scale can wait."""

    class KeepingStore(HostStore):
        def to_device(self, held: Any, out: Tensor) -> None:
            super().to_device(held, out)
            self.kept = out

    store = KeepingStore()
    gradients = [held(values(torch.float32, count), store) for count in (5, 300)]
    expected = [values(torch.float32, count) for count in (5, 300)]
    for tensors in (gradients, expected):
        found = torch.zeros(())
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, torch.tensor(1 / 1024))
        assert found.item() == 0.0
    for gradient, value in zip(gradients, expected, strict=True):
        assert same_bits(as_the_optimizer_reads(cell_of(gradient).for_step(), gradient.shape), value)
