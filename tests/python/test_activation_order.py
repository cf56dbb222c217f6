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
from offload._activation_order import IN_FLIGHT_BYTES, activation_order
from offload._activations import Activations

_BLOCK = 256  # of the host pool


class Lanes:
    """Carries nothing: notes what it is given, by the first byte of a range, and the device's bytes if no copy ends
    before it has to."""

    peak_ring_bytes = 0

    def __init__(self, room: int) -> None:
        self.given: list[int] = []
        self.left_bytes = 0
        self.room = room  # what may be on its way to the host
        self.rooms: set[int] = set()
        self.rooms_both_ways: set[int] = set()
        self.peak_bytes = 0
        self.engine: Activations

    def send(self, tensor: Tensor, tag: str, stream: int, room: int) -> Any:
        self.look(0)
        self.given.append(int(tensor[0]))
        self.left_bytes += tensor.nbytes
        self.rooms.add(room)
        return self.given[-1]

    def start_upload(self, held: Any, out: Tensor, room: int) -> None:
        self.look(out.nbytes)
        self.rooms_both_ways.add(room)
        self.given.append(held)

    def look(self, more: int) -> None:
        on_its_way = min(self.left_bytes, self.room)
        self.peak_bytes = max(self.peak_bytes, self.engine.device_bytes()[0]["activations"] + more + on_its_way)

    def wait_upload(self, ticket: Any) -> None: ...
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
    st.lists(st.integers(1, 6).map(lambda blocks: blocks * _BLOCK), max_size=12),
    st.sampled_from([0.0, 0.125, 0.3, 0.5, 0.9, 1.0]),
    st.one_of(st.just(1 << 40), st.integers(0, 30).map(lambda blocks: blocks * _BLOCK)),
    st.sampled_from([IN_FLIGHT_BYTES, 3 * _BLOCK, 0]),
)
@example([2 * _BLOCK] * 8, 0.125, 5 * _BLOCK, 0)  # one stays, two leave, the others find the host full
def test_the_order_is_the_engines(sizes: list[int], keep: float, host_bytes: int, in_flight_bytes: int) -> None:
    order = activation_order(sizes, keep, host_bytes, in_flight_bytes)
    lanes = Lanes(order.room_bytes)
    lanes.engine = engine = Activations(lanes, torch.device("cpu"), budget=host_bytes, keep=keep, min_bytes=1)
    departures: list[tuple[int, ...]] = []
    returns: list[tuple[int, ...]] = []
    for _ in range(3):  # the first knows neither how much there will be nor the order of backward
        engine.begin()
        lanes.left_bytes = lanes.peak_bytes = 0
        saved, departures, returns = [], [], []
        lanes.rooms, lanes.rooms_both_ways = set(), set()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_activations, "IN_FLIGHT_BYTES", in_flight_bytes)
            for number, nbytes in enumerate(sizes):
                saved.append(engine.pack(torch.full((nbytes,), number, dtype=torch.uint8)))
                lanes.look(0)
                departures.append(lanes.taken())
            while saved:
                engine.unpack(saved.pop())
                returns.append(lanes.taken())
    assert (list(order.departures), list(order.returns)) == (departures, returns)
    assert (order.left_bytes, order.device_bytes) == (lanes.left_bytes, lanes.peak_bytes)
    assert lanes.rooms <= {order.room_bytes} and lanes.rooms_both_ways <= {2 * order.room_bytes}


def test_as_much_as_stays_may_be_on_its_way() -> None:
    assert activation_order([IN_FLIGHT_BYTES] * 4, 0.125).room_bytes == IN_FLIGHT_BYTES
    assert activation_order([IN_FLIGHT_BYTES] * 16, 0.125).room_bytes == 2 * IN_FLIGHT_BYTES
    assert activation_order([IN_FLIGHT_BYTES] * 16, 0.5).room_bytes == 8 * IN_FLIGHT_BYTES
