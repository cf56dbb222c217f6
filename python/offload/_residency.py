"""Residency: parameters that are on the device together, or not at all, and the host bytes that they return from.

The parameters are views of one flat device storage, and stay so: `free()` and `allocate()` resize it in place, and what
autograd has saved of a weight (`weight.t()`) finds the bytes where they were. The host has the same layout, so that one
copy brings them all. Versions of the parameters do not change by any of this.
"""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ._errors import StateError
from ._pending import Away, can_be_pending, make_all_pending, reading_metadata, restore_all
from ._units import Unit, is_dense

__all__ = ["Residency", "can_be_streamed", "group_by_units", "host_runs", "trim_heap", "why_resident"]

# Of glibc; other allocators have none.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

# Copy engines and vector code want it; blocks of the pool and of torch's allocators are multiples of it or of more.
_ALIGNMENT = 256
# Host bytes of weights are obtained in runs of at least this, the pool's own step: small models have one registration,
# and pages are not rounded up for every residency.
_RUN_BYTES = 64 << 20

# For `map`: of every parameter of a residency, several times a step.
_version_of = operator.attrgetter("_version")
_address_of = Tensor.data_ptr


def _span(parameter: Tensor) -> tuple[int, int, int]:
    """Where the bytes of a dense tensor are: its storage, and begin and end within it."""
    begin = int(parameter.storage_offset()) * parameter.element_size()
    return _storage_of(parameter), begin, begin + parameter.numel() * parameter.element_size()


