"""Which activations leave the device, and when they are sent for: what _activations.py does, over sizes. Pure.

See [Note: the allowance] there. No decision of it depends on time, so all of them follow from the sizes of what a
forward saves, in the order in which it saves it, when backward reads that from the last to the first.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

__all__ = ["DEFAULT_KEEP", "IN_FLIGHT_BYTES", "RING_BYTES", "ActivationOrder", "activation_order"]

# Of what a forward saves, what stays: one layer in eight hides the way back of the next, on links that keep up at all.
DEFAULT_KEEP = 0.125
# What may be on its way to the host where the allowance is smaller: the link needs it to be busy.
IN_FLIGHT_BYTES = 64 << 20
# What copies may keep alive on their way that nobody gives more room to; beyond it compute waits for them.
RING_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class ActivationOrder:
    """What the saves of a forward push out and the reads of its backward send for; ranges by their place in forward.

    departures: after each save. returns: at each read, the first of which is that of the last range. left_bytes: of all
    that leave, which are on the host at the end of forward. room_bytes: what may be on its way there at once; beyond it
    compute waits. device_bytes: the most that is on the device at once, if the link is slow: what stays, what came
    back, what leaves.
    """

    departures: tuple[tuple[int, ...], ...]
    returns: tuple[tuple[int, ...], ...]
    left_bytes: int
    room_bytes: int
    device_bytes: int


def activation_order(
    sizes: Sequence[int], keep: float, host_bytes: int | None = None, in_flight_bytes: int = IN_FLIGHT_BYTES
) -> ActivationOrder:
    """Of ranges of those bytes. keep: their share that may stay. host_bytes: what does not fit there stays, None: all
    of it fits. in_flight_bytes: what may be on its way there where the allowance is smaller."""
    allowance = int(keep * sum(sizes))
    room = max(allowance, in_flight_bytes)
    recent: deque[int] = deque()  # the oldest first
    away: list[int] = []
    refused: set[int] = set()
    departures: list[tuple[int, ...]] = []
    counted = refused_bytes = left = peak = 0  # counted: on the device, against the allowance
    for number, nbytes in enumerate(sizes):
        recent.append(number)
        counted += nbytes
        peak = max(peak, counted + refused_bytes + min(left, room))
        before = len(away)
        while counted > allowance and len(recent) > (1 if allowance else 0):
            oldest = recent.popleft()
            counted -= sizes[oldest]
            if host_bytes is not None and left + sizes[oldest] > host_bytes:
                refused.add(oldest)
                refused_bytes += sizes[oldest]
            else:
                away.append(oldest)
                left += sizes[oldest]
        departures.append(tuple(away[before:]))

    ahead: set[int] = set()
    returns: list[tuple[int, ...]] = []
    for number in reversed(range(len(sizes))):
        sent: list[int] = []
        if away and away[-1] == number:
            sent.append(away.pop())
            counted += sizes[number]
        ahead.discard(number)
        # What comes next has one place even where the allowance has none.
        while away and not (ahead and counted + sizes[away[-1]] > allowance):
            ahead.add(away[-1])
            counted += sizes[away[-1]]
            sent.append(away.pop())
        peak = max(peak, counted + refused_bytes + min(left, room))
        if number in refused:
            refused_bytes -= sizes[number]
        else:
            counted -= sizes[number]
        returns.append(tuple(sent))
    return ActivationOrder(tuple(departures), tuple(returns), left, room, peak)
