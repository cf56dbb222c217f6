"""ResidentMove: what stays resident goes to the compute device, for a model that was built on the CPU.

That is every parameter that is not streamed, and the buffers. As with `model.to(device)`, parameters keep their
identity and buffers are replaced; unlike it, a move can be undone until `wrap` has succeeded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._errors import InvalidArgument
from ._pending import can_be_pending
from ._streaming import Streaming


class ResidentMove:
    """Making one copies to `device` and changes nothing; a model that is there already needs no copy.

    Raises `InvalidArgument` naming a parameter that cannot go, streamed ones included, and what torch raises when the
    device has no room.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, device: torch.device, streaming: Streaming) -> None:
        self._model = model
        self._moved: dict[int, Tensor] = {}
        self._originals: list[tuple[Parameter, Tensor]] = []
        self._buffers: list[tuple[dict[str, Any], str, Tensor]] = []
        away = [(name, parameter) for name, parameter in model.named_parameters() if parameter.device != device]
        for name, parameter in away:
            _check(name, parameter, device)
        for name, parameter in away:
            if parameter in streaming:
                continue
            with torch._C.DisableTorchFunctionSubclass():
                moved = parameter.to(device)
                if not torch._has_compatible_shallow_copy_type(parameter, moved):
                    raise _cannot_go(name, parameter, device, f"its layout is {parameter.layout}")
                self._originals.append((parameter, parameter.data))
            self._moved[id(parameter)] = moved
        if not away:
            return  # a buffer that the user keeps elsewhere stays there
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.device != device:
                    self._buffers.append((module._buffers, key, buffer))
                    if id(buffer) not in self._moved:
                        self._moved[id(buffer)] = buffer.to(device)

    def commit(self) -> None:
        """The model has the copies afterwards; after an error `undo()` takes them back."""
        for parameter, _ in self._originals:
            _set_data(parameter, self._moved[id(parameter)])
        for buffers, key, buffer in self._buffers:
            buffers[key] = self._moved[id(buffer)]
        self._moved.clear()  # the weights of an RNN are about to move once more
        ours = {id(parameter) for parameter, _ in self._originals}
        for module in self._model.modules():
            # As its own `to()` does: cuDNN wants the weights of an RNN in one stretch.
            if isinstance(module, nn.RNNBase) and all(id(parameter) in ours for parameter in module.parameters()):
                module.flatten_parameters()

    def undo(self) -> None:
        """The model has what it had, in the memory that it had. Cannot fail."""
        for parameter, original in self._originals:
            _set_data(parameter, original)
        for buffers, key, buffer in self._buffers:
            buffers[key] = buffer


def _check(name: str, parameter: Parameter, device: torch.device) -> None:
    if parameter.grad is not None:
        raise InvalidArgument(
            f"{name} has a gradient on {parameter.grad.device} and is to compute on {device}: call zero_grad() before "
            f"offload.wrap, or model.to({str(device)!r}) where it is to be kept"
        )
    if can_be_pending(parameter):
        return
    kind = type(parameter)
    if kind.to is not Tensor.to or kind.cuda is not Tensor.cuda or is_traceable_wrapper_subclass(parameter):
        raise _cannot_go(name, parameter, device, f"a {kind.__name__} has its own way to a device")


def _cannot_go(name: str, parameter: Parameter, device: torch.device, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"{name} is on {parameter.device} and cannot go to {device} in place ({why}): call model.to({str(device)!r}) "
        "before the optimizer is made and the model is wrapped"
    )


def _set_data(parameter: Parameter, value: Tensor) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        parameter.data = value
