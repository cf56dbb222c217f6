"""`optimizer.state` of a wrapped optimizer: read and written where the states lie, one parameter at a time.

Frameworks move what they find here to where the model is (Lightning does, before and after a run), and users halve a
moment or drop a state. An entry is made when it is asked for, so that going through all of them holds one; what is
assigned goes into the state, on its own tier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

__all__ = ["LiveState", "LiveStates"]


class LiveStates(MutableMapping[Any, Any]):
    """By parameter, a `LiveState`; what a class keeps of no parameter too, as it is.

    keys, read, write: those there are now; the values of one, empty where there are none; takes values, or None to
    start anew, and raises for values that are no state of it.
    """

    def __init__(
        self,
        keys: Callable[[], list[Any]],
        read: Callable[[Any], Any],
        write: Callable[[Any, Any], None],
    ) -> None:
        self._keys = keys
        self._read = read
        self._write = write

    def __getitem__(self, key: Any) -> Any:
        """As torch's defaultdict: of a parameter without a state it is empty."""
        values = self._read(key)
        return LiveState(self, key, values) if isinstance(values, Mapping) else values

    def __setitem__(self, key: Any, values: Any) -> None:
        self._write(key, values)

    def __delitem__(self, key: Any) -> None:
        if key not in self:
            raise KeyError(key)
        self._write(key, None)

    def get(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            return default
        return self[key]

    def __contains__(self, key: object) -> bool:
        return any(key is known for known in self._keys())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    def clear(self) -> None:
        """Every state starts anew."""
        for key in self._keys():
            self._write(key, None)

    def __repr__(self) -> str:
        return repr(self._plain())

    def __reduce__(self) -> Any:
        """Copied and pickled it is a plain dict."""
        return dict, (self._plain(),)

    def _plain(self) -> dict[Any, Any]:
        return {key: dict(value) if isinstance(value, LiveState) else value for key, value in self.items()}


class LiveState(MutableMapping[str, Any]):
    """What an optimizer keeps of one parameter; an entry that is assigned is copied to where the state lies."""

    def __init__(self, states: LiveStates, key: Any, values: Mapping[str, Any]) -> None:
        self._states = states
        self._key = key
        self._values = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if value is not self._values.get(name, self):
            self._take({**self._values, name: value})

    def __delitem__(self, name: str) -> None:
        self._take({key: value for key, value in self._values.items() if key != name})

    def _take(self, values: dict[str, Any]) -> None:
        self._states[self._key] = values
        self._values = dict(self._states[self._key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)

    def __reduce__(self) -> Any:
        return dict, (dict(self._values),)
