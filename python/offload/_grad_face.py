"""HostGrad, the face of a GradCell: the tensor that stands in `p.grad` while the gradient's bytes are away.

[Note: serving a gradient] What training loops do to gradients is served without bringing them back: norms are taken
on the way out, scales wait for the optimizer, zeroing and copying need no old value. Everything else runs on a device
copy: a read drops it, an edit sends it off again, and where anything still reaches its memory after the operation
(a view, an array, a kept reference) it becomes the owner until nothing does. What reaches it is counted, not read
from operator schemas, some of which lie; a foreign operator (not torch's own) may edit what its schema calls
constant, so it always leaves the copy as the owner.

Autograd adds the next micro-batch in place: that is an edit on the device, by torch, with torch's bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _foreach_utils

from ._errors import StateError
from ._grad_cell import GradCell
from ._grad_factors import SCALES, UNSCALE, Factor, make_factor
from ._uncompiled import not_compiled
from ._units import is_dense

__all__ = ["HostGrad", "face_of", "total_norm"]

_aten = torch.ops.aten

_INFINITY_NORM = (_aten._foreach_norm.Scalar, float("inf"), None)


class HostGrad(Tensor):
    """A face of a GradCell: shape, strides, dtype and device of the gradient, and its values on demand."""

    __slots__ = ("cell",)  # no dict of its own for every gradient

    cell: GradCell

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})

    # These reach for the memory before any operator is dispatched; a face has none.

    @property
    def data(self) -> HostGrad:
        return face_of(self.cell)

    @data.setter
    def data(self, value: Tensor) -> None:
        cell = self.cell
        if isinstance(value, HostGrad):
            value = value.cell.own_on_device()
        if (value.shape, value.stride(), value.dtype) != (cell.shape, cell.strides, cell.dtype):
            raise StateError(
                f"the gradient of {cell.name!r} is held by offload: its .data must keep shape {tuple(cell.shape)}, "
                f"strides {cell.strides} and {cell.dtype}, got {tuple(value.shape)}, {value.stride()} and "
                f"{value.dtype}; assign the parameter's .grad instead"
            )
        if value.device == cell.device:
            cell.replace(value)
        else:  # module.cpu() gives it a copy elsewhere: it stays where it is held
            cell.overwrite(value)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.clone())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = copy = self.clone()
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def numpy(self, *, force: bool = False) -> Any:
        return self._through("numpy", force=force)

    def tolist(self) -> Any:
        return self._through("tolist")

    def __dlpack__(self, **options: Any) -> Any:
        return self._through("__dlpack__", **options)

    def untyped_storage(self) -> torch.UntypedStorage:
        storage: torch.UntypedStorage = self._through("untyped_storage")
        return storage

    def data_ptr(self) -> int:
        return self.cell.expose().data_ptr()

    def share_memory_(self) -> HostGrad:
        self.cell.expose().share_memory_()  # type: ignore[no-untyped-call]
        return self

    def _through(self, method: str, **options: Any) -> Any:
        """Calls a method of the device copy, which becomes the owner where the result shares its memory."""
        result = getattr(self.cell.lend(), method)(**options)
        self.cell.settle()
        return result


def face_of(cell: GradCell) -> HostGrad:
    """A new face. Not a call of the class, in which Python and torch look for what else is to be made of it."""
    # By position: names of arguments cost it a fifth more.
    face: HostGrad = _make_face(HostGrad, cell.shape, cell.strides, None, None, cell.dtype, torch.strided, cell.device)
    face.cell = cell
    return face


_make_face = torch.Tensor._make_wrapper_subclass

# The same code paths as for plain tensors, and so the same bits: clipping and optimizers look here.
if HostGrad not in _foreach_utils._foreach_supported_types:
    _foreach_utils._foreach_supported_types.append(HostGrad)


# --- serving operators ------------------------------------------------------------------------------------


class _Traits(NamedTuple):
    """What an operator's schema and name tell."""

    written: frozenset[int | str]  # arguments, by position and by name
    reshapes: bool  # edits shape or strides in place
    foreign: bool  # not torch's own
    foreach: bool


@functools.cache
def _traits(func: Any) -> _Traits:
    schema = getattr(func, "_schema", None)
    if schema is None:  # a higher-order operator
        return _Traits(frozenset(), False, True, False)
    written: set[int | str] = set()
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written |= {argument.name} if argument.kwarg_only else {argument.name, position}
    return _Traits(
        frozenset(written),
        torch.Tag.inplace_view in func.tags,
        func.namespace != "aten",
        schema.name.startswith("aten::_foreach_"),
    )


