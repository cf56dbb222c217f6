"""Registers the hooks that connect a model to an engine, and removes every one of them. No policy."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from ._engine import Engine, EngineUnit
from ._units import Unit


class ModuleHook:
    """A hook that does nothing in a copied or unpickled module: the copy is not the engine's model."""

    def __init__(self, call: Callable[[], None] | None) -> None:
        self._call = call

    @torch._disable_dynamo  # type: ignore[attr-defined]  # compiled code breaks its graph here and calls it
    def __call__(self, *_: Any) -> None:
        if self._call is not None:
            self._call()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleHook:
        return ModuleHook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        # Takes anything and does nothing, as ModuleHook(None), where offload may not be installed.
        return getattr, (contextlib.nullcontext(), "__exit__")


class Hooks:
    """All hooks of one wrapped model; `remove()` leaves none."""

    def __init__(self, model: nn.Module, units: Iterable[Unit], engine: Engine) -> None:
        self._engine = engine
        self._handles: list[RemovableHandle] = []
        self._watched: set[int] = set()
        for module in model.modules():
            hook = ModuleHook(_keep_parameters(module))
            self._handles.append(module.register_load_state_dict_post_hook(hook))  # type: ignore[no-untyped-call]
        # Prepended one after another, so the model's own hook, registered last, runs before its unit's.
        for unit, engine_unit in zip(units, engine.units, strict=True):
            for module in unit.modules:
                self._before_forward(module, _make_ready(engine, engine_unit))
        self._before_forward(model, engine.begin_forward)

    def _before_forward(self, module: nn.Module, call: Callable[[], None]) -> None:
        self._handles.append(module.register_forward_pre_hook(ModuleHook(call), prepend=True))

    def watch_gradient(self, parameter: Parameter) -> None:
        """From now on the gradient of `parameter` leaves the device as soon as backward has made it. Idempotent."""
        if id(parameter) in self._watched:
            return
        self._watched.add(id(parameter))
        name = self._engine.name_of(parameter)
        # The parameter, as an earlier user hook may replace the argument that torch passes. Weakly, as the garbage
        # collector does not see through these hooks: what they refer to would never die.
        its_lanes, itself = weakref.ref(self._engine.lanes), weakref.ref(parameter)

        def take(_: Tensor) -> None:
            lanes, parameter = its_lanes(), itself()
            if lanes is not None and parameter is not None:
                lanes.take(parameter, name)

        self._handles.append(parameter.register_post_accumulate_grad_hook(take))  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._watched.clear()


def _keep_parameters(module: nn.Module) -> Callable[[], None]:
    """Undoes what `load_state_dict(assign=True)` does to parameters: they stay the same objects and take the values."""
    current = module._parameters
    kept = dict(current)

    @torch.no_grad()
    def keep() -> None:
        for name, parameter in kept.items():
            assigned = current.get(name)
            if parameter is not None and assigned is not None and assigned is not parameter:
                current[name] = parameter
                parameter.copy_(assigned)

    return keep


def _make_ready(engine: Engine, unit: EngineUnit) -> Callable[[], None]:
    return lambda: engine.make_ready(unit)
