"""What one token costs in a model: what its forward saves for backward, and operations. Pure functions.

[Note: what activations take] An estimate, by shapes. Each weight matrix keeps its input and its output, in the
weights' dtype. Norms and activation functions are asked: what autograd saves as each computes with one vector counts,
but for an activation's input, which is a matrix's output. For a Llama that is 1 to 6 % more than what autograd saves,
for GPT-2, whose gelu is written out, 5 to 7 %. Attention that makes a matrix of its scores ("eager") keeps that too:
as softmax gives it, in fp32 or in the weights' dtype; from fp32, also as values are multiplied by it; with dropout,
what that drops and what it leaves. Where torch has no fused attention for a model on the CPU it keeps them, and masks,
too, all in fp32. Other dropout, which keeps masks, comes on top. With checkpointing each block keeps its input alone,
and the largest one, as it is recomputed, all. Logits take 10 bytes each: in 16 bits, in fp32, and what the loss keeps
of them in fp32.

[Note: what is rounded] With `activation_format`, of all that is counted here, what gradients flow through: a byte an
element, whatever its dtype, and a scale for every 256 (`may_be_rounded` decides it in a run). Masks of dropout are
exact. A unit before which nothing trains has an input without gradients: all that it saves counts as exact, which is
a bound. What checkpoints keep is known to the byte, the rest is as good as the estimate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ._activation_order import packed_bytes

__all__ = ["TokenCosts"]

_LOGIT_BYTES = 10
_FP32_BYTES, _MASK_BYTES = 4, 1


@dataclasses.dataclass(frozen=True)
class TokenCosts:
    """Of one token in one forward; units by name.

    saved: elements that each unit keeps for its backward. scores: of attention, that a block keeps beside them; with
    dropout on them if `drops_scores`, from a softmax in fp32 if `wide_softmax`; with `wide_attention` that, masks and
    all else of them are in fp32. inputs: elements of each block's input; a unit that is no block has none. operations:
    in a forward, beside the two of each parameter: those of attention, and less those of experts that a token does not
    pass. lookups: names of parameters of which a token reads a row. logits: elements. wide: of `saved`, elements of
    fp32, which count twice there. reached: units before which something trains.
    """

    saved: Mapping[str, int]
    scores: Mapping[str, int]
    drops_scores: bool
    wide_softmax: bool
    inputs: Mapping[str, int]
    operations: Mapping[str, float]
    lookups: frozenset[str]
    logits: int
    wide: Mapping[str, int]
    reached: frozenset[str]
    wide_attention: bool = False

    def saved_bytes(self, tokens: int, itemsize: int, *, checkpointing: bool) -> dict[str, int]:
        """Bytes that each unit's forward of so many tokens keeps, of elements of `itemsize`, without the logits."""
        score_bytes = self._score_bytes(itemsize)
        kept = {unit: itemsize * count + score_bytes * self.scores.get(unit, 0) for unit, count in self.saved.items()}
        if checkpointing:
            kept |= {unit: itemsize * count for unit, count in self.inputs.items()}
        return {unit: tokens * nbytes for unit, nbytes in kept.items()}

    def sent_bytes(self, tokens: int, itemsize: int, *, checkpointing: bool) -> dict[str, int]:
        """Of `saved_bytes`, on their way with a byte an element: see [Note: what is rounded]."""
        rounded, exact_bytes = self._rounded_score(itemsize)
        sent = self.saved_bytes(tokens, itemsize, checkpointing=checkpointing)
        for unit in sent.keys() & self.reached:
            scores = self.scores.get(unit, 0)
            count = self.saved[unit] - self.wide.get(unit, 0) + rounded * scores
            sent[unit] = packed_bytes(tokens * count) + tokens * exact_bytes * scores
            if checkpointing and unit in self.inputs:
                sent[unit] = packed_bytes(tokens * self.inputs[unit])
        return sent

    def activation_bytes(self, tokens: int, itemsize: int, *, checkpointing: bool) -> int:
        """Bytes of all at the end of a forward, or as a block is recomputed."""
        whole = self.saved_bytes(tokens, itemsize, checkpointing=False)
        again = max((whole[name] for name in self.inputs), default=0) if checkpointing else 0
        kept = self.saved_bytes(tokens, itemsize, checkpointing=checkpointing)
        return sum(kept.values()) + again + tokens * self.logits * _LOGIT_BYTES

    @property
    def _mask_bytes(self) -> int:
        return _FP32_BYTES if self.wide_attention else _MASK_BYTES

    def _score_bytes(self, itemsize: int) -> int:
        """Of one score: see [Note: what activations take]."""
        itemsize = _FP32_BYTES if self.wide_attention else itemsize
        softmax = _FP32_BYTES if self.wide_softmax else itemsize
        if self.drops_scores:
            return softmax + self._mask_bytes + itemsize
        return softmax if softmax == itemsize else softmax + itemsize

    def _rounded_score(self, itemsize: int) -> tuple[int, int]:
        """Elements of one score that are rounded, and bytes beside them."""
        if self.drops_scores:
            return 2, self._mask_bytes
        is_narrowed = self.wide_softmax and itemsize != _FP32_BYTES and not self.wide_attention
        return (2 if is_narrowed else 1), 0
