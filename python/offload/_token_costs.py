"""What one token costs in a model: what its forward saves for backward, and operations. Pure functions.

[Note: what activations take] An estimate, by shapes alone. Each weight matrix keeps its input and its output, in the
weights' dtype, and each norm its input in fp32 and what it scales. For a Llama that is 5 to 10 % more than what
autograd saves. Attention that keeps its scores, and dropout, which keeps masks, come on top. With checkpointing each
block keeps its input alone, and the largest one, as it is recomputed, all. Logits take 10 bytes each: in 16 bits, in
fp32, and what the loss keeps of them in fp32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = ["TokenCosts"]

_LOGIT_BYTES = 10


@dataclasses.dataclass(frozen=True)
class TokenCosts:
    """Of one token in one forward; units by name.

    saved: elements that each unit keeps for its backward. inputs: elements of each block's input; a unit that is no
    block has none. operations: in a forward, beside the two of each parameter: those of attention, and less those of
    experts that a token does not pass. lookups: names of parameters of which a token reads a row. logits: elements.
    """

    saved: Mapping[str, int]
    inputs: Mapping[str, int]
    operations: Mapping[str, float]
    lookups: frozenset[str]
    logits: int

    def saved_bytes(self, tokens: int, itemsize: int, *, checkpointing: bool) -> dict[str, int]:
        """Bytes that each unit's forward of so many tokens keeps, of elements of `itemsize`, without the logits."""
        kept = {**self.saved, **self.inputs} if checkpointing else self.saved
        return {unit: tokens * itemsize * count for unit, count in kept.items()}

    def activation_bytes(self, tokens: int, itemsize: int, *, checkpointing: bool) -> int:
        """Bytes of all at the end of a forward, or as a block is recomputed."""
        blocks = [self.saved[name] for name in self.inputs]
        again = max(blocks, default=0) if checkpointing else 0
        kept = sum(self.saved_bytes(tokens, itemsize, checkpointing=checkpointing).values())
        return kept + tokens * (again * itemsize + self.logits * _LOGIT_BYTES)
