"""What `wrap` asks of its process, model, optimizers and options before anything is changed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._config import Config, format_size
from ._errors import DeviceError, InvalidArgument, StateError
from ._native_state import AdagradState
from ._native_updater import NativeUpdater
from ._optimizer import OffloadOptimizer
from ._plan import Plan
from ._probe import named_device
from ._torch_updater import TorchUpdater, check_torch_optimizer
from ._unified import MemoryFacts
from ._units import check_module, is_dense

__all__ = [
    "check_formats",
    "check_memory",
    "check_model",
    "check_optimizers",
    "check_placement",
    "check_process",
    "check_reach",
    "check_shared",
    "device_of",
    "updater_of",
]


def check_process() -> None:
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size.strip() not in ("", "1"):
        raise InvalidArgument(
            f"WORLD_SIZE={world_size}: training in several processes is not supported yet (it would train separate "
            "models); start one process without torchrun"
        )


def check_model(model: nn.Module) -> None:
    check_module(model)
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__name__ in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel") or any(
            base.__name__ == "FSDPModule" for base in kind.__mro__
        ):
            raise InvalidArgument(
                f"{name or 'the model'} is a {kind.__name__}: data parallelism is not supported yet; "
                "wrap the plain module"
            )
        if isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None:
            raise InvalidArgument(
                f"{name or 'the model'} is a torch.jit.ScriptModule with parameters: its code reads them without "
                "asking whether their update has ended; wrap the module that it was made from, or keep it outside of "
                "the model given to wrap. Without parameters it is legal"
            )
    if next(model.parameters(), None) is None:
        raise InvalidArgument(f"this {type(model).__name__} has no parameters: there is nothing to offload")
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise InvalidArgument(f"{name} has no shape yet, as a Lazy module makes it: run one forward before wrap")
        if parameter.is_meta:
            raise InvalidArgument(f"{name} is on the meta device: materialise and initialise the model first")
        if parameter.is_inference():
            raise InvalidArgument(
                f"{name} was made inside torch.inference_mode(), where nothing can be trained or written to later: "
                "make the model outside of it"
            )


def check_optimizers(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    if not optimizers:
        raise InvalidArgument("no optimizer given: pass a torch.optim.Optimizer over the model's parameters")
    known = {id(parameter) for parameter in model.parameters()}
    owner: dict[int, int] = {}
    for index, optimizer in enumerate(optimizers):
        if isinstance(optimizer, OffloadOptimizer):
            raise StateError("this optimizer is wrapped already: call offload.unwrap(model, optim) first")
        if updater_of(optimizer) is TorchUpdater:
            check_torch_optimizer(optimizer, model)
        if not any(group["params"] for group in optimizer.param_groups):
            raise InvalidArgument("the optimizer has only empty groups: give it the model's parameters")
        for number, group in enumerate(optimizer.param_groups):
            if not group["params"]:
                raise InvalidArgument(f"group {number} of the optimizer is empty: remove it or give it parameters")
            for flag in ("differentiable", "capturable"):
                if group.get(flag):
                    raise InvalidArgument(f"group {number} has {flag}=True, which is not supported: pass {flag}=False")
            for position, parameter in enumerate(group["params"]):
                if id(parameter) not in known:
                    raise InvalidArgument(
                        f"parameter {position} of group {number}, of shape {tuple(parameter.shape)}, is not the "
                        "model's: build the optimizer from model.parameters() of the model given to wrap"
                    )
                if owner.setdefault(id(parameter), index) != index:
                    raise InvalidArgument(
                        f"parameter {position} of group {number} is in two optimizers: each parameter needs one"
                    )


def check_shared(model: nn.Module, plan: Plan, others: Iterable[tuple[nn.Module, Plan]]) -> None:
    """others: what is wrapped already. A weight that comes and goes for one model is away when another needs it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for other, its_plan in others:
        shared = [names[id(parameter)] for parameter in other.parameters() if id(parameter) in names]
        if shared and (plan.params != "device" or its_plan.params != "device"):
            raise StateError(
                f"{shared[0]} is a weight of a {type(other).__name__} that is wrapped already, and weights that come "
                "and go do so for one wrapped model: wrap a module that holds both, with the optimizers of both in one "
                "tuple; or pass params='device' for both"
            )


def check_memory(model: nn.Module, plan: Plan, optimizers: list[torch.optim.Optimizer]) -> None:
    """A weight whose update runs elsewhere has its memory for itself: what shares it would not know of the update."""
    if plan.optimizer == "device":
        return
    given = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    trained = {id(p) for p in given if p.requires_grad}
    places, with_gaps = [], []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.layout is torch.strided and tensor.numel() > 0 and not is_traceable_wrapper_subclass(tensor):
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            begin = tensor.data_ptr()
            if id(tensor) in trained or is_dense(tensor):
                places.append((begin, begin + (last + 1) * tensor.element_size(), id(tensor) in trained, name))
            else:
                with_gaps.append((name, tensor))
    places.sort()
    reach, of_trained = (0, ""), (0, "")  # how far what came before goes, with its name
    for begin, end, is_trained, name in places:
        until, before = reach if is_trained else of_trained
        if begin < until:
            raise _shared(name, before, name if is_trained else before)
        reach = max(reach, (end, name))
        if is_trained:
            of_trained = max(of_trained, (end, name))
    for name, tensor in with_gaps:  # in which a weight may lie
        for begin, end, is_trained, weight in places:
            if is_trained and _has_bytes_in(tensor, begin, end):
                raise _shared(name, weight, weight)


def _shared(one: str, other: str, trained: str) -> InvalidArgument:
    return InvalidArgument(
        f"{one} and {other} share memory, and the optimizer updates {trained}: "
        "with optimizer='device' alone the other would change with it; make them one parameter "
        "(`b.weight = a.weight`), or give one memory of its own (`p.data = p.data.clone()`)"
    )


