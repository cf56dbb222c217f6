"""The optimizer state of one parameter, wherever it lives.

A state holds an exact fp32 master of the weight, in one of three forms:

- fp32 parameter: `master` is the weight itself (on the host: its upload source);
- split (bf16 on the host): the working weight plus an int16 `remainder`; no second copy of the weight exists;
- 16-bit with an fp32 `master` beside the working weight.

On the device the working weight is the parameter; on the host it is a buffer that the parameter is refilled from.
A split master needs that buffer: it tells which elements of a parameter the user has overwritten.

A `NativeState` (_native_state.py) holds the optimizer's moments too; classes that are not native keep their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from ._adamw import join_master, round_to_weight, split_master, write_weight
from ._errors import StateError

# No parameter has it: the next step compares the parameter with its working weight.
_UNKNOWN_VERSION = -1

# allocate(dtype, tag) has the parameter's shape and strides, allocate(dtype, tag, count) that many elements in a row.
Allocate = Callable[..., Tensor]


@dataclass(frozen=True)
class SplitMaster:
    """The two live halves of a split master: the bf16 `weight` and the int16 `remainder` of its fp32 value."""

    weight: Tensor
    remainder: Tensor

    def join(self) -> Tensor:
        return join_master(self.weight, self.remainder)

    def join_into(self, out: Tensor) -> None:
        """`join()` without a tensor in between; `out` is fp32 and of the halves' shape."""
        bits = out.view(torch.int32)
        bits.copy_(self.weight.view(torch.int16)).bitwise_left_shift_(16).add_(self.remainder)


