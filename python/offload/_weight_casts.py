"""Casts of streamed weights that autograd saves: kept as (weight, dtype, view), and made again when backward asks.

Under autocast a layer saves a 16-bit copy of its fp32 weight, not the weight: that memory is foreign to the unit and
would stay on the device from forward to backward. Only what is certain is taken: a tensor whose base is the untouched
output of the cast of a whole streamed weight, so that the same cast and the same strides give the same bits. The graph
shows it, so the cast of a frozen weight, which has no history, is saved as any other tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ._activations import Activations
from ._pending import PendingParameter
from ._saved_ranges import KeptTensor, check_version, is_plain, version_witness
from ._streaming import Streaming
from ._uncompiled import not_compiled

__all__ = ["WeightCasts"]

_CAST_NODE = "ToCopyBackward0"


class WeightCasts:
    """Hooks of torch.autograd.graph.saved_tensors_hooks, in front of those of `activations`, where there are any."""

    def __init__(self, streaming: Streaming, activations: Activations | None) -> None:
        self._streaming = weakref.ref(streaming)  # graphs must not keep the engine
        self._activations = activations
        self._is_known = False
        self.asked_count = 0  # calls of pack()

    def expected(self) -> bool:
        """Whether the next forward may save casts: the first one may, and those in which autocast is seen.

        Hooks cost a few microseconds a saved tensor, which a model without autocast need not pay.
        """
        streaming = self._streaming()
        if streaming is None or not streaming.residencies:
            return False
        is_on = torch.is_autocast_enabled(streaming.device.type)
        expected = not self._is_known or streaming.autocast.saw_autocast or is_on
        self._is_known |= torch.is_grad_enabled()
        return expected

    def refuse_wrapped_by_torch_func(self, parameters: Iterable[Tensor]) -> None:
        """Raises `StateError` where torch.func was given streamed weights themselves, which are away."""
        streaming = self._streaming()
        if streaming is not None and streaming.residencies:
            streaming.refuse_torch_func([p for p in map(_unwrapped, parameters) if isinstance(p, PendingParameter)])

    @not_compiled  # compiled code calls it between its graphs
    def pack(self, tensor: Tensor) -> Any:
        """What autograd keeps in place of `tensor`."""
        self.asked_count += 1
        base = tensor if tensor._base is None else tensor._base
        node = base.grad_fn
        if node is not None and node.name() == _CAST_NODE:
            weight = getattr(node.next_functions[0][0], "variable", None)
            streaming = self._streaming()
            is_streamed = streaming is not None and weight in streaming
            if is_streamed and isinstance(weight, Parameter) and _is_whole_cast(base, weight) and is_plain(tensor):
                return SavedCast(self._streaming, weight, tensor)
        return KeptTensor(tensor) if self._activations is None else self._activations.pack(tensor)

    @not_compiled
    def unpack(self, packed: Any) -> Tensor:
        """The tensor that `packed` stands for. Raises `RuntimeError`, as torch, when it was written to since."""
        if isinstance(packed, SavedCast):
            return packed.again()
        if self._activations is not None:
            return self._activations.unpack(packed)
        packed.check()
        tensor: Tensor = packed.tensor
        return tensor


class SavedCast:
    """A view of the cast of a streamed weight.

    The cast also ends with the weight's version: where plain torch would go on with the cast of a value that a step
    has replaced, this raises as torch does for a weight saved without autocast.
    """

    __slots__ = ("_cast_version", "_dtype", "_offset", "_shape", "_streaming", "_stride", "_version", "_weight",
                 "_witness")  # fmt: skip

    def __init__(self, streaming: weakref.ref[Streaming], weight: Parameter, cast: Tensor) -> None:
        self._streaming = streaming
        self._weight = weight
        self._version = weight._version
        self._witness = version_witness(cast)
        self._cast_version = cast._version
        self._dtype = cast.dtype
        self._shape, self._stride, self._offset = cast.shape, cast.stride(), cast.storage_offset()

    def again(self) -> Tensor:
        """The same bits in new memory. Raises `RuntimeError` when the weight or the cast was written to since."""
        check_version(self._weight, self._version, self._weight.dtype, self._weight.shape)
        check_version(self._witness, self._cast_version, self._dtype, self._shape)
        streaming = self._streaming()
        if streaming is not None:
            streaming.bring(self._weight)
        cast = self._weight.detach().to(self._dtype, copy=True)
        return cast.as_strided(self._shape, self._stride, self._offset)


def _unwrapped(parameter: Tensor) -> Tensor | None:
    """What torch.func has wrapped, whose memory it reads without asking the class; None of what it has not."""
    value, functorch = parameter, torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        value = functorch.get_unwrapped(value)
    return None if value is parameter else value


def _is_whole_cast(base: Tensor, weight: Parameter) -> bool:
    """Whether `base` is what `weight.to(dtype)` gives, element for element of its memory; nobody wrote to it."""
    return (
        base._version == 0
        and base.shape == weight.shape
        and base.stride() == weight.stride()
        and base.storage_offset() == 0
        and base.device == weight.device
        and base.untyped_storage().nbytes() == base.numel() * base.element_size()
    )
