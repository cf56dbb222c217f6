"""DeepSpeed's learning-rate schedules: tables of values from the published formulas, and what is refused.

`make compat` compares many more values with DeepSpeed's own classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from offload import InvalidArgument
from offload.deepspeed import _schedulers
from offload.deepspeed._config import load
from offload.deepspeed._schedulers import LRRangeTest, OneCycle, WarmupCosineLR, WarmupDecayLR, WarmupLR
from offload.deepspeed._surface_training import SCHEDULERS

LOG3 = math.log(3) / math.log(4)


def optimizer_of(*rates: float, kind: type[torch.optim.Optimizer] = torch.optim.Adam) -> torch.optim.Optimizer:
    return kind([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates or (2.0,)])


def written(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


# The schedule, its parameters, and the rate at construction and after each step, beside a group with lr 2.
TABLES: list[tuple[type[Any], dict[str, Any], list[float]]] = [
    (
        WarmupLR,
        {"warmup_min_lr": 0.1, "warmup_max_lr": 1.1, "warmup_num_steps": 4, "warmup_type": "linear"},
        [0.1, 0.1, 0.35, 0.6, 0.85, 1.1, 1.1],
    ),
    (WarmupLR, {"warmup_max_lr": 1.0, "warmup_num_steps": 4}, [0, 0, 0.5, LOG3, 1, 1, 1]),
    (WarmupLR, {"warmup_num_steps": 2, "warmup_type": "linear"}, [0, 0, 1, 2, 2]),  # up to the group's own
    (WarmupLR, {"warmup_num_steps": 1, "warmup_type": "linear"}, [0, 0, 1, 2, 2]),  # lasts 2
    (WarmupLR, {"warmup_num_steps": 0, "warmup_min_lr": 0.5}, [2, 2, 2]),
    (
        WarmupDecayLR,
        {"total_num_steps": 6, "warmup_max_lr": 1.0, "warmup_num_steps": 2, "warmup_type": "linear"},
        [0, 0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0],
    ),
    (
        WarmupDecayLR,
        {"total_num_steps": 4, "warmup_min_lr": 1.0, "warmup_max_lr": 2.0, "warmup_num_steps": 0},
        [2, 2, 1.75, 1.5, 1.25, 1, 1],
    ),
    (
        WarmupCosineLR,
        {"total_num_steps": 6, "warmup_num_steps": 2, "cos_min_ratio": 0.5, "warmup_type": "linear"},
        # 2 * (0.5 + 0.5 * (1 + cos(pi * k / 4)) / 2) for k = 1 to 4, then the end
        [0, 0, 1, 1.5 + 0.5 * 0.5**0.5, 1.5, 1.5 - 0.5 * 0.5**0.5, 1, 1, 1],
    ),
    (
        WarmupCosineLR,
        {"total_num_steps": 100, "warmup_num_steps": 4, "warmup_min_ratio": 0.2},
        [0, 0.4, 1.2, 0.4 + 1.6 * LOG3, 2],
    ),
    (
        WarmupCosineLR,
        {"total_num_steps": 2, "warmup_num_steps": 0, "cos_min_ratio": 0},
        [2, 1, 0, 0],
    ),
    (
        OneCycle,
        {"cycle_min_lr": 1.0, "cycle_max_lr": 3.0, "cycle_first_step_size": 2, "cycle_second_step_size": 4},
        [1, 2, 3, 2.5, 2, 1.5, 1, 1, 1],
    ),
    (
        OneCycle,
        {
            "cycle_min_lr": 1.0,
            "cycle_max_lr": 3.0,
            "cycle_first_step_size": 2,
            "decay_step_size": 2,
            "decay_lr_rate": 1.0,
        },
        [1, 2, 3, 2, 1, 1 / 1.5, 1 / 2, 1 / 2.5],
    ),
    (
        OneCycle,
        {"cycle_min_lr": 0.0, "cycle_max_lr": 1.0, "cycle_first_step_size": 4, "cycle_first_stair_count": 2},
        [0, 0, 0.5, 0.5, 1, 0.5, 0.5, 0, 0],
    ),
    (
        LRRangeTest,
        {"lr_range_test_min_lr": 0.5, "lr_range_test_step_size": 2, "lr_range_test_step_rate": 3.0},
        [0.5, 1.25, 2, 2.75, 3.5],
    ),
    (
        LRRangeTest,
        {"lr_range_test_min_lr": 0.5, "lr_range_test_step_size": 2, "lr_range_test_staircase": True},
        [0.5, 0.5, 1, 1, 1.5],
    ),
]


@pytest.mark.parametrize(("kind", "parameters", "expected"), TABLES)
def test_values_of_the_published_formula(kind: type[Any], parameters: dict[str, Any], expected: list[float]) -> None:
    optimizer = optimizer_of()
    schedule = kind(optimizer, **parameters)
    seen = [*written(optimizer)]
    for _ in expected[1:]:
        schedule.step()
        assert schedule.get_last_lr() == schedule.get_lr() == written(optimizer)
        seen += written(optimizer)
    assert seen == pytest.approx(expected, rel=1e-12, abs=1e-15)  # the table's own rounding


def test_one_cycle_moves_the_first_beta_against_the_rate() -> None:
    optimizer = optimizer_of()
    schedule = OneCycle(
        optimizer, 1.0, 3.0, cycle_first_step_size=2, cycle_min_mom=0.5, cycle_max_mom=0.9,
        decay_step_size=2, decay_mom_rate=-0.2,
    )  # fmt: skip
    seen = [optimizer.param_groups[0]["betas"]]
    for _ in range(6):
        schedule.step()
        seen.append(optimizer.param_groups[0]["betas"])
    # Theirs: it is made with the lowest beta, and the first step goes on from the highest.
    expected = [0.5, 0.7, 0.5, 0.7, 0.9, 0.9 * 0.9, 0.9 * 0.8]
    assert [beta for beta, _ in seen] == pytest.approx(expected, rel=1e-12)
    assert {beta2 for _, beta2 in seen} == {0.99}


def test_one_cycle_without_betas_cycles_the_rate_alone() -> None:
    optimizer = optimizer_of(kind=torch.optim.SGD)
    with pytest.warns(UserWarning, match="SGD has no betas"):
        schedule = OneCycle(optimizer, 1.0, 3.0, cycle_first_step_size=2)
    schedule.step()
    assert written(optimizer) == [2] and "betas" not in optimizer.param_groups[0]


def test_each_group_has_its_own_rates() -> None:
    optimizer = optimizer_of(2.0, 4.0)
    schedule = WarmupLR(optimizer, warmup_min_lr=[0.0, 1.0], warmup_num_steps=2, warmup_type="linear")
    assert written(optimizer) == [0, 1]
    schedule.step(1)
    assert written(optimizer) == [1, 2.5]
    with pytest.raises(InvalidArgument, match=r"warmup_min_lr has 1 values; give one number, or 2"):
        WarmupLR(optimizer, warmup_min_lr=[0.0])


def test_a_group_added_later_keeps_its_rate() -> None:
    optimizer = optimizer_of()
    schedule = WarmupLR(optimizer, warmup_num_steps=2)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 7.0})
    schedule.step(5)
    assert written(optimizer) == [2, 7]


def test_a_rate_that_is_a_tensor_is_filled_in_place() -> None:
    rate = torch.tensor(2.0)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    schedule = WarmupLR(optimizer, warmup_num_steps=2, warmup_type="linear")
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == 0
    schedule.step(1)
    assert rate.item() == 1


@pytest.mark.parametrize(("kind", "parameters", "expected"), TABLES)
def test_it_goes_on_from_a_saved_state(kind: type[Any], parameters: dict[str, Any], expected: list[float]) -> None:
    half = len(expected) // 2
    first = optimizer_of()
    schedule = kind(first, **parameters)
    for _ in range(half):
        schedule.step()
    saved = schedule.state_dict()
    assert saved == {"last_batch_iteration": half - 1}  # DeepSpeed's layout

    second = optimizer_of()
    resumed = kind(second, **parameters)
    before = written(second)
    resumed.load_state_dict(saved)
    assert written(second) == before  # they come with the optimizer's state
    assert resumed.get_last_lr() == schedule.get_last_lr()
    for _ in range(3):
        schedule.step()
        resumed.step()
        assert written(second) == written(first)
        assert second.param_groups[0].get("betas") == first.param_groups[0].get("betas")


def test_made_for_a_later_iteration_it_leaves_the_groups_alone() -> None:
    optimizer = optimizer_of()
    schedule = LRRangeTest(optimizer, last_batch_iteration=9)
    assert written(optimizer) == schedule.get_last_lr() == [2]
    schedule.step()
    assert schedule.last_batch_iteration == 10


def test_an_unknown_warmup_type_is_taken_as_log_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="warmup_type is 'cosine'.*'log'"):
        schedule = WarmupLR(optimizer_of(), warmup_type="cosine")
    assert schedule.warmup_type == "log"


@pytest.mark.parametrize("kind", [WarmupDecayLR, WarmupCosineLR])
def test_fewer_steps_than_the_warmup_has_are_warned_of(kind: Callable[..., Any]) -> None:
    with pytest.warns(UserWarning, match="total_num_steps is 5, fewer than the 10"):
        kind(optimizer_of(), total_num_steps=5, warmup_num_steps=10)


@pytest.mark.parametrize(
    ("kind", "parameters", "name"),
    [
        (WarmupLR, {"warmup_num_steps": -1}, "warmup_num_steps"),
        (WarmupLR, {"warmup_num_steps": 1.5}, "warmup_num_steps"),
        (WarmupLR, {"warmup_num_steps": "auto"}, "warmup_num_steps"),
        (WarmupLR, {"warmup_num_steps": math.inf}, "warmup_num_steps"),
        (WarmupLR, {"warmup_min_lr": -1.0}, "warmup_min_lr"),
        (WarmupLR, {"warmup_max_lr": math.nan}, "warmup_max_lr"),
        (WarmupLR, {"last_batch_iteration": -2}, "last_batch_iteration"),
        (WarmupDecayLR, {"total_num_steps": 0}, "total_num_steps"),
        (WarmupCosineLR, {"total_num_steps": True}, "total_num_steps"),
        (WarmupCosineLR, {"total_num_steps": 9000, "cos_min_ratio": -0.1}, "cos_min_ratio"),
        (OneCycle, {"cycle_min_lr": 0.1, "cycle_max_lr": "1"}, "cycle_max_lr"),
        (OneCycle, {"cycle_min_lr": 0.1, "cycle_max_lr": 1, "cycle_first_step_size": 0}, "cycle_first_step_size"),
        (OneCycle, {"cycle_min_lr": 0.1, "cycle_max_lr": 1, "cycle_second_step_size": -1}, "cycle_second_step_size"),
        (OneCycle, {"cycle_min_lr": 0.1, "cycle_max_lr": 1, "decay_lr_rate": -1}, "decay_lr_rate"),
        (OneCycle, {"cycle_min_lr": 0.1, "cycle_max_lr": 1, "cycle_first_stair_count": 0.5}, "cycle_first_stair_count"),
        (OneCycle, {"cycle_min_lr": 0.1, "cycle_max_lr": 1, "cycle_max_mom": 1}, "cycle_max_mom"),
        (LRRangeTest, {"lr_range_test_step_size": 0}, "lr_range_test_step_size"),
        (LRRangeTest, {"lr_range_test_min_lr": None}, "lr_range_test_min_lr"),
    ],
)
def test_bad_values_are_refused_and_change_nothing(kind: type[Any], parameters: dict[str, Any], name: str) -> None:
    optimizer = optimizer_of()
    with pytest.raises(InvalidArgument, match=f"{name} is {parameters[name]!r}; give"):
        kind(optimizer, **parameters)
    assert written(optimizer) == [2] and optimizer.param_groups[0]["betas"] == (0.9, 0.999)


# What each schedule needs beside the argument that is tried.
NEEDED: dict[str, dict[str, Any]] = {
    "WarmupDecayLR": {"total_num_steps": 9},
    "WarmupCosineLR": {"total_num_steps": 9},
    "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2},
}
NUMBERS = [
    (section.path.split(".")[1], key.name)
    for section in SCHEDULERS
    for key in section.keys
    if key.name not in ("warmup_type", "cycle_momentum", "lr_range_test_staircase")
]


def refusal_of(make: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    try:
        make(*arguments, **options)
    except InvalidArgument as error:
        return str(error)
    return ""


# DeepSpeed's class, and so ours, takes parts of steps; its configs do not.
OF_STEPS = ("cycle_first_step_size", "cycle_second_step_size", "decay_step_size")


@pytest.mark.filterwarnings("ignore:total_num_steps is")
@pytest.mark.parametrize(("name", "key"), NUMBERS)
def test_a_config_and_the_class_refuse_the_same_numbers(name: str, key: str) -> None:
    refused = []
    for value in (-2, -1, -0.5, 0, 0.5, 1, 1.5, 2, [0.5], [-1], [1], math.nan, math.inf, -math.inf):
        params = NEEDED.get(name, {}) | {key: value}
        if key in OF_STEPS and value in (0.5, 1.5):
            continue
        config = {"train_batch_size": 8, "scheduler": {"type": name, "params": params}}
        of_both = (refusal_of(load, config), refusal_of(getattr(_schedulers, name), optimizer_of(), **params))
        said = [text for text in of_both if text]
        if said:
            by_config, by_class = said
            assert f"scheduler.params.{key}={value!r}: must be a" in by_config
            assert f"{key} is " in by_class and "; give a" in by_class
            refused.append(value)
    assert refused[-2:] == [math.inf, -math.inf]


def test_a_bad_state_and_a_bad_optimizer_are_refused() -> None:
    schedule = WarmupLR(optimizer_of())
    with pytest.raises(InvalidArgument, match="'last_batch_iteration'"):
        schedule.load_state_dict({"last_epoch": 3})
    assert schedule.last_batch_iteration == -1
    with pytest.raises(InvalidArgument, match="optimizer is a list"):
        WarmupLR([torch.zeros(1)])  # type: ignore[arg-type]


def test_whole_numbers_may_be_floats_as_json_writes_them() -> None:
    assert WarmupLR(optimizer_of(), warmup_num_steps=1e3).warmup_num_steps == 1000  # type: ignore[arg-type]


def test_every_schedule_is_named() -> None:
    assert set(_schedulers.__all__) == {kind.__name__ for kind, _, _ in TABLES}
