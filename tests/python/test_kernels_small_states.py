"""kernels/update.cu over bf16 and int8 moments and bf16 masters: the bits of the native core and of torch operations.

On the CPU it is the same source, compiled as C++; on CUDA it is the binary that training launches.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import offload
import test_bf16_masters
import test_small_moments
from offload import _native_state
from offload._adamw import FORMATS, round_to_weight
from offload._kernels import Found, Kernels
from offload._moments import RandomWords
from test_kernels import Counted, Guarded, Operations, without_kernels
from test_small_moments import SEED, STEP
from training import RESIDENT, Run, assert_same_bits, batches, loss_of, make_model, train

pytestmark = pytest.mark.usefixtures("device")

# (moments, rule, master); what has fp32 moments and masters is in test_kernels.py.
MIXTURES = [
    *((form, rule, "bf16") for form in ("fp32", "bf16", "int8") for rule in ("adamw", "lion")),
    ("fp32", "adagrad", "bf16"),
    *(
        (form, rule, master)
        for form in ("bf16", "int8")
        for rule in ("adamw", "lion")
        for master in ("fp32", "fp32 of bf16", "fp32 of fp16")
    ),
]


def made(form: str, rule: str, master: str, count: int, gradient_dtype: torch.dtype = torch.bfloat16) -> Any:
    """One parameter on the CPU, whose states have these formats."""
    kind = test_bf16_masters.Case if master == "bf16" else test_small_moments.Case
    with torch.device("cpu"):
        return kind(form, rule, count, gradient_dtype)


def arrays(case: Any) -> dict[str, Tensor]:
    """What a step changes."""
    named = {"master": case.weight if hasattr(case, "weight") else case.master}
    for argument, moment in zip(case.arguments, case.moments, strict=True):
        named |= dict(zip((argument, f"{argument}_scales"), moment.tensors(), strict=False))
    return named


def by_kernel(kernels: Kernels, rule: str, case: Any, weight_dtype: torch.dtype | None) -> dict[str, Tensor]:
    guarded = {name: Guarded(tensor) for name, tensor in arrays(case).items()}
    gradient = Guarded(case.gradient)
    if weight_dtype is not None:
        guarded["weight"] = Guarded(torch.full_like(case.master, float("nan"), dtype=weight_dtype))
    moments = {"exp_avg": 0, "exp_avg_sq": 0} | {
        name: guard.tensor.data_ptr() for name, guard in guarded.items() if name.startswith("exp_avg")
    }
    moments["moment_format"] = case.moments[0].native()["moment_format"]
    weight = guarded["weight"].tensor if weight_dtype is not None else None
    scalars, words = case.hyper.scalars(STEP), RandomWords(SEED, STEP)
    kernels.update_(rule, guarded["master"].tensor, weight, moments, gradient.tensor, scalars, rounding_key=words.key)
    assert gradient.intact() and all(guard.intact() for guard in guarded.values())
    assert same(gradient.tensor.cpu(), case.gradient), "the gradient was written to"
    return {name: guard.tensor.cpu() for name, guard in guarded.items()}


def same(one: Tensor, other: Tensor) -> bool:
    """Equal bits; a NaN equals any NaN: processors differ in the one that they make."""
    if not one.dtype.is_floating_point:
        return torch.equal(one, other)
    integer = {2: torch.int16, 4: torch.int32}[one.itemsize]
    return bool(((one.view(integer) == other.view(integer)) | (one.isnan() & other.isnan())).all())


def assert_all_agree(kernels: Kernels, rule: str, master: str, case: Any) -> None:
    weight_dtype = {"fp32 of bf16": torch.bfloat16, "fp32 of fp16": torch.float16}.get(master)
    written = by_kernel(kernels, rule, case, weight_dtype)
    for other in (copy.deepcopy(case).step(), copy.deepcopy(case).reference()):
        expected = arrays(other)
        if weight_dtype is not None:
            expected["weight"] = round_to_weight(other.master, weight_dtype)
        assert written.keys() == expected.keys()
        for name, tensor in expected.items():
            assert same(written[name], tensor), name


# --- one step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "rule", "master"), MIXTURES)
def test_bits_of_every_mixture_of_formats(kernels: Kernels, form: str, rule: str, master: str) -> None:
    for dtype in FORMATS:
        assert_all_agree(kernels, rule, master, made(form, rule, master, 5003, dtype))


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_every_tail_of_a_block(kernels: Kernels, form: str) -> None:
    for count in (*range(1, 34), 255, 256, 257, 511, 512, 513, 1023, 1025, 2047, 2048, 2049, 2048 * 2 + 300):
        assert_all_agree(kernels, "adamw", "bf16", made(form, "adamw", "bf16", count))


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_blocks_of_nothing_and_of_what_is_not_finite(kernels: Kernels, form: str) -> None:
    case = made(form, "adamw", "fp32", 5 * 256 + 7)
    with torch.device("cpu"):
        case.gradient[:256] = 0.0
        for moment in case.moments:
            value = moment.value()
            value[:256], value[256:512] = 0.0, value[256:512] * 1e-38
            moment.load(value)
    assert_all_agree(kernels, "adamw", "fp32", case)
    case.gradient[600], case.gradient[1285] = float("nan"), float("inf")
    written, expected = by_kernel(kernels, "adamw", case, None), copy.deepcopy(case).step()
    kept = copy.deepcopy(case)
    for name, tensor in arrays(kept).items():
        tensor.copy_(written[name])
    for mine, other in zip(kept.moments, expected.moments, strict=True):
        assert same(mine.value(), other.value()) and other.value()[[600, 1285]].isnan().any()


# --- under training -----------------------------------------------------------------------------------------


@pytest.fixture
def counted(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """States on the device are updated by the kernel, but for `without_kernels`."""
    launch = Counted(kernels._launch)
    monkeypatch.setattr(_native_state, "find_kernels", lambda _: Found(launch, None))
    yield launch


PLACEMENTS: dict[str, dict[str, Any]] = {
    "resident": RESIDENT,
    "mixed": {"optimizer": 0.5, "gradients": "host"},
    "streamed": {"optimizer": 0.5, "gradients": "host", "params": "host"},
}
FORMATS_OF_STATES = (
    {"moments": "bf16"},
    {"moments": "int8"},
    {"master": "bf16"},
    {"moments": "int8", "master": "bf16"},
)


@pytest.mark.parametrize("formats", FORMATS_OF_STATES, ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_training_has_the_bits_of_torch_operations(counted: Counted, placement: str, formats: dict[str, Any]) -> None:
    def run(options: dict[str, Any]) -> Run:
        model = make_model(torch.bfloat16, depth=2)
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return train(*offload.wrap(model, adamw, **formats, **options), micro_batches=2)

    expected = without_kernels(lambda: run(RESIDENT))
    assert counted.count == 0
    written = run(PLACEMENTS[placement])
    assert_same_bits(written, expected)
    assert counted.count > 0
    assert not any("torch operations" in line for line in written.optimizer.stats().fallbacks)


@pytest.mark.parametrize("formats", FORMATS_OF_STATES, ids=str)
def test_a_step_is_nothing_but_the_kernel(counted: Counted, formats: dict[str, Any]) -> None:
    """No torch operation, so no fp32 copy of moments or masters."""
    model = make_model(torch.bfloat16, depth=1)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **formats, **RESIDENT)
    loss_of(model, next(batches(1))).backward()
    with Operations() as operations:
        optimizer.step(grad_scale=0.5)
    ours = {name for name in operations.names if not name.startswith("profiler.")}  # torch marks every step()
    assert ours <= {"aten.detach.default"}
    assert counted.count == len(list(model.parameters()))
