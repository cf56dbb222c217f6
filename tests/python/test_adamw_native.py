"""The native AdamW against the same sequence in single torch operations, bit for bit, and against torch.optim."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload import InvalidArgument, _native

ISAS = _native.available_isas()
FORMATS = {torch.float32: _native.FLOAT32, torch.bfloat16: _native.BFLOAT16, torch.float16: _native.FLOAT16}
# What holds the fp32 master: alone, beside a 16-bit weight, or split into bf16 weight and remainder.
MASTERS = ("float32", "float32+bfloat16", "float32+float16", "split")
# Every tail of the widest vectors, the prefetch stride and several blocks of the parallel loop.
COUNTS = (*range(34), 47, 63, 65, 1000, 33_001)

SCALARS: dict[str, Any] = {
    "weight_scale": 1 - 1e-3 * 0.1,
    "l2": 0.0,
    "one_minus_beta1": 1 - 0.9,
    "beta2": 0.999,
    "one_minus_beta2": 1 - 0.999,
    "step_size": 1e-3 * (1 - 0.999**3) ** 0.5 / (1 - 0.9**3),
    "eps": 1e-8 * (1 - 0.999**3) ** 0.5,
    "maximize": False,
}


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of the split master, element by element in 64-bit integers."""
    pattern = bits(master).to(torch.int64) & 0xFFFFFFFF
    nan = (pattern & 0x7FFFFFFF) > 0x7F800000
    pattern = torch.where(nan, (pattern & 0x80000000) | 0x7FC00000, pattern)
    high = (pattern + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (pattern - (high << 16)).to(torch.int16)


@dataclass
class States:
    """What one update reads and writes; `weight` and `remainder` as the kind of master needs them."""

    kind: str
    gradient: Tensor
    master: Tensor  # fp32; of a split master it is only the value to start from
    weight: Tensor | None
    remainder: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def random(cls, kind: str, gradient_dtype: torch.dtype, count: int, seed: int = 0) -> States:
        generator = torch.Generator().manual_seed(seed)

        # Magnitudes over many binades; fp16 denormals and zeros are among them.
        def normal(spread: float) -> Tensor:
            values = torch.randn(count, generator=generator)
            values *= torch.exp(spread * torch.randn(count, generator=generator))
            return values * (torch.rand(count, generator=generator) > 0.05)

        return cls.of(
            kind,
            gradient=normal(4.0).to(gradient_dtype),
            master=normal(1.0),
            exp_avg=normal(2.0),
            exp_avg_sq=normal(2.0).square(),
        )

    @classmethod
    def of(cls, kind: str, gradient: Tensor, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> States:
        weight, remainder = None, None
        if kind == "split":
            weight, remainder = split(master)
        elif kind != "float32":
            weight = torch.zeros(master.numel(), dtype=getattr(torch, kind.partition("+")[2]))
        return cls(kind, gradient, master.clone(), weight, remainder, exp_avg.clone(), exp_avg_sq.clone())

    def clone(self) -> States:
        copies = {k: v.clone() for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **copies)

    def part(self, start: int, end: int) -> States:
        """The same memory from `start` to `end`."""
        return replace(self, **{k: v[start:end] for k, v in vars(self).items() if isinstance(v, Tensor)})

    def written(self) -> list[Tensor]:
        master = [self.weight, self.remainder] if self.kind == "split" else [self.master, self.weight]
        return [t for t in (*master, self.exp_avg, self.exp_avg_sq) if t is not None]

    def update(
        self,
        scalars: dict[str, Any] = SCALARS,
        factors: Sequence[tuple[int, float]] = (),
        isa: str | None = None,
        threads: int = 1,
    ) -> States:
        held = self.remainder if self.remainder is not None else self.master
        _native.update_states(
            gradient=self.gradient.data_ptr(),
            gradient_format=FORMATS[self.gradient.dtype],
            master=held.data_ptr(),
            master_format=_native.MASTER_SPLIT if self.kind == "split" else _native.MASTER_FLOAT32,
            weight=0 if self.weight is None else self.weight.data_ptr(),
            weight_format=_native.FLOAT32 if self.weight is None else FORMATS[self.weight.dtype],
            exp_avg=self.exp_avg.data_ptr(),
            exp_avg_sq=self.exp_avg_sq.data_ptr(),
            count=self.gradient.numel(),
            scalars=_native.AdamWScalars(**scalars),
            factors=factors,
            isa=isa,
            threads=threads,
        )
        return self

    def reference(self, scalars: dict[str, Any] = SCALARS, factors: Sequence[tuple[int, float]] = ()) -> States:
        """[Note: the AdamW sequence], one torch operation for one rounding."""
        gradient = self.gradient.clone()
        for kind, value in factors:
            if kind == _native.FACTOR_MULTIPLY_WIDE:
                gradient = gradient.float() * value
            elif kind == _native.FACTOR_MULTIPLY:
                gradient.mul_(value)
            elif kind == _native.FACTOR_DIVIDE:
                gradient.div_(value)
            else:
                gradient.mul_((1 / torch.tensor(value, dtype=torch.float32)).item())
        g = gradient.float()
        if scalars["maximize"]:
            g = -g
        p = self.master
        if scalars["l2"] != 0:
            g = g + scalars["l2"] * p
        else:
            p = p * scalars["weight_scale"]
        m = self.exp_avg + (g - self.exp_avg) * scalars["one_minus_beta1"]
        v = self.exp_avg_sq * scalars["beta2"] + (scalars["one_minus_beta2"] * g) * g
        # In double and back it is rounded correctly: on the CPU torch's fp32 square root can be an ulp off.
        root = v.double().sqrt().float()
        p = p - (scalars["step_size"] * m) / (root + scalars["eps"])
        result = States.of(self.kind, self.gradient, p, m, v)
        if result.weight is not None and self.kind != "split":
            half_up = result.weight.dtype == torch.bfloat16
            result.weight = split(p)[0] if half_up else p.to(result.weight.dtype)
        return result


def assert_same(a: States, b: States) -> None:
    for left, right in zip(a.written(), b.written(), strict=True):
        assert same_bits(left, right)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", MASTERS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_bits_equal_the_sequence_in_torch_operations(isa: str, kind: str, dtype: torch.dtype) -> None:
    for count in COUNTS:
        states = States.random(kind, dtype, count, seed=count)
        expected = states.reference()
        assert_same(states.update(isa=isa), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("changes", [{"l2": 0.1, "weight_scale": 1.0}, {"maximize": True}, {"eps": 0.0}])
def test_variants(isa: str, changes: dict[str, Any]) -> None:
    scalars = {**SCALARS, **changes}
    states = States.random("float32+bfloat16", torch.bfloat16, 1003)
    states.exp_avg_sq += 1e-3  # with eps = 0 a zero second moment would divide zero by zero
    expected = states.reference(scalars)
    assert_same(states.update(scalars, isa=isa), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_factors_round_as_torch_in_place_operations(isa: str, dtype: torch.dtype) -> None:
    values = [float(torch.tensor(value)) for value in (0.3, 1 / 1024, 3.0, 0.98)]
    multiply, divide = _native.FACTOR_MULTIPLY, _native.FACTOR_DIVIDE
    reciprocal = _native.FACTOR_MULTIPLY_RECIPROCAL
    lists = [[(kind, value)] for kind in (multiply, divide, reciprocal) for value in values]
    lists += [[(multiply, values[1]), (divide, values[2]), (reciprocal, values[0]), (multiply, values[3])]]
    wide = _native.FACTOR_MULTIPLY_WIDE
    lists += [[(wide, values[0])], [(multiply, values[1]), (wide, values[1])]]
    for factors in lists:
        states = States.random("float32", dtype, 5003)
        states.exp_avg.zero_()  # then m shows every bit of the gradient
        states.exp_avg_sq.zero_()
        expected = states.reference(factors=factors)
        assert_same(states.update(factors=factors, isa=isa), expected)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(MASTERS),
    dtype=st.sampled_from(list(FORMATS)),
    count=st.integers(0, 700) | st.integers(32_700, 98_500),
    threads=st.integers(1, 4),
    cut=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_bits_do_not_depend_on_isa_threads_or_cuts(
    kind: str, dtype: torch.dtype, count: int, threads: int, cut: float, seed: int
) -> None:
    factors = [(_native.FACTOR_MULTIPLY, 0.1), (_native.FACTOR_DIVIDE, 7.0)]
    states = States.random(kind, dtype, count, seed)
    expected = states.clone().update(factors=factors, isa="scalar")
    for isa in ISAS:
        whole, parts = states.clone(), states.clone()
        assert_same(whole.update(factors=factors, isa=isa, threads=threads), expected)
        middle = int(cut * count)  # at odd places the second part is unaligned
        for part in (parts.part(0, middle), parts.part(middle, count)):
            part.update(factors=factors, isa=isa)
        assert_same(parts, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", MASTERS)
def test_not_finite_gradients_spread_as_in_torch(isa: str, kind: str) -> None:
    states = States.random(kind, torch.float32, 100)
    bad = {3: float("nan"), 40: float("inf"), 97: float("-inf"), 98: -float("nan")}
    for at, value in bad.items():
        states.gradient[at] = value
    expected = states.reference()
    states.update(isa=isa)
    for ours, theirs in zip(states.written(), expected.written(), strict=True):
        if ours.dtype == torch.int16:
            assert torch.equal(ours, theirs)  # the remainder of a NaN is 0
        else:
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours.nan_to_num(0.0), theirs.nan_to_num(0.0))
    if kind.endswith("bfloat16") or kind == "split":
        assert states.weight is not None
        assert (bits(states.weight)[list(bad)] & 0x7FFF == 0x7FC0).all()


@pytest.mark.parametrize("low", [0x7FFF, 0x8000, None])
def test_split_and_join_are_a_bijection(low: int | None) -> None:
    """All low halves on a few high halves, or all high halves on the low halves around the tie."""
    half = torch.arange(1 << 16, dtype=torch.int64)
    highs = [0x0000, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0xBF80, 0xFF7F, 0x007F]
    patterns = (half << 16) + low if low is not None else torch.cat([(high << 16) + half for high in highs])
    master = patterns.to(torch.int32).view(torch.float32)
    weight = torch.empty(master.numel(), dtype=torch.bfloat16)
    remainder = torch.empty(master.numel(), dtype=torch.int16)
    joined = torch.empty_like(master)
    _native.split_master(master.data_ptr(), weight.data_ptr(), remainder.data_ptr(), master.numel())
    _native.join_master(weight.data_ptr(), remainder.data_ptr(), joined.data_ptr(), master.numel())

    expected_weight, expected_remainder = split(master)
    assert same_bits(weight, expected_weight)
    assert torch.equal(remainder, expected_remainder)
    nan = master.isnan()
    assert same_bits(joined[~nan], master[~nan])
    assert (bits(joined[nan]) & 0x7FFFFFFF == 0x7FC00000).all()
    assert torch.equal(bits(joined[nan]) < 0, bits(master[nan]) < 0)
    top = master.abs() == torch.finfo(torch.float32).max
    assert torch.isinf(weight[top]).all() and (remainder[top] == -1).all()  # up to infinity, and back


def ulp(values: Tensor) -> Tensor:
    _, exponent = torch.frexp(values.double())
    return torch.exp2((exponent - 24).clamp(min=-149).double())


def scalars_of(step: int, lr: float, decay: float, decoupled: bool) -> dict[str, Any]:
    correction2 = (1 - 0.999**step) ** 0.5
    return {
        **SCALARS,
        "weight_scale": 1 - lr * decay if decoupled else 1.0,
        "l2": 0.0 if decoupled else decay,
        "step_size": lr * correction2 / (1 - 0.9**step),
        "eps": 1e-8 * correction2,
    }


@pytest.mark.parametrize("decoupled", [True, False])
def test_against_torch_optim(decoupled: bool) -> None:
    count, lr, decay = 20_000, 1e-3, 0.1
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(count, generator=generator)
    parameter = torch.nn.Parameter(start.clone())
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optim = kind([parameter], lr=lr, weight_decay=decay, foreach=False)
    zeros = torch.zeros(count)
    states = States.of("float32", zeros, start, zeros, zeros)

    for step in range(1, 1001):
        gradient = torch.randn(count, generator=generator)
        parameter.grad = gradient
        optim.step()
        states.gradient = gradient
        states.update(scalars_of(step, lr, decay, decoupled))
        if step == 1:
            theirs = parameter.detach()
            scale = torch.stack([start.abs(), theirs.abs(), (theirs - start).abs()]).amax(0)
            assert ((states.master.double() - theirs.double()).abs() / ulp(scale)).max() <= 2
    drift = (states.master - parameter.detach()).abs().max()
    travelled = (parameter.detach() - start).abs().max()
    assert drift <= DRIFT_AFTER_1000_STEPS * travelled


# The largest difference from torch.optim over the largest distance travelled, 1,000 steps of noise.
DRIFT_AFTER_1000_STEPS = 4e-6  # 1.2e-6 was seen


def test_workers_flush_denormals_as_the_caller_does() -> None:
    states = States.random("float32", torch.float32, 100_000)
    states.exp_avg.fill_(1e-40)
    states.gradient.zero_()
    kept = states.clone().update(threads=3)
    assert (kept.exp_avg != 0).all()
    if not torch.set_flush_denormal(True):
        return  # this CPU cannot
    try:
        assert _native.flush_denormals_enabled()
        flushed = states.clone().update(threads=3)
    finally:
        torch.set_flush_denormal(False)
    assert not _native.flush_denormals_enabled()
    assert (bits(flushed.exp_avg) == 0).all()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.parametrize("isa", ISAS)
def test_forced_isa_is_the_active_one(isa: str) -> None:
    done = run_python("from offload import _native; print(_native.active_isa())", OFFLOAD_FORCE_ISA=isa)
    assert done.stdout.strip() == isa, done.stderr


def test_stats_show_the_isa() -> None:
    pair = "model := torch.nn.Linear(8, 8), torch.optim.AdamW(model.parameters())"
    code = f"import offload, torch; print(offload.wrap({pair}, device='cpu', optimizer='host')[1].stats().isa)"
    done = run_python(code, OFFLOAD_FORCE_ISA="scalar")
    assert done.stdout.strip() == "scalar", done.stderr


def test_unknown_forced_isa_is_refused_at_first_use() -> None:
    done = run_python("from offload import _native; _native.active_isa()", OFFLOAD_FORCE_ISA="mmx")
    assert done.returncode != 0
    assert "InvalidArgument" in done.stderr and "OFFLOAD_FORCE_ISA=mmx" in done.stderr


def test_without_force_the_best_isa_is_active() -> None:
    code = "from offload import _native; print(_native.active_isa())"
    assert run_python(code, OFFLOAD_FORCE_ISA="").stdout.strip() == ISAS[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient": 0}, "gradient is null"),
        ({"master": 0}, "master is null"),
        ({"exp_avg": 0}, "exp_avg is null"),
        ({"exp_avg_sq": 0}, "exp_avg_sq is null"),
        ({"gradient_format": 3}, "gradient_format is 3"),
        ({"master_format": -1}, "master_format is -1"),
        ({"weight_format": _native.FLOAT32}, "BFLOAT16 or FLOAT16"),
        ({"master_format": _native.MASTER_SPLIT, "weight_format": _native.FLOAT16}, "split master"),
        ({"master_format": _native.MASTER_SPLIT, "weight": 0}, "split master"),
        ({"isa": "mmx"}, "isa is 'mmx'"),
        ({"factors": [(4, 1.0)]}, "factor kind is 4"),
        ({"threads": 1 << 20}, "threads"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    memory = torch.zeros(8, 64)
    addresses = ["gradient", "master", "weight", "exp_avg", "exp_avg_sq"]
    arguments: dict[str, Any] = {name: memory[i].data_ptr() for i, name in enumerate(addresses)}
    arguments |= {"gradient_format": _native.FLOAT32, "master_format": _native.MASTER_FLOAT32}
    arguments |= {"weight_format": _native.BFLOAT16, "count": 64, "scalars": _native.AdamWScalars(**SCALARS)}
    _native.update_states(**arguments)
    before = memory.clone()
    with pytest.raises(InvalidArgument, match=message):
        _native.update_states(**{**arguments, **changes})
    assert torch.equal(memory, before)
