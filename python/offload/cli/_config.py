"""`offload config explain` and `offload config check`: a DeepSpeed config, key by key."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..deepspeed._config import resolve
from ..deepspeed._explain import key_rows, placement_rows
from ..deepspeed._read import read
from ._table import Piece, Table, show

__all__ = ["run_config"]


def run_config(arguments: argparse.Namespace) -> int:
    """Explains or checks the file and returns the exit code: 1 where checking refuses it."""
    settings, report = resolve(read(arguments.file), for_trainer=True)
    refusals = report.refusals(strict=arguments.action == "check")
    if arguments.action == "check":
        verdict = f"{arguments.file}: {f'refused, {len(refusals)} errors' if refusals else 'accepted'}"
        show([*_labelled("error", refusals), *_labelled("warning", report.deprecations), verdict])
        return 1 if refusals else 0
    keys = [(*cells, text.replace("`", "")) for *cells, text in key_rows(report)]
    pieces: list[Piece] = [Table(keys, left=4, wraps=True), ""]
    if not refusals:
        pieces += [Table(placement_rows(settings, report), left=2), ""]
    pieces += _labelled("error", refusals)
    pieces += _labelled("warning", report.doubts + report.deprecations)
    pieces += _labelled("note", settings.notices)
    show(pieces)
    return 0


def _labelled(label: str, lines: Sequence[str]) -> list[str]:
    return [f"{label}: {line}" for line in lines]
