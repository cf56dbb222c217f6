"""DeepSpeed's learning-rate schedules, by its names, parameters and defaults.

A schedule counts optimizer steps in `last_batch_iteration`, from -1. Making one writes its value at -1 to the groups,
which is what the first update uses; `step()` after each update goes on to the next. Sums are written in DeepSpeed's
order of operations, so that values agree to the last bit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from offload import InvalidArgument

from ._surface import Key
from ._surface_training import SCHEDULERS
from ._values import limits_text

__all__ = ["LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]

_WARMUP_TYPES = ("log", "linear")
_SECTIONS = {section.path.removeprefix("scheduler."): section for section in SCHEDULERS}
_ONE_CYCLE_BETA2 = 0.99  # what OneCycle makes of the second beta whenever it cycles the first


class _Schedule:
    """Counting, saving and writing to the groups. Groups added later keep the learning rate they came with."""

    def __init__(self, optimizer: Optimizer, last_batch_iteration: int) -> None:
        if not isinstance(optimizer, Optimizer):
            raise InvalidArgument(f"optimizer is a {type(optimizer).__name__}; give a torch.optim.Optimizer")
        self.optimizer = optimizer
        self.last_batch_iteration = self._count("last_batch_iteration", last_batch_iteration)
        self._last_lr = [float(group["lr"]) for group in optimizer.param_groups]

    def _begin(self) -> None:
        """The last act of making a schedule. One that resumes leaves the groups as the optimizer was loaded."""
        if self.last_batch_iteration == -1:
            self._write()

    def get_lr(self) -> list[float]:
        """The learning rate of each group at `last_batch_iteration`."""
        raise NotImplementedError

    def get_last_lr(self) -> list[float]:
        """The learning rate of each group as this schedule last set it."""
        return list(self._last_lr)

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Goes on to the next iteration, or to the one given, and writes its values to the groups."""
        if last_batch_iteration is None:
            last_batch_iteration = self.last_batch_iteration + 1
        before = self.last_batch_iteration
        self.last_batch_iteration = self._count("last_batch_iteration", last_batch_iteration)
        try:
            self._write()
        except BaseException:  # a class of the user's may have a get_lr() of its own
            self.last_batch_iteration = before
            raise

    def state_dict(self) -> dict[str, Any]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the saved iteration. The groups are left alone: the optimizer's own state has their values."""
        if "last_batch_iteration" not in state_dict:
            raise InvalidArgument(
                f"{type(self).__name__} cannot load {sorted(state_dict)}: give what its state_dict() returned, "
                "which has 'last_batch_iteration'"
            )
        self.last_batch_iteration = self._count("last_batch_iteration", state_dict["last_batch_iteration"])
        self._last_lr = self.get_lr()

    def _write(self) -> None:
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=False):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _key(self, name: str) -> Key:
        """The row of an argument in the table of keys, which says what numbers are legal in configs and here."""
        sections = (_SECTIONS.get(kind.__name__) for kind in type(self).__mro__)  # a user's class may derive from it
        found = next(section for section in sections if section is not None).find(name)
        assert found is not None
        return found

    def _number(self, name: str, value: Any) -> float:
        key = self._key(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and key.holds(value)):
            raise InvalidArgument(f"{name} is {value!r}; give a finite number{limits_text(key)}")
        return float(value)

    def _count(self, name: str, value: Any) -> int:
        """A whole number; JSON may write one as 1e6."""
        key = self._key(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number and key.holds(value) and value % 1 == 0):
            raise InvalidArgument(f"{name} is {value!r}; give a whole number{limits_text(key)}")
        return int(value)

    def _by_group(self, name: str, value: Any) -> list[float]:
        """One number for each group."""
        count = len(self.optimizer.param_groups)
        values: Iterable[Any] = value if isinstance(value, (list, tuple)) else [value] * count
        numbers = [self._number(name, one) for one in values]
        if len(numbers) != count:
            raise InvalidArgument(f"{name} has {len(numbers)} values; give one number, or {count}: one for each group")
        return numbers


