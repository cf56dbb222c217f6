"""What state_dict() has of weights that are away: copies in host memory, or the host bytes themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Parameter

from ._residency import Residency
from ._stored_values import LentWeight
from ._weight_window import WeightStore, WeightWindow

__all__ = ["WeightCopies"]


class WeightCopies:
    """See the module's text. While one state_dict() runs, a parameter has the same copy wherever it is met."""

    def __init__(self, store: WeightStore, window: WeightWindow) -> None:
        self._store = store
        self._window = window
        # While state_dict() runs: a copy of each parameter that it has come to, and the id of its module.
        self._copies: dict[int, Tensor] | None = None
        self._copied = 0
        self._lends = False

    @property
    def are_asked(self) -> bool:
        """Whether a state_dict() runs: who reads a weight that is away has its copy."""
        return self._copies is not None

    def begin(self, module: int) -> None:
        """state_dict() of a module begins: parameters give copies of their values until that of the outermost ends."""
        if self._copies is None or self._copied == module:  # or an error ended the last one
            self._copies = {}
            self._copied = module

    def end(self, module: int) -> None:
        if self._copied == module:
            self._copies = None

    def clear(self) -> None:
        """Values may change."""
        if self._copies is not None:
            self._copies.clear()

    def forget(self) -> None:
        """Values change: a state_dict() whose copies are still there has ended by an error, which no hook tells."""
        self._copies = None

    def of(self, residency: Residency, parameter: Parameter) -> Tensor:
        """A copy of the parameter's value, which travels with `residency`."""
        self._window.flush()
        self._store.settle_updates([parameter])
        known = None if self._copies is None else self._copies.get(id(parameter))
        if known is None:
            stored = self._store.stored_weight(residency, parameter) if self._lends else None
            with torch.inference_mode(False):
                if stored is None:
                    self._store.hold(residency)
                    known = residency.on_host(parameter)
                else:
                    known = LentWeight(stored)
                if not self._lends:
                    known = known.clone()
            if self._copies is not None:
                self._copies[id(parameter)] = known
        return known

    @contextlib.contextmanager
    def lending(self) -> Iterator[None]:
        """Inside the context state_dict() gives the host bytes themselves, to be read before a weight changes.

        Weights on disk are `LentWeight`s.
        """
        self._lends = True
        try:
            yield
        finally:
            self._lends = False
