"""Registers the hooks that connect a model to an engine, and removes every one of them. No policy."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from . import _trace
from ._activation_region import ModelRegion, in_torch_func
from ._conversions import NoConversions
from ._cuda_graphs import CompiledGraphs
from ._engine import Engine, EngineUnit
from ._foreign_steps import ForeignSteps
from ._grad_dtype import WideGradient
from ._interrupts import Uninterrupted
from ._pending import PendingParameter, make_current
from ._uncompiled import not_compiled
from ._units import Unit
from ._weight_casts import WeightCasts


class ModuleHook:
    """A hook that does nothing in a copied or unpickled module: the copy is not the engine's model."""

    def __init__(self, call: Callable[[], None] | None) -> None:
        self.call = call  # what it does; a trace replaces it for a while

    @not_compiled
    def __call__(self, *_: Any) -> None:
        if self.call is not None:
            self.call()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleHook:
        return ModuleHook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        # Takes anything and does nothing, as ModuleHook(None), where offload may not be installed.
        return getattr, (contextlib.nullcontext(), "__exit__")


class ForwardHook(ModuleHook):
    """A ModuleHook that is called with what the forward was given and what it returned; None when it raised."""

    def __init__(self, call: Callable[[Any, Any], None] | None) -> None:
        self._call_with = call

    @not_compiled
    def __call__(self, module: nn.Module, *arguments: Any) -> None:
        if self._call_with is not None:
            self._call_with(arguments[:-1], arguments[-1])

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardHook:
        return ForwardHook(None)