class _Warmup(_Schedule):
    """What the three schedules with a warm-up share. A warm-up of 1 step lasts 2, as DeepSpeed's; of 0, none."""

    def __init__(
        self, optimizer: Optimizer, warmup_num_steps: int, warmup_type: str, last_batch_iteration: int
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        steps = self._count("warmup_num_steps", warmup_num_steps)
        self.warmup_num_steps = max(2, steps) if steps else 0
        if warmup_type not in _WARMUP_TYPES:
            warnings.warn(
                f"warmup_type is {warmup_type!r}; give 'log' or 'linear': 'log' is used, as DeepSpeed does",
                stacklevel=3,
            )
            warmup_type = "log"
        self.warmup_type = warmup_type

    def _warming_up(self) -> bool:
        return max(0, self.last_batch_iteration) < self.warmup_num_steps

    def _risen(self) -> float:
        """How much of the rise is done during the warm-up: 0 to 1."""
        if self.last_batch_iteration < 0:
            return 0.0
        if self.warmup_type == "linear":
            return self.last_batch_iteration / self.warmup_num_steps
        return 1.0 / math.log(self.warmup_num_steps) * math.log(self.last_batch_iteration + 1)

    def _warn_if_shorter_than_warmup(self, total_num_steps: int) -> None:
        if total_num_steps < self.warmup_num_steps:
            warnings.warn(
                f"total_num_steps is {total_num_steps}, fewer than the {self.warmup_num_steps} steps of the warm-up: "
                "training ends before the learning rate is at its maximum",
                stacklevel=3,
            )


class WarmupLR(_Warmup):
    """From `warmup_min_lr` to `warmup_max_lr` over `warmup_num_steps` steps, then constant.

    The rise is logarithmic, log(i + 1) / log(n), or linear, i / n. A rate is a number, or a list with one for each
    group; `warmup_max_lr=None` is each group's own. Raises `InvalidArgument`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        self.min_lrs = self._by_group("warmup_min_lr", warmup_min_lr)
        self.max_lrs = self.get_last_lr() if warmup_max_lr is None else self._by_group("warmup_max_lr", warmup_max_lr)
        self._begin()

    def get_lr(self) -> list[float]:
        gamma = self._risen() if self._warming_up() else self._after_warmup()
        return [low + (high - low) * gamma for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def _after_warmup(self) -> float:
        return 1.0


class WarmupDecayLR(WarmupLR):
    """`WarmupLR`, then linearly down to `warmup_min_lr` at step `total_num_steps`. Raises `InvalidArgument`."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = self._count("total_num_steps", total_num_steps)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)
        self._warn_if_shorter_than_warmup(self.total_num_steps)

    def _after_warmup(self) -> float:
        left = self.total_num_steps - max(0, self.last_batch_iteration)
        return max(0.0, left / max(1, self.total_num_steps - self.warmup_num_steps))


class WarmupCosineLR(_Warmup):
    """Each group's own rate times a ratio: a warm-up from `warmup_min_ratio` to 1, then half a cosine down.

    The cosine ends at `cos_min_ratio` at step `total_num_steps` - 1 and stays there. Before the first `step()` the rate
    is 0, whatever `warmup_min_ratio` is. Raises `InvalidArgument`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        self.total_num_steps = self._count("total_num_steps", total_num_steps)
        self.warmup_min_ratio = self._number("warmup_min_ratio", warmup_min_ratio)
        self.cos_min_ratio = self._number("cos_min_ratio", cos_min_ratio)
        self.org_lrs = self.get_last_lr()
        self._warn_if_shorter_than_warmup(self.total_num_steps)
        self._begin()

    def get_lr(self) -> list[float]:
        ratio = self.get_lr_ratio()
        return [lr * ratio for lr in self.org_lrs]

    def get_lr_ratio(self) -> float:
        """What the groups' own learning rates are multiplied by at `last_batch_iteration`."""
        if self._warming_up():
            if self.last_batch_iteration < 0:
                return 0.0
            return self.warmup_min_ratio + self._risen() * (1.0 - self.warmup_min_ratio)
        done = self.last_batch_iteration - self.warmup_num_steps + 1
        progress = min(1.0, done / max(1, self.total_num_steps - self.warmup_num_steps))
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * ((1 + math.cos(math.pi * progress)) / 2))


