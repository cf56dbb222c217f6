"""The order in which units are touched, recorded in one pass and predicted in the next."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["TouchOrder"]

# A unit by its number, and whether backward touched it.
Touch = tuple[int, bool]

# A pass that nothing begins anew, as when the user calls the parts of a model, is cut into pieces of this length.
_LONGEST = 4096


class TouchOrder:
    """Predicts from the last pass; where the present one departs from it, goes on after the next equal touch."""

    def __init__(self) -> None:
        self._last: list[Touch] = []
        self._present: list[Touch] = []
        self._position = 0

    def begin(self) -> None:
        """The present pass is over and becomes the last one."""
        if self._present:
            self._last, self._present = self._present, []
        self._position = 0

    def record(self, touch: Touch) -> None:
        if len(self._present) == _LONGEST:
            self.begin()
        if self._position < len(self._last) and (known := self._last[self._position]) == touch:  # as in the last pass
            self._present.append(known)  # the tuple that is there already: fewer for the garbage collector
            self._position += 1
            return
        self._present.append(touch)
        for start, end in ((self._position, len(self._last)), (0, self._position)):
            try:
                self._position = self._last.index(touch, start, end) + 1
            except ValueError:
                continue
            return

    def upcoming(self, count: int, but: Collection[int] = ()) -> list[int]:
        """The next `count` different units that are not among `but`."""
        found: dict[int, None] = {}
        for position in range(self._position, len(self._last)):
            if len(found) == count:
                break
            unit, _ = self._last[position]
            if unit not in but:
                found[unit] = None
        return list(found)

    def first(self, count: int) -> list[int]:
        """The first `count` different units of the pass that comes next."""
        return list(dict.fromkeys(self.next_pass()))[:count]

    def ahead(self) -> list[int]:
        """The units of what is left of the pass, and then of another such pass; none while the first is recorded."""
        return [unit for unit, _ in (*self._last[self._position :], *self._last)]

    def next_pass(self) -> list[int]:
        """The units of the pass that comes next."""
        return [unit for unit, _ in (self._present or self._last)]