@not_compiled
def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    serve = _SERVED.get(func)
    if serve is not None:
        result = serve(func, args, kwargs)
        if result is not NotImplemented:
            return result
    traits = _traits(func)
    if traits.reshapes:
        raise StateError(
            f"{func} would change the shape of a gradient that offload holds: assign a new tensor to .grad instead"
        )
    if traits.foreach and not kwargs and isinstance(args[0], (list, tuple)) and len(args[0]) > 1 and _is_uniform(args):
        return _one_at_a_time(func, args)
    return _run_on_copies(func, args, kwargs, traits)


class _Loan:
    """The faces that one operation borrows copies of. No local function: one that calls itself is a reference cycle,
    which would keep the gradients until the garbage collector comes by."""

    def __init__(self) -> None:
        self.faces: list[HostGrad] = []
        self.written: set[int] = set()

    def lend(self, value: Any, is_written: bool) -> Any:
        if isinstance(value, HostGrad):
            self.faces.append(value)
            if is_written:
                self.written.add(id(value.cell))
            return value.cell.lend()
        if isinstance(value, (list, tuple)):
            return [self.lend(item, is_written) for item in value]
        return value


def _run_on_copies(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], traits: _Traits) -> Any:
    """The general way, see [Note: serving a gradient]."""
    loan = _Loan()
    result: Any = None
    lent: Any = None
    lent_by_name: Any = None
    begun = False
    try:
        lent = [loan.lend(value, position in traits.written) for position, value in enumerate(args)]
        lent_by_name = {name: loan.lend(value, name in traits.written) for name, value in kwargs.items()}
        begun = True
        result = func(*lent, **lent_by_name)
        return _with_faces(result, {id(face.cell.lend()): face for face in reversed(loan.faces)})
    finally:
        result = lent = lent_by_name = None
        cells = {id(face.cell): face.cell for face in loan.faces}
        for key, cell in cells.items():  # all of them before one departs: the store may refuse
            if begun and (traits.foreign or key in loan.written):
                cell.own_on_device()
        if not (begun and traits.foreign):
            for cell in cells.values():
                cell.settle()


def _with_faces(result: Any, faces: dict[int, HostGrad]) -> Any:
    """An operator that returns its argument returns the face it was given."""
    if isinstance(result, Tensor):
        return faces.get(id(result), result)
    if isinstance(result, (list, tuple)):
        return type(result)([_with_faces(item, faces) for item in result])
    return result


def _is_uniform(args: tuple[Any, ...]) -> bool:
    """Whether torch takes one path for the whole of these lists, so that one at a time gives the same bits.

    It does for dense tensors of one dtype and device, with the same layout in each position of the lists.
    """
    lists = [value for value in args if isinstance(value, (list, tuple)) and isinstance(value[0], Tensor)]
    leaders = lists[0]
    kind = (leaders[0].dtype, leaders[0].device, torch.strided)
    return all(
        (tensor.dtype, tensor.device, tensor.layout) == kind
        and (type(tensor) is HostGrad or is_dense(tensor))
        and (tensor is leader or (tensor.shape, tensor.stride()) == (leader.shape, leader.stride()))
        for tensors in lists
        for tensor, leader in zip(tensors, leaders, strict=True)
    )


def _one_at_a_time(func: Any, args: tuple[Any, ...]) -> Any:
    """A `_foreach_` operator item by item: never more than one gradient is on the device."""
    results: list[Any] = []
    for index in range(len(args[0])):
        item = [[value[index]] if isinstance(value, (list, tuple)) else value for value in args]
        results.append(func(*item))
    return None if results[0] is None else [result[0] for result in results]


