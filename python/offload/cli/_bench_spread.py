"""Many samples as few numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["low_median_high", "median_interval", "summary"]


def summary(samples: list[float]) -> dict[str, Any]:
    """`samples` with their median and 20th and 80th percentiles, in the samples' own unit."""
    ordered = sorted(samples)

    def percentile(share: float) -> float:
        return ordered[round(share * (len(ordered) - 1))]

    return {"samples": samples, "median": percentile(0.5), "p20": percentile(0.2), "p80": percentile(0.8)}


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the median of independent samples, whatever their distribution.

    How many of n samples lie below the median is binomial, of n/2 with a deviation of sqrt(n)/2.
    """
    ordered = sorted(samples)
    middle, reach = len(ordered) / 2, 1.96 * math.sqrt(len(ordered)) / 2
    low, high = math.floor(middle - reach), math.ceil(middle + reach)
    return ordered[max(0, low)], ordered[min(len(ordered) - 1, high)]


def low_median_high(values: Sequence[float]) -> dict[str, float] | None:
    """Their extremes and median; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return {"min": ordered[0], "median": ordered[len(ordered) // 2], "max": ordered[-1]}
