"""The part of the engine that only tells what the config said, by the names of DeepSpeed's engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import offload

from ._settings import BatchSizes, Settings

if TYPE_CHECKING:
    from ._data import EngineLoader

__all__ = ["INSTEAD_OF", "EngineSettings"]

_CONFIG = "engine.config is the config as it was given, engine.settings what it means"
_RANKS = "one process trains the whole model: engine.world_size and engine.global_rank"
# Attributes of DeepSpeed's engine that scripts may ask for and that are not here.
INSTEAD_OF = {
    **dict.fromkeys(
        (
            "communication_data_type", "curriculum_learning_enabled", "data_efficiency_enabled", "dump_state",
            "elasticity_enabled", "flops_profiler_enabled", "fp16_auto_cast", "get_data_types",
            "gradient_predivide_factor", "initial_dynamic_scale", "memory_breakdown", "optimizer_params",
            "postscale_gradients", "scheduler_params", "sparse_gradients_enabled", "swap_tensor_config",
            "torch_autocast_enabled", "zero_allow_untested_optimizer", "zero_cpu_offload", "zero_elastic_checkpoint",
            "zero_force_ds_cpu_optimizer", "zero_load_from_fp32_weights", "zero_max_live_parameters",
            "zero_overlap_comm", "zero_param_persistence_threshold", "zero_prefetch_bucket_size",
            "zero_reduce_bucket_size", "zero_sub_group_size", "zero_use_cpu_optimizer", "_config",
        ),
        _CONFIG,
    ),
    **dict.fromkeys(
        (
            "data_parallel_group", "get_data_parallel_rank", "get_model_parallel_rank", "get_sequence_parallel_group",
            "get_tensor_parallel_rank", "mpu", "seq_data_parallel_group",
        ),
        _RANKS,
    ),
    "basic_optimizer": "engine.optimizer.optimizer is the wrapped optimizer",
    "checkpoint_engine": "engine.save_checkpoint and engine.load_checkpoint are all there is",
    "client_optimizer": "engine.optimizer.optimizer is the wrapped optimizer",
    "client_lr_scheduler": "engine.lr_scheduler",
    "deepspeed_io": "pass training_data= to initialize, or make a torch.utils.data.DataLoader",
    "flops_profiler": "use the section flops_profiler of the config, or torch.utils.flop_counter",
    "load_universal_checkpoint": "checkpoints load under any placement as they are",
    "monitor": "write csv_monitor or tensorboard in the config, or log from the training loop",
    "scale": "engine.backward scales the loss; engine.optimizer.loss_scale is the factor",
    "timers": "write wall_clock_breakdown in the config",
    "tput_timer": "write wall_clock_breakdown in the config",
}  # fmt: skip


class EngineSettings:
    """Read access to the config, and the batch sizes, which may change while training."""

    settings: Settings
    training_dataloader: EngineLoader | None
    _batch: BatchSizes

    # One process.
    global_rank = local_rank = 0
    world_size = dp_world_size = mp_world_size = 1

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
        self._batch = BatchSizes(train_batch_size, self._batch.micro, accumulation)

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Another micro-batch size, and so another train batch size, with the same number of micro-batches."""
        if micro_batch_size < 1:
            raise offload.InvalidArgument(f"micro-batch size {micro_batch_size}: give 1 or more")
        accumulation = self._batch.accumulation
        self._batch = BatchSizes(micro_batch_size * accumulation, micro_batch_size, accumulation)

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
