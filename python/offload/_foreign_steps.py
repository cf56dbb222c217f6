"""Tells of an optimizer of torch's own that trains the weights of a wrapped model, while nobody steps the wrapped one.

A Trainer without `optimizers=` makes such a one: training is then what it is without offload, and the states of the
wrapped optimizer take memory for nothing. No weight and no gradient shows who steps, so one hook of torch's for all
optimizers of the process is there while a model is wrapped.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from ._engine import Engine
from ._interrupts import Uninterrupted
from ._uncompiled import not_compiled

# By engine: the optimizers that have stepped beside its own, and how often its own had stepped by then; None for one
# that has no weight of it.
_Seen = weakref.WeakKeyDictionary[Optimizer, int | None]
_seen: weakref.WeakKeyDictionary[Engine, _Seen] = weakref.WeakKeyDictionary()
_handles: list[RemovableHandle] = []


class ForeignSteps:
    """Of one wrapped model, until `remove()`: warns once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        with Uninterrupted():
            _seen[engine] = weakref.WeakKeyDictionary()
            if not _handles:
                _handles.append(register_optimizer_step_post_hook(_stepped))

    def remove(self) -> None:
        engine = self._engine()
        if engine is not None:
            _seen.pop(engine, None)
        while _handles and not _seen:  # models that were dropped are in it no more
            _handles.pop().remove()


@not_compiled  # a compiled step calls it
def _stepped(optimizer: Optimizer, *_: Any) -> None:
    for engine, seen in list(_seen.items()):
        # The wrapped one itself comes here too, behind a step that was counted.
        count = engine.step.count
        if optimizer not in seen:
            seen[optimizer] = count if _trained_by(optimizer, engine) else None
        elif seen[optimizer] == count:
            del _seen[engine]
            _tell(optimizer, engine)
        elif seen[optimizer] is not None:
            # In turn with the wrapped one, or around its steps, as SAM and Lookahead are: both are meant.
            seen[optimizer] = count


def _trained_by(optimizer: Optimizer, engine: Engine) -> list[str]:
    """The names of the weights that it has in common with the wrapped optimizers of a model."""
    given = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [engine.name_of(parameter) for parameter in given if id(parameter) in engine.states]


def _tell(optimizer: Optimizer, engine: Engine) -> None:
    names = _trained_by(optimizer, engine)
    others = f" and {len(names) - 1} more weights" if len(names) > 1 else ""
    warnings.warn(
        f"this {type(optimizer).__name__} is not the optimizer that offload.wrap returned, and it is the one that "
        f"trains {names[0]}{others} of a wrapped model: nothing of its states is offloaded, and those of the wrapped "
        "optimizer take memory for nothing. Step the one that wrap returned; a Trainer takes it by "
        "`optimizers=(optim, scheduler)`",
        stacklevel=_level_of_caller(),
    )


def _level_of_caller() -> int:
    """That of who called step(), for `_tell`: what torch has between differs by version."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith((__name__, "torch.")):
        level, frame = level + 1, frame.f_back
    return level
