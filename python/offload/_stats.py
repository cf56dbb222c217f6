"""What the engine measured, as one immutable value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ._config import format_size

__all__ = ["ResidentWeight", "Stats"]


@dataclasses.dataclass(frozen=True)
class ResidentWeight:
    """A weight or buffer that stays on the device although weights are streamed. `nbytes`: its bytes there."""

    name: str
    nbytes: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Stats:
    """A snapshot of `optim.stats()`; counters run since `wrap`.

    device_bytes, host_bytes: bytes in use by tag (weights, master, moments, gradients, ...); torch_states
    are those of an optimizer that runs as its own torch class, beside the host budget.
    pool: the host pool's counters; *_bytes are bytes, the rest counts.
    transfers: bytes and copies by direction (to_host, to_device).
    isa: the instruction set of the host update. pinned: host memory is page-locked; when it is not,
    pageable_reason says why. update_s: seconds the host update ran; exposed_s: of these, seconds that the training
    thread was blocked (with `run_ahead` a stream waits in its place, which is not counted); blocked_s: all that it was
    blocked for, uploads and late gradients included. fallbacks: every slower path taken, one sentence each.
    peak_weight_bytes: the most that weights took on the device at once.
    activations: of the latest forward, bytes that could leave, that left (offloaded_bytes), what these were on their
    way (sent_bytes: fewer with an activation_format), and that the host budget kept on the device.
    resident_weights: with `params="host"`, what does not come and go with its unit, and why: always on the device, or
    from the beginning of a forward to the end of its backward.
    disk: with states or weights on disk, bytes that the files and the window of the states take, that were read and
    written, and that needed no reading, being in the window still (kept_bytes); wait_ns: how long the update waited for
    the states. weights_*: of weights alone, what their cache and their files take, and reads and writes of it that were
    asked for. snapshot_*: how many asynchronous saves read clones of the files, the bytes that those of a save which is
    running may take at most, and the most of these.
    speculation: with `speculate`, updates that began in backward: how many the step kept and how many it threw away,
    parameters that have a backup, and bytes of these.
    passing_bytes: on the device too, what comes and goes: activations that stay or came back, and what copies under way
    keep there. device_peak_bytes, host_peak_bytes: the most of each tag at once; tags need not have had theirs at the
    same time.
    """

    steps: int
    device_bytes: Mapping[str, int]
    host_bytes: Mapping[str, int]
    pool: Mapping[str, int]
    transfers: Mapping[str, int]
    isa: str
    pinned: bool
    pageable_reason: str | None
    update_s: float
    blocked_s: float
    exposed_s: float
    fallbacks: tuple[str, ...] = ()
    peak_weight_bytes: int = 0
    activations: Mapping[str, int] = dataclasses.field(default_factory=dict)
    resident_weights: tuple[ResidentWeight, ...] = ()
    disk: Mapping[str, int] = dataclasses.field(default_factory=dict)
    passing_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    device_peak_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    host_peak_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    speculation: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def hidden_share(self) -> float | None:
        """The share of the host update that ran behind other work, 0 to 1; None before any update."""
        if self.update_s <= 0:
            return None
        return min(1.0, max(0.0, 1 - self.exposed_s / self.update_s))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON; `hidden_share` included."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in values.items():
            if isinstance(value, Mapping):
                values[name] = dict(value)
        values["resident_weights"] = [dataclasses.asdict(weight) for weight in self.resident_weights]
        return values | {"fallbacks": list(self.fallbacks), "hidden_share": self.hidden_share}

    def __str__(self) -> str:
        hidden = "no update yet" if self.hidden_share is None else f"{self.hidden_share:.1%} hidden"
        memory = "pinned" if self.pinned else f"pageable ({self.pageable_reason or 'not asked for'})"
        rows = [("steps", str(self.steps))]
        rows += [(f"device {tag}", format_size(size)) for tag, size in self.device_bytes.items()]
        rows.append(("device weights, peak", format_size(self.peak_weight_bytes)))
        rows += [("of these resident", text) for text in self._resident_reasons()]
        rows += [(f"host {tag}", format_size(size)) for tag, size in self.host_bytes.items()]
        rows += [(f"activations {name}", _counter(name, value)) for name, value in self.activations.items()]
        rows.append(("host memory", memory))
        rows += [(f"pool {name}", _counter(name, value)) for name, value in self.pool.items()]
        rows += [(f"transfers {name}", _counter(name, value)) for name, value in self.transfers.items()]
        rows += [(f"disk {name}", _counter(name, value)) for name, value in self.disk.items()]
        rows += [(f"speculation {name}", _counter(name, value)) for name, value in self.speculation.items()]
        rows.append(("host update", f"{self.update_s:.3f} s, {hidden}; blocked for {self.blocked_s:.3f} s in all"))
        rows.append(("instruction set", self.isa))
        rows += [("fallback", text) for text in self.fallbacks]
        return "\n".join(f"{name:<28}{value}" for name, value in rows)

    def _resident_reasons(self) -> list[str]:
        """One text a reason: bytes, how many, and the first name."""
        by_reason: dict[str, list[ResidentWeight]] = {}
        for weight in self.resident_weights:
            by_reason.setdefault(weight.reason, []).append(weight)
        return [
            f"{format_size(sum(weight.nbytes for weight in weights))} in {len(weights)} ({weights[0].name}"
            f"{', ...' if len(weights) > 1 else ''}): {reason}"
            for reason, weights in by_reason.items()
        ]


def _counter(name: str, value: int) -> str:
    return format_size(value) if name.endswith("_bytes") else str(value)
