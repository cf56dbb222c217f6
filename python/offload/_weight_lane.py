"""How streamed weights travel: the store of `WeightWindow`, over the engine's pool, lanes and updates.

A `WeightLane` has their host bytes in the pool, a `DiskWeightLane` in files, behind a `WeightCache`.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _native, _trace
from ._errors import OffloadError, StorageError
from ._parameter_state import ParameterState
from ._residency import Residency, host_runs
from ._stored_values import StoredWeight
from ._weight_cache import WeightCache

if TYPE_CHECKING:
    from ._disk import DiskStore
    from ._disk_snapshot import DiskSnapshot
    from ._disk_window import CacheSize
    from ._engine import Engine

# What StepPipeline.submit() takes.
Job = tuple[Any, ...]
Submit = Callable[[list[Job]], list[_native.Ticket]]

_ANY_BYTES = 1 << 62


class WeightLane:
    """See `_weight_window.WeightStore`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def name_of(self, parameter: Tensor) -> str:
        return self._engine.name_of(parameter)

    # --- where the host bytes are ---------------------------------------------------------------------------

    def reserve(self, residencies: Sequence[Residency], more_bytes: int) -> Iterator[list[Residency]]:
        pool = self._engine.pool
        for run, nbytes in host_runs(residencies, more_bytes, pool.stats()["budget_bytes"]):
            pool.reserve(nbytes)
            yield run

    def give_host_bytes(self, residency: Residency) -> None:
        residency.take_host_bytes(self._engine.pool.acquire(residency.nbytes, "weights"))

    def in_memory_first(self, residencies: Sequence[Residency]) -> Sequence[Residency]:
        return residencies

    def take_host_bytes_back(self, residency: Residency) -> None:
        self._engine.pool.trim()

    def hold(self, residency: Residency, *, for_writing: bool = False) -> None:
        pass

    def hold_or_lose(self, residency: Residency) -> None:
        pass

    def stored_weight(self, residency: Residency, parameter: Parameter) -> StoredWeight | None:
        return None

    def expect(self, coming: Callable[[], Iterable[Residency]]) -> None:
        pass

    def read_ahead(self) -> None:
        pass

    # --- travel ---------------------------------------------------------------------------------------------

    def no_upload(self) -> Any:
        return _native.Ticket()

    def start_weights(self, residency: Residency, upload: Any) -> None:
        self._engine.require_own_process()
        if _trace.active() is None:
            self._start(residency, upload)
        else:
            with _trace.naming(lambda: self.name_of(residency.parameters[0]), "weights"):
                self._start(residency, upload)

    def _start(self, residency: Residency, upload: Any) -> None:
        engine = self._engine
        after = self._ready_for(residency, upload)
        residency.came_on(engine.lanes.compute_stream())
        engine.transfers.submit_to_device(
            residency.address,
            residency.host_address,
            residency.nbytes,
            residency.stream,
            after,
            upload,
        )

    def _ready_for(self, residency: Residency, upload: Any) -> _native.Ticket | None:
        """Its host bytes have an address; what the upload has to wait for."""
        return self._engine.latest_update(residency.parameters)

    def wait_weights(self, residency: Residency, upload: Any) -> None:
        stream = self._engine.lanes.compute_stream()
        if stream in residency.users:
            return
        try:
            self._engine.transfers.wait_on_stream(stream, upload)
        except OffloadError:
            self._engine.settle_updates(residency.parameters)  # an update's is told as one, wherever it was waited for
            raise
        if stream != residency.stream:
            residency.used_on(torch.cuda.current_stream(self._engine.streaming.device))
        residency.users.add(stream)

    def abandon_weights(self, residency: Residency, upload: Any) -> None:
        self._engine.transfers.wait_on_stream(residency.stream, upload)

    def settle_updates(self, parameters: Collection[Parameter]) -> None:
        self._engine.require_own_process()
        self._engine.settle_updates(parameters)

    def follow_updates(self, parameters: Collection[Parameter]) -> None:
        self._engine.require_own_process()
        self._engine.follow_updates(parameters)

    def weight_written(self, parameter: Parameter, on_host: Tensor) -> None:
        state = self._engine.states.get(id(parameter))
        if state is not None and state.on_host:
            state.adopt_parameter()
        else:
            on_host.copy_(parameter)

    # --- for the engine -------------------------------------------------------------------------------------

    @property
    def loss(self) -> str | None:
        """Why weights are not what they should be."""
        return None

    def submit(self, jobs: list[Job], states: Sequence[ParameterState], submit: Submit) -> list[_native.Ticket]:
        """`submit(jobs)`, where each job is told where its state's weight is."""
        return submit(jobs)

    def flush(self) -> None:
        """What lives on disk is there; raises `StorageError` when it cannot be."""

    def check(self, *, wait: bool = False) -> None:
        """Raises the error of a write of weights, once. wait: for those under way."""

    def cache_stats(self) -> dict[str, int]:
        """Of weights on disk: bytes of cache and files, read, written, and not read, being there still."""
        return {}

    def close(self) -> None:
        """Gives up what it has in memory."""