class OneCycle(_Schedule):
    """One cycle of the rate up and down, the first beta the other way, then a decay: arXiv 1803.09820.

    The rate goes from `cycle_min_lr` to `cycle_max_lr` over `cycle_first_step_size` steps and back over
    `cycle_second_step_size` (None: as many), in `cycle_first_stair_count` and `cycle_second_stair_count` stairs, or
    continuously with 0. After the cycle it is divided by 1 + `decay_lr_rate` * steps / `decay_step_size`, and the first
    beta is multiplied likewise with `decay_mom_rate`; a `decay_step_size` of 0 means no decay. With `cycle_momentum`
    the groups' betas become (cycled, 0.99); an optimizer without betas keeps what it has, and a warning says so.
    Rates and momenta are numbers, or lists with one for each group. Raises `InvalidArgument`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_min_lr: float | Sequence[float],
        cycle_max_lr: float | Sequence[float],
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: float = 2000,
        cycle_second_step_size: float | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: float = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float | Sequence[float] = 0.8,
        cycle_max_mom: float | Sequence[float] = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.first_step_size = self._number("cycle_first_step_size", cycle_first_step_size)
        self.second_step_size = self.first_step_size
        if cycle_second_step_size is not None:
            self.second_step_size = self._number("cycle_second_step_size", cycle_second_step_size)
        self.total_size = self.first_step_size + self.second_step_size
        self.first_stair_count = self._count("cycle_first_stair_count", cycle_first_stair_count)
        self.second_stair_count = self.first_stair_count
        if cycle_second_stair_count is not None:
            self.second_stair_count = self._count("cycle_second_stair_count", cycle_second_stair_count)
        self.decay_step_size = self._number("decay_step_size", decay_step_size)
        self.decay_lr_rate = self._number("decay_lr_rate", decay_lr_rate)
        self.decay_mom_rate = self._number("decay_mom_rate", decay_mom_rate)
        self.min_lrs = self._by_group("cycle_min_lr", cycle_min_lr)
        self.max_lrs = self._by_group("cycle_max_lr", cycle_max_lr)
        self.min_moms = self._by_group("cycle_min_mom", cycle_min_mom)
        self.max_moms = self._by_group("cycle_max_mom", cycle_max_mom)
        self.cycle_momentum = cycle_momentum
        if cycle_momentum and "betas" not in optimizer.defaults:
            warnings.warn(
                f"{type(optimizer).__name__} has no betas: cycle_momentum is without effect; give cycle_momentum=False",
                stacklevel=2,
            )
            self.cycle_momentum = False
        self._begin()

    def get_lr(self) -> list[float]:
        done = self.last_batch_iteration + 1
        if self.last_batch_iteration < self.total_size:
            height = self._height()
            return [low + (high - low) * height for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]
        factor = self._decay(done, self.decay_lr_rate)
        return [low / factor for low in self.min_lrs]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """The betas of each group at `last_batch_iteration`; None when they are not cycled."""
        if not self.cycle_momentum:
            return None
        if self.last_batch_iteration < self.total_size:
            height = self._height()
            first = [high - (high - low) * height for low, high in zip(self.min_moms, self.max_moms, strict=True)]
        else:
            factor = self._decay(self.last_batch_iteration + 1, self.decay_mom_rate)
            first = [high * factor for high in self.max_moms]
        return [(beta, _ONE_CYCLE_BETA2) for beta in first]

    def _height(self) -> float:
        """0 at both ends of the cycle, 1 at its peak."""
        done = self.last_batch_iteration + 1
        phase = (1 + done / self.total_size) % 1  # with the 1 it is rounded as DeepSpeed's
        turn = self.first_step_size / self.total_size
        rising = phase <= turn
        stairs = self.first_stair_count if rising else self.second_stair_count
        if stairs == 0:
            return phase / turn if rising else (phase - 1) / (turn - 1)
        # From whole steps: the phase may lie a rounding below a stair.
        at = done % self.total_size
        climbed = (
            at * stairs / self.first_step_size if rising else (self.total_size - at) * stairs / self.second_step_size
        )
        return math.floor(climbed) / stairs

    def _decay(self, done: int, rate: float) -> float:
        """The factor of the decay, `done` steps after the schedule began."""
        if self.decay_step_size == 0:
            return 1.0
        return 1 + rate * ((done - self.total_size) / self.decay_step_size)

    def _begin(self) -> None:
        if self.last_batch_iteration != -1:
            return
        super()._begin()
        if self.cycle_momentum:
            # Not get_mom(): DeepSpeed begins the betas at the bottom, and the first step() goes on from the top.
            for group, beta in zip(self.optimizer.param_groups, self.min_moms, strict=True):
                group["betas"] = (beta, _ONE_CYCLE_BETA2)

    def step(self, last_batch_iteration: int | None = None) -> None:
        super().step(last_batch_iteration)
        for group, betas in zip(self.optimizer.param_groups, self.get_mom() or [], strict=False):
            group["betas"] = betas


class LRRangeTest(_Schedule):
    """The rate grows by `lr_range_test_step_rate` times its start every `lr_range_test_step_size` steps, for ever.

    Continuously, or with `lr_range_test_staircase` once a step size. `lr_range_test_min_lr`, the start, is a number or
    a list with one for each group. arXiv 1803.09820. Raises `InvalidArgument`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_range_test_min_lr: float | Sequence[float] = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.min_lr = self._by_group("lr_range_test_min_lr", lr_range_test_min_lr)
        self.step_size = self._count("lr_range_test_step_size", lr_range_test_step_size)
        self.step_rate = self._number("lr_range_test_step_rate", lr_range_test_step_rate)
        self.staircase = lr_range_test_staircase
        self._begin()

    def get_lr(self) -> list[float]:
        intervals = (self.last_batch_iteration + 1) / self.step_size
        if self.staircase:
            intervals = math.floor(intervals)
        return [low * (1 + self.step_rate * intervals) for low in self.min_lr]
