"""Tells what torch.utils.checkpoint saves, the inputs of its blocks, from what else autograd does."""

from __future__ import annotations

import functools
import sys
from types import FrameType

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from ._errors import StateError

__all__ = ["check_checkpoints_are_recognised", "in_checkpoint"]


def in_checkpoint() -> bool:
    """Whether torch.utils.checkpoint saves the inputs of a block right now, in either of its kinds.

    It does so from its own file, and no module is called in between. What the block saves does not come here.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        if frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


@functools.cache
def check_checkpoints_are_recognised() -> None:
    """Runs a checkpoint of each kind: another torch may save their inputs in another way."""

    def pack(tensor: Tensor) -> Tensor:
        seen[-1] = seen[-1] or in_checkpoint()
        return tensor.detach()

    seen: list[bool] = []
    for reentrant in (False, True):
        seen.append(False)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block_input = torch.ones(1, device="cpu", requires_grad=True)
            checkpoint.checkpoint(torch.sin, block_input, use_reentrant=reentrant, preserve_rng_state=False)
    if not all(seen):
        raise StateError(
            f"activations='checkpoints': torch {torch.__version__} saves the inputs of its checkpoints in a way that "
            "is not known here; use activations='host', or a share"
        )
