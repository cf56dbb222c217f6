"""What a simulated pipeline is made of: lanes that work pieces off in order, and device memory that runs short."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable

from ._step_work import LANES

__all__ = ["BEGIN", "Compute", "Lane", "Piece", "Ring", "latest"]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """Work of a lane, from `start`, when `cause` ended, to `end`."""

    lane: str
    start: float
    end: float
    cause: Piece | None = dataclasses.field(repr=False)


BEGIN = Piece("compute", 0.0, 0.0, None)


def latest(pieces: Iterable[Piece]) -> Piece:
    return max(pieces, key=lambda piece: piece.end, default=BEGIN)


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
        cause = latest((self.last, *after))
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

    def _drop_oldest(self) -> None:
        _, nbytes = self._copies.popleft()
        self._bytes = self._bytes - nbytes if self._copies else 0.0
