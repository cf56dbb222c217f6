"""`offload bench report`: JSON of benches, or of `make gpu-acceptance`, as Markdown tables and plots."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import offload

from ._bench_conditions import noise
from ._bench_figures import absent_peers, figure_rows
from ._outputs import check_writable
from ._progress import shown
from ._table import format_bytes

__all__ = ["Entry", "entries", "markdown", "read", "run_report", "tokens_by_run"]

_SCHEMA_VERSIONS = (1, 2)  # of benches; since the second results have figures. 1 is that of make gpu-acceptance
_EXIT_WORSE = 1
_LANES = ("to_host", "to_device")
_OUTCOMES = ("does_not_fit", "unavailable", "failed")  # of a run that did not come about
_LABELS = ("name", "model", "mode")  # under which a result says what it is of
_PEERS = ("fsdp2", "torchao", "deepspeed")
_FACTS = (
    *("date", "accelerator", "driver", "cuda", "cpu", "cpu_count", "memory_bytes", "torch", "python", "offload"),
    *("commit", "dirty", "sources"),
)

Rows = list[Sequence[str]]


class Entry(NamedTuple):
    """One result: of which section (the part itself where there are none), of which part, and what it measured."""

    section: str
    part: str
    result: dict[str, Any]


def run_report(options: argparse.Namespace) -> int:
    """Prints the Markdown, or writes it; draws where it was asked for. The exit code is 1 if anything is worse.

    Raises `InvalidArgument` for a file that no bench wrote, ModuleNotFoundError for plots without matplotlib.
    """
    check_writable("--out", options.out)
    reports = {path: read(path) for path in options.files}
    text = "\n".join(markdown(path.stem, report) for path, report in reports.items())
    worse = False
    if options.compare is not None:
        from ._bench_compare import compare, comparison_lines, comparison_rows

        for path, report in reports.items():
            compared = compare(read(options.compare), report)
            rows = comparison_rows(compared)
            tables = [_table(rows)] if len(rows) > 1 else []
            chapters = [f"# {path.stem} beside {options.compare.stem}", *tables, *comparison_lines(compared)]
            text += "\n" + "\n\n".join(chapters) + "\n"
            worse = worse or compared["counts"]["worse"] > 0
    if options.plots is not None:
        from ._report_plots import draw

        for path, report in reports.items():
            with shown("offload bench report"):
                images = draw(entries(report), options.plots, path.stem)
            text += "".join(f"\n![{image.stem}]({image})\n" for image in images)
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text)
    return _EXIT_WORSE if worse else 0


def read(path: Path) -> dict[str, Any]:
    """The report in a file. Raises `InvalidArgument` naming it."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise offload.InvalidArgument(f"{path}: {error}: give JSON files of offload bench --json") from error
    version = report.get("schema_version") if isinstance(report, dict) else None
    if version not in _SCHEMA_VERSIONS or not {"results", "sections"} & set(report):
        raise offload.InvalidArgument(
            f"{path}: schema version {version!r}, with neither results nor sections or not of {_SCHEMA_VERSIONS}: give "
            "JSON files of this release's offload bench --json"
        )
    if not _is_whole(report):
        raise offload.InvalidArgument(
            f"{path}: its environment or its results are not what a bench writes: give JSON files of "
            "this release's offload bench --json"
        )
    return dict(report)


def _is_whole(report: Mapping[str, Any]) -> bool:
    try:
        return isinstance(report["environment"], dict) and all(isinstance(one.result, dict) for one in entries(report))
    except (AttributeError, KeyError):  # a mapping is another thing, or missing
        return False


def entries(report: Mapping[str, Any]) -> list[Entry]:
    found = [Entry(part, part, result) for part, result in report.get("results", {}).items()]
    for name, section in report.get("sections", {}).items():
        results = section.get("bench", {}).get("results", {})
        found += [Entry(name, part, result) for part, result in results.items()]
    return found


def markdown(title: str, report: Mapping[str, Any]) -> str:
    """All tables of one report; every section is there, also one that failed, with its last line."""
    environment = report["environment"]
    facts = [f"{name} {_value(environment[name])}" for name in _FACTS if environment.get(name) is not None]
    chapters = [f"# {title}", ", ".join(facts) + (", **quick**" if _is_quick(report) else "")]
    if "sections" in report:
        chapters += ["## sections", _table(_sections(report["sections"]))]
    found = entries(report)
    for entry in found:
        chapters += [f"## {entry.section}", *_chapter(entry)]
    beside = _beside_peers(found)
    if len(beside) > 1:
        chapters += [
            "## beside peers",
            "Tokens/s of ours over the peer's, at the same steps.",
            _table(beside),
        ]
    return "\n\n".join(chapters) + "\n"


def _is_quick(report: Mapping[str, Any]) -> bool:
    return bool(report.get("quick") or report["environment"].get("quick"))


