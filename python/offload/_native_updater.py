"""NativeUpdater: torch's Adam and AdamW, run by the native core or, on the device, in its sequence of operations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.nn import Parameter

from . import _checkpoint
from ._adamw import AdamWHyper
from ._checkpoint import Groups, SavedState
from ._engine import Engine, Update
from ._errors import InvalidArgument
from ._parameter_state import AdamWState


class NativeUpdater:
    """Updates through the engine's states; see `_optimizer.Updater`."""

    state_kind = AdamWState

    def __init__(self, original: torch.optim.Optimizer, engine: Engine) -> None:
        self.engine = engine
        self._original = original
        self._decoupled = type(original) is torch.optim.AdamW
        for group in original.param_groups:
            self.check_group(group)
        pairs = [(p, original.state.get(p)) for group in original.param_groups for p in group["params"]]
        for parameter, saved in pairs:
            self._check_state(parameter, saved)
        for parameter, _ in pairs:
            if parameter.requires_grad:
                self.adopt(parameter)
        self._take_states([(parameter, saved) for parameter, saved in pairs if saved])

    @staticmethod
    def takes(optimizer: torch.optim.Optimizer) -> bool:
        """Exact types only: a subclass may do anything in its step. `amsgrad` has a third moment."""
        exact = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        return exact and not any(group.get("amsgrad") for group in optimizer.param_groups)

    def check_group(self, group: Mapping[str, Any]) -> None:
        AdamWHyper.of_group(group, decoupled=self._decoupled)

    def adopt(self, parameter: Parameter) -> None:
        self.engine.adopt(parameter, AdamWState)

    def step(self, groups: Groups, grad_scale: float) -> None:
        updates = []
        for group in groups:
            hyper = AdamWHyper.of_group(group, decoupled=self._decoupled)
            updates += [Update(p, hyper, grad_scale) for p in group["params"] if p.grad is not None]
        self.engine.submit_step(updates)

    # --- states ---------------------------------------------------------------------------------------------

    def dump(self, groups: Iterable[Mapping[str, Any]], *, joined: bool = True) -> dict[Any, Any]:
        states = self._states(groups)
        return {state.parameter: _checkpoint.dump(state, joined=joined) for state in states if state.step > 0}

    def check(
        self,
        groups: Groups,
        saved_groups: Groups,
        pairs: Iterable[tuple[Parameter, SavedState | None]],
        others: Mapping[Any, Any],
    ) -> None:
        _checkpoint.check_groups(groups, saved_groups, decoupled=self._decoupled)
        if others:
            raise InvalidArgument(f"the loaded state has an entry {next(iter(others))!r} that is in none of its groups")
        for parameter, saved in pairs:
            self._check_state(parameter, saved)

    def _check_state(self, parameter: Parameter, saved: SavedState | None) -> None:
        if saved:
            _checkpoint.check_state(self.engine.name_of(parameter), parameter, saved)

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
            state = self.engine.adopt(parameter, AdamWState)
            # A state on the device takes the weight from there.
            with contextlib.nullcontext() if state.on_host else self.engine.streaming.present([parameter]):
                if saved:
                    _checkpoint.load(state, saved)
                else:
                    _checkpoint.reset(state)

    def plain_states(self) -> dict[Any, Any]:
        states = self._states(self._original.param_groups)
        return {state.parameter: _checkpoint.plain(state) for state in states if state.step > 0}

    def release(self, states: Mapping[Any, Any]) -> None:
        self._original.state.update(states)

    def _states(self, groups: Iterable[Mapping[str, Any]]) -> Iterator[AdamWState]:
        for group in groups:
            for parameter in group["params"]:
                state = self.engine.states.get(id(parameter))
                if isinstance(state, AdamWState):
                    yield state