def _has_bytes_in(tensor: Tensor, begin: int, end: int) -> bool:
    """Whether an element of `tensor` has bytes in that range of addresses."""
    itemsize = tensor.element_size()
    low = begin - itemsize + 1  # where an element begins that ends in it
    sizes = zip(tensor.stride(), tensor.shape, strict=True)
    steps = sorted(((stride * itemsize, size) for stride, size in sizes if stride and size > 1), reverse=True)

    def begins_there(place: int, depth: int) -> bool:
        if depth == len(steps):
            return low <= place < end
        stride, size = steps[depth]
        inner = sum(step * (count - 1) for step, count in steps[depth + 1 :])
        index = max(0, -((place - low) // stride))  # the first that does not begin before it
        if index < size and place + index * stride < end:
            return True
        first = max(0, -((place + inner - low) // stride))  # of those that begin before it and may come to it
        return any(begins_there(place + number * stride, depth + 1) for number in range(first, min(index, size)))

    return begins_there(tensor.data_ptr(), 0)


def check_formats(settings: Config, optimizers: list[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        if settings.master == "bf16" and updater_of(optimizer) is TorchUpdater:
            raise InvalidArgument(
                f"master='bf16': {type(optimizer).__name__} runs as itself, over fp32 masters; bf16 masters are for "
                "Adam, AdamW, Adagrad and offload.Lion, pass master='auto'"
            )
        if settings.moments == "fp32":
            continue
        if updater_of(optimizer) is TorchUpdater:
            why = "runs as itself, with states of its own"
        elif updater_of(optimizer).state_kind_of(optimizer) is AdagradState:
            why = "never forgets: the rounding errors of its sum would add up for ever"
        else:
            continue
        raise InvalidArgument(
            f"moments={settings.moments!r}: {type(optimizer).__name__} {why}; small moments are for Adam, AdamW and "
            "offload.Lion, pass moments='fp32'"
        )


def check_placement(plan: Plan, optimizers: list[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        if updater_of(optimizer) is not TorchUpdater:
            continue
        if plan.optimizer == "mixed":
            raise InvalidArgument(
                f"{type(optimizer).__name__} cannot have a share of its states on the host: its own step may compute "
                "over several parameters at once, in one place; pass optimizer='host' or optimizer='device'"
            )
        if plan.params == "disk":
            raise InvalidArgument(
                f"{type(optimizer).__name__} cannot train weights on disk: its own step computes over all of them at "
                "once; pass params='host', or use Adam, AdamW, Adagrad or offload.Lion"
            )
        if plan.optimizer == "unified":
            raise InvalidArgument(
                f"{type(optimizer).__name__} cannot have unified states: its own step makes them on the "
                "device; pass optimizer='host', or use Adam, AdamW, Adagrad or offload.Lion"
            )
        if plan.optimizer == "disk":
            raise InvalidArgument(
                f"{type(optimizer).__name__} cannot have its states on disk: its own step computes over tensors; pass "
                "optimizer='host', or use Adam, AdamW, Adagrad or offload.Lion"
            )
        if plan.params == "host" and plan.optimizer == "device":
            raise InvalidArgument(
                f"{type(optimizer).__name__} on the device steps over all weights at once, and params='host' keeps "
                "them away: pass optimizer='host', or params='device'"
            )


def check_reach(facts: MemoryFacts, pool: Mapping[str, Any]) -> None:
    """Raises `DeviceError` where the device cannot update states in the pool."""
    if facts.pageable_memory_access:
        return
    pageable_bytes = pool["mapped_bytes"] - pool["pinned_bytes"]
    if pageable_bytes == 0 and facts.reads_page_locked_memory:
        return
    why = "page-locked memory at the host's addresses"
    if pageable_bytes:
        why = f"{format_size(pageable_bytes)} that are not page-locked ({pool['pin_refusal'] or 'pin=False'})"
    raise DeviceError(f"optimizer='unified': {facts.device} does not read {why}; pass optimizer='host'")


def updater_of(optimizer: torch.optim.Optimizer) -> type[NativeUpdater] | type[TorchUpdater]:
    return NativeUpdater if NativeUpdater.takes(optimizer) else TorchUpdater


def device_of(model: nn.Module, settings: Config) -> torch.device:
    """The device asked for, to which parameters may come from the CPU; else the one that all of them are on."""
    asked = None if settings.device is None else named_device(settings.device)
    places: dict[torch.device, str] = {}  # with the first parameter on each
    for name, parameter in model.named_parameters():
        places.setdefault(parameter.device, name)
    for device, name in places.items():
        if device.type not in ("cpu", "cuda"):
            raise InvalidArgument(f"{name} is on {device}: legal are 'cpu' and 'cuda' devices; call model.to() first")
        if asked is not None and device not in (asked, torch.device("cpu")):
            raise InvalidArgument(
                f"device={settings.device!r}, but {name} is on {device}: call model.to({str(asked)!r}) first, or pass "
                f"device={str(device)!r}"
            )
    if asked is not None:
        return asked
    if len(places) > 1:
        where = " and ".join(f"{name} on {device}" for device, name in places.items())
        raise InvalidArgument(
            f"there are {where}: one device computes; pass device= to name it, and what is on the CPU goes there"
        )
    only = next(iter(places))
    if only.type == "cpu" and torch.cuda.is_available():
        warnings.warn(
            "the model is on the CPU although there is an accelerator, so it trains on the CPU: pass device='cuda' to "
            "train there, or device='cpu' to say that it is meant",
            stacklevel=3,
        )
    return only