def _shared_stretches(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    """The parameters by stretch of memory: those that overlap or follow one another in a storage come together."""
    stretches: list[list[Parameter]] = []
    storage, limit = 0, 0
    for parameter in sorted(parameters, key=_span):
        own, begin, end = _span(parameter)
        if own == storage and begin < limit + _ALIGNMENT:
            stretches[-1].append(parameter)
        else:
            stretches.append([parameter])
            limit = 0
        storage, limit = own, max(limit, end)
    return stretches


class Residency:
    """See the module's text. Until `place()` the parameters are where the user made them, on any device."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = tuple(parameters)
        self.nbytes = 0
        self._offsets: dict[int, int] = {}
        # Each stretch: where it begins, its parameters, and the device that the user made them on.
        self._stretches: list[tuple[int, list[Parameter], torch.device]] = []
        for stretch in _shared_stretches(parameters):
            first = min(_span(parameter)[1] for parameter in stretch)
            for parameter in stretch:
                self._offsets[id(parameter)] = self.nbytes + _span(parameter)[1] - first
            self._stretches.append((self.nbytes, stretch, stretch[0].device))
            self.nbytes += math.ceil((max(_span(p)[2] for p in stretch) - first) / _ALIGNMENT) * _ALIGNMENT
        self._begins = [self._offsets[id(parameter)] for parameter in self.parameters]
        # Where the storage was last seen on the device, and each parameter then.
        self._start: int | None = None
        self._addresses: list[int] = []
        # As they were made: `parameter.data = ...` may give one another layout, for which there is no room.
        self._layouts = {id(p): (p.dtype, p.shape, p.stride()) for p in self.parameters}
        self.is_placed = False
        self._buffer: Any = None
        self._begin: int | None = None
        self._flat: Tensor | None = None
        # That of `_flat`: asking for it costs as much as resizing it.
        self._storage: torch.UntypedStorage
        self._answers: Sequence[Away] = ()
        # The compute stream on which it was allocated, and to which its memory goes back.
        self.stream = 0
        # Those that wait for its upload already.
        self.users: set[int] = set()
        # Versions of the parameters when device and host were equal: another one means that somebody wrote.
        self._versions: list[int] = []
        # Whether hide() has ended and show() has not begun.
        self._is_hidden = False

    def __repr__(self) -> str:
        return f"Residency({len(self.parameters)} parameters, {self.nbytes} bytes)"

    # --- the host -------------------------------------------------------------------------------------------

    def take_host_bytes(self, buffer: Any, begin: int | None = None) -> None:
        """`buffer` has `address` and the buffer protocol, and `nbytes` of its own; or from `begin` on, for a while."""
        self._buffer = buffer
        self._begin = begin

    def lose_host_bytes(self) -> None:
        """They are not in memory any more: nobody may ask for them."""
        self._buffer = None

    @property
    def host_address(self) -> int:
        address: int = self._buffer.address
        return address + (self._begin or 0)

    def offset_of(self, parameter: Parameter) -> int:
        """Where its bytes begin in those of the residency."""
        return self._offsets[id(parameter)]

    def on_host(self, parameter: Parameter) -> Tensor:
        """The host bytes of a parameter, as a tensor like it."""
        dtype, shape, strides = self._layouts[id(parameter)]
        offset = (self._begin or 0) + self._offsets[id(parameter)]
        flat = torch.frombuffer(self._buffer, dtype=dtype, count=math.prod(shape), offset=offset)
        return flat.as_strided(shape, strides)

    def owns(self, parameter: Parameter) -> bool:
        """Whether the parameter still is a view of the flat storage (`parameter.data = ...` gives it another)."""
        return _storage_of(parameter) == self.storage_key

    # --- the device -----------------------------------------------------------------------------------------

    def place(self, answers: Sequence[Away], device: torch.device) -> None:
        """Takes the values to the host bytes; the parameters become views of a flat storage without bytes on `device`.

        The memory that they had is given up. answers: what each parameter answers with while it is hidden.
        """
        with torch.no_grad():
            for parameter in self.parameters:
                self.on_host(parameter).copy_(parameter)
        self._flat = _bytes(self.nbytes, device)
        self._storage = self._flat.untyped_storage()
        self._answers = answers
        self.is_placed = True  # from here on return_home() is needed
        for parameter in self.parameters:
            parameter.data = self._view(parameter)
        self.free()
        self.hide()

    @property
    def storage_key(self) -> int:
        key: int = self._storage._cdata
        return key

    @property
    def address(self) -> int:
        return self._storage.data_ptr()

    def allocate(self, *, poison: bool) -> None:
        assert self._flat is not None
        self._storage.resize_(self.nbytes)
        if poison:
            with torch._C._DisableFuncTorch():  # a forward within torch.func brings weights too
                self._flat.fill_(0xFF)  # NaN in every format

    def came_on(self, stream: int) -> None:
        """It was allocated on that compute stream, and is on its way: none may use it yet."""
        self.stream = stream
        self.users.clear()

    def used_on(self, stream: Any) -> None:
        """Another stream of torch's than its own computes with it: when it is freed, that work comes first."""
        assert self._flat is not None
        self._flat.record_stream(stream)

    def free(self) -> None:
        self._storage.resize_(0)

    def hide(self) -> None:
        """Nobody may read the parameters: their memory is not there, or not filled yet. Idempotent."""
        if self._is_hidden:
            return
        make_all_pending(self.parameters, self._answers)
        self._is_hidden = True

    def show(self) -> None:
        """The parameters are plain: their memory is there, and filled."""
        self._is_hidden = False
        restore_all(self.parameters)

    def mark_equal(self) -> None:
        """Device and host have the same values now."""
        self._versions = list(map(_version_of, self.parameters))

    def mark_different(self) -> None:
        """Each may have another value than the host."""
        self._versions = [-1] * len(self.parameters)

    def written(self) -> list[Parameter]:
        """The parameters that were written, or were given other storage, since mark_equal()."""
        start = self.address
        if start != self._start:
            self._addresses = [start + begin for begin in self._begins]
            self._start = start
        versions, addresses = list(map(_version_of, self.parameters)), list(map(_address_of, self.parameters))
        if versions == self._versions and addresses == self._addresses:  # as mostly
            return []
        known = zip(self.parameters, versions, self._versions, addresses, self._addresses, strict=True)
        return [p for p, version, old, address, home in known if version != old or address != home]

    def take_home(self, parameter: Parameter, name: str) -> None:
        """Copies a parameter that was given other storage to its place; `StateError` where it does not fit there."""
        if self.owns(parameter):
            return
        dtype, shape, _ = self._layouts[id(parameter)]
        if (parameter.dtype, parameter.shape, parameter.device) != (dtype, shape, self._storage.device):
            raise StateError(
                f"{name}: became {parameter.dtype} of shape {tuple(parameter.shape)} on {parameter.device} after wrap; "
                f"its place is for {dtype} of shape {tuple(shape)} on {self._storage.device}. Give it such a value "
                "again (`parameter.data = ...`); call offload.unwrap before what changes these, and wrap again"
            )
        home = self._view(parameter)
        home.copy_(parameter.detach())
        parameter.data = home
        torch.autograd.graph.increment_version(parameter)  # a write like any other

    def _view(self, parameter: Parameter) -> Tensor:
        dtype, shape, strides = self._layouts[id(parameter)]
        view = torch.empty(0, dtype=dtype, device=self._storage.device)
        return view.set_(self._storage, self._offsets[id(parameter)] // dtype.itemsize, shape, strides)

    # --- the end --------------------------------------------------------------------------------------------

    def resident_copies(self, *, where_made: bool = False) -> list[Tensor]:
        """A tensor with its value for each parameter; those that shared memory do so again.

        They are on the device, or where the user made them.
        """
        copies = {}
        for begin, stretch, origin in self._stretches:
            values = {id(parameter): self.on_host(parameter) for parameter in stretch}
            ends = [self._offsets[key] + value.nbytes for key, value in values.items()]
            memory = _bytes(max(ends) - begin, origin if where_made else self._storage.device)
            for key, value in values.items():
                copy = torch.empty(0, dtype=value.dtype, device=memory.device)
                offset = (self._offsets[key] - begin) // value.itemsize
                copies[key] = copy.set_(memory.untyped_storage(), offset, value.shape, value.stride()).copy_(value)
        return [copies[id(parameter)] for parameter in self.parameters]

    def leave(self, copies: Sequence[Tensor]) -> None:
        """The parameters become `copies`; cannot fail. They must be plain."""
        for parameter, copy in zip(self.parameters, copies, strict=True):
            parameter.data = copy
        self.is_placed = False
        self._flat = None
        del self._storage

    def return_home(self) -> None:
        """Undoes `place`: the parameters are where the user made them, and the host bytes are given up. Cannot fail."""
        try:
            copies = self.resident_copies(where_made=True)
        except (RuntimeError, MemoryError):  # there is no memory for them: the parameters keep the host bytes
            copies = [self.on_host(parameter) for parameter in self.parameters]
            if self._begin is not None:  # or, where they are lent for a while, copies of them
                copies = [copy.clone() for copy in copies]
        self.leave(copies)
        self._buffer = None


def host_runs(
    residencies: Sequence[Residency], more_bytes: int, budget_bytes: int
) -> Iterator[tuple[list[Residency], int]]:
    """Residencies in runs, with the host bytes to obtain for each at once; the last one has `more_bytes` with it."""
    total = sum(residency.nbytes for residency in residencies) + more_bytes
    # All of it is over the budget: that is refused before anything has moved.
    least = _RUN_BYTES if total <= budget_bytes else total
    run, nbytes = list[Residency](), 0
    for residency in residencies:
        run.append(residency)
        nbytes += residency.nbytes
        if nbytes >= least:
            yield run, nbytes
            run, nbytes = [], 0
    yield run, nbytes + more_bytes


def trim_heap() -> None:
    """Memory that was freed goes back to the system.

    Once a large block has been freed, glibc's malloc takes blocks of up to 32 MiB from its heap, and keeps what is
    freed there below others: a model's weights would stay, beside their copies, until the last of them has left.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


def group_by_units(units: Sequence[Unit]) -> list[list[Parameter]]:
    """The parameters that can be streamed, by the units that need them; those whose memory overlaps stay together."""
    users: dict[int, set[int]] = {}
    parameters: dict[int, Parameter] = {}
    for number, unit in enumerate(units):
        for _, parameter in unit.parameters:
            if can_be_streamed(parameter):
                parameters[id(parameter)] = parameter
                users.setdefault(id(parameter), set()).add(number)
    for stretch in _shared_stretches(list(parameters.values())):
        _join_overlapping(stretch, users)
    groups: dict[tuple[int, ...], list[Parameter]] = {}
    for key, parameter in parameters.items():
        groups.setdefault(tuple(sorted(users[key])), []).append(parameter)
    return list(groups.values())


def _join_overlapping(stretch: Sequence[Parameter], users: dict[int, set[int]]) -> None:
    """Parameters with bytes in common are needed by every unit that needs one of them."""
    limit, joined = 0, set[int]()
    for parameter in stretch:  # by where they begin
        _, begin, end = _span(parameter)
        if begin >= limit:
            joined = set()
        joined |= users[id(parameter)]
        users[id(parameter)] = joined  # one set for all of them: it grows with what follows
        limit = max(limit, end)


def why_resident(parameter: Parameter) -> str | None:
    """Why a parameter cannot be streamed; None where it can."""
    if not can_be_pending(parameter):
        return f"a Parameter subclass ({type(parameter).__name__}) cannot be guarded while it is away"
    if parameter.layout is not torch.strided or parameter.is_quantized:
        return "sparse and quantized tensors are not bytes in one place"
    if parameter.numel() == 0:
        return "it has no elements"
    return None if is_dense(parameter) else "its elements do not fill one stretch of memory"


def can_be_streamed(parameter: Parameter) -> bool:
    return why_resident(parameter) is None


def _storage_of(tensor: Tensor) -> int:
    key: int = reading_metadata(lambda: tensor.untyped_storage()._cdata)
    return key


def _bytes(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty(count, dtype=torch.uint8, device=device)
