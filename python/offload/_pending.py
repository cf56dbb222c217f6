"""PendingParameter: the class a parameter wears while its bytes are about to change.

After `optim.step()` the new value of a parameter is still being computed. Until it has arrived the parameter's
class is `PendingParameter`: metadata passes, and any other access first waits for the value (torch's own
`UninitializedParameter` swaps classes the same way). Units restore the class before they compute, so inside a
model's forward nothing of this is seen. A streamed parameter that is away wears it too, and answers with an error, or
while copies of the model are made with its value (`Away`).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import graph
from torch.nn import Parameter
from torch.utils._pytree import tree_map

from ._uncompiled import not_compiled

_RESOLVE = "_offload_resolve"  # in the parameter's __dict__ while it is pending: a call that makes it current


# fmt: off
_METADATA_PROPERTIES = (
    "shape", "dtype", "device", "layout", "requires_grad", "grad", "is_leaf", "grad_fn", "ndim", "_version", "names",
    "grad_dtype", "itemsize", "nbytes", "is_cpu", "is_cuda", "is_meta", "is_sparse", "is_quantized", "is_mkldnn",
    "output_nr", "retains_grad", "_backward_hooks", "_post_accumulate_grad_hooks",
)
_METADATA_METHODS = (
    "size", "dim", "stride", "numel", "nelement", "element_size", "is_contiguous", "is_floating_point", "is_complex",
    "storage_offset", "register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "get_device",
    "is_signed", "is_shared", "ndimension", "__hash__", "__len__", "dim_order", "is_inference", "is_conj", "is_neg",
    "is_same_size", "is_distributed", "retain_grad",
)
# fmt: on


def _metadata_calls() -> frozenset[Any]:
    """What tells nothing about a tensor's values, and so need not wait."""
    calls: set[Any] = set()
    for name in _METADATA_PROPERTIES:
        attribute = getattr(Tensor, name, None)
        if attribute is not None and hasattr(attribute, "__get__"):
            calls.add(attribute.__get__)
    for name in ("grad", "requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks", "grad_dtype"):
        attribute = getattr(Tensor, name, None)
        if attribute is not None and hasattr(attribute, "__set__"):
            calls.add(attribute.__set__)
    calls.add(Tensor.grad.__delete__)  # type: ignore[union-attr]
    calls.update(getattr(Tensor, name) for name in _METADATA_METHODS if hasattr(Tensor, name))
    calls.update((torch.numel, torch.is_floating_point, torch.is_complex, torch.is_tensor, torch.is_inference))
    calls.update((torch.is_conj, torch.is_neg, torch.is_same_size, torch.result_type))
    calls.add(torch._has_compatible_shallow_copy_type)  # module.to() asks it
    # New tensors of the same shape: states of optimizers, averages, gradients of zeros, noise.
    calls.update((torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like))
    calls.update((torch.rand_like, torch.randn_like, torch.randint_like))
    calls.update((Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full))
    return frozenset(calls)


_METADATA_CALLS = _metadata_calls()
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]

_CASTS = {
    Tensor.float: torch.float32, Tensor.double: torch.float64, Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
}  # fmt: skip
_MOVES = frozenset((Tensor.to, Tensor.cpu, Tensor.cuda, *_CASTS))
# Their `inputs` are places in the graph: nobody reads a value there.
_GRADIENT_CALLS = frozenset((torch.autograd.grad, torch.autograd.backward))
_HOST_COPY_OF = "_offload_host_copy_of"  # on what `parameter.cpu()` gives of a streamed one: that, and its version
_AROUND_A_CALL = ("torch._compile", "torch._dynamo.eval_frame")

T = TypeVar("T")


def reading_metadata(call: Callable[[], T]) -> T:
    """What `call()` returns. Within it pending parameters answer at once, where else each access takes a microsecond to
    find out that it asks for metadata. Nothing else may be asked for.

    One call of native code and no `with` block: Ctrl-C at the end of one would leave every parameter unguarded.
    """
    result: T = torch._C._disabled_torch_function_impl(call, (), (), {})
    return result


