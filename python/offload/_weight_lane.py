"""How streamed weights travel: the store of `WeightWindow`, over the engine's pool, lanes and updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Parameter

from . import _native
from ._residency import Residency

if TYPE_CHECKING:
    from ._engine import Engine


class WeightLane:
    """See `_weight_window.WeightStore`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def name_of(self, parameter: Tensor) -> str:
        return self._engine.name_of(parameter)

    def reserve_host_bytes(self, nbytes: int) -> None:
        self._engine.pool.reserve(nbytes)

    @property
    def host_budget_bytes(self) -> int:
        budget: int = self._engine.pool.stats()["budget_bytes"]
        return budget

    def return_free_pages(self) -> None:
        self._engine.pool.trim()

    def acquire_weights(self, nbytes: int) -> Any:
        return self._engine.pool.acquire(nbytes, "weights")

    def no_upload(self) -> Any:
        return _native.Ticket()

    def start_weights(self, residency: Residency, upload: Any) -> None:
        engine = self._engine
        engine.require_own_process()
        engine.transfers.submit_to_device(
            residency.address,
            residency.host_address,
            residency.nbytes,
            engine.lanes.compute_stream(),
            engine.latest_update(residency.parameters),
            upload,
        )

    def wait_weights(self, upload: Any) -> None:
        self._engine.transfers.wait_on_stream(self._engine.lanes.compute_stream(), upload)

    def settle_updates(self, parameters: Sequence[Parameter]) -> None:
        self._engine.require_own_process()
        self._engine.settle_updates(parameters)

    def weight_written(self, parameter: Parameter, on_host: Tensor) -> None:
        state = self._engine.states.get(id(parameter))
        if state is not None and state.on_host:
            state.adopt_parameter()
        else:
            on_host.copy_(parameter)