class DiskWeightLane(WeightLane):
    """The same for weights on disk. Raises `OutOfHostMemory` when the pool cannot hold the cache."""

    def __init__(self, engine: Engine, store: DiskStore, size: CacheSize) -> None:
        super().__init__(engine)
        self.cache = WeightCache(store, engine.pool, size, engine.name_of)

    # --- where the host bytes are ---------------------------------------------------------------------------

    def reserve(self, residencies: Sequence[Residency], more_bytes: int) -> Iterator[list[Residency]]:
        self.cache.open(residencies)
        self._engine.pool.reserve(more_bytes)
        for run, _ in host_runs(residencies, 0, _ANY_BYTES):
            yield run

    def give_host_bytes(self, residency: Residency) -> None:
        self.cache.admit(residency)

    def in_memory_first(self, residencies: Sequence[Residency]) -> Sequence[Residency]:
        return sorted(residencies, key=self.cache.is_present, reverse=True)

    def take_host_bytes_back(self, residency: Residency) -> None:
        self.cache.discard(residency)

    def hold(self, residency: Residency, *, for_writing: bool = False) -> None:
        self.cache.hold(residency, for_writing=for_writing)

    def hold_or_lose(self, residency: Residency) -> None:
        if not self.cache.hold_or_lose(residency):
            names = ", ".join(map(self.name_of, residency.parameters))
            warnings.warn(f"the disk has lost {names}: they are NaN until you load a checkpoint", stacklevel=4)
            residency.take_host_bytes(bytearray(b"\xff") * residency.nbytes)  # NaN in every format

    def stored_weight(self, residency: Residency, parameter: Parameter) -> StoredWeight:
        self.cache.write(residency)
        self.cache.check(wait=True)
        offset, cache = residency.offset_of(parameter), self.cache

        def read(begin: int, out: Tensor, snapshot: DiskSnapshot | None) -> None:
            cache.read(residency, offset + begin, out, snapshot)

        return StoredWeight(read, parameter.dtype, parameter.shape, parameter.stride())

    def expect(self, coming: Callable[[], Iterable[Residency]]) -> None:
        self.cache.expect(coming())

    def read_ahead(self) -> None:
        self.cache.read_ahead()

    # --- travel ---------------------------------------------------------------------------------------------

    def _ready_for(self, residency: Residency, upload: Any) -> _native.Ticket:
        return self.cache.begin_upload(residency, upload)

    def wait_weights(self, residency: Residency, upload: Any) -> None:
        try:
            super().wait_weights(residency, upload)
        except StorageError as error:
            raise self.cache.told(residency, error) from error

    # --- for the engine -------------------------------------------------------------------------------------

    @property
    def loss(self) -> str | None:
        return self.cache.loss

    def submit(self, jobs: list[Job], states: Sequence[ParameterState], submit: Submit) -> list[_native.Ticket]:
        """Reads and writes are chained to the updates before those are submitted: all of them, or none."""
        streaming = self._engine.streaming
        homes = [streaming.residency_of(state.parameter) for state in states]
        order = [home for home in homes if home is not None]
        self.cache.expect(itertools.chain(order, streaming.next_pass()))
        ends: list[tuple[_native.Ticket, int]] = []
        placed: list[Job] = []
        try:
            for home, numbers in itertools.groupby(range(len(jobs)), key=homes.__getitem__):
                if home is None:
                    placed += [jobs[number] for number in numbers]
                    continue
                before, end = self.cache.begin_update(home)
                ends.append((end, -1))
                for number in numbers:
                    ends[-1] = (end, number)
                    slot, gradient, dtype, tickets, *rest = jobs[number]
                    address = home.host_address + home.offset_of(states[number].parameter)
                    placed.append((slot, gradient, dtype, [*tickets, *before], *rest, address))
            submitted = submit(placed)
        except BaseException as error:
            for end, _ in ends:
                end.fail(f"the step was not submitted: {error}")
            if ends:
                self.cache.loss = str(error)
            raise
        for end, number in ends:
            end.end_with(self._engine.pipeline.weight(submitted[number]))
        return submitted

    def flush(self) -> None:
        self.cache.flush()

    def check(self, *, wait: bool = False) -> None:
        self.cache.check(wait=wait)

    def cache_stats(self) -> dict[str, int]:
        return self.cache.stats()

    def close(self) -> None:
        self.cache.close()
