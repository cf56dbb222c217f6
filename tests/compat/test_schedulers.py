"""Our schedules beside DeepSpeed's own classes: the same rates and betas at every step, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules as theirs

from offload.deepspeed import _schedulers as ours

STEPS = 60  # past the end of every schedule below
RATES = (3e-3, 7e-4)  # of two groups


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for steps, kind in product((1, 2, 3, 7, 10, 1000), ("log", "linear")):
        warmup = {"warmup_num_steps": steps, "warmup_type": kind}
        yield "WarmupLR", {**warmup, "warmup_min_lr": 1e-5}
        yield "WarmupLR", {**warmup, "warmup_max_lr": [1e-3, 2e-3]}
        for total in (5, 23, 40):
            yield "WarmupDecayLR", {**warmup, "total_num_steps": total, "warmup_min_lr": 1e-6}
            yield (
                "WarmupCosineLR",
                {**warmup, "total_num_steps": total, "warmup_min_ratio": 0.03, "cos_min_ratio": 0.01},
            )
    for first, second, stairs, second_stairs, decay in product(
        (1, 3, 7, 10), (None, 0, 4, 11), (0, 2, 3), (None, 0, 3), (0, 3)
    ):
        cycle = {
            "cycle_min_lr": 1e-4,
            "cycle_max_lr": [3e-3, 2e-3],
            "cycle_first_step_size": first,
            "cycle_second_step_size": second,
            "cycle_first_stair_count": stairs,
            "cycle_second_stair_count": second_stairs,
            "decay_step_size": decay,
        }
        for lr_rate, mom_rate in product((0.0, 0.1), (0.0, -0.01)):
            yield "OneCycle", {**cycle, "decay_lr_rate": lr_rate, "decay_mom_rate": mom_rate}
        yield "OneCycle", {**cycle, "cycle_momentum": False}
    for size, rate, staircase in product((1, 3, 7), (1.0, 0.3), (False, True)):
        yield (
            "LRRangeTest",
            {
                "lr_range_test_step_size": size,
                "lr_range_test_step_rate": rate,
                "lr_range_test_staircase": staircase,
            },
        )
    # What a configuration gets when it names no more than it must.
    yield "WarmupLR", {}
    yield "WarmupDecayLR", {"total_num_steps": 30}
    yield "WarmupCosineLR", {"total_num_steps": 30}
    yield "OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3}
    yield "LRRangeTest", {}


CASES = list(cases())


def values(module: Any, name: str, parameters: dict[str, Any], resume_at: int | None = None) -> list[Any]:
    """(lr, betas) of both groups at construction and after each step; from `resume_at` in a schedule made anew."""
    optimizer = torch.optim.Adam([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in RATES])
    schedule = getattr(module, name)(optimizer, **parameters)
    seen = []
    for step in range(STEPS):
        seen.append([(group["lr"], group["betas"]) for group in optimizer.param_groups])
        if step == resume_at:
            saved, groups = schedule.state_dict(), optimizer.state_dict()
            for group, rate in zip(optimizer.param_groups, RATES, strict=True):
                group["lr"] = rate
            schedule = getattr(module, name)(optimizer, **parameters)
            schedule.load_state_dict(saved)
            optimizer.load_state_dict(groups)
        schedule.step()
    return seen


@pytest.mark.filterwarnings("ignore:total_num_steps is")
@pytest.mark.parametrize("name", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"])
@pytest.mark.parametrize("resume_at", [None, 5])
def test_every_value_is_theirs(name: str, resume_at: int | None) -> None:
    parameter_sets = [parameters for kind, parameters in CASES if kind == name]
    assert len(parameter_sets) > 10
    for parameters in parameter_sets:
        expected = values(theirs, name, parameters, resume_at)
        assert values(ours, name, parameters, resume_at) == expected, parameters


def test_states_move_between_the_two() -> None:
    here, there = (
        module.WarmupLR(torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)) for module in (ours, theirs)
    )
    here.step(7)
    there.load_state_dict(here.state_dict())
    assert there.state_dict() == here.state_dict()
    there.step()
    here.load_state_dict(there.state_dict())
    assert here.last_batch_iteration == 8 and here.get_last_lr() == there.get_last_lr()
