"""What a run under a framework leaves, and how two of them are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import offload
from training import HOST, same_bits

__all__ = ["OFFLOADED", "Outcome", "assert_offloaded_equals_resident", "wrap"]

STREAMED = HOST | {"params": "host"}
OFFLOADED = {"host": HOST, "params": STREAMED, "activations": HOST | {"activations": "host"}}


@dataclass
class Outcome:
    """numbers: losses, norms and the like, in order."""

    numbers: list[float] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    optimizer: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Outcome:
        """Callbacks copy the module that holds it; an optimizer is not copied with its model."""
        return self

    def keep(self, values: dict[str, Any], prefix: str = "") -> None:
        for name, value in values.items():
            if isinstance(value, Tensor):
                self.tensors[prefix + name] = value.detach().clone()


def wrap(model: Any, optimizer: Any, placement: dict[str, Any] | None) -> tuple[Any, Any]:
    """`offload.wrap`; None is the plain framework."""
    return (model, optimizer) if placement is None else offload.wrap(model, optimizer, **placement)


def assert_offloaded_equals_resident(offloaded: Outcome, resident: Outcome) -> None:
    stats = offloaded.optimizer.stats()
    # Those of a class that runs as itself are its own, beside the pool's.
    kind = "torch_states" if offloaded.optimizer._engine.torch_optimizers else "moments"
    assert stats.host_bytes[kind] > 0 and not stats.device_bytes.get(kind)
    assert stats.transfers["to_host_bytes"] > 0 and stats.transfers["to_device_bytes"] > 0
    assert offloaded.numbers == resident.numbers
    assert len(resident.numbers) > 0 and resident.tensors.keys() == offloaded.tensors.keys()
    for name, value in resident.tensors.items():
        assert same_bits(offloaded.tensors[name], value), name
