"""The door: `wrap`, `unwrap`, `full_params`. Plans, and puts the parts together and apart."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from ._config import Config
from ._engine import Engine
from ._errors import InvalidArgument, StateError, StorageError
from ._grad_dtype import check_grad_dtype
from ._hooks import Hooks
from ._host_grad import HostGrad
from ._hybrid import Rates
from ._interrupts import Uninterrupted
from ._model_sizes import parameter_sizes
from ._optimizer import OffloadOptimizer
from ._plan import Plan, make_plan
from ._probe import probe_device, probe_host
from ._rates import measure_rates
from ._resident_move import ResidentMove
from ._torch_func import ask_before_torch_func
from ._torch_updater import TorchUpdater
from ._unified import classify
from ._unified_plan import MemoryKind, advised_against
from ._units import Unit, check_module, find_units
from ._updater import Updater
from ._wrap_checks import (
    check_formats,
    check_memory,
    check_model,
    check_optimizers,
    check_placement,
    check_process,
    check_reach,
    check_shared,
    device_of,
    updater_of,
)

_Optim = TypeVar("_Optim", bound=torch.optim.Optimizer)

# What every wrapped model was given.
_Parts = tuple[Engine, Hooks, tuple[OffloadOptimizer, ...]]
_wrapped: weakref.WeakKeyDictionary[nn.Module, _Parts] = weakref.WeakKeyDictionary()


@overload
def wrap(
    model: nn.Module, optim: torch.optim.Optimizer, *, config: Any = None, **options: Any
) -> tuple[nn.Module, OffloadOptimizer]: ...
@overload
def wrap(
    model: nn.Module, optim: Sequence[torch.optim.Optimizer], *, config: Any = None, **options: Any
) -> tuple[nn.Module, tuple[OffloadOptimizer, ...]]: ...
@overload
def wrap(model: nn.Module, optim: None, *, config: Any = None, **options: Any) -> tuple[nn.Module, None]: ...
def wrap(
    model: nn.Module,
    optim: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
    *,
    config: Config | dict[str, Any] | None = None,
    **options: Any,
) -> tuple[nn.Module, OffloadOptimizer | tuple[OffloadOptimizer, ...] | None]:
    """Lets `model` train with optimizer states, gradients and weights off the device; the loop stays as it is.

    Args:
        model: any module whose trainable parameters are dense fp32, bf16 or fp16. It is returned, with hooks. It
            computes where it is, or on `device`: parameters and buffers that are on the CPU then go there, without any
            that are on the device already, and keep their identity. With `params="host"` their values go straight to
            the host pool, unit by unit, and never lie on the device or twice on the host as a whole, so the model may
            be larger than the device; with `"disk"` they go on to files. Gradients that it has on the CPU are refused.
        optim: a torch optimizer over its parameters, or several. Fresh, or with states to go on from. Of torch's,
            `Adam`, `AdamW` and `Adagrad` run in native code, and so does `offload.Lion`; any other class runs as itself
            over fp32 masters, at its own speed, and so do its methods beside `step` (as `train()`, `eval()` of a
            schedule-free one). None: nothing is trained, weights come and go for evaluation.
        config: a `Config`, or a dict of its fields. `options` are the same fields and win over it.

    Returns:
        The same model, and an `OffloadOptimizer` (a tuple of them for several) to use in the place of `optim`, or None.

    Raises:
        InvalidArgument: an option, model or optimizer that is not legal, or a budget that is too small.
        OutOfHostMemory: the host budget cannot hold what the plan puts there.
        StorageError: `disk_path` cannot be used, or has no space for the states.
        DeviceError: the device does not answer, or cannot update states where `optimizer="unified"` would have them.
        StateError: the model or optimizer is wrapped already, or shares weights with another wrapped model while those
            of one of the two are off the device.
        In every case the model and `optim` are as they were: weights that had left have come back, in new memory.
    """
    settings = Config.resolve(config, options)
    check_process()
    check_grad_dtype(settings.grad_dtype)
    if engine_of(model) is not None:
        raise StateError("this model is wrapped already: call offload.unwrap(model) first")
    check_model(model)
    optimizers = as_list(optim)  # after the model: who gives both the wrong way round is told of that
    if optim is not None:
        check_optimizers(model, optimizers)
        check_formats(settings, optimizers)
    device = device_of(model, settings)
    units = find_units(model, settings.units)
    plan = _plan(model, units, optimizers, settings, device)
    check_placement(plan, optimizers)
    check_shared(model, plan, [(other, engine.plan) for other, (engine, *_) in _wrapped.items()])
    check_memory(model, plan, optimizers)
    ask_before_torch_func()

    engine = Engine(device, plan, settings, units)
    hooks = Hooks(model, engine)
    updaters: list[Updater] = []
    move: ResidentMove | None = None
    taken: list[tuple[OffloadOptimizer, dict[Any, Any]]] = []  # with the states that the wrapped ones had
    try:
        kinds = [(optimizer, updater_of(optimizer)) for optimizer in optimizers]
        trained = [
            (parameter, kind.state_kind_of(optimizer))
            for optimizer, kind in kinds
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad or optimizer.state.get(parameter)
        ]
        updaters += [kind(optimizer, engine) for optimizer, kind in kinds]
        move = ResidentMove(model, device, engine.streaming)
        hooks.register(model, units)
        wrapped = tuple(OffloadOptimizer(o, u, hooks, model) for o, u in zip(optimizers, updaters, strict=True))
        move.commit()
        engine.settle_in(trained)
        if plan.unified_states and device.type == "cuda":
            check_reach(classify(device), engine.pool.stats())
        for updater in updaters:
            updater.begin()
        with Uninterrupted():
            for one, optimizer in zip(wrapped, optimizers, strict=True):
                taken.append((one, dict(optimizer.state)))
                one.take_over()
            _wrapped[model] = (engine, hooks, wrapped)
        return model, _given_as(optim, wrapped)
    except BaseException:  # Ctrl-C at the end, too: nobody has what would be returned
        with Uninterrupted():
            _wrapped.pop(model, None)
            for one, states in taken:
                one.release(states)
            hooks.remove()
            updaters.clear()  # what they and the states hold may be needed for the weights that come back
            engine.drop_states()
            engine.streaming.give_back()
            if move is not None:
                move.undo()
            engine.close()
        raise


def unwrap(
    model: nn.Module, optim: OffloadOptimizer | Sequence[OffloadOptimizer] | Literal["all"] | None = "all"
) -> tuple[nn.Module, torch.optim.Optimizer | tuple[torch.optim.Optimizer, ...] | None]:
    """Undoes `wrap`: waits for the update, removes every hook, and returns the plain model and optimizer.

    optim: what `wrap` returned. `"all"` stands for that where it is not at hand, as after a cell of a notebook that ran
    twice: one is returned as itself, several as a tuple.

    The optimizer holds its states as stock torch does: in each parameter's dtype, on its device. Gradients become
    plain tensors again. To keep fp32 moments and masters of a 16-bit model, take `optim.state_dict()` first.

    After a failed update that was raised, the states are no longer those of one step: they and gradients on the host
    are given up, weights may be of either step (NaN where a disk has lost them), and the plain model and optimizer are
    ready to load a checkpoint. States or weights on disk that cannot be read raise `StorageError` and count as such a
    failure: the next call gives those up too.

    Raises `StateError` if the model is not wrapped, or inside `full_params`, `InvalidArgument` if `optim` is not what
    wrap returned with it, and the error of an update in flight; nothing was changed then.
    """
    engine, hooks, known = _parts_of(model)
    given_back: Any = optim if optim != "all" else known[0] if len(known) == 1 else known or None
    wrapped = as_list(given_back)
    if sorted(map(id, wrapped)) != sorted(map(id, known)):
        given = ", ".join(type(one).__name__ for one in wrapped) or "no optimizer"
        raise InvalidArgument(
            f"unwrap was given {given}: pass all {len(known)} that offload.wrap returned with this model, each once, "
            "or offload.unwrap(model) alone"
            if known
            else f"unwrap was given {given}: this model was wrapped without an optimizer, pass None"
        )
    engine.streaming.refuse_while_present("offload.unwrap()", "what was written to the weights would be lost")
    # Also those that a group has and the model has not, or no more.
    trained = (p for one in known for group in one.param_groups for p in group["params"])
    parameters = {id(p): p for p in itertools.chain(model.parameters(), trained)}
    held = [(p, p.grad.cell) for p in parameters.values() if isinstance(p.grad, HostGrad)]
    engine.announce_end()
    lossy = engine.has_failed
    if lossy:
        engine.abandon()
        gradients: list[Tensor | None] = [None] * len(held)
        states: list[dict[Tensor, Any]] = [{}] * len(wrapped)
    else:
        engine.synchronize()
        engine.streaming.empty()
        gradients = [cell.materialize().to(p.dtype) for p, cell in held]
    try:
        if not lossy:
            states = [one.plain_states() for one in wrapped]
        resident = engine.streaming.resident_copies(lossy=lossy)
    except StorageError as error:
        engine.fail(str(error))  # who calls again gives up what cannot be read
        raise
    # Nothing was changed until here, and nothing fails from here on.
    with Uninterrupted():
        for parameter, _ in held:
            parameter.grad = None
        hooks.remove()
        engine.streaming.leave(resident)
        for (parameter, _), gradient in zip(held, gradients, strict=True):
            parameter.grad = gradient
        originals = tuple(one.release(own) for one, own in zip(wrapped, states, strict=True))
        engine.close()
        del _wrapped[model]
    return model, _given_as(given_back, originals)


@contextmanager
def full_params(
    model: nn.Module, parameters: nn.Parameter | Iterable[nn.Parameter] | None = None
) -> Iterator[nn.Module]:
    """Inside the context every parameter of the wrapped `model` is present and current, for reading and writing.

    parameters: only these, and those that travel with them; None means all. Others than the model's raise
    `InvalidArgument`. In-place writes re-seed the optimizer's masters at the next step. With `params="host"` or
    `"disk"` the weights are on the device until the context ends: copy what is to outlive it, as autograd does with
    weights that it saves inside.
    """
    engine, *_ = _parts_of(model)
    if parameters is not None:
        if not isinstance(parameters, Iterable):
            raise InvalidArgument(
                f"full_params was given {parameters!r}: give parameters of the model, or None for all"
            )
        parameters = [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)
        known = set(map(id, model.parameters()))
        for number, parameter in enumerate(parameters):
            if id(parameter) not in known and parameter not in engine.streaming:
                raise InvalidArgument(
                    f"parameter {number} given to full_params, {_described(parameter)}, is none of this "
                    f"{type(model).__name__}'s: give parameters of the wrapped model, or None for all"
                )
    engine.synchronize()
    with engine.streaming.present(parameters), engine.streaming.saving_copies():
        yield model


def engine_of(model: nn.Module) -> Engine | None:
    """The engine of a wrapped model; None for any other module."""
    entry = _wrapped.get(model) if isinstance(model, nn.Module) else None
    return None if entry is None else entry[0]


def as_list(optim: _Optim | Sequence[_Optim] | None) -> list[_Optim]:
    """One optimizer, several or none, as a list."""
    if optim is None:
        return []
    if isinstance(optim, torch.optim.Optimizer):
        return [optim]
    if not isinstance(optim, Iterable):
        raise InvalidArgument(f"optim={optim!r}: give a torch.optim.Optimizer, a list of them, or None")
    optimizers = list(optim)
    for number, one in enumerate(optimizers):
        if not isinstance(one, torch.optim.Optimizer):
            raise InvalidArgument(f"optimizer {number} is a {type(one).__name__}: give torch.optim.Optimizer")
    return optimizers


def _given_as(optim: Any, results: tuple[_Optim, ...]) -> Any:
    """`results` in the form in which optimizers were given: one, several or none."""
    if optim is None:
        return None
    return results[0] if isinstance(optim, torch.optim.Optimizer) else results


def _described(given: Any) -> str:
    return f"of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"


def _parts_of(model: nn.Module) -> _Parts:
    check_module(model)
    entry = _wrapped.get(model)
    if entry is None:
        raise StateError(f"this {type(model).__name__} is not wrapped: pass the model that offload.wrap returned")
    return entry


def _plan(
    model: nn.Module,
    units: Sequence[Unit],
    optimizers: list[torch.optim.Optimizer],
    settings: Config,
    device: torch.device,
) -> Plan:
    trained = {
        id(p): updater_of(o).state_kind_of(o)
        for o in optimizers
        for g in o.param_groups
        for p in g["params"]
        if p.requires_grad
    }
    sizes = parameter_sizes(model, units, trained, settings)
    host_bytes = probe_host().available_bytes
    if device.type == "cpu":
        device_bytes = host_bytes
    else:
        # The weights are part of what the plan places, and take memory of one of the two until then.
        there = sum(p.numel() * p.element_size() for p in model.parameters() if p.device == device)
        device_bytes = probe_device(str(device)).free_bytes + there
        host_bytes += sum(size.numel * size.itemsize for size in sizes) - there
    others = sorted({type(o).__name__ for o in optimizers if updater_of(o) is TorchUpdater})
    memory_kind = _memory_kind_of(device) if settings.optimizer_shares.get("unified") else None
    plan = make_plan(
        sizes,
        settings,
        gradient_itemsize=settings.gradient_itemsize,
        device_kind=device.type,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        memory_kind=memory_kind,
        measure=None if others else _measure(device, settings),
        notes=[f"{name}: what it keeps is not known before it runs, two fp32 moments are charged" for name in others],
    )
    if advised_against(memory_kind) and plan.optimizer == "unified":
        why = next(line for line in plan.reason if line.startswith("unified: "))
        warnings.warn(f"optimizer='unified': {why}", stacklevel=3)  # the caller of wrap()
    return plan


def _measure(device: torch.device, settings: Config) -> Callable[[], Rates] | None:
    """Of the CPU as the device nothing is asked: a state that stays there saves no copy."""
    if device.type == "cpu":
        return None
    return partial(measure_rates, device, pin=settings.pins_on(device.type))


def _memory_kind_of(device: torch.device) -> MemoryKind | None:
    return classify(device).kind if device.type == "cuda" else None