class Hooks:
    """All hooks of one wrapped model, from `register()` on; `remove()` leaves none, whatever has interrupted that."""

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        self._engine = engine
        # For traces. Weakly: a unit may be the model, which must be free to die.
        self.model = weakref.ref(model)
        # The name of its unit, each module, and the hook that makes the unit ready.
        self.modules: list[tuple[str, weakref.ref[nn.Module], ModuleHook]] = []
        self._handles: list[RemovableHandle | WideGradient | NoConversions | ForeignSteps | ModelRegion] = []
        self._watched: set[int] = set()
        self._watches_nodes = set[int]()  # modules, by identity
        self._widened: set[int] = set()

    def register(self, model: nn.Module, units: Sequence[Unit]) -> None:
        engine = self._engine
        self._handles.append(NoConversions(model, engine, engine.lanes.device))
        self._handles.append(ForeignSteps(engine))
        if engine.streaming.residencies:
            self._give_and_take_values(model)
        for module in _with_parameters(model):
            hook = ModuleHook(_keep_parameters(module, engine))
            self._handles.append(module.register_load_state_dict_post_hook(hook))  # type: ignore[no-untyped-call]
        # Prepended one after another, so the model's own hook, registered last, runs before its unit's.
        for unit, engine_unit in zip(units, engine.units, strict=True):
            for module in unit.modules:
                ready = self._before_forward(module, _make_ready(engine, engine_unit))
                self.modules.append((unit.name, weakref.ref(module), ready))
                if engine.streaming.residencies:
                    engine_unit.touch = _touch(engine, engine_unit.number)
                    self._after_forward(module, _watch_backward(module, engine, engine_unit))
                    self._before_forward(module, self._watch_hooked(module))
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder) and len(module.layers):
                self._before_forward(module, _show_first_layer(module.layers[0], engine))
        self._before_forward(model, engine.begin_forward)
        if engine.activations is not None or engine.streaming.residencies:
            casts = WeightCasts(engine.streaming, engine.activations)
            region = ModelRegion(model, engine.activations, casts)
            self._before_forward(model, region.enter)
            leave = ModuleHook(region.leave)
            self._handles.append(model.register_forward_hook(leave, always_call=True))
            self._handles.append(region)
            what = "activations that come and go" if engine.activations is not None else "weights that come and go"
            self._before_forward(model, CompiledGraphs(model, what).check)
        if engine.streaming.residencies:
            self._end_forward(model)
        _trace.wrapped(self)

    @property
    def engine(self) -> Engine:
        return self._engine

    def _before_forward(self, module: nn.Module, call: Callable[[], None]) -> ModuleHook:
        hook = ModuleHook(call)
        self._handles.append(module.register_forward_pre_hook(hook, prepend=True))
        return hook

    def _after_forward(self, module: nn.Module, call: Callable[[Any, Any], None]) -> int:
        self._watches_nodes.add(id(module))
        # Also after a forward that raised, or that a checkpoint's recompute leaves early.
        handle = module.register_forward_hook(ForwardHook(call), always_call=True, with_kwargs=True)
        self._handles.append(handle)
        return handle.id

    def _watch_hooked(self, module: nn.Module) -> Callable[[], None]:
        """A hook of somebody's on a part of a unit may keep what the part was given or returned, for a loss of it."""
        watched, itself = self._watches_nodes, weakref.ref(self)
        parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]

        def look() -> None:
            for part in parts:
                if (part._forward_hooks or part._forward_pre_hooks) and id(part) not in watched:
                    hooks = itself()
                    if hooks is not None:
                        hooks._watch_part(part)

        return look

    def _watch_part(self, part: nn.Module) -> None:
        engine = self._engine

        def watch(given: Any, output: Any) -> None:
            unit = engine.streaming.innermost
            if unit is not None and torch.is_grad_enabled() and not in_torch_func():
                touch_before([*tensors_in(given), *tensors_in(output)], engine, unit)

        with Uninterrupted():
            self._watches_nodes.add(id(part))
            # Before theirs, which may return another output than they keep.
            self._handles.append(part.register_forward_hook(ForwardHook(watch), prepend=True, with_kwargs=True))

    def _end_forward(self, model: nn.Module) -> None:
        """Behind the model's other hooks, those that come later too: they may use weights."""
        engine, hooks = self._engine, model._forward_hooks

        def end(_: Any, output: Any) -> None:
            if torch.is_grad_enabled() and not in_torch_func():
                # What units made and did not return, as caches: it comes out here.
                touch_before(tensors_in(output), engine, None)
            engine.end_forward()

        own = self._after_forward(model, end)

        def go_last() -> None:
            if own in hooks and next(reversed(hooks)) != own:
                with Uninterrupted():
                    hooks[own] = hooks.pop(own)

        self._before_forward(model, go_last)

    def _give_and_take_values(self, model: nn.Module) -> None:
        """state_dict() has copies of streamed weights, and load_state_dict() finds them on the device."""
        streaming = self._engine.streaming
        for module in _with_parameters(model):
            parameters = [p for p in module._parameters.values() if p is not None]
            before = ModuleHook(functools.partial(streaming.open_for_writing, parameters))
            self._handles.append(module.register_load_state_dict_pre_hook(before))  # type: ignore[no-untyped-call]
            give = ModuleHook(functools.partial(streaming.begin_copies, id(module)))
            self._handles.append(module.register_state_dict_pre_hook(give))  # type: ignore[no-untyped-call]
            end = ModuleHook(functools.partial(streaming.copies.end, id(module)))
            self._handles.append(module.register_state_dict_post_hook(end))  # type: ignore[no-untyped-call]

    def watch_gradient(self, parameter: Parameter) -> None:
        """From now on the gradient of `parameter` leaves the device as soon as backward has made it. Idempotent."""
        if id(parameter) in self._watched:
            return
        self._watched.add(id(parameter))
        name = self._engine.name_of(parameter)
        # The parameter, as an earlier user hook may replace the argument that torch passes. Weakly, as the garbage
        # collector does not see through these hooks: what they refer to would never die.
        its_lanes, itself = weakref.ref(self._engine.lanes), weakref.ref(parameter)

        @not_compiled
        def take(_: Tensor) -> None:
            lanes, parameter = its_lanes(), itself()
            if lanes is not None and parameter is not None:
                lanes.take(parameter, name)

        self._handles.append(parameter.register_post_accumulate_grad_hook(take))  # type: ignore[no-untyped-call]

    def widen_gradient(self, parameter: Parameter) -> None:
        """From now on gradients of a 16-bit `parameter` add up in fp32. Idempotent; frozen ones may be of any dtype."""
        if id(parameter) not in self._widened and parameter.dtype in (torch.bfloat16, torch.float16):
            self._widened.add(id(parameter))
            self._handles.append(WideGradient(parameter))

    def remove(self) -> None:
        _trace.unwrapped(self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._watched.clear()
        self._widened.clear()


def _with_parameters(model: nn.Module) -> Iterator[nn.Module]:
    """Those that hold parameters, in them or in their parts: no others have anything to give, and a ScriptModule among
    these takes no hooks."""
    return (module for module in model.modules() if next(module.parameters(), None) is not None)


def _keep_parameters(module: nn.Module, engine: Engine) -> Callable[[], None]:
    """Undoes what `load_state_dict(assign=True)` does to parameters: they stay the same objects and take the values."""
    weakly = weakref.ref(module)
    kept = dict(module._parameters)

    @torch.no_grad()
    def keep() -> None:
        module = weakly()
        assert module is not None  # it is being loaded
        for name, parameter in kept.items():
            assigned = module._parameters.get(name)
            if parameter is not None and assigned is not None and assigned is not parameter:
                setattr(module, name, parameter)  # as torch assigns: a recurrent layer lists its weights
                engine.streaming.open_for_writing([parameter])
                parameter.copy_(assigned)

    return keep


def _show_first_layer(layer: nn.Module, engine: Engine) -> Callable[[], None]:
    """torch's encoder looks at the class of its first layer's weights before it calls that, and packs a padded batch in
    evaluation only where they are plain tensors: so they are."""
    parameters = list(layer.parameters())

    def show() -> None:
        if not layer.training:
            for parameter in parameters:
                engine.streaming.bring(parameter)
                if isinstance(parameter, PendingParameter):
                    make_current(parameter)

    return show


def _make_ready(engine: Engine, unit: EngineUnit) -> Callable[[], None]:
    return functools.partial(engine.make_ready, unit)


# In the metadata of a node of autograd: the unit that is touched before it runs.
_TOUCHES = "offload.touches"


def _watch_backward(module: nn.Module, engine: Engine, unit: EngineUnit) -> Callable[[Any, Any], None]:
    """After its forward: backward touches `unit` before it runs the nodes that made its outputs."""
    modules = list(module.modules())

    def watch(given: Any, output: Any) -> None:
        engine.leave(unit)
        if not torch.is_grad_enabled():
            return
        if in_torch_func():
            engine.streaming.refuse_torch_func(
                parameter for inner in modules for parameter in inner._parameters.values()
            )
            return
        found = [output] if isinstance(output, Tensor) else list(tensors_in(output))
        for inner in modules:
            found += _tensors_kept(inner)
        arguments, named = given
        for value in (*arguments, *named.values()):
            if type(value) in (list, dict):  # that it may have added to
                found += tensors_in(value, depth=2)
        for tensor in found:
            if engine.streaming.shares_memory(unit.number, tensor):
                engine.streaming.pin(unit.number)  # who uses the output uses the weight
        touch_before(found, engine, unit.number)

    return watch


def touch_before(tensors: Iterable[Tensor], engine: Engine, unit: int | None) -> None:
    """Backward touches a unit before it runs the nodes that made these: the one within `unit` whose forward made each,
    else `unit` itself. None is the whole model: what no unit made is touched by nobody.
    """
    for tensor in tensors:
        # The base too: an edit in place of a view gives the view a new node, and the base's stays.
        for made in (tensor, tensor._base):
            node: Any = None if made is None else made.grad_fn
            # Who returns what another unit made has no nodes of its own behind it.
            if node is not None and _TOUCHES not in node.metadata:
                maker = engine.streaming.maker_of(node._sequence_nr(), unit)
                if maker is not None:
                    node.metadata[_TOUCHES] = engine.units[maker].name
                    node.register_prehook(engine.units[maker].touch)


def _touch(engine: Engine, unit: int) -> Callable[[Any], None]:
    """What nodes of `unit` call. Graphs must not keep the engine, nor a unit's states."""
    weakly = weakref.ref(engine)

    @not_compiled
    def touch(_: Any) -> None:
        engine = weakly()
        if engine is not None:
            engine.streaming.touch_in_backward(unit)

    return touch


# What every module has: its parts, parameters, hooks.
_ATTRIBUTES_OF_ALL = frozenset(vars(nn.Module()))


def _tensors_kept(module: nn.Module) -> list[Tensor]:
    """Those that a forward left in attributes, as auxiliary losses are: in them or in lists, tuples and dicts.

    Not parameters: recurrent layers list theirs, which nobody else uses, and who does is seen when it reads them.
    """
    attributes, found = vars(module), list[Tensor]()
    for name in tuple(attributes):
        if name in _ATTRIBUTES_OF_ALL:
            continue
        value = attributes.get(name)
        if isinstance(value, (Tensor, list, tuple, dict)):
            found += [tensor for tensor in tensors_in(value, depth=2) if not isinstance(tensor, Parameter)]
    return found


def tensors_in(value: Any, depth: int = 8) -> Iterator[Tensor]:
    """Every tensor in what a forward returned: containers, dataclasses and plain objects are looked into."""
    if isinstance(value, Tensor):
        yield value
    elif depth == 0 or value is None or isinstance(value, (str, bytes, int, float, type, nn.Module)):
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, depth - 1)
    elif isinstance(value, (tuple, list, set, frozenset)):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from tensors_in(item, depth - 1)
