"""Which activations leave the device, and when they are sent for: what _activations.py does, over sizes. Pure.

See [Note: the allowance] there. No decision of it depends on time, so all of them follow from the sizes of what a
forward saves, in the order in which it saves it, when backward reads that from the last to the first.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

__all__ = [
    "DEFAULT_KEEP",
    "HOST_BLOCK_BYTES",
    "IN_FLIGHT_BYTES",
    "RING_BYTES",
    "SCALE_BLOCK",
    "ActivationOrder",
    "activation_order",
    "packed_bytes",
    "scale_bytes",
]

# Of what a forward saves, what stays: one layer in eight hides the way back of the next, on links that keep up at all.
DEFAULT_KEEP = 0.125
# What may be on its way to the host where the allowance is smaller: the link needs it to be busy.
IN_FLIGHT_BYTES = 64 << 20
# What copies may keep alive on their way that nobody gives more room to; beyond it compute waits for them.
RING_BYTES = 256 << 20
# Blocks of the host pool are multiples of this (csrc/memory/host_pool.h).
HOST_BLOCK_BYTES = 256
# Elements that share a scale, where a byte an element is sent (kBlock of kernels/activations.cu).
SCALE_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class ActivationOrder:
    """What the saves of a forward push out and the reads of its backward send for; ranges by their place in forward.

    departures: after each save. returns: at each read, the first of which is that of the last range. sent_bytes: of all
    that leave, on their way, which they go twice. host_bytes: of their blocks on the host, at the end of forward.
    converted_bytes: of those that are packed for the way, in both forms. room_bytes: what may be on its way there at
    once; beyond it compute waits. device_bytes: the most that is on the device at once, if the link is slow: what
    stays, what came back, what leaves, and the packed form of what is being packed or unpacked.
    """

    departures: tuple[tuple[int, ...], ...]
    returns: tuple[tuple[int, ...], ...]
    sent_bytes: int
    host_bytes: int
    converted_bytes: int
    room_bytes: int
    device_bytes: int


def scale_bytes(count: int) -> int:
    """Of the fp32 scales of so many rounded elements."""
    return 4 * -(-count // SCALE_BLOCK)


def packed_bytes(count: int) -> int:
    """Of so many rounded elements: their scales, and a code each."""
    return scale_bytes(count) + count


def activation_order(
    sizes: Sequence[int],
    keep: float,
    host_bytes: int | None = None,
    in_flight_bytes: int = IN_FLIGHT_BYTES,
    sent: Sequence[int] | None = None,
) -> ActivationOrder:
    """Of ranges of those bytes. keep: their share that may stay. host_bytes: what does not fit there stays, None: all
    of it fits. in_flight_bytes: what may be on its way there where the allowance is smaller. sent: bytes on the way,
    None: as many; what has others is packed."""
    sent = sizes if sent is None else sent
    packed = [way if way != nbytes else 0 for nbytes, way in zip(sizes, sent, strict=True)]
    blocks = [-(-way // HOST_BLOCK_BYTES) * HOST_BLOCK_BYTES for way in sent]
    allowance = int(keep * sum(sizes))
    room = max(allowance, in_flight_bytes)
    recent: deque[int] = deque()  # the oldest first
    away: list[int] = []
    refused: set[int] = set()
    departures: list[tuple[int, ...]] = []
    counted = refused_bytes = left = held = peak = 0  # counted: on the device, against the allowance

    def on_device() -> int:
        return counted + refused_bytes + min(left, room)

    for number, nbytes in enumerate(sizes):
        recent.append(number)
        counted += nbytes
        peak = max(peak, on_device())
        before = len(away)
        while counted > allowance and len(recent) > (1 if allowance else 0):
            oldest = recent.popleft()
            if host_bytes is not None and held + blocks[oldest] > host_bytes:
                counted -= sizes[oldest]
                refused.add(oldest)
                refused_bytes += sizes[oldest]
                continue
            peak = max(peak, on_device() + packed[oldest])
            counted -= sizes[oldest]
            away.append(oldest)
            left += sent[oldest]
            held += blocks[oldest]
        departures.append(tuple(away[before:]))
    converted = sum(sizes[number] + packed[number] for number in away if packed[number])

    ahead: set[int] = set()
    returns: list[tuple[int, ...]] = []
    is_away = set(away)
    for number in reversed(range(len(sizes))):
        coming: list[int] = []
        if away and away[-1] == number:
            coming.append(away.pop())
            counted += sizes[number]
        ahead.discard(number)
        # What comes next has one place even where the allowance has none.
        while away and not (ahead and counted + sizes[away[-1]] > allowance):
            ahead.add(away[-1])
            counted += sizes[away[-1]]
            coming.append(away.pop())
        peak = max(peak, on_device() + (packed[number] if number in is_away else 0))
        if number in refused:
            refused_bytes -= sizes[number]
        else:
            counted -= sizes[number]
        returns.append(tuple(coming))
    return ActivationOrder(tuple(departures), tuple(returns), left, held, converted, room, peak)
