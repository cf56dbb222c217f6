"""Parsing of arguments, without torch: errors that name the nearest word, and the types of numbers."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

__all__ = [
    "Once",
    "Parser",
    "Several",
    "amount",
    "count",
    "ending",
    "memory_size",
    "place_or_share",
    "positive",
    "seed",
]

EXIT_USAGE = 2

_EXITS = (
    "exit codes: 0 done, 1 a check failed, 2 bad arguments or a missing package, 130 stopped by Ctrl-C, 141 nobody "
    "reads what is printed"
)

# No model has so many; to build one of far more, even without weights, takes forever.
_MOST_PARAMETERS = 10**15
# What has fewer is no memory for tensors, and its unit was left out.
_FEWEST_BYTES = 10_000


def ending(*examples: str, title: str = "examples", exits: str = _EXITS) -> str:
    """What the help of a command ends with."""
    return "\n".join([f"{title}:", *(f"  {example}" for example in examples), "", exits])


class _Formatter(argparse.HelpFormatter):
    """Fills paragraphs, and keeps the lines of those that begin with a heading."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        fill = super()._fill_text
        return "\n\n".join(one if one.split("\n")[0].endswith(":") else fill(one, width, indent) for one in paragraphs)


class Parser(argparse.ArgumentParser):
    """Ends with one line that says what is wrong and what was meant, of the command that was called."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": _Formatter} | options)
        # So that -64GiB is a value, and told what is wrong with it: argparse takes plain numbers alone for that.
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:  # said here, by the command itself: the outermost parser knows no options
            hints = [_nearest(word, self._option_string_actions) for word in unknown if word.startswith("--")]
            self.error(f"unknown arguments: {' '.join(unknown)}{''.join(hints)}")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            words = [str(choice) for choice in action.choices]
            legal = f"{_nearest(str(value), words)}; legal are {', '.join(words)}"
            raise argparse.ArgumentError(action, f"{value!r} is not known{legal}")

    def error(self, message: str) -> NoReturn:
        print(f"offload: {message}\n`{self.prog} --help` says more", file=sys.stderr)
        sys.exit(EXIT_USAGE)


class Several(argparse.Action):
    """Of an option with several values: given again it adds to them. What is given at all replaces the default."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, _: Any = None
    ) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(() if before is self.default else before), *values])


class Once(argparse.Action):
    """Of an option with one value that has several elsewhere: given again it is an error."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, _: Any = None
    ) -> None:
        before = getattr(namespace, self.dest)
        if before is not self.default:
            raise argparse.ArgumentError(self, f"it takes one value here, and was given {before!r} and {values!r}")
        setattr(namespace, self.dest, values)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def amount(text: str) -> float:
    """A finite number that is not negative."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return value


def seed(text: str) -> int:
    """A whole number that torch takes as the seed of a generator."""
    try:
        value = int(text)
    except ValueError:
        value = 2**64
    if not -(2**63) <= value < 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 64 bits")
    return value


def memory_size(text: str) -> str:
    """Bytes as text such as 24GiB, which `offload` itself reads."""
    if text.startswith("-"):
        raise argparse.ArgumentTypeError(f"{text!r} is negative: give a size such as 24GiB")
    if text.isdigit() and 0 < int(text) < _FEWEST_BYTES:  # 64 where 64GiB was meant
        raise argparse.ArgumentTypeError(f"{text!r} is a number of bytes: give a unit, as {text}GiB")
    return text


def place_or_share(text: str) -> str | float | dict[str, float]:
    """A share is a number with a point, and may be that of a place: `unified=0.6,host=0.4`.

    Everything else is checked by `offload.wrap`.
    """
    try:
        if "=" in text:
            shares = (part.partition("=") for part in text.split(","))
            return {place: float(share) for place, _, share in shares}
        return float(text) if "." in text else text
    except ValueError:
        return text


def count(text: str) -> int:
    """A number of parameters: 5000000, 5M, 1.5B or 8e9."""
    factor = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}.get(text[-1:].upper(), 1)
    try:
        value = int(float(text[:-1] if factor > 1 else text) * factor)
    except (ValueError, OverflowError):  # of text, nan; of inf
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 5000000, 5M or 1.5B") from None
    if not 1 <= value <= _MOST_PARAMETERS:
        raise argparse.ArgumentTypeError(f"{text} parameters: give 1 to {_MOST_PARAMETERS:.0e}")
    return value


def _nearest(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.partition("=")[0], list(words), n=1)
    return f": did you mean {near[0]!r}?" if near else ""
