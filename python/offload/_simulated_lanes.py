"""What a simulated pipeline is made of: lanes that work pieces off in order, and device memory that runs short."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from ._step_work import LANES

__all__ = ["BEGIN", "Compute", "Lane", "Piece", "Repeats", "Ring", "latest"]

# Of the length of a period: by so much the rounding of long sums may differ.
_SAME = 1e-9


# Not frozen, which would triple the time that making one takes; nothing writes to it.
@dataclasses.dataclass(eq=False, slots=True)
class Piece:
    """Work of a lane, from `start`, when `cause` ended, to `end`."""

    lane: str
    start: float
    end: float
    cause: Piece | None = dataclasses.field(repr=False)


BEGIN = Piece("compute", 0.0, 0.0, None)


def latest(pieces: Iterable[Piece]) -> Piece:
    """The first of those that end last."""
    last = None
    for piece in pieces:
        if last is None or piece.end > last.end:
            last = piece
    return BEGIN if last is None else last


class Lane:
    """Works pieces off in the order in which they are given."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.last = BEGIN
        self.busy = 0.0

    def run(self, seconds: float, *after: Piece) -> Piece:
        """The next piece: it begins when the one before it and those in `after` have ended."""
        if seconds == 0.0:
            return latest(after)  # nothing is given to the lane
        cause = self.last
        for piece in after:
            if piece.end > cause.end:
                cause = piece
        self.last = Piece(self.name, cause.end, cause.end + seconds, cause)
        self.busy += seconds
        return self.last

    def pass_by(self, *after: Piece) -> Piece:
        """What takes no time and keeps its turn: pieces given later begin when those in `after` have ended too."""
        self.last = latest((self.last, *after))
        return self.last


class Compute(Lane):
    """The lane that everything else is to hide behind. exposed: seconds that it waited, by the lane that kept it."""

    def __init__(self) -> None:
        super().__init__("compute")
        self.exposed = dict.fromkeys(LANES[1:], 0.0)

    def wait(self, piece: Piece) -> None:
        begin, end = self.last.end, piece.end
        if end <= begin:
            return
        self.last = Piece("compute", begin, end, piece)
        while end > begin:
            self.exposed[piece.lane] += end - max(begin, piece.start)
            assert piece.cause is not None  # only the beginning of time has none
            piece, end = piece.cause, piece.start


class Ring:
    """Device memory of copies on their way: beyond `limit` bytes compute waits for the oldest."""

    def __init__(self, compute: Compute, limit: float) -> None:
        self._compute, self._limit = compute, limit
        self._copies: deque[tuple[Piece, float]] = deque()
        self._bytes = 0.0

    def add(self, copy: Piece, nbytes: float, room: float | None = None) -> None:
        """room: what may be on its way after this copy, None for the limit."""
        while self._copies and self._copies[0][0].end <= self._compute.last.end:
            self._drop_oldest()
        self._copies.append((copy, nbytes))
        self._bytes += nbytes
        while self._copies and self._bytes > (self._limit if room is None else room):
            self._compute.wait(self._copies[0][0])
            self._drop_oldest()

    def remove(self, copy: Piece) -> None:
        """Compute has waited for it."""
        for place in self._copies:
            if place[0] is copy:
                self._copies.remove(place)
                self._bytes -= place[1]
                return

    def map_pieces(self, of: Callable[[Piece], Piece]) -> None:
        self._copies = deque((of(copy), nbytes) for copy, nbytes in self._copies)

    def _drop_oldest(self) -> None:
        _, nbytes = self._copies.popleft()
        self._bytes = self._bytes - nbytes if self._copies else 0.0


class Played(Protocol):
    """What plays periods: its lanes, and every piece that one of them leaves to the next."""

    lanes: dict[str, Lane]

    def map_pieces(self, of: Callable[[Piece], Piece]) -> None:
        """Puts `of` each in its place."""


class Repeats:
    """Passes over micro-batches that would only repeat what was played.

    What one finds is all that tells how it goes: pieces that the one before it left. Where each of those ends as long
    before or after compute as it did some micro-batches ago, everything from here on repeats what came in between, so
    much later. A piece that is still the same one is none of theirs: nothing has used it meanwhile.
    """

    def __init__(self, played: Played) -> None:
        self._played = played
        self._compute = played.lanes["compute"]
        assert isinstance(self._compute, Compute)
        self._exposed = self._compute.exposed
        self._count = 0
        self._remember()

    def passed_over(self, left: int) -> int:
        """After a micro-batch: how many of those left have been passed over, whole periods of them."""
        self._count += 1
        if not self._is_as_remembered():
            if self._count & (self._count - 1) == 0:  # the longer nothing repeats, the longer a period may be
                self._remember()
            return 0
        times, period = left // (self._count - self._then), self._count - self._then
        later = times * (self._compute.last.end - self._now)
        for name, busy in self._busy.items():
            self._played.lanes[name].busy += times * (self._played.lanes[name].busy - busy)
        for name, seconds in self._waited.items():
            self._exposed[name] += times * (self._exposed[name] - seconds)
        self._put_off(later)
        return times * period

    def _remember(self) -> None:
        self._then = self._count
        self._now = self._compute.last.end
        self._pieces = self._left()
        self._busy = {name: lane.busy for name, lane in self._played.lanes.items()}
        self._waited = dict(self._exposed)

    def _left(self) -> list[Piece]:
        found: list[Piece] = []

        def look(piece: Piece) -> Piece:
            found.append(piece)
            return piece

        self._played.map_pieces(look)
        return found

    def _is_as_remembered(self) -> bool:
        pieces, before, now = self._left(), self._now, self._compute.last.end
        return len(pieces) == len(self._pieces) and all(
            new is old or abs((new.end - now) - (old.end - before)) <= _SAME * (now - before)
            for new, old in zip(pieces, self._pieces, strict=True)
        )

    def _put_off(self, later: float) -> None:
        """All that micro-batches have used since what is remembered, with what compute could still wait for."""
        static, now = {id(piece) for piece in self._pieces}, self._compute.last.end
        moved: dict[int, Piece] = {}

        def put_off(piece: Piece) -> Piece:
            chain = []
            while id(piece) not in static and id(piece) not in moved:
                chain.append(piece)
                if piece.start <= now or piece.cause is None:
                    break
                piece = piece.cause
            for link in reversed(chain):
                cause = None if link.cause is None else moved.get(id(link.cause), link.cause)
                moved[id(link)] = Piece(link.lane, link.start + later, link.end + later, cause)
            return moved.get(id(chain[0] if chain else piece), piece)

        self._played.map_pieces(put_off)