class ParameterState:
    """The master of `parameter`, and how many updates it had in `step`.

    `allocate(dtype, tag)` gives a tensor with the parameter's shape and strides, on the tier of the state. `value` has
    the parameter's values: itself, or the host bytes of a streamed one, which are its working weight on the host.
    """

    # Whether the master may be split: only the native update reads and writes one.
    may_split = False

    @classmethod
    def moment_bytes(cls, form: str) -> tuple[int, int]:
        """What the plan charges for the optimizer's moments stored as `form`: an element, and more for each block.

        What a class of its own keeps is not known.
        """
        return 8, 0

    def __init__(
        self,
        name: str,
        parameter: Parameter,
        value: Tensor,
        *,
        on_host: bool,
        split: bool,
        streamed: bool,
        allocate: Allocate,
    ) -> None:
        self.name = name
        self.parameter = parameter
        self.on_host = on_host
        self.streamed = streamed
        self.step = 0
        self.remainder: Tensor | None = None
        self.master: Tensor | None = None
        self._host_weight: Tensor | None = None
        # A streamed weight on the host is the model's own: a master that was loaded waits here for the next step.
        self._loaded: Tensor | None = None
        if on_host and parameter.dtype != torch.float32:
            self._host_weight = allocate(parameter.dtype, "weights")
        if split:
            self.remainder = allocate(torch.int16, "master").zero_()
        elif on_host or parameter.dtype != torch.float32:
            self.master = allocate(torch.float32, "master")
        with torch.no_grad():
            if on_host and not streamed:
                self.working_weight().copy_(value)
            if self.master is not None and self.master.data_ptr() != value.data_ptr():
                self.master.copy_(value)
        # The version of the parameter that the working weight equals; another one means the user wrote to it.
        self.version = parameter._version
        # Where its bytes are; another address means that the user gave it other storage (`p.data = ...`). Streamed ones
        # come and go, and their residency looks for that.
        self.address = 0 if streamed else parameter.data_ptr()
        self.layout = (parameter.dtype, parameter.shape, parameter.stride(), parameter.device)

    def has_moved(self) -> bool:
        """Whether the parameter has other storage than at the last look; `StateError` if it has another layout too."""
        parameter = self.parameter
        if parameter.data_ptr() == self.address:
            return False
        layout = (parameter.dtype, parameter.shape, parameter.stride(), parameter.device)
        if layout != self.layout:
            raise StateError(
                f"{self.name}: became {layout} after wrap, its state is for {self.layout}; call offload.unwrap before "
                "model.to(), .half() and the like, and wrap again"
            )
        return True

    def working_weight(self) -> Tensor:
        """What the parameter is refilled from (host), or the parameter's own values (device)."""
        if not self.on_host:
            return self.parameter.detach()
        if self._host_weight is not None:
            return self._host_weight
        assert self.master is not None
        return self.master

    def tensors(self) -> list[Tensor]:
        """What an update changes, on the tier of the state."""
        parts = (self.remainder, self.master, self.working_weight())
        return [part for part in parts if part is not None]

    def master_value(self) -> Tensor:
        """The fp32 master: the live tensor where one exists, a new one for a split master."""
        if self._loaded is not None:
            return self._loaded
        if self.remainder is not None:
            return join_master(self.working_weight(), self.remainder)
        return self.master if self.master is not None else self.working_weight()

    def live_master(self) -> Tensor | SplitMaster:
        """The master where it lies: nothing is joined."""
        if self._loaded is None and self.remainder is not None:
            return SplitMaster(self.working_weight(), self.remainder)
        return self.master_value()

    @torch.no_grad()
    def set_master(self, value: Tensor) -> None:
        """Makes `value` (any float dtype, any device) the master of a 16-bit parameter, or of any one on the host.

        The parameter itself is not written: `adopt_parameter` decides at the next step whether it still agrees.
        """
        tier = torch.device("cpu") if self.on_host else self.parameter.device
        value = value.to(device=tier, dtype=torch.float32)
        if self.streamed and self.on_host:
            self._loaded = value.clone()
        elif self.remainder is not None:
            weight, low = split_master(value)
            self.remainder.copy_(low)
            self.working_weight().copy_(weight)
        elif self.master is not None:
            self.master.copy_(value)
            if self._host_weight is not None:
                self._host_weight.copy_(round_to_weight(value, self.parameter.dtype))
        self.version = _UNKNOWN_VERSION

    @torch.no_grad()
    def adopt_host_weight(self) -> None:
        """A streamed parameter is away: a loaded master counts where the weight is its value."""
        if self._loaded is not None and self.parameter.dtype != torch.float32:
            weight = self.working_weight()
            if self.remainder is not None:
                rounded, low = split_master(self._loaded)
                self.remainder.copy_(low.masked_fill(rounded.view(torch.int16) != weight.view(torch.int16), 0))
            elif self.master is not None:
                changed = round_to_weight(self._loaded, weight.dtype).view(torch.int16) != weight.view(torch.int16)
                self.master.copy_(torch.where(changed, weight.to(torch.float32), self._loaded))
        self._loaded = None
        self.version = self.parameter._version

    @torch.no_grad()
    def seed_master(self) -> None:
        """Makes the working weight the master: its low bits are forgotten."""
        self._loaded = None
        if self.remainder is not None:
            self.remainder.zero_()
        elif self.master is not None and self.parameter.dtype != torch.float32:
            self.master.copy_(self.working_weight())
        self.version = _UNKNOWN_VERSION

    @torch.no_grad()
    def adopt_parameter(self) -> None:
        """The user wrote to the parameter: elements that differ from the working weight re-seed the master.

        Elements that are unchanged keep their master's low bits, so swapping weights out and back (an EMA evaluation)
        leaves training exactly as it was.
        """
        version, address = self.parameter._version, self.parameter.data_ptr()
        if self.on_host or self.master is not None:  # else the parameter is its own master
            self._take_values()
        if self._loaded is not None:
            return  # it is still to be compared with the weight that was written
        # Last: interrupted before, the next step does all of it again.
        self.version, self.address = version, address

    def _take_values(self) -> None:
        new = self.parameter.detach().to(self.working_weight().device)
        if new.dtype != torch.float32:
            old = self.working_weight() if self.on_host else round_to_weight(self.master_value(), new.dtype)
            changed = new.view(torch.int16) != old.view(torch.int16)
            if self.remainder is not None:
                self.remainder.masked_fill_(changed, 0)
            elif self.master is not None:
                self.master.copy_(torch.where(changed, new.to(torch.float32), self.master))
        if self.on_host:
            self.working_weight().copy_(new)

    @torch.no_grad()
    def follow_master(self) -> None:
        """The fp32 master was written: the working weight becomes its rounded value."""
        if self.parameter.dtype != torch.float32:
            write_weight(self.working_weight(), self.master_value())
