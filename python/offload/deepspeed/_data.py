"""The data loader that `initialize(training_data=...)` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

__all__ = ["EngineLoader", "RepeatingLoader"]

# Loading hides behind an accelerator; on a CPU more processes would take the cores that compute.
_WORKERS_BESIDE_AN_ACCELERATOR = 2


class EngineLoader:
    """Micro-batches of a data set, in DeepSpeed's order: a permutation by a fixed seed, the same in every epoch.

    `next(loader)` goes on where it was and starts the next epoch after the last batch, by `StopIteration` in between;
    `iter(loader)` starts anew. `data_sampler.set_epoch(n)` chooses another permutation.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        on_accelerator: bool = False,
        data_sampler: Any = None,
        workers: int | None = None,
    ) -> None:
        if data_sampler is None and not isinstance(dataset, IterableDataset):
            data_sampler = DistributedSampler(dataset, num_replicas=1, rank=0)
        self.dataset = dataset
        self.data_sampler = data_sampler
        self.batch_size = batch_size
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=data_sampler,
            collate_fn=collate_fn,
            drop_last=drop_last,
            pin_memory=on_accelerator,
            num_workers=workers if workers is not None else _WORKERS_BESIDE_AN_ACCELERATOR if on_accelerator else 0,
        )
        self._batches: Iterator[Any] | None = None

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> EngineLoader:
        self._batches = iter(self._loader)
        return self

    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = iter(self._loader)
        try:
            return next(self._batches)
        except StopIteration:
            self._batches = None
            raise


class RepeatingLoader:
    """A loader without an end: after its last batch it starts anew."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._batches = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._batches)
        except StopIteration:
            self._batches = iter(self.loader)
            return next(self._batches)
