"""Updates on the host that begin in backward, ahead of the step that is expected: exact, and off unless asked for.

The states are updated in place, with a backup of what they were. The step takes such an update up when it is the one
that was expected; otherwise, and before anybody reads or writes a state, they become what they were, to the byte. Which
of the two is decided by the native pipeline, once clipping coefficients have landed: see [Note: updates ahead of the
step] in csrc/pipeline/update_ahead.h. Nothing here waits but `settle`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn import Parameter

from . import _native
from ._adamw import FORMATS
from ._errors import OutOfHostMemory
from ._grad_cell import Owner
from ._gradient_lanes import JobGradient
from ._host_grad import HostGrad
from ._native_state import Hyper, NativeState
from ._state_homes import BLOCK_BYTES

if TYPE_CHECKING:
    from ._engine import Engine

# After a step that threw updates away no more are begun for one step, after the next such for two, and so on: clipping
# that is rare costs a step each time, a loss scale or constant clipping next to nothing.
_LONGEST_PAUSE = 64


@dataclass(frozen=True)
class _Ahead:
    """An update that may have begun: whose states, and of which copy of the gradient."""

    slot: int
    gradient: _native.Ticket


class Speculation:
    """See the module's text. room: bytes of backups; the parameters whose gradients leave first have them, for good.

    Gradients leave in another thread than the training's on an accelerator, and never while that one is in here.
    """

    def __init__(self, engine: Engine, room: int) -> None:
        self._engine = engine
        self._room = room
        self._hyper_of: Callable[[Parameter], Hyper | None] | None = None
        self._optimizers = 0
        self._backups: dict[int, _native.HostBuffer] = {}
        self._ahead: dict[int, _Ahead] = {}
        # What was given to the pipeline last, which works in that order. Shared with what outlives the engine.
        self.latest = [_native.Ticket()]
        # How often each gradient has left since the last step, and in that before: in the last backward it is complete.
        self._left: dict[int, int] = {}
        self._expected: dict[int, int] = {}
        self._complete: list[Parameter] = []  # of those, what has not begun
        self._pause = 0
        self._steps_to_sit_out = 0
        self._counted = (0, 0)  # updates kept and thrown away when last looked at
        itself = weakref.ref(self)  # gradients keep their lanes, and must not keep the engine

        def left(parameter: Parameter) -> None:
            if (speculation := itself()) is not None:
                speculation._gradient_left(parameter)

        def ended() -> None:
            if (speculation := itself()) is not None:
                speculation._begin_complete()

        engine.lanes.on_leave, engine.lanes.on_end = left, ended

    def follow(self, hyper_of: Callable[[Parameter], Hyper | None]) -> None:
        """hyper_of: a parameter's hyperparameters as they are now; None where that has none."""
        self._optimizers += 1
        self._hyper_of = hyper_of if self._optimizers == 1 else None

    def why_not(self) -> str | None:
        """Why nothing is ever begun."""
        if self._hyper_of is not None:
            return None
        return "there are several optimizers" if self._optimizers else "the optimizer has no native update"

    def stats(self) -> Mapping[str, int]:
        """Parameters that have a backup, updates kept and thrown away, bytes of the backups."""
        counts = self._engine.pipeline.stats()
        return {
            "parameters": len(self._backups),
            "kept": counts["kept_count"],
            "thrown_away": counts["discarded_count"],
            "backup_bytes": sum(buffer.nbytes for buffer in self._backups.values()),
        }

    # --- in backward ----------------------------------------------------------------------------------------

    def _gradient_left(self, parameter: Parameter) -> None:
        if not self._left:
            self._look_back()
        key = id(parameter)
        self._left[key] = self._left.get(key, 0) + 1
        self._discard([key])
        if self._steps_to_sit_out == 0 and self._left[key] == self._expected.get(key):
            self._complete.append(parameter)
        if not self._engine.lanes.any_waits:
            self._begin_complete()

    def _begin_complete(self) -> None:
        """Once nothing that has left waits: to begin one update would submit its gradient, which may be small, alone.

        What somebody still refers to, as older torch does while a gradient's hooks run, leaves with a later one, and
        the last at the end of backward.
        """
        self._complete = [waiting for waiting in self._complete if not self._begin(waiting)]

    def _look_back(self) -> None:
        """At the first gradient of a step: how the last one ended."""
        stats = self._engine.pipeline.stats()
        kept, thrown_away = stats["kept_count"], stats["discarded_count"]
        if thrown_away > self._counted[1]:
            self._pause = min(max(1, 2 * self._pause), _LONGEST_PAUSE)
            self._steps_to_sit_out = self._pause
        elif kept > self._counted[0]:
            self._pause = 0
        self._counted = kept, thrown_away

    def _begin(self, parameter: Parameter) -> bool:
        """Begins the update of a parameter where that can be; False while its gradient has not left."""
        engine = self._engine
        state, gradient = engine.states.get(id(parameter)), parameter.grad
        if not isinstance(state, NativeState) or state.by_device or self._hyper_of is None:
            return True
        if not isinstance(gradient, HostGrad) or gradient.cell.strides != parameter.stride():
            return True
        if gradient.cell.owner is not Owner.HOST:
            return False
        taken = engine.lanes.for_step(parameter)
        backup = self._backup_of(parameter)
        hyper = self._hyper_now(parameter)
        if backup is None or hyper is None or taken.factors:
            return True
        slot = engine.slots[id(parameter)]
        tickets = [*taken.tickets, *engine.step.readers_of(state)]
        scalars = hyper.native_scalars(state.step + 1)
        self._ahead[id(parameter)] = _Ahead(slot, taken.tickets[0])  # first: Ctrl-C may come before it has begun
        job = (slot, taken.address, FORMATS[taken.dtype], tickets, scalars, ())
        self.latest[0] = self._engine.pipeline.speculate(job, backup.address)
        taken.release_after(self.latest[0])
        return True

    def _hyper_now(self, parameter: Parameter) -> Hyper | None:
        assert self._hyper_of is not None
        try:
            return self._hyper_of(parameter)
        except (KeyError, TypeError, ValueError):  # the step will say so, where they are no better by then
            return None

    def _backup_of(self, parameter: Parameter) -> _native.HostBuffer | None:
        if id(parameter) not in self._backups:
            nbytes = self._engine.pipeline.backup_bytes(self._engine.slots[id(parameter)])
            rounded = -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES
            if rounded > self._room:
                return None
            self._room -= rounded  # first: after Ctrl-C there is less of it, and never more than the plan has
            try:
                self._backups[id(parameter)] = self._engine.pool.acquire(nbytes, "backups")
            except OutOfHostMemory:  # the pool is in pieces
                self._room = 0
                return None
        return self._backups[id(parameter)]

    # --- at the step, and around it -------------------------------------------------------------------------

    def expect(self, gradients: Iterable[tuple[Parameter, JobGradient]]) -> None:
        """Before the submission of a step over these gradients: others, and changed ones, are thrown away.

        The pipeline compares the rest: addresses, scalars and factors.
        """
        same = {
            id(parameter)
            for parameter, taken in gradients
            if id(parameter) in self._ahead and taken.tickets[0] is self._ahead[id(parameter)].gradient
        }
        self._discard([key for key in self._ahead if key not in same])

    def submitted(self) -> None:
        """The step was submitted: it takes up what it can."""
        self._ahead.clear()
        self._complete.clear()
        self._expected, self._left = self._left, {}
        self._steps_to_sit_out = max(0, self._steps_to_sit_out - 1)

    def forget(self) -> None:
        """Gradients were dropped: what is added up begins anew. A forked child drops its own, and no step follows."""
        if self._engine.is_forked:
            return
        self._discard(list(self._ahead))
        self._complete.clear()
        self._left.clear()

    def settle(self, parameters: Iterable[Parameter] | None = None) -> None:
        """The states, or those of these parameters, are those of the last step once this returns."""
        self._discard(list(self._ahead) if parameters is None else [id(parameter) for parameter in parameters])
        self._engine.pipeline.wait(self.latest)

    def _discard(self, keys: Collection[int]) -> None:
        slots = [self._ahead[key].slot for key in keys if key in self._ahead]
        if slots:
            self.latest[0] = self._engine.pipeline.discard(slots)
            for key in keys:
                self._ahead.pop(key, None)


def why_not_ahead(engine: Engine) -> str | None:
    """Why no update ever begins in backward; None where some do."""
    plan = engine.plan
    if engine.speculation is not None:
        return engine.speculation.why_not()
    if plan.params != "device":
        return f"weights are on the {plan.params}"
    if plan.optimizer not in ("host", "mixed"):
        return f"states are not in host memory, the plan has them on {plan.optimizer!r}"
    if plan.gradients != "host":
        return "gradients stay on the device until step()"
    return "the optimizer has no native update"
