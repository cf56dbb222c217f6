"""NativeUpdater: torch's Adam, AdamW and Adagrad, and Lion, run by the native core.

Where states stay on the device it is torch operations in the native core's sequence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _checkpoint
from ._adagrad import AdagradHyper
from ._adamw import AdamWHyper
from ._checkpoint import Groups, SavedState
from ._engine import Engine
from ._engine_step import Update
from ._errors import InvalidArgument
from ._grad_factors import GradScale
from ._lion import Lion, LionHyper
from ._native_state import AdagradState, AdamWState, Hyper, LionState, NativeState
from ._pending import reading_metadata

# Exact types only: a subclass may do anything in its step.
_KINDS: dict[type[torch.optim.Optimizer], type[NativeState]] = {
    torch.optim.Adam: AdamWState,
    torch.optim.AdamW: AdamWState,
    torch.optim.Adagrad: AdagradState,
    Lion: LionState,
}


class NativeUpdater:
    """Updates through the engine's states; see `_updater.Updater`."""

    def __init__(self, original: torch.optim.Optimizer, engine: Engine) -> None:
        self.engine = engine
        self._original = original
        self._kind = self.state_kind_of(original)
        self._decoupled = type(original) is torch.optim.AdamW
        self._groups: dict[int, Mapping[str, Any]] = {}  # of each parameter at the last step, where updates run ahead
        # What `_hyper_now` has read of each: marks that tell whether it still is so, their values, and the result.
        self._read: dict[int, tuple[list[Any], list[Any], Hyper]] = {}
        for group in original.param_groups:
            self.check_group(group)
        for parameter, saved in self._originals():
            self._check_state(parameter, saved)
            if parameter.requires_grad or saved:
                engine.check_trainable(parameter)

    @property
    def announces_updates(self) -> bool:
        """Copies of what is on disk are read back in the order of its updates: they cannot be waited for in one."""
        watch = self.engine.watch
        return self.engine.disk is None or (watch is not None and watch.keeps_disk)

    def begin(self) -> None:
        pairs = self._originals()
        for parameter, _ in pairs:
            if parameter.requires_grad:
                self.adopt(parameter)
        if self.engine.speculation is not None:
            self.engine.speculation.follow(self._hyper_now)
        self._take_states([(parameter, saved) for parameter, saved in pairs if saved])

    def _originals(self) -> list[tuple[Parameter, SavedState | None]]:
        original = self._original
        return [(p, original.state.get(p)) for group in original.param_groups for p in group["params"]]

    @staticmethod
    def takes(optimizer: torch.optim.Optimizer) -> bool:
        """`amsgrad` has a third moment."""
        return type(optimizer) in _KINDS and not any(group.get("amsgrad") for group in optimizer.param_groups)

    @staticmethod
    def state_kind_of(optimizer: torch.optim.Optimizer) -> type[NativeState]:
        return _KINDS[type(optimizer)]

    def method(self, name: str) -> None:
        """The native classes have `step` alone."""

    def _hyper_of(self, group: Mapping[str, Any]) -> Hyper:
        if self._kind is LionState:
            return LionHyper.of_group(group)
        if self._kind is AdagradState:
            return AdagradHyper.of_group(group)
        return AdamWHyper.of_group(group, decoupled=self._decoupled)

    def _hyper_now(self, parameter: Parameter) -> Hyper | None:
        """A rate may be a tensor, and to read one waits for its device: that happens once for a value.

        A write that no version shows costs the updates ahead: the step reads all anew, and compares.
        """
        group = self._groups.get(id(parameter))
        if group is None:
            return None
        values = [group[key] for key in self._kind.hyperparameters if key != "betas"] + list(group.get("betas", ()))
        marks = [(id(value), value._version) if isinstance(value, Tensor) else value for value in values]
        known = self._read.get(id(group))
        if known is None or known[0] != marks:
            known = self._read[id(group)] = marks, values, self._hyper_of(group)
        return known[2]

    def check_group(self, group: Mapping[str, Any]) -> None:
        self._hyper_of(group)

    def adopt(self, parameter: Parameter) -> None:
        self._adopted(parameter)

    def _adopted(self, parameter: Parameter) -> NativeState:
        known = id(parameter) in self.engine.states
        state = self.engine.adopt(parameter, self._kind)
        if not known and self._kind is AdagradState:
            state.begin_moments(self._original.defaults["initial_accumulator_value"])
        return state

    def step(self, groups: Groups, grad_scale: GradScale) -> None:
        updates = []
        if self.engine.speculation is not None:
            self._groups = {id(parameter): group for group in groups for parameter in group["params"]}
        for group in groups:
            hyper = self._hyper_of(group)
            if id(group) in self._read and self._read[id(group)][2] != hyper:
                del self._read[id(group)]
            gradients = reading_metadata(lambda: [p.grad for p in group["params"]])  # noqa: B023  # called now
            pairs = zip(group["params"], gradients, strict=True)
            updates += [Update(parameter, hyper) for parameter, grad in pairs if grad is not None]
        self.engine.step.submit(updates, self._adopted, grad_scale)

    # --- states ---------------------------------------------------------------------------------------------

    def dump(self, groups: Iterable[Mapping[str, Any]], *, joined: bool = True) -> dict[Any, Any]:
        return {state.parameter: _checkpoint.dump(state, joined=joined) for state in self._states(groups)}

    def dump_one(self, parameter: Parameter) -> dict[str, Any]:
        return _checkpoint.dump(self._adopted(parameter))

    def keys(self, groups: Groups) -> list[Any]:
        return [state.parameter for state in self._states(groups)]

    def take(self, key: Any, saved: SavedState | None) -> None:
        self._check_state(key, saved)
        self._take_states([(key, saved)])

    def check(
        self,
        groups: Groups,
        saved_groups: Groups,
        pairs: Iterable[tuple[Parameter, SavedState | None]],
        others: Mapping[Any, Any],
    ) -> None:
        _checkpoint.check_groups(groups, saved_groups, self._kind, self._hyper_of)
        if others:
            raise InvalidArgument(f"the loaded state has an entry {next(iter(others))!r} that is in none of its groups")
        for parameter, saved in pairs:
            self._check_state(parameter, saved)

    def _check_state(self, parameter: Parameter, saved: SavedState | None) -> None:
        if saved:
            _checkpoint.check_state(self.engine.name_of(parameter), parameter, saved, self._kind)

    def load(
        self, groups: Groups, pairs: Iterable[tuple[Parameter, SavedState | None]], others: Mapping[Any, Any]
    ) -> None:
        for group in groups:  # as torch: an AdamW stays one when it loads what an Adam saved; torch 2.6 has no such key
            if self._decoupled and "decoupled_weight_decay" in group:
                group["decoupled_weight_decay"] = True
        self._take_states(pairs)

    def _take_states(self, pairs: Iterable[tuple[Parameter, SavedState | None]]) -> None:
        for parameter, saved in pairs:
            if not saved and id(parameter) not in self.engine.states:
                continue
            state = self._adopted(parameter)
            # A state on the device takes the weight from there.
            with contextlib.nullcontext() if state.on_host else self.engine.streaming.present([parameter]):
                if saved:
                    _checkpoint.load(state, saved)
                else:
                    _checkpoint.reset(state)

    def plain_states(self) -> dict[Any, Any]:
        states = self._states(self._original.param_groups)
        return {state.parameter: _checkpoint.plain(state) for state in states}

    def release(self, states: Mapping[Any, Any]) -> None:
        self._original.state.update(states)

    def _states(self, groups: Iterable[Mapping[str, Any]]) -> Iterator[NativeState]:
        """The states that torch's own class would have by now."""
        for group in groups:
            for parameter in group["params"]:
                state = self.engine.states.get(id(parameter))
                if isinstance(state, NativeState) and (state.step > 0 or state.from_the_start):
                    yield state
