"""`offload config explain` and `offload config check`: a DeepSpeed config, key by key."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Sequence

from ..deepspeed._config import resolve
from ..deepspeed._explain import key_rows, placement_rows
from ..deepspeed._read import read
from ._table import table

__all__ = ["run_config"]

_NARROWEST = 32  # columns for the last column of a table, on the smallest terminal


def run_config(arguments: argparse.Namespace) -> int:
    """Explains or checks the file and returns the exit code: 1 where checking refuses it."""
    settings, report = resolve(read(arguments.file), for_trainer=True)
    refusals = report.refusals(strict=arguments.action == "check")
    if arguments.action == "check":
        _print_lines("error", refusals)
        _print_lines("warning", report.deprecations)
        print(f"{arguments.file}: {f'refused, {len(refusals)} errors' if refusals else 'accepted'}")
        return 1 if refusals else 0
    print(table(_wrapped(key_rows(report)), left=4))
    print()
    if not refusals:
        print(table(placement_rows(settings, report), left=2))
        print()
    _print_lines("error", refusals)
    _print_lines("warning", report.doubts + report.deprecations)
    _print_lines("note", settings.notices)
    return 0


def _print_lines(label: str, lines: Sequence[str]) -> None:
    for line in lines:
        print(f"{label}: {line}")


def _wrapped(rows: Sequence[tuple[str, str, str, str]]) -> list[tuple[str, str, str, str]]:
    """The rows with the last column broken into lines that fit the terminal."""
    taken = sum(max(len(row[column]) for row in rows) + 2 for column in range(3))
    width = max(shutil.get_terminal_size().columns - taken, _NARROWEST)
    lines = []
    for key, value, standing, text in rows:
        first, *others = textwrap.wrap(text.replace("`", ""), width) or [""]
        lines.append((key, value, standing, first))
        lines += [("", "", "", other) for other in others]
    return lines
