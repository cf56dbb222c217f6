"""What a streamed parameter answers with while it is not on the device."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Parameter

from ._errors import StateError

if TYPE_CHECKING:
    from ._streaming import Streaming

__all__ = ["AwayParameter"]


class AwayParameter:
    """See `_pending.Away`."""

    def __init__(self, streaming: weakref.ref[Streaming], parameter: weakref.ref[Parameter]) -> None:
        self._streaming = streaming
        self._parameter = parameter

    def _those(self) -> tuple[Streaming, Parameter]:
        streaming, parameter = self._streaming(), self._parameter()
        if streaming is None or parameter is None:
            raise StateError("this parameter is of a wrapped model that is gone, and so are its bytes on the host")
        return streaming, parameter

    def __call__(self) -> Tensor | None:
        streaming, parameter = self._those()
        return streaming.read_away(parameter)

    def copy(self) -> Parameter:
        """A resident parameter with its value."""
        streaming, parameter = self._those()
        value = streaming.copy_of(parameter).to(parameter.device, copy=True)
        return Parameter(value, requires_grad=parameter.requires_grad)

    def on_host(self) -> Tensor:
        streaming, parameter = self._those()
        return streaming.copy_of(parameter)

    def __reduce__(self) -> Any:
        raise StateError(
            "a parameter that is not on the device cannot be pickled by its attributes: save model.state_dict()"
        )
