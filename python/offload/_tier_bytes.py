"""Bytes of one tier by kind, and the table of them."""

from __future__ import annotations

import dataclasses

from ._config import format_size

__all__ = ["TierBytes", "table"]


@dataclasses.dataclass(frozen=True)
class TierBytes:
    """Bytes of one tier by kind.

    working: host copies of weights, the source of their upload; gradients: also, on the host,
    the copies that a host update of device gradients reads; window: what states on disk pass through; cache: what
    weights on disk do; backups: what states were before updates that run ahead of the step.
    """

    weights: int = 0
    working: int = 0
    master: int = 0
    moments: int = 0
    gradients: int = 0
    window: int = 0
    cache: int = 0
    backups: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def table(device: TierBytes, host: TierBytes, disk: TierBytes | None = None) -> str:
    """One line a kind, one column a tier; that of the disk only where something is there."""
    tiers = {"device": device, "host": host} | ({"disk": disk} if disk and disk.total else {})
    of_some = {"window": host.window, "cache": host.cache, "backups": host.backups}
    kinds = [field.name for field in dataclasses.fields(TierBytes) if of_some.get(field.name, 1)]
    rows = [("", *tiers)]
    rows += [(kind, *(format_size(getattr(tier, kind)) for tier in tiers.values())) for kind in kinds]
    rows.append(("total", *(format_size(tier.total) for tier in tiers.values())))
    return "\n".join(f"{kind:<10}" + "".join(f"{size:>14}" for size in sizes) for kind, *sizes in rows)
