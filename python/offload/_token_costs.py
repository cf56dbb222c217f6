"""What one token costs in a model: what its forward saves for backward, and operations. Pure functions.

[Note: what activations take] An estimate, by shapes alone. Each weight matrix keeps its input and its output, in the
weights' dtype, and each norm its input in fp32 and what it scales. For a Llama that is 5 to 10 % more than what
autograd saves. Attention that makes a matrix of its scores ("eager") keeps that too: as softmax gives it, in fp32 or in
the weights' dtype; from fp32, also as values are multiplied by it; with dropout, what that drops and what it leaves.
Other dropout, which keeps masks, comes on top. With checkpointing each block keeps its input alone, and the largest
one, as it is recomputed, all. Logits take 10 bytes each: in 16 bits, in fp32, and what the loss keeps of them in fp32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = ["TokenCosts"]

_LOGIT_BYTES = 10
_FP32_BYTES, _MASK_BYTES = 4, 1


@dataclasses.dataclass(frozen=True)
class TokenCosts:
    """Of one token in one forward; units by name.

    saved: elements that each unit keeps for its backward. scores: of attention, that a block keeps beside them; with
    dropout on them if `drops_scores`, from a softmax in fp32 if `wide_softmax`. inputs: elements of each block's input;
    a unit that is no block has none. operations: in a forward, beside the two of each parameter: those of attention,
    and less those of experts that a token does not pass. lookups: names of parameters of which a token reads a row.
    logits: elements.
    """

    saved: Mapping[str, int]
    scores: Mapping[str, int]
    drops_scores: bool
    wide_softmax: bool
    inputs: Mapping[str, int]
    operations: Mapping[str, float]
    lookups: frozenset[str]
    logits: int

    def saved_bytes(self, tokens: int, itemsize: int, *, checkpointing: bool) -> dict[str, int]:
        """Bytes that each unit's forward of so many tokens keeps, of elements of `itemsize`, without the logits."""
        score_bytes = self._score_bytes(itemsize)
        kept = {unit: itemsize * count + score_bytes * self.scores.get(unit, 0) for unit, count in self.saved.items()}
        if checkpointing:
            kept |= {unit: itemsize * count for unit, count in self.inputs.items()}
        return {unit: tokens * nbytes for unit, nbytes in kept.items()}

    def activation_bytes(self, tokens: int, itemsize: int, *, checkpointing: bool) -> int:
        """Bytes of all at the end of a forward, or as a block is recomputed."""
        whole = self.saved_bytes(tokens, itemsize, checkpointing=False)
        again = max((whole[name] for name in self.inputs), default=0) if checkpointing else 0
        kept = self.saved_bytes(tokens, itemsize, checkpointing=checkpointing)
        return sum(kept.values()) + again + tokens * self.logits * _LOGIT_BYTES

    def _score_bytes(self, itemsize: int) -> int:
        """Of one score: see [Note: what activations take]."""
        softmax = _FP32_BYTES if self.wide_softmax else itemsize
        if self.drops_scores:
            return softmax + _MASK_BYTES + itemsize
        return softmax if softmax == itemsize else softmax + itemsize
