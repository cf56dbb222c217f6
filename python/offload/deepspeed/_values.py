"""Values of a DeepSpeed config: what types are legal, and the conversions that DeepSpeed makes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ._surface import Key, Kind

__all__ = ["coerce", "kind_text", "limits_text", "switched_on"]

_TRUE = ("true", "1", "on", "t", "y", "yes")
_FALSE = ("false", "0", "off", "f", "n", "no")
_WHOLE = re.compile(r"\s*[+-]?\d+(\.0*)?\s*")


def coerce(value: Any, key: Key, any_case: bool) -> Any:
    """`value` as the key's type. any_case: legal words may be written in upper case.

    Raises ValueError with the rule that it breaks, as "a whole number >= 0".
    """
    if isinstance(key.kind, tuple):
        return _choice(value, key, any_case)
    kind = key.kind.removesuffix("?")
    if value is None and (key.kind.endswith("?") or kind == "any" or key.default is None):
        return None
    for name in kind.split("|"):
        try:
            typed = _CONVERSIONS[name](value)
        except (ValueError, OverflowError):
            continue
        if name in _NUMBERS and not all(map(key.holds, typed if name == "numbers" else [typed])):
            break
        return typed
    raise ValueError(_rule(key))


def kind_text(kind: Kind) -> str:
    """A type as a reader of the documents knows it."""
    if isinstance(kind, tuple):
        return " or ".join(str(choice) for choice in kind)
    words = [_WORDS[name] for name in kind.removesuffix("?").split("|")]
    return " or ".join([*words, "null"] if kind.endswith("?") else words)


def limits_text(key: Key) -> str:
    """What numbers a key takes, to be put behind the name of its type."""
    if key.low is not None and key.high is not None:
        return f" from {key.low:g} to {key.high:g}"
    low = "" if key.low is None else f", {key.low:g} or more"
    return low if key.below is None else f"{low} and less than {key.below:g}"


def switched_on(value: Any) -> bool:
    """Whether a section asks for anything: it does, unless it has flags `enabled`, here or deeper, all of them off."""
    if not isinstance(value, Mapping):
        return bool(value)
    flags = _flags(value)
    return any(flags) if flags else bool(value)


def _flags(section: Mapping[str, Any]) -> list[bool]:
    found = []
    for name, value in section.items():
        if name == "enabled":
            found.append(bool(value))
        elif isinstance(value, Mapping):
            found += _flags(value)
    return found


def _choice(value: Any, key: Key, any_case: bool) -> Any:
    if value is None and key.default is None:
        return None
    for choice in key.kind:
        if isinstance(choice, int):
            if _matches_number(value, choice):
                return choice
        elif isinstance(value, str) and (value.lower() if any_case else value) == choice:
            return choice
    raise ValueError(_rule(key))


def _matches_number(value: Any, number: int) -> bool:
    try:
        return _int(value) == number
    except ValueError:
        return False


def _rule(key: Key) -> str:
    if isinstance(key.kind, tuple):
        names = [repr(choice) for choice in key.kind]
        return f"must be {', '.join(names[:-1])} or {names[-1]}"
    return f"must be {kind_text(key.kind)}{limits_text(key)}"


def _bool(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
        return value.lower() in _TRUE
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise ValueError


def _int(value: Any) -> int:
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value.split(".")[0])
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int):
        return int(value)
    raise ValueError


def _float(value: Any) -> float:
    # A flag where a number belongs is a slip: `"loss_scale": true`.
    number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number):
        raise ValueError
    return number


def _numbers(value: Any) -> list[float]:
    return [_float(one) for one in _of(list, tuple)(value)]


def _of(*types: type) -> Callable[[Any], Any]:
    def conversion(value: Any) -> Any:
        if isinstance(value, types):
            return value
        raise ValueError

    return conversion


def _path(value: Any) -> Path:
    return Path(_of(str, Path)(value))


_NUMBERS = ("int", "float", "numbers")  # what limits are of
_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "bool": _bool,
    "int": _int,
    "float": _float,
    "str": _of(str),
    "path": _path,
    "list": _of(list, tuple),
    "numbers": _numbers,
    "object": _of(Mapping),
    "any": lambda value: value,
}
_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "path": "a path",
    "list": "a list",
    "numbers": "a list of numbers",
    "object": "an object",
    "any": "anything",
}
