"""The figures of a bench in one shape for every part: what the JSON, the terminal, `--compare` and `report` show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from ._table import Table

__all__ = ["Figure", "Side", "absent_peers", "figure", "figure_rows", "figure_table"]

Side = Literal["ours", "peer", "ceiling"]
Better = Literal["lower", "higher"]


class Figure(TypedDict):
    """One measured quantity.

    side: whose it is. better: which way is an improvement. median, p20, p80: in `unit`. samples: how many there are.
    ceiling: what bounds it, in words, and share_of_ceiling how much of that it reaches, 1 being all; both None where
    nothing does. times_as_fast_as: by peer, above 1 where this is the faster.
    """

    name: str
    side: Side
    unit: str
    better: Better
    median: float
    p20: float
    p80: float
    samples: int
    ceiling: str | None
    share_of_ceiling: float | None
    times_as_fast_as: dict[str, float]


def figure(
    name: str,
    unit: str,
    measured: Mapping[str, Any],
    *,
    side: Side = "ours",
    better: Better = "lower",
    scale: float = 1.0,
    ceiling: tuple[str, float] | None = None,
    peers: Mapping[str, Mapping[str, Any]] | None = None,
) -> Figure:
    """A figure of what `summary` gave; `scale` turns its unit into `unit`.

    ceiling: its name, and its median in the unit of `measured`. peers: what `summary` gave of each, in the same unit.
    """
    median: float = measured["median"]

    def times(other: float) -> float | None:
        """How many times as good as `other`; None where the clock was too coarse for either."""
        above, below = (other, median) if better == "lower" else (median, other)
        return above / below if below else None

    ratios = {peer: times(one["median"]) for peer, one in (peers or {}).items()}
    return {
        "name": name,
        "side": side,
        "unit": unit,
        "better": better,
        "median": median * scale,
        "p20": measured["p20"] * scale,
        "p80": measured["p80"] * scale,
        "samples": len(measured["samples"]),
        "ceiling": ceiling[0] if ceiling else None,
        "share_of_ceiling": times(ceiling[1]) if ceiling else None,
        "times_as_fast_as": {peer: ratio for peer, ratio in ratios.items() if ratio is not None},
    }


def figure_rows(figures: Sequence[Figure]) -> list[Sequence[str]]:
    """The rows of a table of them, the header first."""
    rows: list[Sequence[str]] = [("figure", "median", "p20", "p80", "unit", "of its ceiling", "times as fast as")]
    for one in figures:
        name = one["name"] if one["side"] == "ours" else f"{one['name']} ({one['side']})"
        spread = [f"{one[key]:.4g}" for key in ("median", "p20", "p80")]
        share = one["share_of_ceiling"]
        reached = "" if share is None else f"{share:.3f} of {one['ceiling']}"
        beside = ", ".join(f"{peer} {ratio:.2f}" for peer, ratio in one["times_as_fast_as"].items())
        rows.append((name, *spread, one["unit"], reached, beside))
    return rows


def figure_table(figures: Sequence[Figure]) -> Table:
    """The table of them on a terminal; what they are compared with stands below each where it is too wide."""
    return Table(figure_rows(figures), words=2, below={6: "times as fast as", 5: "reaches"})


def absent_peers(result: Mapping[str, Any]) -> list[str]:
    """A line for each peer that was not measured, with the reason."""
    return [f"{name} is left out: {reason}" for name, reason in result.get("absent_peers", {}).items()]
