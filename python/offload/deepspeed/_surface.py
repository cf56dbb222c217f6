"""Every section and key of a DeepSpeed config, and what each means here: the one table.

Reading, checking, `offload config explain` and docs/deepspeed.md all come from it. The sections are written down in
`_surface_training`, `_surface_zero`, `_surface_services` and `_surface_elsewhere`; this module says what a row is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

__all__ = ["OBJECT", "REQUIRED", "Key", "Kind", "Section", "Standing", "accepted", "honoured", "inert", "refused"]

Standing = Literal["honoured", "accepted", "refused"]
# Names of types joined by "|", with a "?" at the end where null is legal too; or the legal values one by one.
Kind = str | tuple[str | int, ...]
REQUIRED = "required"  # in place of a default
OBJECT = "object?"


@dataclass(frozen=True)
class Key:
    """One key of a section.

    kind, default, low, high, below: what values are legal, low and high included; DeepSpeed's of the day.
    text: honoured: what the key does here; accepted: why it has no effect; refused: what to write instead.
    harmless: of a refused key: the values that ask for nothing, and pass.
    also: a second spelling that DeepSpeed accepts without a word.
    now, now_value: of a deprecated spelling: the key that replaces it, and its value there for `true` (None: the same).
    trainer: what the Hugging Face Trainer, or Accelerate, puts in the place of "auto".
    aloud: accepted, and worth a notice of its own when it is switched on.
    """

    name: str
    kind: Kind
    default: Any
    standing: Standing
    text: str
    low: float | None = None
    high: float | None = None
    below: float | None = None
    harmless: tuple[Any, ...] = ()
    also: str | None = None
    now: str | None = None
    now_value: Any = None
    trainer: str | None = None
    aloud: bool = False

    def holds(self, number: float) -> bool:
        """Whether a number is within the limits."""
        return (
            (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.below is None or number < self.below)
        )


@dataclass(frozen=True)
class Section:
    """path: dotted, as in the JSON; empty for the top level. strict: DeepSpeed refuses keys it does not know.

    open: keys that are not in the table are legal, as the section is handed on to something that reads its own.
    arguments: the keys are arguments of a constructor, which refuses the ones it does not know too.
    """

    path: str
    text: str
    keys: tuple[Key, ...]
    strict: bool = False
    open: bool = False
    arguments: bool = False

    def find(self, name: str) -> Key | None:
        """The key of this name or second spelling."""
        return next((key for key in self.keys if name in (key.name, key.also)), None)


def honoured(name: str, kind: Kind, default: Any, text: str, **more: Any) -> Key:
    """A key that does here what it does in DeepSpeed."""
    return Key(name, kind, default, "honoured", text, **more)


def accepted(name: str, kind: Kind, default: Any, text: str, **more: Any) -> Key:
    """A key that may stand in the config and changes nothing here; `text` is the reason."""
    return Key(name, kind, default, "accepted", text, **more)


def refused(name: str, kind: Kind, default: Any, text: str, **more: Any) -> Key:
    """A key that would change what is trained, and cannot be served.

    Its default, null, false and 0 pass, unless `harmless` says otherwise, and an object that switches nothing on.
    """
    harmless = more.pop("harmless", (default, None, False, 0))
    return Key(name, kind, default, "refused", text, harmless=harmless, **more)


def inert(text: str, rows: Iterable[tuple[str, Kind, Any]]) -> tuple[Key, ...]:
    """Accepted keys that share one reason."""
    blank = accepted("", "any", None, text)
    return tuple(replace(blank, name=name, kind=kind, default=default) for name, kind, default in rows)
