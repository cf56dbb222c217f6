"""The plots of `offload bench report`; needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ._bench_report import Entry, tokens_by_run

__all__ = ["draw"]

_COLOURS = {"to_host": "C0", "to_device": "C1", "both": "C2"}
_STYLES = ("-", "--", ":")


def draw(entries: Sequence[Entry], folder: Path, stem: str) -> list[Path]:
    """PNG files in `folder`, which is made: bandwidths by size of copy, and tokens a second by tokens of a step."""
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for section, part, result in entries:
        if part == "link":
            images.append(_image(folder / f"{stem}-{section}.png", partial(_link, result)))
    for (size, vocabulary, micro_batch, checkpointing), runs in tokens_by_run(entries).items():
        name = f"{stem}-train-{size}-{vocabulary}-{micro_batch}{'' if checkpointing else '-activations'}"
        images.append(_image(folder / f"{name}.png", partial(_train, size, runs)))
    return images


def _image(path: Path, fill: Callable[[Axes], None]) -> Path:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    fill(axes)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
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
