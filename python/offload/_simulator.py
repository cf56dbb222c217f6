"""The pipeline of a step, played over seconds instead of bytes."""

from __future__ import annotations

__all__ = ["window_schedule"]


def window_schedule(count: int, prefetch: int) -> list[list[int]]:
    """Which of `count` streamed units each touch of one micro-batch sends for; see [Note: touches].

    Touches are the units' forwards and then, backwards, their backwards; the first finds nothing on the device.
    """
    touches = [*range(count), *reversed(range(count))]
    schedule = []
    present: set[int] = set()
    for position, unit in enumerate(touches):
        ahead = dict.fromkeys(other for other in touches[position + 1 :] if other != unit)
        window = [unit, *list(ahead)[:prefetch]]
        schedule.append([other for other in window if other not in present])
        present = set(window)
    return schedule
