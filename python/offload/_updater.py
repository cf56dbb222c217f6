"""Updater: what `OffloadOptimizer` asks of whoever runs the arithmetic of the optimizer that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch.nn import Parameter

from ._checkpoint import Groups, SavedState
from ._engine import Engine
from ._grad_factors import GradScale
from ._parameter_state import ParameterState

__all__ = ["Updater"]


class Updater(Protocol):
    """Runs the arithmetic of one wrapped optimizer and owns what it keeps of each parameter.

    Making one checks the optimizer and its parameters. `groups` are always the user's own; `pairs` are their parameters
    with what a state_dict holds of each, `others` its entries of no parameter.
    """

    engine: Engine

    @staticmethod
    def state_kind_of(optimizer: torch.optim.Optimizer) -> type[ParameterState]:
        """Of which kind the states of this optimizer are."""

    @property
    def announces_updates(self) -> bool:
        """Whether the engine asks before each update of a step (`Engine.watch`)."""

    def begin(self) -> None:
        """Makes the states of its parameters, which are where they will be, and takes copies of those it has."""

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raises `InvalidArgument` for settings that cannot be run."""

    def adopt(self, parameter: Parameter) -> None:
        """Makes the state of a parameter. Idempotent."""

    def step(self, groups: Groups, grad_scale: GradScale) -> None:
        """Updates every parameter that has a gradient, or submits that; it reads them times `grad_scale`, in fp32."""

    def method(self, name: str) -> Callable[..., Any] | None:
        """Runs another method of the optimizer's class over what is trained; None where there is none to run so."""

    def dump(self, groups: Iterable[Mapping[str, Any]], *, joined: bool = True) -> dict[Any, Any]:
        """What `optimizer.state` shows, by parameter; submitted updates have ended. A master is joined if asked."""

    def dump_one(self, parameter: Parameter) -> dict[str, Any]:
        """The same of one parameter that has a state, before its first update too."""

    def keys(self, groups: Groups) -> list[Any]:
        """Those of `dump`."""

    def take(self, key: Any, saved: SavedState | None) -> None:
        """Takes a copy of what is to be one entry of `dump`; None: it starts anew. Raises `InvalidArgument` first."""

    def check(
        self,
        groups: Groups,
        saved_groups: Groups,
        pairs: Iterable[tuple[Parameter, SavedState | None]],
        others: Mapping[Any, Any],
    ) -> None:
        """Raises `InvalidArgument` for what load() cannot take."""

    def load(
        self, groups: Groups, pairs: Iterable[tuple[Parameter, SavedState | None]], others: Mapping[Any, Any]
    ) -> None:
        """Takes copies of checked states; without one a parameter starts anew. The groups are loaded already."""

    def plain_states(self) -> dict[Any, Any]:
        """The states as stock torch would hold them, by parameter."""

    def release(self, states: Mapping[Any, Any]) -> None:
        """Gives the wrapped optimizer these states, and its attributes as they are now."""
