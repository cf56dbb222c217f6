"""`offload config explain` and `offload config check`: a DeepSpeed config, key by key."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ..deepspeed._check import Report
from ..deepspeed._config import resolve
from ..deepspeed._explain import key_rows, placement_rows
from ..deepspeed._read import read
from ..deepspeed._settings import Settings
from ._table import Piece, Table, show

__all__ = ["run_config"]


def run_config(arguments: argparse.Namespace) -> int:
    """Explains or checks the file and returns the exit code: 1 where checking refuses it."""
    settings, report = resolve(read(arguments.file), for_trainer=True)
    refusals = report.refusals(strict=arguments.action == "check")
    if arguments.json:
        print(json.dumps(_as_json(arguments, settings, report, refusals), indent=2))
        return 1 if refusals and arguments.action == "check" else 0
    if arguments.action == "check":
        errors = f"{len(refusals)} error{'s' if len(refusals) > 1 else ''}"
        verdict = f"{arguments.file}: {f'refused, {errors}' if refusals else 'accepted'}"
        show([*_labelled("error", refusals), *_labelled("warning", report.deprecations), verdict])
        return 1 if refusals else 0
    keys = [(*cells, text.replace("`", "")) for *cells, text in key_rows(report)]
    pieces: list[Piece] = [Table(keys, left=3, words=1, below={3: ""}), ""]
    if not refusals:
        pieces += [Table(placement_rows(settings, report), words=1), ""]
    pieces += _labelled("error", refusals)
    pieces += _labelled("warning", report.doubts + report.deprecations)
    pieces += _labelled("note", settings.notices)
    show(pieces)
    return 0


def _as_json(
    arguments: argparse.Namespace, settings: Settings, report: Report, refusals: Sequence[str]
) -> dict[str, Any]:
    found: dict[str, Any] = {"schema_version": 1, "file": arguments.file, "accepted": not refusals, "errors": refusals}
    if arguments.action == "check":
        return found | {"warnings": report.deprecations}
    header, *rows = key_rows(report)
    keys = [dict(zip(header, row, strict=True)) for row in rows]
    placement = {} if refusals else dict(placement_rows(settings, report)[1:])
    warnings = report.doubts + report.deprecations
    return found | {"warnings": warnings, "notes": list(settings.notices), "keys": keys, "placement": placement}


def _labelled(label: str, lines: Sequence[str]) -> list[str]:
    return [f"{label}: {line}" for line in lines]
