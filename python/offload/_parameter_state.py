"""The optimizer state of one parameter, wherever it lives.

A state holds a master of the weight, exact and in fp32 but for the last of four forms:

- fp32 parameter: `master` is the weight itself (on the host: its upload source);
- split (bf16 on the host): the working weight plus an int16 `remainder`; no second copy of the weight exists;
- 16-bit with an fp32 `master` beside the working weight;
- bf16 and its own master: the working weight is all there is, rounded stochastically by every step.

States on disk have the same forms, but for the working weight, which stays in memory: that of an fp32 parameter is the
parameter itself. What changes a state goes over its pieces, of which one in memory has a single one.

A working weight that lives on disk is the unit's, with the weights that it travels with, and in memory for a while only
(`WeightHome`): the upper half of a split master, or the whole of an fp32 one. Lower halves are where the moments are.

On the device the working weight is the parameter; on the host it is a buffer that the parameter is refilled from.
A split master needs that buffer: it tells which elements of a parameter the user has overwritten.

A `NativeState` (_native_state.py) holds the optimizer's moments too; classes that are not native keep their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from ._adamw import round_to_weight, split_master, write_weight
from ._errors import StateError
from ._old_weight import OldWeight, same_bits
from ._parameter_size import MasterFormat
from ._state_pieces import Piece, Stretch, whole
from ._state_store import StateStore, StoredArrays
from ._stored_values import SplitMaster, StoredValue, StoredWeight, flat

# No parameter has it: the next step compares the parameter with its working weight.
_UNKNOWN_VERSION = -1

# allocate(dtype, tag) has the parameter's shape and strides, allocate(dtype, tag, count) that many elements in a row.
Allocate = Callable[..., Tensor]


class WeightHome(Protocol):
    """Where the working weight of a parameter is, that comes to memory and goes."""

    def present(self) -> Tensor:
        """In memory, until that of another parameter is asked for. Raises `StorageError`."""

    def stored(self) -> StoredWeight:
        """For who reads it later, from disk."""


class ParameterState:
    """The master of `parameter`, and how many updates it had in `step`.

    `allocate(dtype, tag)` gives a tensor with the parameter's shape and strides, on the tier of the state. `value` has
    the parameter's values: itself, or the host bytes of a streamed one, which are its working weight on the host.
    on_host: the tier is the host. by_device: the device updates it, on the host over its link. store: where master and
    moments go, None: to that tier. The update of such a state runs on the host all the same.
    weight_home: of a working weight that is on disk, or is the master of a state on the device and comes and goes.
    """

    # Whether the master may be split: only the native update reads and writes one.
    may_split = False
    # Whether it may live on disk: torch's own classes want tensors.
    may_be_stored = False

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
        by_device: bool,
        master_format: MasterFormat,
        streamed: bool,
        allocate: Allocate,
        store: StateStore | None = None,
        weight_home: WeightHome | None = None,
    ) -> None:
        self.name = name
        self.parameter = parameter
        self.on_host = on_host
        self.by_device = by_device
        self.master_format = master_format
        self.streamed = streamed
        self.step = 0
        self.remainder: Tensor | None = None
        self.master: Tensor | None = None
        self._host_weight: Tensor | None = None
        # A streamed weight on the host is the model's own: where it is not that of the master, the next step decides.
        self._is_other = False
        self._old_weight: OldWeight | None = None  # what it was, of a split master: others tell by themselves
        if streamed and on_host and master_format == "split":
            self._old_weight = OldWeight(name, parameter, store)
        # Whether a master was given that may have more bits than the weight, before the first step.
        self._was_set = False
        self.moments: dict[str, Any] = {}
        self.stored: StoredArrays | None = None
        self._weight_home = weight_home
        if on_host and parameter.dtype != torch.float32 and weight_home is None:
            self._host_weight = allocate(parameter.dtype, "weights")
        arrays = self.arrays_on_disk(parameter.dtype, split=master_format == "split", streamed=streamed)
        if store is not None:
            self.stored = store.place(name, arrays, parameter.numel())
        if self.stored is None or "master" not in arrays:
            if master_format == "split":
                self.remainder = allocate(torch.int16, "master").zero_()
            elif master_format == "fp32" and (parameter.dtype != torch.float32 or (on_host and weight_home is None)):
                self.master = allocate(torch.float32, "master")
        with torch.no_grad():
            if self.has_host_weight() and not streamed:
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
                f"{self.name}: became {_described(layout)} after wrap, its state is for {_described(self.layout)}; "
                "call offload.unwrap before what changes shape, dtype or device of a parameter, and wrap again"
            )
        return True

    @classmethod
    def arrays_on_disk(cls, dtype: torch.dtype, *, split: bool, streamed: bool) -> dict[str, torch.dtype]:
        """What of the state of a parameter of this dtype lives on disk, by the native core's names.

        The master of a streamed fp32 parameter is its weight on the host, and stays there.
        """
        if streamed and dtype == torch.float32:
            return {}
        return {"master": torch.int16 if split else torch.float32}

    def pieces(self, *, read: bool = True, write: bool = True) -> Iterator[Piece]:
        """All of the state, a piece at a time. read: with its values; write: changes are kept."""
        if self.stored is None:
            yield Piece(self._weight_copy(), self.master, self.remainder, self.moments, whole)
            return
        for chunk, arrays in self.stored.edit(read=read, write=write):
            of = Stretch(self.parameter, chunk.begin, chunk.count)
            master = arrays.pop("master", None)
            is_split = master is not None and master.dtype == torch.int16
            weight = self._weight_copy()
            yield Piece(
                weight=None if weight is None else of(weight),
                master=of(self.master) if self.master is not None else None if is_split else master,
                remainder=master if is_split else None,
                moments=self._named_moments(arrays),
                of=of,
                begin=chunk.begin,
            )

    def _named_moments(self, arrays: dict[str, Tensor]) -> Mapping[str, Any]:
        return arrays

    def _weight_copy(self) -> Tensor | None:
        """The host's working weight where it is one beside the master, or the upper half of it."""
        if self.on_host and self._weight_home is not None and self.parameter.dtype != torch.float32:
            return self._weight_home.present()
        return self._host_weight

    def _stored_value(self, array: str, weight: Tensor | StoredWeight | None = None) -> StoredValue:
        assert self.stored is not None
        read = functools.partial(self.stored.read, array)
        return StoredValue(read, self.parameter.shape, self.parameter.stride(), weight)

    def has_host_weight(self) -> bool:
        """Whether the host has a copy of the weight, in `working_weight()`."""
        homes = (self._weight_home, self._host_weight, self.master)
        return self.on_host and any(home is not None for home in homes)

    def working_weight(self) -> Tensor:
        """What the parameter is refilled from, or its own values: on the device, and of fp32 with states on disk."""
        if not self.has_host_weight():
            return self.parameter.detach()
        if self._weight_home is not None:
            return self._weight_home.present()
        if self._host_weight is not None:
            return self._host_weight
        assert self.master is not None
        return self.master

    def tensors(self) -> list[Tensor]:
        """What an update changes, on the tier of the state, and in memory.

        Not a streamed weight that is updated on the device: who reads it does so on the host, where it is written back.
        """
        is_away = self._weight_home is not None or (self.streamed and not self.has_host_weight())
        parts = (self.remainder, self.master, None if is_away else self.working_weight())
        return [part for part in parts if part is not None]

    def master_value(self) -> Tensor:
        """The master: the live tensor where one exists, a new one for a split master and for one on disk."""
        master = self.live_master()
        return master if isinstance(master, Tensor) else master.join()

    def live_master(self) -> Tensor | SplitMaster | StoredValue:
        """The master where it lies: nothing is joined or read."""
        if self.stored is not None and "master" in self.stored.dtypes:
            is_split = self.stored.dtypes["master"] == torch.int16
            return self._stored_value("master", self._upper_half() if is_split else None)
        if self.remainder is not None:
            upper = self._upper_half()
            if isinstance(upper, Tensor):
                return SplitMaster(upper, self.remainder)
            return StoredValue(flat(self.remainder), self.parameter.shape, self.parameter.stride(), upper)
        if self._weight_home is not None and not self.on_host:
            return self._weight_home.present()
        return self.master if self.master is not None else self.working_weight()

    def _upper_half(self) -> Tensor | StoredWeight:
        """Of a split master."""
        if self._is_other and self._old_weight is not None:
            return self._old_weight.live()
        return self.working_weight() if self._weight_home is None else self._weight_home.stored()

    @torch.no_grad()
    def set_master(self, value: Tensor) -> None:
        """Makes `value` (any float dtype, any device) the master of a 16-bit parameter, or of any one on the host.

        The parameter itself is not written: `adopt_parameter` decides at the next step whether it still agrees.
        """
        if self._is_models_own:
            self._set_master_beside(value.to(device="cpu", dtype=torch.float32))
        elif self.streamed and (self.on_host or self.master_format == "bf16"):
            return  # the model's own weight
        else:
            tier = torch.device("cpu") if self.on_host else self.parameter.device
            for piece in self.pieces():
                piece.set_master(piece.of(value).to(device=tier, dtype=torch.float32))
        self.version = _UNKNOWN_VERSION

    @property
    def _is_models_own(self) -> bool:
        """Whether the working weight on the host is the model's, and not the master by itself."""
        is_master = self.parameter.dtype == torch.float32 or self.master_format == "bf16"
        return self.streamed and self.on_host and not is_master

    def _set_master_beside(self, value: Tensor) -> None:
        """The weight stays what it is."""
        if self._old_weight is not None:
            self._old_weight.keep(lambda begin, n: split_master(Stretch(self.parameter, begin, n)(value))[0])
        for piece in self.pieces():
            if piece.remainder is not None:
                piece.remainder.copy_(split_master(piece.of(value))[1])
            elif piece.master is not None:
                piece.master.copy_(piece.of(value))
        self._is_other = self._was_set = True
        self._see_whether_it_came_back()

    def _see_whether_it_came_back(self) -> None:
        """The weight to what it was."""
        if self._is_other and self._old_weight is not None and self._old_weight.equals(self.working_weight()):
            self._agree()

    def _agree(self) -> None:
        """The weight is that of the master."""
        self._is_other = False
        if self._old_weight is not None:
            self._old_weight.forget()

    @torch.no_grad()
    def adopt_host_weight(self) -> None:
        """A streamed parameter is away: where its weight is not that of the master, it is the master from now on."""
        if self._is_other:
            for piece in self.pieces():
                weight = piece.of(self.working_weight())
                if self._old_weight is not None:
                    old = self._old_weight.elements(piece.begin, weight.numel())
                    old = old.as_strided(weight.shape, weight.stride())
                else:
                    assert piece.master is not None
                    old = round_to_weight(piece.master, weight.dtype)
                piece.adopt(weight.view(torch.int16) != old.view(torch.int16), weight)
            self._agree()
        self.version = self.parameter._version

    @torch.no_grad()
    def seed_master(self) -> None:
        """Makes the working weight the master: its low bits are forgotten."""
        self._agree()
        self._was_set = False
        if self.parameter.dtype != torch.float32:
            for piece in self.pieces():
                self._seed(piece, self.working_weight())
        self.version = _UNKNOWN_VERSION

    @staticmethod
    def _seed(piece: Piece, value: Tensor) -> None:
        if piece.remainder is not None:
            piece.remainder.zero_()
        elif piece.master is not None:
            piece.master.copy_(piece.of(value))

    @torch.no_grad()
    def adopt_parameter(self) -> None:
        """The user wrote to the parameter: elements that differ from the working weight re-seed the master.

        Elements that are unchanged keep their master's low bits, so swapping weights out and back (an EMA evaluation)
        leaves training exactly as it was.
        """
        version, address = self.parameter._version, self.parameter.data_ptr()
        if self.on_host or self.master is not None:  # else the parameter is its own master
            self._take_values()
        if not self._is_other:
            # Last: interrupted before, the next step does all of it again.
            self.version, self.address = version, address

    def _take_values(self) -> None:
        value = self.parameter.detach()
        if value.dtype == torch.float32 and self.has_host_weight():  # its master, in one piece wherever moments are
            self.working_weight().copy_(value)
            return
        if self._is_models_own:
            self._take_weight_beside(value.to("cpu"))
            return
        tier = torch.device("cpu") if self.on_host else value.device
        for piece in self.pieces():
            new = piece.of(value).to(tier)
            if new.dtype != torch.float32:
                old = piece.weight
                if old is None:
                    assert piece.master is not None
                    old = round_to_weight(piece.master, new.dtype)
                piece.adopt(new.view(torch.int16) != old.view(torch.int16), new)
            home = piece.master if piece.weight is None else piece.weight
            if self.on_host and home is not None:
                home.copy_(new)

    def _take_weight_beside(self, new: Tensor) -> None:
        """The master stays what it is until the next step: the weight may come back before that."""
        weight = self.working_weight()
        if same_bits(new, weight):
            return
        # The low bits of a split master are 0 at first.
        if self._old_weight is None or self._is_other or self.step > 0 or self._was_set:
            if self._old_weight is not None and not self._is_other:
                self._old_weight.keep(lambda begin, n: flat(weight)[begin : begin + n])
            # Before the copy: interrupted in between, the step finds nothing changed.
            self._is_other, self.version = True, _UNKNOWN_VERSION
        weight.copy_(new)
        self._see_whether_it_came_back()

    @torch.no_grad()
    def follow_master(self) -> None:
        """The fp32 master was written: the working weight becomes its rounded value."""
        if self.parameter.dtype != torch.float32:
            write_weight(self.working_weight(), self.master_value())


def _described(layout: tuple[torch.dtype, torch.Size, tuple[int, ...], torch.device]) -> str:
    dtype, shape, strides, device = layout
    return f"{dtype} of shape {tuple(shape)}, strides {strides}, on {device}"
