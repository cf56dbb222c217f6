"""Where the states of parameters live, and what they take: the device, the engine's pool, the disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _native, _trace
from ._adamw import FORMATS
from ._config import Config
from ._native_state import NativeState
from ._parameter_size import MASTER_BYTES, MasterFormat
from ._parameter_state import ParameterState
from ._plan import Plan
from ._state_store import StateStore
from ._stored_values import StoredWeight
from ._streaming import Streaming

State = TypeVar("State", bound=ParameterState)

# The pool's blocks begin at multiples of this (csrc/memory/host_pool.h).
BLOCK_BYTES = 256

_MASTER_FORMATS: dict[MasterFormat, int] = {
    "fp32": _native.MASTER_FLOAT32,
    "split": _native.MASTER_SPLIT,
    "bf16": _native.MASTER_BFLOAT16,
}


class StateHomes:
    """Makes states where the plan wants them. `names` are the model's, by identity."""

    def __init__(
        self,
        plan: Plan,
        config: Config,
        pool: _native.HostPool,
        streaming: Streaming,
        store: StateStore | None,
        names: Mapping[int, str],
    ) -> None:
        self._plan = plan
        self._config = config
        self._pool = pool
        self._streaming = streaming
        self.store = store
        self._names = names

    def lies_on_host(self, parameter: Parameter) -> bool:
        """Whether its state is there or on disk."""
        return not self._plan.keeps_state(self._name_of(parameter))

    def updates_on_host(self, parameter: Parameter) -> bool:
        """Whether its update runs on the host."""
        return not self._plan.updates_on_device(self._name_of(parameter))

    def _name_of(self, parameter: Parameter) -> str:
        return self._names.get(id(parameter), "")

    def _master_format(self, parameter: Parameter, kind: type[ParameterState]) -> MasterFormat:
        if not kind.may_split or parameter.dtype != torch.bfloat16 or self._config.master == "fp32":
            return "fp32"
        if self._config.master == "bf16":
            return "bf16"
        return "split" if self.lies_on_host(parameter) else "fp32"

    def _store_of(self, parameter: Parameter) -> StateStore | None:
        return self.store if self.updates_on_host(parameter) and parameter.numel() > 0 else None

    def _arrays_on_disk(self, parameter: Parameter, kind: type[ParameterState]) -> dict[str, torch.dtype]:
        if self._store_of(parameter) is None:
            return {}
        streamed = parameter in self._streaming
        split = self._master_format(parameter, kind) == "split"
        return kind.arrays_on_disk(parameter.dtype, split=split, streamed=streamed)

    def disk_bytes(self, parameter: Parameter, kind: type[ParameterState]) -> int:
        """What its state takes on disk, to whole blocks."""
        arrays = self._arrays_on_disk(parameter, kind)
        return self.store.bytes_of(arrays, parameter.numel()) if arrays and self.store is not None else 0

    def host_bytes(self, parameter: Parameter, kind: type[ParameterState]) -> int:
        """What its state takes in the pool, and its gradient where that leaves."""
        numel, sizes = parameter.numel(), list[int]()
        if self.lies_on_host(parameter):
            streamed = parameter in self._streaming  # its working weight is counted there
            on_disk = self._arrays_on_disk(parameter, kind)
            if issubclass(kind, NativeState) and not on_disk:
                sizes += kind.moment_sizes(self._config.moments, numel)
            if parameter.dtype != torch.float32 and not streamed:
                sizes.append(2 * numel)
            if "master" not in on_disk and not (streamed and parameter.dtype == torch.float32):
                sizes.append(MASTER_BYTES[self._master_format(parameter, kind)] * numel)
        if self.updates_on_host(parameter) or self._plan.gradient_leaves(self._name_of(parameter)):
            sizes.append((self._config.gradient_itemsize or parameter.element_size()) * numel)
        return _in_blocks(sizes)

    def close(self) -> None:
        """Gives up what no state holds."""
        if self.store is not None:
            self.store.close()

    def make(self, name: str, parameter: Parameter, kind: type[State]) -> State:
        """The state of a parameter; raises `OutOfHostMemory` over the budget, `StorageError` without disk space."""
        on_host = self.lies_on_host(parameter)
        streamed = parameter in self._streaming
        value = self._streaming.present_value(parameter) if streamed else parameter

        def allocate(dtype: torch.dtype, tag: Any, count: int | None = None) -> Tensor:
            if streamed and on_host and dtype == parameter.dtype and tag != "moments":
                return self._streaming.host_weight(parameter)
            if not on_host or parameter.numel() == 0:
                tier = torch.device("cpu") if on_host else parameter.device
                if count is not None:
                    return torch.empty(count, dtype=dtype, device=tier)
                return torch.empty_like(value, dtype=dtype, device=tier, requires_grad=False)
            buffer = self._pool.acquire((count or parameter.numel()) * dtype.itemsize, tag)
            row = torch.frombuffer(buffer, dtype=dtype)
            return row if count is not None else row.as_strided(parameter.shape, parameter.stride())

        form: dict[str, Any] = {}
        if issubclass(kind, NativeState):
            form = {"moments": self._config.moments, "rounding_seed": self._config.rounding_seed}
        if self._plan.params == "disk" and streamed and on_host:
            form["weight_home"] = _WeightOnDisk(self._streaming, parameter)
        master_format = self._master_format(parameter, kind)
        if streamed and not on_host and master_format == "bf16":
            form["weight_home"] = _WeightAway(self._streaming, parameter)
        return kind(
            name,
            parameter,
            value,
            on_host=on_host,
            by_device=not self.updates_on_host(parameter),
            master_format=master_format,
            streamed=streamed,
            allocate=allocate,
            store=self._store_of(parameter),
            **form,
        )

    @staticmethod
    def slot_of(state: NativeState) -> dict[str, Any]:
        """The arguments of `StepPipeline.add_slot`."""
        parameter, weight = state.parameter, state.working_weight()
        in_memory = state.has_host_weight()
        is_master = parameter.dtype == torch.float32 or state.master_format == "bf16"
        master = state.remainder if state.remainder is not None else weight if is_master and in_memory else state.master
        slot = {
            "name": state.name,
            "master": 0 if master is None else master.data_ptr(),
            "master_format": _MASTER_FORMATS[state.master_format],
            # Of weights on disk each job says where they are.
            "weight": weight.data_ptr() if in_memory and not is_master else 0,
            "weight_format": FORMATS[parameter.dtype],
            **state.native_moments(),
            "count": parameter.numel(),
            "upload_source": weight.data_ptr() if in_memory else 0,
            # The next touch of a streamed one uploads the weight.
            "device_weight": 0 if state.streamed else parameter.data_ptr(),
            "weight_bytes": parameter.numel() * parameter.element_size(),
            "trace_name": _trace.number_of(state.name),
        }
        if state.stored is not None:
            slot |= {"layout": state.stored.layout, "disk_offset": state.stored.offset}
        return slot


class _WeightOnDisk:
    """See `_parameter_state.WeightHome`."""

    def __init__(self, streaming: Streaming, parameter: Parameter) -> None:
        self._streaming = streaming
        self._parameter = parameter

    def present(self) -> Tensor:
        return self._streaming.host_weight(self._parameter)

    def stored(self) -> StoredWeight:
        return self._streaming.stored_weight(self._parameter)


class _WeightAway(_WeightOnDisk):
    """Of a state on the device: the master is the weight, which comes and goes."""

    def present(self) -> Tensor:
        return self._streaming.present_value(self._parameter)


def _in_blocks(sizes: Iterable[int]) -> int:
    """What arrays of these bytes take, each from the beginning of a block."""
    return sum(-(-size // BLOCK_BYTES) * BLOCK_BYTES for size in sizes)
