"""`--compare`: what became better or worse since an earlier result of the same machine.

A figure is called better or worse where the ranges from the 20th to the 80th percentile of both runs do not overlap and
the medians are more than 5 % apart; else it is the same. Ceilings and peers are judged as well and do not count: where
they moved with ours, it was the machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import offload

from ._bench_conditions import noise
from ._bench_figures import Figure
from ._bench_report import entries, read
from ._table import Table

__all__ = [
    *("comparable_parts", "compare", "comparison_lines", "comparison_rows", "comparison_table", "read_earlier"),
    "verdict",
]

MARGIN = 0.05
_RULE = f"better or worse: ranges of p20 to p80 do not overlap, and medians are more than {MARGIN:.0%} apart"
_MACHINE = ("machine", "cpu", "cpu_count", "accelerator")
_VERSIONS = ("offload", "torch", "torch_threads", "python", "kernel", "driver", "cuda")

Verdict = Literal["better", "worse", "same"]


def verdict(old: Figure, new: Figure) -> Verdict:
    """By the rule above."""
    overlap = new["p20"] <= old["p80"] and old["p20"] <= new["p80"]
    if overlap or abs(new["median"] - old["median"]) <= MARGIN * abs(old["median"]):
        return "same"
    return "better" if (new["median"] > old["median"]) == (new["better"] == "higher") else "worse"


def read_earlier(path: Path, environment: Mapping[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """The report in a file, if figures of any of `parts` measured in `environment` could be compared with it.

    Raises `InvalidArgument`: no bench wrote it, it is another machine's, or it has none of these parts' figures.
    """
    report = read(path)
    _check_machine(str(path), report["environment"], environment)
    found = comparable_parts(report)
    if not set(parts) & set(found):
        raise offload.InvalidArgument(
            f"{path} has figures of {', '.join(found) or 'no part'}, not of {', '.join(parts)}: compare with a file "
            "that this release's offload bench --json wrote for them"
        )
    return report


def comparable_parts(report: Mapping[str, Any]) -> list[str]:
    """The parts, or sections, that have figures."""
    return [entry.section for entry in entries(report) if entry.result.get("figures")]


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Verdicts on all figures that both reports have.

    Gives a JSON-able dict: `rule`; `figures`, each with `part`, `name`, `side`, `unit`, `old` and `new` (median, p20,
    p80), `change` of the median and `verdict`; `counts` of verdicts on our own; `not_compared` by part, with the
    reason; `missing` figures that only one of the two has; and `remarks` on versions and noise.

    Raises `InvalidArgument` for reports of two machines.
    """
    _check_machine("the earlier result", old["environment"], new["environment"])
    before = {entry.section: entry.result for entry in entries(old)}
    after = {entry.section: entry.result for entry in entries(new)}
    found: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    missing: list[str] = []
    remarks = [
        f"{name} was {old['environment'].get(name)}, is {new['environment'].get(name)}"
        for name in _VERSIONS
        if old["environment"].get(name) != new["environment"].get(name)
    ]
    for part in dict.fromkeys([*before, *after]):
        reason = _refusal(before.get(part), after.get(part))
        if reason is not None:
            refused[part] = reason
            continue
        for when, result in (("earlier", before[part]), ("now", after[part])):
            remarks += [f"{part}, {when}: {words}" for words in noise(result["conditions"])]
        ours = {one["name"]: one for one in after[part]["figures"]}
        theirs = {one["name"]: one for one in before[part]["figures"]}
        missing += [f"{part}: {name}" for name in sorted(ours.keys() ^ theirs.keys())]
        found += [_row(part, theirs[name], ours[name]) for name in ours if name in theirs]
    counts = dict.fromkeys(("better", "worse", "same"), 0)
    for row in found:
        counts[row["verdict"]] += row["side"] == "ours"
    return {
        "rule": _RULE,
        "figures": found,
        "counts": counts,
        "not_compared": refused,
        "missing": missing,
        "remarks": remarks,
    }


def comparison_rows(compared: Mapping[str, Any]) -> list[Sequence[str]]:
    """The rows of a table: what moved, of all sides; the header first."""
    rows: list[Sequence[str]] = [("part", "figure", "earlier", "now", "unit", "change", "verdict")]
    for row in compared["figures"]:
        if row["verdict"] != "same":
            name = row["name"] if row["side"] == "ours" else f"{row['name']} ({row['side']})"
            spreads = [
                f"{row[when]['median']:.4g} ({row[when]['p20']:.4g} to {row[when]['p80']:.4g})"
                for when in ("old", "new")
            ]
            change = "" if row["change"] is None else f"{row['change']:+.1%}"
            rows.append((row["part"], name, *spreads, row["unit"], change, row["verdict"]))
    return rows


def comparison_table(compared: Mapping[str, Any]) -> list[Table]:
    """The table of what moved on a terminal; none where nothing did."""
    rows = comparison_rows(compared)
    return [Table(rows, left=2, below={2: "earlier", 3: "now"})] if len(rows) > 1 else []


def comparison_lines(compared: Mapping[str, Any]) -> list[str]:
    """All that there is to say beside the table."""
    counts = compared["counts"]
    lines = [
        f"Our figures: {counts['better']} better, {counts['worse']} worse, {counts['same']} the same.",
        f"Rule: {compared['rule']}. Ceilings and peers do not count.",
    ]
    lines += [f"Not compared: {part}: {reason}." for part, reason in compared["not_compared"].items()]
    if compared["missing"]:
        lines.append(f"In one of the two only: {'; '.join(compared['missing'])}.")
    return [*lines, *(f"Note: {remark}." for remark in compared["remarks"])]


def _row(part: str, old: Figure, new: Figure) -> dict[str, Any]:
    def spread(one: Figure) -> dict[str, float]:
        return {"median": one["median"], "p20": one["p20"], "p80": one["p80"]}

    return {
        "part": part,
        "name": new["name"],
        "side": new["side"],
        "unit": new["unit"],
        "old": spread(old),
        "new": spread(new),
        "change": new["median"] / old["median"] - 1 if old["median"] else None,
        "verdict": verdict(old, new),
    }


def _check_machine(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    different = [f"{key} {old.get(key)} and {new.get(key)}" for key in _MACHINE if old.get(key) != new.get(key)]
    if different:
        raise offload.InvalidArgument(
            f"{name} is of another machine: {'; '.join(different)}. Compare results of one machine"
        )


def _refusal(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> str | None:
    """Why two results of one part cannot be compared; None if they can."""
    if old is None or new is None:
        return "measured now only" if old is None else "measured earlier only"
    for when, result in (("earlier", old), ("now", new)):
        if not result.get("figures"):
            return f"has no figures {when}"
    if old.get("device") != new.get("device"):
        return f"on {old.get('device')} earlier, on {new.get('device')} now"
    given, taken = old["arguments"], new["arguments"]
    different = sorted(name for name in given.keys() | taken.keys() if given.get(name) != taken.get(name))
    if different:
        words = (f"{name}={given.get(name)} earlier, {taken.get(name)} now" for name in different)
        return f"measured with {'; '.join(words)}"
    return None
