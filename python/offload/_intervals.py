"""Sets of time: sorted, disjoint half-open intervals of nanoseconds."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Intervals", "intersect", "subtract", "total", "union"]

Intervals = list[tuple[int, int]]


def union(intervals: Iterable[tuple[int, int]]) -> Intervals:
    """The set that any intervals cover."""
    merged: Intervals = []
    for begin, end in sorted(intervals):
        if begin >= end:
            continue
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def intersect(one: Intervals, other: Intervals) -> Intervals:
    common: Intervals = []
    i = j = 0
    while i < len(one) and j < len(other):
        begin, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if begin < end:
            common.append((begin, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return common


def subtract(one: Intervals, other: Intervals) -> Intervals:
    left: Intervals = []
    j = 0
    for begin, end in one:
        while j < len(other) and other[j][1] <= begin:
            j += 1
        k = j
        while k < len(other) and other[k][0] < end:
            if other[k][0] > begin:
                left.append((begin, other[k][0]))
            begin = max(begin, other[k][1])
            k += 1
        if begin < end:
            left.append((begin, end))
    return left


def total(intervals: Intervals) -> int:
    return sum(end - begin for begin, end in intervals)