class PendingParameter(Parameter):
    """A parameter whose new value is on its way; see the module's text. Never constructed, only worn."""

    @classmethod
    @not_compiled
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA_CALLS and not (func == Tensor.size and _becomes_a_gradient(_caller())):
            return torch._C._disabled_torch_function_impl(func, types, args, kwargs)  # see reading_metadata()
        if func == Tensor.type and len(args) == 1 and not kwargs:  # its name; with a type, a conversion
            return torch._C._disabled_torch_function_impl(func, types, args, kwargs)
        if func in _MOVES:
            asked = _asked_place(func, *args, **kwargs)
            if asked is not None and _is_there_already(args[0], *asked):
                return args[0]
            away = _away(args[0])
            if asked is not None and away is not None and _goes_to_the_host(args[0], *asked):
                return _marked(away.on_host(), args[0])
        if func in _GRADIENT_CALLS:
            inputs = _inputs_of(func, args, kwargs)
            if any(isinstance(asked, PendingParameter) for asked in inputs):
                return _by_edges(func, inputs, args, kwargs)
        if func == Tensor.view_as and _caller().f_code.co_filename == graph.__file__:
            # So torch comes to the node of a leaf, for its gradient's edge and for hooks of several gradients.
            return torch._C._disabled_torch_function_impl(func, types, args, kwargs)
        if func == _SET_DATA and (args[0] is args[1] or _is_marked(args[1], args[0])):  # what module.to() does then
            return None
        stand_ins = {}
        for parameter in _pending_in((args, kwargs)):
            value = value_of(parameter)
            if value is not parameter:
                stand_ins[id(parameter)] = value
        if stand_ins:
            args, kwargs = tree_map(lambda value: stand_ins.get(id(value), value), (args, kwargs))
        return func(*args, **kwargs)

    # These read the class before any torch function is called, so they are made current here, or stood for.
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            away = _away(self)
            memo[id(self)] = copy.deepcopy(make_current(self), memo) if away is None else away.copy()
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        away = _away(self)
        value = make_current(self) if away is None else away.copy()
        return value.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        away = _away(self)
        return repr(make_current(self) if away is None else away.copy())


class Away(Protocol):
    """The answer of a parameter whose bytes are not on the device."""

    def __call__(self) -> Tensor | None:
        """As `resolve` of make_pending()."""

    def copy(self) -> Parameter:
        """A plain parameter with its value."""

    def on_host(self) -> Tensor:
        """Its value, copied in host memory."""


def make_pending(parameter: Parameter, resolve: Callable[[], Tensor | None] | Away) -> None:
    """From now on an access to the values of `parameter` calls `resolve` first.

    It makes the parameter current, or returns a tensor that is read in its place. An `Away` also gives copies. Only
    plain `torch.nn.Parameter` objects can wear the class (`can_be_pending`).
    """
    make_all_pending((parameter,), (resolve,))


def make_all_pending(parameters: Sequence[Parameter], resolves: Sequence[Callable[[], Tensor | None] | Away]) -> None:
    """The same for several, each with its own call."""
    for parameter, resolve in zip(parameters, resolves, strict=True):
        parameter.__dict__[_RESOLVE] = resolve
        parameter.__class__ = PendingParameter


def can_be_pending(parameter: Tensor) -> bool:
    """Whether `parameter` is a plain Parameter: a subclass has a class of its own that must not be taken off."""
    return type(parameter) in (Parameter, PendingParameter)


def restore(parameter: Parameter) -> None:
    """Takes the class off again: the value is there."""
    restore_all((parameter,))


def restore_all(parameters: Sequence[Parameter]) -> None:
    """The same for several."""
    for parameter in parameters:
        # The class last: interrupted in between, the next access takes it off. A plain parameter never keeps the call.
        parameter.__dict__.pop(_RESOLVE, None)
        parameter.__class__ = Parameter


def noted_on(parameter: Parameter) -> dict[str, Any]:
    """The attributes that users have set on a parameter, whatever it wears."""
    return {name: value for name, value in parameter.__dict__.items() if name != _RESOLVE}


def make_current(parameter: Parameter) -> Parameter:
    """Waits for the value of a pending parameter. Raises what the update raised, and the parameter stays pending."""
    value_of(parameter)
    return parameter


def value_of(parameter: Parameter) -> Tensor:
    """The parameter, whose value is there now, or what is read in its place."""
    while (resolve := parameter.__dict__.get(_RESOLVE)) is not None:
        stand_in: Tensor | None = resolve()
        if stand_in is not None:
            return stand_in
        if parameter.__dict__.get(_RESOLVE) is resolve:
            break
        # Else it is current; or the training thread has submitted its next step meanwhile, which is waited for too.
    restore(parameter)
    return parameter


