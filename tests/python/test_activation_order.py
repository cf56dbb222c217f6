"""Which activations leave, and when they are sent for: the order of the forecast beside the engine's own decisions."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload import _activations
from offload._activation_order import IN_FLIGHT_BYTES, activation_order, packed_bytes
from offload._activations import Activations

_BLOCK = 256  # of the host pool


class Form:
    """Stands for a lossy format: as many bytes, and in each of them what a range has in its first element."""

    packed_bytes = staticmethod(packed_bytes)

    def pack(self, values: Tensor) -> Tensor:
        return torch.full((packed_bytes(values.numel()),), int(values[0]), dtype=torch.uint8)

    def unpack(self, packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype)

    def fallbacks(self) -> list[str]:
        return []


class Lanes:
    """Carries nothing: notes what it is given, by the first byte of a range, and the device's bytes if no copy ends
    before it has to."""

    peak_ring_bytes = 0

    def __init__(self, room: int, sizes: list[int]) -> None:
        self.sizes = sizes  # on the device
        self.given: list[int] = []
        self.left_bytes = 0
        self.room = room  # what may be on its way to the host
        self.rooms: set[int] = set()
        self.rooms_both_ways: set[int] = set()
        self.peak_bytes = 0
        self.engine: Activations

    def send(self, tensor: Tensor, tag: str, stream: int, room: int) -> Any:
        number = int(tensor[0])
        self.look(self.packed_beside(number, tensor))
        self.given.append(number)
        self.left_bytes += tensor.nbytes
        self.rooms.add(room)
        return self.given[-1]

    def start_upload(self, held: Any, out: Tensor, room: int) -> int:
        self.look(self.sizes[held])
        self.rooms_both_ways.add(room)
        self.given.append(held)
        return self.sizes[held] + self.packed_beside(held, out)

    def packed_beside(self, number: int, tensor: Tensor) -> int:
        """What it takes beside the range itself, of which it is the packed form or which it is."""
        return tensor.nbytes if tensor.nbytes != self.sizes[number] else 0

    def look(self, more: int) -> None:
        on_its_way = min(self.left_bytes, self.room)
        self.peak_bytes = max(self.peak_bytes, self.engine.device_bytes()[0]["activations"] + more + on_its_way)

    def wait_upload(self, ticket: int, lock: Any) -> None:
        self.look(ticket)  # unpacked next; the engine does not count any more what is read for the last time

    def reserve(self, nbytes: int) -> None: ...

    def compute_stream(self) -> int:
        return 0

    def on_stream(self, stream: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def pool_stats(self) -> dict[str, Any]:
        return {}

    def in_ring(self, *, leaving_only: bool = False) -> dict[int, int]:
        return {}

    def trace_sample(self) -> None: ...

    def taken(self) -> tuple[int, ...]:
        given, self.given = tuple(self.given), []
        return given


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6).map(lambda blocks: blocks * _BLOCK), st.booleans()), max_size=12),
    st.sampled_from([0.0, 0.125, 0.3, 0.5, 0.9, 1.0]),
    st.one_of(st.just(1 << 40), st.integers(0, 30).map(lambda blocks: blocks * _BLOCK)),
    st.sampled_from([IN_FLIGHT_BYTES, 3 * _BLOCK, 0]),
)
@example([(2 * _BLOCK, False)] * 8, 0.125, 5 * _BLOCK, 0)  # one stays, two leave, the others find the host full
@example([(6 * _BLOCK, True)] * 8, 0.125, 5 * _BLOCK, 0)  # two leave, of two blocks each
def test_the_order_is_the_engines(
    ranges: list[tuple[int, bool]], keep: float, host_bytes: int, in_flight_bytes: int
) -> None:
    """ranges: their bytes, and whether they are packed on their way."""
    sizes = [nbytes for nbytes, _ in ranges]
    sent = [packed_bytes(nbytes // 4) if packs else nbytes for nbytes, packs in ranges]
    order = activation_order(sizes, keep, host_bytes, in_flight_bytes, sent)
    lanes = Lanes(order.room_bytes, sizes)
    lanes.engine = engine = Activations(
        lanes,
        torch.device("cpu"),
        budget=host_bytes,
        keep=keep,
        min_bytes=1,
        form=Form(),  # type: ignore[arg-type]
    )
    departures: list[tuple[int, ...]] = []
    returns: list[tuple[int, ...]] = []
    for _ in range(3):  # the first knows neither how much there will be nor the order of backward
        engine.begin()
        lanes.left_bytes = lanes.peak_bytes = 0
        saved, departures, returns = [], [], []
        lanes.rooms, lanes.rooms_both_ways = set(), set()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_activations, "IN_FLIGHT_BYTES", in_flight_bytes)
            for number, (nbytes, packs) in enumerate(ranges):
                saved.append(engine.pack(saved_by_autograd(nbytes, number, packs=packs)))
                lanes.look(0)
                departures.append(lanes.taken())
            while saved:
                engine.unpack(saved.pop())
                returns.append(lanes.taken())
    assert (list(order.departures), list(order.returns)) == (departures, returns)
    assert (order.sent_bytes, order.device_bytes) == (lanes.left_bytes, lanes.peak_bytes)
    blocks = [-(-nbytes // _BLOCK) * _BLOCK for nbytes in sent]
    left = [number for gone in order.departures for number in gone]
    assert order.host_bytes == sum(blocks[number] for number in left) <= host_bytes
    assert order.converted_bytes == sum(sizes[n] + sent[n] for n in left if ranges[n][1])
    assert lanes.rooms <= {order.room_bytes} and lanes.rooms_both_ways <= {2 * order.room_bytes}


def saved_by_autograd(nbytes: int, number: int, *, packs: bool) -> Tensor:
    """A range that begins with that number; gradients flow through one that is packed."""
    if not packs:
        return torch.full((nbytes,), number, dtype=torch.uint8)
    return torch.full((nbytes // 4,), float(number)).requires_grad_() * 1


def test_as_much_as_stays_may_be_on_its_way() -> None:
    assert activation_order([IN_FLIGHT_BYTES] * 4, 0.125).room_bytes == IN_FLIGHT_BYTES
    assert activation_order([IN_FLIGHT_BYTES] * 16, 0.125).room_bytes == 2 * IN_FLIGHT_BYTES
    assert activation_order([IN_FLIGHT_BYTES] * 16, 0.5).room_bytes == 8 * IN_FLIGHT_BYTES
