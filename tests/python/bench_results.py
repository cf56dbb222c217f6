"""Results of `offload bench --json`, as the tests read them: with figures in the one shape of all parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from offload.cli._bench_figures import Figure

__all__ = ["bench_results", "check_figures"]


def bench_results(path: Path) -> dict[str, Any]:
    """By part; fails for one whose figures are not what every reader of them expects."""
    report = json.loads(path.read_text())
    assert report["schema_version"] == 2
    for result in report["results"].values():
        check_figures(result)
    return report["results"]


def check_figures(result: dict[str, Any]) -> None:
    figures = result["figures"]
    assert len({one["name"] for one in figures}) == len(figures), "names tell figures apart"
    for one in figures:
        assert one.keys() == Figure.__annotations__.keys()
        assert one["side"] in ("ours", "peer", "ceiling") and one["better"] in ("lower", "higher")
        assert one["p20"] <= one["median"] <= one["p80"] and one["samples"] > 0
        assert (one["ceiling"] is None) == (one["share_of_ceiling"] is None)
    assert not figures or any(one["side"] == "ours" for one in figures)
    assert result["conditions"]["seconds"] > 0 and "quick" in result["arguments"]
