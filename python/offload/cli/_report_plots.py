"""The plots of `offload bench report`; needs matplotlib."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from ._bench_figures import Figure
from ._bench_report import Entry, tokens_by_run

__all__ = ["draw"]

_COLOURS = {"to_host": "C0", "to_device": "C1", "both": "C2"}
_STYLES = ("-", "--", ":")
_SIDES = {"ours": "C0", "peer": "C1", "ceiling": "0.6"}


def draw(entries: Sequence[Entry], folder: Path, stem: str) -> list[Path]:
    """PNG files in `folder`, which is made: bandwidths by size of copy, tokens a second by tokens of a step, and of
    all other parts their figures."""
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for section, part, result in entries:
        path = folder / f"{stem}-{section}.png"
        if part == "link" and "rows" in result:
            images.append(_curves(path, partial(_link, result)))
        elif part not in ("link", "train") and result.get("figures"):
            images.append(_bars(path, part, result["figures"]))
    for (size, vocabulary, micro_batch, checkpointing), runs in tokens_by_run(entries).items():
        name = f"{stem}-train-{size}-{vocabulary}-{micro_batch}{'' if checkpointing else '-activations'}"
        images.append(_curves(folder / f"{name}.png", partial(_train, size, runs)))
    return images


def _bars(path: Path, part: str, figures: Sequence[Figure]) -> Path:
    """Medians of all that has the part's most frequent unit, with p20 to p80: ours beside peers and ceilings."""
    (unit, _), *_ = Counter(one["unit"] for one in figures).most_common(1)
    shown = [one for one in figures if one["unit"] == unit]
    canvas = Canvas(figsize=(9, 1.2 + 0.3 * len(shown)), layout="constrained")
    axes = canvas.subplots()
    for side, colour in _SIDES.items():
        own = [(place, one) for place, one in enumerate(shown) if one["side"] == side]
        if own:
            medians = [one["median"] for _, one in own]
            below = [one["median"] - one["p20"] for _, one in own]
            above = [one["p80"] - one["median"] for _, one in own]
            places = [place for place, _ in own]
            axes.barh(places, medians, xerr=(below, above), color=colour, ecolor="0.2", capsize=2, label=side)
    axes.set_yticks(range(len(shown)), [one["name"] for one in shown])
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit}, {shown[0]['better']} is better; p20 to p80")
    axes.set_title(part)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend()
    canvas.savefig(path, dpi=120)
    return path


def _curves(path: Path, fill: Callable[[Axes], None]) -> Path:
    canvas = Canvas(figsize=(8, 5), layout="constrained")
    axes = canvas.subplots()
    fill(axes)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    canvas.savefig(path, dpi=120)
    return path


def _link(result: Mapping[str, Any], axes: Axes) -> None:
    for side, style in zip(result["rows"][0]["gb_per_s"], _STYLES, strict=False):
        for mode, colour in _COLOURS.items():
            rows = [row for row in result["rows"] if row["mode"] == mode]
            sizes = [row["bytes"] / 2**10 for row in rows]
            low, median, high = ([row["gb_per_s"][side][key] for row in rows] for key in ("p20", "median", "p80"))
            axes.plot(sizes, median, style, color=colour, label=f"{mode}, {side}")
            axes.fill_between(sizes, low, high, color=colour, alpha=0.1)
    axes.set_xlabel("KiB of a copy")
    axes.set_ylabel("GB/s")
    axes.set_title(f"copies, {result['device']}")


def _train(size: str, runs: Mapping[str, Mapping[int, float]], axes: Axes) -> None:
    for name, rates in runs.items():
        if name != "compute":  # its steps are single micro-batches
            axes.plot(list(rates), list(rates.values()), "o-", label=name)
    axes.set_xlabel("tokens a step")
    axes.set_ylabel("tokens/s")
    axes.set_title(f"training {size}")