def _chapter(entry: Entry) -> list[str]:
    """Paragraphs and tables of one result: its figures, and what they leave out."""
    result = entry.result
    own: list[str] = []
    if entry.part == "train" and "runs" in result:
        own = _train(result)
    elif entry.part == "largest" and "plan" in result:
        own = _largest(result)
    elif entry.part == "plan" and "rows" in result:
        own = [_table(_plan(result["rows"]))]
    if "figures" not in result:  # of version 1, or not measured
        return own or _figures(result)
    if "host_memory" in result:
        own = [_table(_host_memory(result["host_memory"]))]
    measured = [_table(figure_rows(result["figures"]))] if result["figures"] else []
    measured += [f"**Failed: {result['failed']}**"] if "failed" in result else []
    return [*measured, *absent_peers(result), *own, _conditions(result["conditions"])]


def _conditions(conditions: Mapping[str, Any]) -> str:
    """What else the figures depend on, in a paragraph."""
    load, mhz = conditions["load_average"], conditions["cpu_mhz"]["before"]
    clock = "" if mhz is None else f" CPU clock {mhz['median']:,.0f} MHz."
    words = f"Measured in {conditions['seconds']:.0f} s.{clock} Load average {load['before']:.1f} before, "
    words += f"{load['after']:.1f} after."
    words += "".join(f" **{disturbance[0].upper()}{disturbance[1:]}.**" for disturbance in noise(conditions))
    gpu = conditions["gpu"]
    if gpu is None:
        return words
    if "unknown" in gpu:
        return f"{words} GPU clocks are unknown: {gpu['unknown']}."
    during = gpu["during"]
    clocks = during["sm_mhz"] or {}
    limits = ", ".join(during["limited_by"]) or "nothing"
    spread = " to ".join(f"{clocks[key]:,.0f}" for key in ("min", "max") if key in clocks) or "?"
    return f"{words} GPU clock {spread} MHz in {during['samples']} samples of {gpu['source']}, limited by {limits}."


# --- by part ------------------------------------------------------------------------------------------------------


def _sections(sections: Mapping[str, Any]) -> Rows:
    rows: Rows = [("section", "state", "s", "")]
    for name, section in sections.items():
        words = ""
        if "tests" in section:
            tests = section["tests"]
            words = f"{tests['passed']} passed, {tests['skipped']} skipped, {tests['failed']} failed"
            words += "".join(f"; {test}" for test in tests["not_passed"])
        elif section["state"] != "done":
            words = next(iter(section.get("output", "").strip().splitlines()[-1:]), "no output")
        rows.append((name, section["state"], f"{section['seconds']:.1f}", words))
    return rows


def _host_memory(measured: Sequence[Mapping[str, Any]]) -> Rows:
    rows: Rows = [("copies meanwhile", "host memory, GB/s", "the copies, GB/s")]
    for row in measured:
        copied = _spread(row["copies_gb_per_s"]) if row["copies"] else "-"
        rows.append((row["copies"] or "none", _value(row["gb_per_s"]), copied))
    return rows


def _train(result: Mapping[str, Any]) -> list[str]:
    model = (
        f"{result['size']}, {result['parameters']:,} parameters, vocabulary {result['vocabulary']:,}, micro-batches of "
        f"{result['micro_batch_tokens']:,} tokens at most, sequences of {result['sequence_tokens']:,}"
    )
    if not result["gradient_checkpointing"]:
        model += ", no gradient checkpointing"
    if result["device_cap_gib"] is not None:
        model += f", placements in {result['device_cap_gib']:g} GiB of the device"
    rates = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in result["ceilings_bytes_per_s"].items())
    rows: Rows = [
        (
            *("run", "tokens", "step s", "tokens/s", "of resident", "bound s", "bound by", "step over bound"),
            *("link to host", "to device", "hidden", "device peak GiB"),
        )
    ]
    for name, one in result["runs"].items():
        rows += _train_rows(name, one)
    lines = [model, f"Ceilings, GB/s: {rates}.", _table(rows)]
    lines += [f"{name}: {one['precision']}." for name, one in result["runs"].items() if "precision" in one]
    if "losses_equal_resident" in result:
        equal = "equal bit for bit" if result["losses_equal_resident"] else "**NOT EQUAL**"
        lines.append(f"Losses of placements and resident: {equal}.")
    return lines


