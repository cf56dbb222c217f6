"""Who owns which bytes in which tier, now and at most, beside what the plan predicted. Formats counters, takes none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ._config import format_size
from ._plan import Plan
from ._stats import Stats
from ._tier_bytes import TierBytes

__all__ = ["MemoryRow", "MemorySummary", "MemoryTier", "summarize"]

# What an owner is called, where its tag does not say it.
_WORDS = {
    "torch_states": "states of torch's own",
    "copies": "copies under way",
    "staging": "scalars under way",
}


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """Bytes of one owner: now, the most at once since `wrap`, and what the plan predicted (None: it is not planned)."""

    owner: str
    now: int
    peak: int
    planned: int | None = None


@dataclasses.dataclass(frozen=True)
class MemoryTier:
    """The owners of one tier, and all of them together.

    total.now is the sum of the rows. total.peak is the most at once where one counter sees all of the tier (host), and
    no less than that elsewhere: the owners' peaks, added. beside: what lies in the tier and belongs to none of them.
    """

    name: str
    rows: tuple[MemoryRow, ...]
    total: MemoryRow
    beside: tuple[MemoryRow, ...] = ()


@dataclasses.dataclass(frozen=True)
class MemorySummary:
    """What `optim.memory_summary()` returns; `print` shows it as tables. Every figure is in bytes.

    tiers: device, host, and the disk where something is there. process: resident memory of this process, of
    which the host pool is a part. allocator: torch's own figures for a CUDA device, empty on the CPU. notes: what to
    know of these figures, one sentence each.
    """

    tiers: tuple[MemoryTier, ...]
    process: MemoryRow
    allocator: tuple[MemoryRow, ...]
    notes: tuple[str, ...]

    def tier(self, name: str) -> MemoryTier:
        """Raises KeyError for a tier that nothing is in."""
        for tier in self.tiers:
            if tier.name == name:
                return tier
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        return {
            "tiers": {tier.name: _tier_dict(tier) for tier in self.tiers},
            "process": {"now": self.process.now, "peak": self.process.peak},
            "allocator": {row.owner: {"now": row.now, "peak": row.peak} for row in self.allocator},
            "notes": list(self.notes),
        }

    def pieces(self) -> list[str | list[tuple[str, ...]]]:
        """What `str()` shows, in its order: lines of text, and tables as rows of cells, the first being the header."""
        shown: list[str | list[tuple[str, ...]]] = []
        for tier in self.tiers:
            header = (tier.name, "now", "at most", "planned")
            shown += [[header, *map(_cells, (*tier.rows, tier.total, *tier.beside))], ""]
        shown.append([("beside offload", "now", "at most", ""), *map(_cells, (self.process, *self.allocator))])
        return [*shown, "", *(f"- {note}" for note in self.notes)]

    def __str__(self) -> str:
        return "\n".join(piece if isinstance(piece, str) else "\n".join(map(_line, piece)) for piece in self.pieces())


def summarize(
    stats: Stats, plan: Plan, *, process: Mapping[str, int], allocator: Mapping[str, Mapping[str, int]]
) -> MemorySummary:
    """The summary of these counters.

    process: resident and peak_resident bytes. allocator: torch's `allocated` and `reserved` bytes on the device, each
    with `now` and `peak`; empty where it does not count.
    """
    device, host = _device(stats, plan), _host(stats, plan)
    tiers = [device, host]
    if stats.disk:
        tiers.append(_disk(stats, plan))
    resident = MemoryRow("resident memory of this process", process["resident"], process["peak_resident"])
    figures = [MemoryRow(f"{name} by torch", value["now"], value["peak"]) for name, value in allocator.items()]
    notes = _notes(stats, plan)
    if "allocated" in allocator:
        rest = format_size(max(0, allocator["allocated"]["now"] - device.total.now))
        notes.append(f"{rest} of what torch has allocated now are not offload's: activations, workspace, your tensors")
    return MemorySummary(tuple(tiers), resident, tuple(figures), tuple(notes))


def _device(stats: Stats, plan: Plan) -> MemoryTier:
    planned = {kind: getattr(plan.device, kind) for kind in ("weights", "gradients", "master", "moments")}
    now = {**stats.device_bytes, **stats.passing_bytes}
    rows = [
        MemoryRow(_WORDS.get(tag, tag), size, max(size, stats.device_peak_bytes.get(tag, 0)), planned.get(tag))
        for tag, size in now.items()
        if size or tag in planned or stats.device_peak_bytes.get(tag)
    ]
    return _added("device", rows, plan.device)


def _host(stats: Stats, plan: Plan) -> MemoryTier:
    planned = {
        "weights": plan.host.working + plan.host.cache,  # the cache of weights on disk holds their working copies
        "master": plan.host.master,
        "moments": plan.host.moments,
        "gradients": plan.host.gradients,
        "window": plan.host.window,
        "backups": plan.host.backups,
    }
    in_pool = {tag: size for tag, size in stats.host_bytes.items() if tag != "torch_states"}
    rows = [
        MemoryRow(_WORDS.get(tag, tag), size, stats.host_peak_bytes[tag], planned.get(tag))
        for tag, size in in_pool.items()
        if stats.host_peak_bytes[tag] or planned.get(tag)
    ]
    pool = stats.pool
    in_use = MemoryRow("in use", pool["used_bytes"], pool["peak_used_bytes"], sum(planned.values()))
    beside = [MemoryRow("obtained from the system", pool["mapped_bytes"], pool["mapped_bytes"])]
    if "torch_states" in stats.host_bytes:
        size = stats.host_bytes["torch_states"]
        beside.append(MemoryRow(_WORDS["torch_states"], size, size))
    return MemoryTier("host", tuple(rows), in_use, tuple(beside))


def _disk(stats: Stats, plan: Plan) -> MemoryTier:
    weights, files = stats.disk.get("weights_allocated_bytes", 0), stats.disk["allocated_bytes"]
    states = MemoryRow("states", files - weights, files - weights, plan.disk.master + plan.disk.moments)
    rows = [states, MemoryRow("weights", weights, weights, plan.disk.working)]
    # More than it takes: only what is written meanwhile, not what stays the same.
    rows.append(MemoryRow("saves", stats.disk["snapshot_bytes"], stats.disk["snapshot_peak_bytes"]))
    return _added("disk", [row for row in rows if row.now or row.peak or row.planned], plan.disk)


def _added(name: str, rows: list[MemoryRow], planned: TierBytes) -> MemoryTier:
    now, peak = sum(row.now for row in rows), sum(row.peak for row in rows)
    return MemoryTier(name, tuple(rows), MemoryRow("together", now, peak, planned.total))


def _notes(stats: Stats, plan: Plan) -> list[str]:
    obtained, budget = format_size(stats.pool["mapped_bytes"]), format_size(plan.host_capacity)
    notes = [
        f"after {stats.steps} steps; {obtained} of the host budget of {budget} are obtained, "
        f"{'pinned' if stats.pinned else 'pageable'}"
    ]
    if plan.device_kind == "cpu":
        notes.append("the device is the CPU: its bytes lie in the same memory as the host's, and are resident")
    notes.append(
        "what the device has together at most is no more than that: its owners need not have had theirs at once"
    )
    if plan.activations == "device":
        notes.append("activations are on the device, and not counted here")
    else:
        may = format_size(plan.activation_host_bytes)
        notes.append(f"activations may take {may} on the host, of which the plan does not know how much they will")
    if stats.disk:
        notes.append(
            "on disk the states of each parameter, and weights that travel together, take whole blocks (disk_block)"
        )
    if "torch_states" in stats.host_bytes:
        notes.append("states of torch's own lie beside the host budget")
    if stats.pool["waiting_bytes"]:
        waiting = format_size(stats.pool["waiting_bytes"])
        notes.append(f"{waiting} of what was obtained are given back and wait for a copy or an update that reads them")
    return notes


def _tier_dict(tier: MemoryTier) -> dict[str, Any]:
    def figures(row: MemoryRow) -> dict[str, int | None]:
        return {"now": row.now, "peak": row.peak, "planned": row.planned}

    return {
        "owners": {row.owner: figures(row) for row in tier.rows},
        "total": figures(tier.total),
        "beside": {row.owner: figures(row) for row in tier.beside},
    }


def _cells(row: MemoryRow) -> tuple[str, ...]:
    planned = "" if row.planned is None else format_size(row.planned)
    return f"  {row.owner}", format_size(row.now), format_size(row.peak), planned


def _line(cells: tuple[str, ...]) -> str:
    name, *figures = cells
    return (f"{name:<36}" + "".join(f"{figure:>14}" for figure in figures)).rstrip()
