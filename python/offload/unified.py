"""Unified memory: what kind a device has, tensors that host and device share, and a pool of them for torch.

A door: the work is done in `offload._unified` and `offload._unified_pool`.
"""

from ._unified import (
    MemoryFacts,
    Placement,
    advise,
    alias,
    classify,
    discard,
    empty,
    placement,
    prefetch,
)
from ._unified_pool import Pool, pool

__all__ = [
    "MemoryFacts",
    "Placement",
    "Pool",
    "advise",
    "alias",
    "classify",
    "discard",
    "empty",
    "placement",
    "pool",
    "prefetch",
]
