"""What torch.compile calls and does not compile: whoever compiles a whole training step compiles none of offload."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Call = TypeVar("_Call", bound=Callable[..., Any])

# What torch says where a graph must not break (`fullgraph=True`).
_WHY = (
    "offload moves weights and gradients there: compile without fullgraph=True, or compile parts of the model in place"
)


def not_compiled(call: _Call) -> _Call:
    """Compiled code breaks its graph at `call` and calls it, and nothing that it calls is compiled. So it is where
    autograd calls it in a backward that compiled code began.

    torch's own way to say so costs every call two microseconds, compiled or not. Where torch has it, its evaluation of
    frames is told so once, of the code of `call`, which must be that of nothing else.
    """
    frames = torch._C._dynamo.eval_frame
    if not all(hasattr(frames, name) for name in ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction")):
        # Torch 2.6. What it returns imports torch._dynamo in the first call: a program that ends cannot.
        atexit.register(call.__dict__.setdefault, "__dynamo_disable", call)
        return cast(_Call, torch._disable_dynamo(call))  # type: ignore[attr-defined]
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(call.__code__, frames._FrameExecStrategy(skip, skip))
    # Where another function is compiled that calls it.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_msg = _WHY  # type: ignore[attr-defined]
    return call