def _share(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return face_of(args[0].cell)


def _return_self(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0]


def _zero(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args[0].cell.zero()
    return args[0]


def _foreach_zero(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for tensor in args[0]:
        tensor.zero_()


def _copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target, source = args[0], args[1]
    if not isinstance(target, HostGrad):
        return NotImplemented
    if isinstance(source, HostGrad):
        if source.cell is target.cell:
            return target
        source = source.cell.materialize()
    target.cell.overwrite(source)
    return target


def _padded(args: tuple[Any, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    return args + defaults[len(args) :]


def _vector_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    gradient, order, dim, keepdim = _padded(args, (None, 2, None, False))
    if dim or keepdim:
        return NotImplemented
    return gradient.cell.norm((func, float(order), kwargs.get("dtype"))).clone()


def _foreach_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors, order, dtype = _padded(args, (None, 2, None))
    if not _is_uniform((tensors,)):
        return NotImplemented
    # Copies, as the caller may edit them, and all in one operation: on a card each is a launch.
    return list(torch.stack(_norms(tensors, order, dtype)).unbind())


def _norms(tensors: Sequence[Tensor], order: float, dtype: torch.dtype | None) -> list[Tensor]:
    """As `torch._foreach_norm` of tensors of one dtype, for who does not edit what it returns."""
    operation = _aten._foreach_norm.Scalar
    key = (operation, float(order), dtype)
    plain = [tensor for tensor in tensors if not isinstance(tensor, HostGrad)]
    others = iter(operation(plain, order, dtype) if plain else ())
    return [tensor.cell.norm(key) if isinstance(tensor, HostGrad) else next(others) for tensor in tensors]


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm over all elements of all gradients, summed in fp32: a scalar on their device, 0 for none."""
    if not gradients:
        return torch.zeros(())
    # In one call; but of several dtypes it would take all gradients to the device at once.
    alike = len({gradient.dtype for gradient in gradients}) == 1
    norms: list[Tensor] = []
    for some in [gradients] if alike else [[gradient] for gradient in gradients]:
        norms += _norms(some, 2.0, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), 2.0)
    return norm


def _scale(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`mul_` and `div_` of one gradient."""
    gradient, scale = args
    if not isinstance(gradient, HostGrad) or not _defer(gradient.cell, _Scale(func, scale)):
        return NotImplemented
    return gradient


def _foreach_scale(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors, scales = args
    if not _is_uniform((tensors,)):
        return NotImplemented
    one_scale = None if isinstance(scales, (list, tuple)) else _Scale(func, scales)
    for index, tensor in enumerate(tensors):
        scale = one_scale or _Scale(func, scales[index])
        if not isinstance(tensor, HostGrad) or not _defer(tensor.cell, scale):
            _run_on_copies(func, ([tensor], [scale.value] if one_scale is None else scale.value), {}, _traits(func))
    return None


def _unscale(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """GradScaler's check and scale: torch's own operator looks at the infinity norms instead of the gradients."""
    tensors, found_inf, inverse_scale = args
    if not _is_uniform((tensors,)):
        return NotImplemented
    scale = _Scale(func, inverse_scale)
    norms: list[Tensor] = []
    for tensor in tensors:
        cell = tensor.cell if isinstance(tensor, HostGrad) else None
        if cell is not None and cell.can_defer() and scale.factor_for(cell) is not None:
            norm = cell.norm(_INFINITY_NORM)
            # Taking it may have made a device copy the owner: then nothing can wait any more.
            if _defer(cell, scale):
                norms.append(norm)
                continue
        _run_on_copies(func, ([tensor], found_inf, inverse_scale), {}, _traits(func))
    if norms:
        func([torch.stack(norms)], found_inf, inverse_scale)
    return None


class _Scale:
    """The scale of one call: copied once, for the first gradient that defers it, and shared by the others."""

    def __init__(self, operation: Any, value: Any) -> None:
        self.operation = operation
        self.value = value
        self._factor: Factor | None = None
        self._asked = False

    def factor_for(self, cell: GradCell) -> Factor | None:
        if not self._asked:
            self._asked = True
            self._factor = make_factor(self.operation, self.value, cell.dtype, cell.device, cell.store)
        return self._factor


def _defer(cell: GradCell, scale: _Scale) -> bool:
    factor = scale.factor_for(cell) if cell.can_defer() else None
    if factor is None:
        return False
    cell.defer(factor)
    return True


_SERVED: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    _aten.detach.default: _share,
    _aten.alias.default: _share,
    _aten.detach_.default: _return_self,
    _aten.zero_.default: _zero,
    _aten._foreach_zero_.default: _foreach_zero,
    _aten.copy_.default: _copy,
    _aten.linalg_vector_norm.default: _vector_norm,
    _aten._foreach_norm.Scalar: _foreach_norm,
    **{func: _foreach_scale if "_foreach_" in func.__name__ else _scale for func in SCALES},
    UNSCALE: _unscale,
}
