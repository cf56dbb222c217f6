"""The part of the engine that only tells what the config said, by the names of DeepSpeed's engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import offload

from ._casting import TORCH_DTYPES
from ._settings import BatchSizes, Settings

if TYPE_CHECKING:
    from ._data import EngineLoader

__all__ = ["EngineSettings"]


class EngineSettings:
    """Read access to the config, and the batch sizes, which may change while training."""

    settings: Settings
    training_dataloader: EngineLoader | None
    _batch: BatchSizes

    # One process.
    global_rank = local_rank = 0
    world_size = dp_world_size = mp_world_size = seq_dp_world_size = sequence_parallel_size = 1
    has_moe_layers = pipeline_parallelism = False

    def _set_batch(self, batch: BatchSizes) -> None:
        raise NotImplementedError

    def train_batch_size(self) -> int:
        """Samples of one optimizer step."""
        return self._batch.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples of one forward."""
        return self._batch.micro

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of one optimizer step."""
        return self._batch.accumulation

    def get_batch_info(self) -> tuple[int, int, int]:
        """Train batch size, micro-batch size, accumulation steps."""
        return self._batch.train, self._batch.micro, self._batch.accumulation

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Another train batch size, by another number of micro-batches of the same size."""
        accumulation, rest = divmod(train_batch_size, self._batch.micro)
        if rest or accumulation < 1:
            raise offload.InvalidArgument(
                f"train batch size {train_batch_size} is not a multiple of the micro-batch size {self._batch.micro}"
            )
        self._set_batch(BatchSizes(train_batch_size, self._batch.micro, accumulation))

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Another micro-batch size, and so another train batch size, with the same number of micro-batches."""
        if micro_batch_size < 1:
            raise offload.InvalidArgument(f"micro-batch size {micro_batch_size}: give 1 or more")
        accumulation = self._batch.accumulation
        self._set_batch(BatchSizes(micro_batch_size * accumulation, micro_batch_size, accumulation))

    def managed_gradient_accumulation(self) -> bool:
        """Whether the engine counts micro-batches; else every `step()` updates."""
        return self.settings.managed_accumulation

    def dataloader_drop_last(self) -> bool:
        return self.settings.dataloader_drop_last

    def gradient_clipping(self) -> float:
        """The norm that gradients are clipped to; 0.0 clips nothing."""
        return self.settings.gradient_clipping

    def steps_per_print(self) -> int | None:
        return self.settings.logging.steps_per_print

    def wall_clock_breakdown(self) -> bool:
        return self.settings.logging.wall_clock_breakdown

    def fp16_enabled(self) -> bool:
        return self.settings.precision.dtype == "fp16"

    def bfloat16_enabled(self) -> bool:
        return self.settings.precision.dtype == "bf16"

    def torch_autocast_enabled(self) -> bool:
        return self.settings.precision.autocast is not None

    def torch_autocast_dtype(self) -> torch.dtype | None:
        autocast = self.settings.precision.autocast
        return None if autocast is None else TORCH_DTYPES[autocast.dtype]

    def loss_scale(self) -> float:
        """The fixed loss scale of the config; 0.0 where it adapts, or there is none.

        The scale of the next backward is `engine.optimizer.cur_scale`.
        """
        scale = self.settings.precision.loss_scale
        return 0.0 if scale is None or scale.static is None else scale.static

    def dynamic_loss_scale(self) -> bool:
        scale = self.settings.precision.loss_scale
        return scale is not None and scale.static is None

    def zero_optimization(self) -> bool:
        """Whether a ZeRO stage is on."""
        return self.settings.placement.stage > 0

    def zero_optimization_stage(self) -> int:
        return self.settings.placement.stage

    def zero_optimization_partition_gradients(self) -> bool:
        return self.settings.placement.stage >= 2

    def zero_optimization_partition_weights(self) -> bool:
        return self.settings.placement.stage >= 3

    def zero_offload_optimizer(self) -> bool:
        """Whether optimizer states are off the device."""
        return self.settings.placement.optimizer != "device"

    def zero_offload_param(self) -> bool:
        """Whether weights are off the device."""
        return self.settings.placement.params != "device"

    def optimizer_name(self) -> str | None:
        return None if self.settings.optimizer is None else self.settings.optimizer.name.lower()

    def scheduler_name(self) -> str | None:
        return None if self.settings.scheduler is None else self.settings.scheduler.name

    def set_dataloader(self, loader: Any) -> None:
        self.training_dataloader = loader