def is_pending(parameter: Parameter) -> bool:
    """Whether `parameter` wears the class."""
    return type(parameter) is PendingParameter


def is_away(parameter: Parameter) -> bool:
    """Whether a pending parameter is one whose bytes are not on the device."""
    return _away(parameter) is not None


def _away(parameter: Parameter) -> Away | None:
    resolve = parameter.__dict__.get(_RESOLVE)
    return resolve if hasattr(resolve, "copy") else None


def _caller() -> FrameType:
    """Who called the torch function that is asked about, behind the modes that were asked before (a default device) and
    what `not_compiled` puts around a call for torch 2.6."""
    frame = sys._getframe(2)
    while frame.f_back is not None and (
        frame.f_code.co_name == "__torch_function__" or frame.f_globals.get("__name__") in _AROUND_A_CALL
    ):
        frame = frame.f_back
    return frame


def _becomes_a_gradient(caller: FrameType) -> bool:
    """Whether torch asks for the size of what backward begins with: it reads the values after that without asking."""
    return caller.f_code is torch.autograd._make_grads.__code__


def _inputs_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The `inputs` of a call of torch.autograd.grad or backward, as these pass it on."""
    inputs = args[1] if func is torch.autograd.grad and len(args) > 1 else kwargs.get("inputs")
    return inputs if isinstance(inputs, tuple) else ()


def _by_edges(func: Any, inputs: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call, with the edges to pending parameters in the place of these: their gradients need no value of theirs,
    and what backward needs of others comes as in any backward."""
    edges = tuple(_edge_of(asked) if isinstance(asked, PendingParameter) else asked for asked in inputs)
    if func is torch.autograd.backward:
        return func(*args, **{**kwargs, "inputs": edges})
    # torch makes no zeros for an edge.
    zeros = kwargs.get("materialize_grads", False)
    if zeros:
        kwargs = {**kwargs, "materialize_grads": False, "allow_unused": True}
    found = func(args[0], edges, *args[2:], **kwargs)
    if not zeros:
        return found
    tracked = bool(kwargs.get("create_graph"))
    return tuple(
        torch.zeros_like(asked, requires_grad=tracked) if gradient is None else gradient
        for asked, gradient in zip(inputs, found, strict=True)
    )


def _edge_of(parameter: Parameter) -> Any:
    # Torch refuses what needs no gradient, in words that depend on the call.
    return graph.get_gradient_edge(parameter) if parameter.requires_grad else torch.empty(0)


# The place that a move asks for; None where there is none, or more is asked for.
_Place = tuple[torch.device | None, torch.dtype | None]


def _asked_place(func: Any, parameter: Tensor, *args: Any, **kwargs: Any) -> _Place | None:
    if func is Tensor.cpu:
        return (torch.device("cpu"), None) if not args and not kwargs else None
    if func in _CASTS:
        args = (*args, _CASTS[func])
    if func is Tensor.cuda:
        args = args or ("cuda",)
    if kwargs.get("copy") or kwargs.get("memory_format") is not None or not args or isinstance(args[0], Tensor):
        return None
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and device.type == parameter.device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device, dtype


def _is_there_already(parameter: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> bool:
    """Whether the parameter is what it would become: Trainer and Accelerate move every model once."""
    return device in (None, parameter.device) and dtype in (None, parameter.dtype)


def _goes_to_the_host(parameter: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> bool:
    """Whether nothing but the device would change, without a graph, as Lightning moves every model when it is done."""
    to_the_host = device is not None and device.type == "cpu" and dtype in (None, parameter.dtype)
    return to_the_host and not torch.is_grad_enabled()


def _marked(copy: Tensor, parameter: Parameter) -> Tensor:
    """`copy`, which module.cpu() is about to give to the streamed `parameter` for its own value."""
    setattr(copy, _HOST_COPY_OF, (parameter, copy._version))
    return copy


def _is_marked(value: Tensor, parameter: Parameter) -> bool:
    """Whether `value` still is what the streamed parameter has on the host: then there is nothing to move."""
    owner, version = getattr(value, _HOST_COPY_OF, (None, 0))
    return owner is parameter and version == value._version


def _pending_in(value: Any) -> Iterator[PendingParameter]:
    if isinstance(value, PendingParameter):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _pending_in(item)
    elif isinstance(value, dict):
        yield from _pending_in(list(value.values()))
