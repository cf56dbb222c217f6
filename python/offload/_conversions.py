"""Refuses what would convert the parameters of a wrapped model: `model.half()`, `.to("meta")`, `to_empty()` and others.

All of these go through `torch.nn.Module._apply`: of the model, of a part of it, or of what it is a part of. While a
model is wrapped another function stands there and asks first, with stand-ins that have no memory, what would become of
each parameter; so what is refused has changed nothing. A module's own attribute in its place would go with every copy
of the module, and would not know whose it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ._errors import StateError
from ._pending import can_be_pending, reading_metadata

_Apply = Callable[..., Any]
_beneath: _Apply = nn.Module._apply  # what `_apply` stands in the place of
_stands = False

# By id(parameter) of a wrapped model: that and what holds its bytes, both weakly, its name, and where it computes.
_Known = tuple["weakref.ref[Parameter]", "weakref.ref[Any]", str, torch.device]
_known: dict[int, _Known] = {}


class NoConversions:
    """Of one wrapped model, until `remove()`. owner: as long as it lives the parameters are not the user's alone.

    device: where the model computes, to which it may come back from the host.
    """

    def __init__(self, model: nn.Module, owner: object, device: torch.device) -> None:
        _forget(())  # those of models that were dropped
        self._ids = [id(parameter) for parameter in model.parameters()]
        for name, parameter in model.named_parameters():
            _known[id(parameter)] = weakref.ref(parameter), weakref.ref(owner), name, device
        global _beneath, _stands
        if not _stands:
            _beneath, nn.Module._apply = nn.Module._apply, _apply  # type: ignore[method-assign]
            _stands = True

    def remove(self) -> None:
        _forget(self._ids)


def _forget(ids: Sequence[int]) -> None:
    for number in ids:
        _known.pop(number, None)
    for number in [number for number, (one, owner, *_) in _known.items() if one() is None or owner() is None]:
        del _known[number]
    global _stands
    # Where somebody has put another one over it, which calls it, it stays, and asks of nothing.
    if not _known and nn.Module._apply is _apply:
        nn.Module._apply = _beneath  # type: ignore[method-assign]
        _stands = False


class _Asked:
    """A conversion that was found to change no parameter: modules inside need not ask again."""

    def __init__(self, convert: Callable[[Tensor], Tensor]) -> None:
        self._convert = convert

    def __call__(self, tensor: Tensor) -> Tensor:
        return self._convert(tensor)


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    if not isinstance(fn, _Asked):
        _ask(self, fn, recurse)
        fn = _Asked(fn)
    return _beneath(self, fn, recurse)


def _ask(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
    try:
        for name, parameter, device in _known_in(module, recurse):
            _check(f"{name} of a wrapped model", parameter, device, fn)
            gradient = _gradient_of(parameter)
            if gradient is not None:
                _check(f"the gradient of {name} of a wrapped model", gradient, device, fn)
    except StateError:
        if isinstance(module, nn.RNNBase):  # its own _apply has forgotten them before it came here
            module._flat_weight_refs = [None if one is None else weakref.ref(one) for one in module._flat_weights]
        raise


def _gradient_of(parameter: Parameter) -> Tensor | None:
    return reading_metadata(lambda: parameter.grad)


def _known_in(module: nn.Module, recurse: bool) -> Iterator[tuple[str, Parameter, torch.device]]:
    for parameter in module.parameters(recurse):
        one, owner, name, device = _known.get(id(parameter), (None, None, "", parameter.device))
        # A class of its own may have its own way to a device, as quantized ones have.
        theirs = one is not None and one() is parameter and owner is not None and owner() is not None
        if theirs and can_be_pending(parameter):
            yield name, parameter, device


@torch.no_grad()
def _check(what: str, tensor: Tensor, device: torch.device, convert: Callable[[Tensor], Tensor]) -> None:
    """Raises StateError unless `convert` gives back what it gets, or takes it to the host, or back to `device`."""
    stand_in = reading_metadata(lambda: _StandIn(tensor))
    stand_in.home = device
    try:
        given = convert(stand_in)
        becomes = "" if given is stand_in else f"become a {type(given).__name__}"
    except _Changed as changed:
        becomes = str(changed)
    except Exception as error:  # whatever it does to one that has no memory
        becomes = f"be changed ({type(error).__name__}: {error})"
    if becomes:
        raise StateError(
            f"{what} would {becomes}: nothing was changed; call offload.unwrap(model, optim), convert the plain model "
            "and wrap it again"
        )


def _same_place(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index == other.index or None in (one.index, other.index))


class _Changed(Exception):
    """What a stand-in would have become."""


class _StandIn(Tensor):
    """Has what a tensor is, and none of its memory. home: where the model computes."""

    home: torch.device

    @staticmethod
    def __new__(cls, tensor: Tensor) -> _StandIn:
        made: _StandIn = Tensor._make_wrapper_subclass(
            cls,
            tensor.size(),
            strides=tensor.stride(),
            dtype=tensor.dtype,
            device=tensor.device,
            layout=tensor.layout,
        )
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        itself = args[0]
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        if func is torch.ops.aten._to_copy.default:
            kept = dtype in (None, itself.dtype) and kwargs.get("memory_format") in (None, torch.preserve_format)
            # As Lightning takes every model away when it is done, and brings it when it goes on.
            if kept and device is not None and (device.type == "cpu" or _same_place(device, itself.home)):
                return itself
            asked = [
                str(one) for one, had in ((device, itself.device), (dtype, itself.dtype)) if one not in (None, had)
            ]
            raise _Changed(f"become {' and '.join(asked) or 'one of other strides'}")
        raise _Changed(f"lose its value to {func.__name__}")

    def share_memory_(self) -> _StandIn:
        return self  # keeps its value, in other memory: of streamed weights that is an access

    def _read(self, *_: Any, **__: Any) -> Any:
        raise _Changed("be read")  # torch would look at memory that is not there

    data_ptr = untyped_storage = _typed_storage = storage = numpy = tolist = _read
