"""`offload bench link`: our copy lanes beside raw copies over the same link, and what copies leave of host memory.

All sides take turns, round after round, over buffers of the same size (see `_bench_copies`).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ._bench_adamw import streaming_bytes_per_s
from ._bench_copies import COPIES_AT_MOST, MODES, Link, busy_link
from ._bench_figures import Figure, Side, figure
from ._bench_spread import summary
from ._device import compute_device
from ._progress import now_at
from ._table import Piece, Table

__all__ = ["figures", "pieces", "run"]

_KIB, _MIB = 2**10, 2**20
_SIZES = tuple(64 * _KIB * 4**power for power in range(7))  # 64 KiB to 256 MiB
_QUICK_SIZES = _SIZES[:4]
_SMALL_SIZES = (4 * _KIB, 16 * _KIB, 64 * _KIB)  # of what shares a submission
_TOGETHER = (
    "batches",
    "kernel",
)  # sides that share submissions: as the driver takes them, as older ones are given them
_SUBMISSION_BYTES = 4 * _KIB  # of a copy whose submission is timed: the copy itself costs next to nothing
_UPDATE_FORMAT = "split"  # of what host memory streams meanwhile: as the update of bf16 weights


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times every size and mode. Bandwidths are GB/s (1e9 bytes), of both directions together under "both".

    Yields a JSON-able dict: `rows`, each with `mode`, `bytes` and by side a summary of samples, and `share_of_raw` of
    the lanes; `small`, the same for copies that share submissions; `submission_us`, the cost of one small copy to the
    submitting thread; `host_memory`, what all threads stream while raw copies run, and what the copies get meanwhile.
    """
    device = compute_device(options.device)
    sizes, rounds = (_QUICK_SIZES, 3) if options.quick else (_SIZES, 9)
    link = Link(device, sizes[-1])
    for side in link.sides.values():
        side.check()
    rows: list[dict[str, Any]] = []
    for mode, nbytes in itertools.product(MODES, sizes):
        row = _row(link, [name for name in link.sides if name not in _TOGETHER], mode, nbytes, rounds)
        row["share_of_raw"] = row["gb_per_s"]["lanes"]["median"] / row["gb_per_s"]["raw"]["median"]
        rows.append(row)
    small = itertools.product(("to_host", "to_device"), _SMALL_SIZES)
    sides_of_small = [name for name in ("lanes", *_TOGETHER, "raw") if name in link.sides]
    yield {
        "name": "link",
        "device": str(device),
        "facts": link.facts,
        "pin_refusal": link.pin_refusal or None,
        "raw": "cuMemcpyAsync from page-locked memory" if device.type == "cuda" else "memmove in a thread",
        "rows": rows,
        "copies_together": link.native.copies_together,
        "small": [_row(link, sides_of_small, mode, nbytes, rounds) for mode, nbytes in small],
        "submission_us": _submission_us(link, rounds),
        "host_memory": _host_memory(link, options.quick),
    }


def _row(link: Link, names: Sequence[str], mode: str, nbytes: int, rounds: int) -> dict[str, Any]:
    now_at(f"{mode}, {nbytes // _KIB} KiB")
    rates = link.measure(names, mode, nbytes, rounds)
    by_side = {name: summary([rate / 1e9 for rate in samples]) for name, samples in rates.items()}
    return {"mode": mode, "bytes": nbytes, "gb_per_s": by_side}


def _host_memory(link: Link, quick: bool) -> list[dict[str, Any]]:
    """By what is copied meanwhile (None: nothing), GB/s read and written by all threads, and those of the copies."""
    elements, rounds = (1 if quick else 64) * _MIB, 3
    nbytes = (4 if quick else 64) * _MIB

    now_at("host memory while copies run")

    def stream() -> float:
        return streaming_bytes_per_s(_UPDATE_FORMAT, elements, rounds) / 1e9

    rows: list[dict[str, Any]] = [{"copies": None, "gb_per_s": stream(), "copies_gb_per_s": None}]
    for mode in MODES:
        with busy_link(link.sides["raw"], mode, nbytes) as rates:
            rate = stream()
        copied = summary([one / 1e9 for one in rates])
        rows.append({"copies": mode, "gb_per_s": rate, "copies_gb_per_s": copied})
    return rows


def _submission_us(link: Link, rounds: int) -> dict[str, Any]:
    """By side and lane; the raw side of the CPU hands over all copies in one call and has no such cost."""
    names = [name for name in ("lanes", *_TOGETHER) if name in link.sides]
    names += ["raw"] if link.device.type == "cuda" else []
    samples: dict[str, dict[str, list[float]]] = {name: {lane: [] for lane in MODES["both"]} for name in names}
    for number, name, lane in itertools.product(range(rounds + 1), names, MODES["both"]):
        side = link.sides[name]
        cost = side.submission_us(side.copies(lane, _SUBMISSION_BYTES, COPIES_AT_MOST))
        if number > 0:
            samples[name][lane].append(cost)
    return {
        name: {lane: {"bytes": _SUBMISSION_BYTES, **summary(costs)} for lane, costs in by_lane.items()}
        for name, by_lane in samples.items()
    }


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """Bandwidths of each side by size and direction, beside raw copies; what the submission of a small copy costs."""
    found = [one for row in result["rows"] for one in _rates(row, "")]
    found += [one for row in result["small"] for one in _rates(row, "small copies, ")]
    for side, by_lane in result["submission_us"].items():
        owner: Side = "ceiling" if side == "raw" else "ours"
        found += [figure(f"submission, {side}, {lane}", "us", one, side=owner) for lane, one in by_lane.items()]
    return found


def _rates(row: Mapping[str, Any], kind: str) -> Iterator[Figure]:
    raw = row["gb_per_s"]["raw"]
    for side, rate in row["gb_per_s"].items():
        name = f"{kind}{side}, {row['mode']}, {row['bytes'] // _KIB} KiB"
        if side == "raw":
            yield figure(name, "GB/s", rate, side="ceiling", better="higher")
        else:
            yield figure(name, "GB/s", rate, better="higher", ceiling=("raw copies", raw["median"]))


def pieces(result: Mapping[str, Any]) -> list[Piece]:
    """What host memory streams while copies run."""
    memory = [("GB/s", "host memory", "the copies")]
    for row in result["host_memory"]:
        copied = "-" if row["copies"] is None else f"{row['copies_gb_per_s']['median']:.2f}"
        memory.append((row["copies"] or "no copies", f"{row['gb_per_s']:.2f}", copied))
    return [f"{result['device']}, raw: {result['raw']}", Table(memory)]