def _train_rows(name: str, one: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for outcome in _OUTCOMES:
        if outcome in one:
            yield (name, "", f"{outcome.replace('_', ' ')}: {one[outcome]}", *[""] * 9)
    for row in one.get("steps", ()):
        bound = row.get("bound")
        yield (
            name,
            f"{row['tokens']:,}",
            _spread(row["step_s"]),
            f"{row['tokens_per_s']:,.0f}",
            f"{1 / row['step_over_resident']:.3f}" if "step_over_resident" in row else "-",
            f"{max(bound.values()):.4f}" if bound else "-",
            row["bound_by"].removesuffix("_s") if bound else "-",
            f"{1 / row['share_of_bound']:.2f}" if bound else "-",
            *(f"{row['share_of_link'][lane]:.2f}" if "share_of_link" in row else "-" for lane in _LANES),
            f"{row['hidden_share']:.2f}" if "hidden_share" in row else "-",
            "-" if one["peak_device_bytes"] is None else f"{one['peak_device_bytes'] / 2**30:.1f}",
        )


def _plan(settings: Sequence[Mapping[str, Any]]) -> Rows:
    rows: Rows = [("shape", "on the host", "micro-batches", "clipped", "bound", "predicted s", "measured s", "error")]
    for row in settings:
        measured = (f"{row['step_s']['median']:.3f}", f"{row['error']:+.1%}") if "error" in row else ("", "")
        clipped = "yes" if row["clips"] else "no"
        what = (row["shape"], row["placement"], str(row["micro_batches"]), clipped, row["bound_by"])
        rows.append((*what, f"{row['predicted_s']:.3f}", *measured))
    return rows


def _largest(result: Mapping[str, Any]) -> list[str]:
    places = ", ".join(f"{kind} {place}" for kind, place in result["places"].items())
    rows: Rows = [("tier", *next(iter(result["plan"].values())), "total", "budget")]
    for tier, kinds in result["plan"].items():
        sizes = [*kinds.values(), sum(kinds.values()), result[f"{tier}_budget_bytes"]]
        rows.append((tier, *map(format_bytes, sizes)))
    lines = [f"{result['parameters']:,} parameters, {result['layers']} layers; on the host: {places}", _table(rows)]
    if "run" in result:
        runs: Rows = [("tokens", "step s", "tokens/s", "device peak GiB")]
        for row in _train_rows("", result["run"]):
            runs.append((row[1], row[2], row[3], row[-1]))
        lines += ["Trained:", _table(runs)]
    else:
        lines.append(f"Not trained: {result.get('does_not_fit', 'planned alone')}.")
    return lines


# --- across sections ----------------------------------------------------------------------------------------------


def tokens_by_run(entries: Sequence[Entry]) -> dict[tuple[Any, ...], dict[str, dict[int, float]]]:
    """Tokens a second by model, run and tokens a step. Results of the same model and micro-batches are taken together.

    The model: its size, vocabulary, tokens of a micro-batch, and whether it recomputes activations. A run in a part of
    the device's memory is left out: it does not compete with those that have all of it.
    """
    found: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    for _, part, result in entries:
        if part != "train" or "runs" not in result or result["device_cap_gib"] is not None:
            continue
        keys = ("size", "vocabulary", "micro_batch_tokens", "gradient_checkpointing")
        runs = found.setdefault(tuple(result[key] for key in keys), {})
        for name, one in result["runs"].items():
            for row in one.get("steps", ()):
                # The first of several measurements: each has a resident run of its own beside it.
                runs.setdefault(name, {}).setdefault(row["tokens"], row["tokens_per_s"])
    return found


def _beside_peers(entries: Sequence[Entry]) -> Rows:
    """A row a peer and number of tokens, and one for each peer that did not run, with its reason."""
    trained = [entry.result for entry in entries if entry.part == "train" and "runs" in entry.result]
    placements = list(dict.fromkeys(n for result in trained for n, one in result["runs"].items() if "places" in one))
    rows: Rows = [("peer", "model", "tokens", "its tokens/s", *(f"{name}, times as fast" for name in placements))]
    for (size, *_), runs in tokens_by_run(entries).items():
        for peer in _PEERS:
            for tokens, rate in runs.get(peer, {}).items():
                ours = [runs.get(name, {}).get(tokens) for name in placements]
                ratios = ["-" if own is None else f"{own / rate:.2f}" for own in ours]
                rows.append((peer, size, f"{tokens:,}", f"{rate:,.0f}", *ratios))
    for result in trained:
        for name, one in result["runs"].items():
            for outcome in _OUTCOMES:
                if name in _PEERS and outcome in one:
                    words = f"{outcome.replace('_', ' ')}: {one[outcome]}"
                    rows.append((name, result["size"], "", words, *[""] * len(placements)))
    return rows


# --- any part -----------------------------------------------------------------------------------------------------


def _figures(result: Mapping[str, Any]) -> list[str]:
    """Every figure of a result by its path: for parts whose result is flat enough to be read so."""
    rows: Rows = [("figure", "median (p20 to p80)")]
    rows += list(_walk("", result))
    return [_table(rows)] if len(rows) > 1 else []


def _walk(path: str, value: Any) -> Iterator[Sequence[str]]:
    if isinstance(value, Mapping):
        if {"median", "p20", "p80"} <= set(value):
            yield (path, _spread(value))
            return
        for key, inner in value.items():
            yield from _walk(f"{path}, {key}" if path else str(key), inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _walk(f"{path}, {_label(inner) or index}", inner)
    elif value is not None and path.rpartition(", ")[2] not in _LABELS:
        yield (path, _value(value))


def _label(value: Any) -> str | None:
    """What an element of a list calls itself."""
    return next((value[key] for key in _LABELS if key in value), None) if isinstance(value, Mapping) else None


def _spread(one: Mapping[str, float], scale: float = 1.0) -> str:
    """The median and, in brackets, the 20th and 80th percentiles."""
    median, low, high = (one[key] * scale for key in ("median", "p20", "p80"))
    return f"{median:.4g} ({low:.4g} to {high:.4g})"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(rows: Rows) -> str:
    """A Markdown table; the first row is its header."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
