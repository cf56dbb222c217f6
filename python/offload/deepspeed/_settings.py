"""What a DeepSpeed config means here: resolved and typed, with every default filled in. The engine reads nothing else.

`_config.load` makes them. Each field names the JSON key it comes from where the two differ. One process: the world
size is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

__all__ = [
    "ActivationCheckpointing",
    "Autocast",
    "BatchSizes",
    "Checkpoint",
    "Dtype",
    "FlopsProfiler",
    "Logging",
    "LossScale",
    "Monitor",
    "Optimizer",
    "Placement",
    "Precision",
    "Scheduler",
    "Settings",
    "Tier",
]

Tier = Literal["device", "host", "disk"]
Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class BatchSizes:
    """`train == micro * accumulation`, in samples, samples and micro-batches.

    train: `train_batch_size`; micro: `train_micro_batch_size_per_gpu`; accumulation: `gradient_accumulation_steps`.
    """

    train: int
    micro: int
    accumulation: int


@dataclass(frozen=True)
class LossScale:
    """The loss scale of fp16.

    static: the scale, where `fp16.loss_scale` is not 0; None means dynamic, and then:
    initial_scale_power: the first scale is 2 to this power.
    window: `fp16.loss_scale_window`: good steps in a row after which the scale doubles.
    hysteresis: overflows that are let pass before the scale is halved.
    consecutive_hysteresis: a good step gives all of the hysteresis back, not only one that doubles the scale.
    min_scale: `fp16.min_loss_scale`: the scale is not halved below it.
    """

    static: float | None = None
    initial_scale_power: int = 16
    window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    min_scale: float = 1.0

    @property
    def initial(self) -> float:
        """The scale of the first step."""
        return 2.0**self.initial_scale_power if self.static is None else self.static


@dataclass(frozen=True)
class Autocast:
    """`torch_autocast`, where it is enabled: forward runs under torch.autocast with `dtype`."""

    dtype: Dtype


@dataclass(frozen=True)
class Precision:
    """dtype: what the model is cast to (fp32: it stays as it is).

    loss_scale: given exactly when dtype is fp16.
    cast_inputs: `fp16.auto_cast`: floating-point inputs of forward are cast to fp16.
    grad_dtype: `data_types.grad_accum_dtype`: what micro-batches add up in; None is `dtype`.
    buffer_dtype: `data_types.buffer_dtype`: what buffers are cast to; None leaves them as they are.
    keep_in_fp32: `data_types.keep_in_fp32_modules`: patterns of names of buffers that are fp32 in a 16-bit model; None
        means those that the model itself names.
    skip_bad_steps: a step whose gradients hold inf or NaN is skipped: fp16 always, bf16 by `bf16.check_grad_overflow`.
    """

    dtype: Dtype = "fp32"
    loss_scale: LossScale | None = None
    cast_inputs: bool = False
    skip_bad_steps: bool = False
    autocast: Autocast | None = None
    grad_dtype: Literal["fp32"] | None = None
    buffer_dtype: Dtype | None = None
    keep_in_fp32: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Placement:
    """Where each kind of tensor lives, and the knobs of moving it.

    stage: `zero_optimization.stage`. It places nothing by itself, as there is one process; some rules read it.
    gradients: with the optimizer, as in DeepSpeed.
    activations: host with `activation_checkpointing.cpu_checkpointing`.
    optimizer_ratio: `offload_optimizer.ratio`: the share of the optimizer states that is where `optimizer` says; the
        others stay on the device.
    pin_memory: page-lock host memory; that of `offload_optimizer` or `offload_param`, whichever asks for it.
    disk_path: the different `nvme_path`s of `offload_optimizer` and `offload_param`; given exactly when one is on disk.
    disk_block, disk_queue_depth: of the section `aio`, bytes of a transfer and transfers under way; None: ours.
    """

    stage: int = 0
    optimizer: Tier = "device"
    gradients: Tier = "device"
    params: Tier = "device"
    activations: Tier = "device"
    optimizer_ratio: float = 1.0
    pin_memory: bool = True
    disk_path: tuple[str, ...] | None = None
    disk_block: int | None = None
    disk_queue_depth: int | None = None


@dataclass(frozen=True)
class Optimizer:
    """name: Adam, AdamW, Lion, Adagrad, or the name of a class of torch.optim, spelt as torch does.

    params: keyword arguments of its constructor, DeepSpeed's defaults filled in (AdamW: weight_decay 0.0, not torch's
        0.01); without `torch_adam`, `adam_w_mode` and the keys that have no effect.
    torch_adam: use torch's own class for Adam and AdamW (also set by `amsgrad`, which only torch's has).
    adam_w_mode: decoupled weight decay. As in DeepSpeed, Adam has it too unless the config says `false`, and AdamW
        always. Of no meaning for other names.
    """

    name: str
    params: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    torch_adam: bool = False
    adam_w_mode: bool = True


@dataclass(frozen=True)
class Scheduler:
    """name: WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest, or a class of torch.optim.lr_scheduler.

    params: keyword arguments of its constructor, the optimizer left out; defaults filled in for the first five.
    """

    name: str
    params: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class ActivationCheckpointing:
    """The section `activation_checkpointing`. configured: the config has the section."""

    configured: bool = False
    cpu_checkpointing: bool = False


@dataclass(frozen=True)
class Logging:
    """steps_per_print: optimizer steps between two lines of the log; None prints none.

    wall_clock_breakdown, memory_breakdown: after every step, where time went and where the bytes are.
    """

    steps_per_print: int | None = None
    wall_clock_breakdown: bool = False
    dump_state: bool = False
    memory_breakdown: bool = False


@dataclass(frozen=True)
class Monitor:
    """`csv_monitor` or `tensorboard`. output_path: the folder as given; empty means the writer's own default."""

    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


@dataclass(frozen=True)
class FlopsProfiler:
    """The section `flops_profiler`. module_depth: -1 means to the innermost. output_file: None means the log."""

    enabled: bool = False
    recompute_fwd_factor: float = 0.0
    profile_step: int = 1
    module_depth: int = -1
    detailed: bool = True
    output_file: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """async_save: `checkpoint.writer.decoupled`: `save_checkpoint` returns before the files are on disk."""

    async_save: bool = False


@dataclass(frozen=True)
class Settings:
    """A DeepSpeed config, resolved.

    gradient_clipping: the L2 norm that gradients are clipped to; 0.0 clips nothing.
    grad_norm: `zero_optimization.compute_grad_norm`: the norm is taken even where no step depends on it.
    managed_accumulation: `managed_gradient_accumulation`: the engine counts micro-batches; False: every `step()`
        applies an update, and the caller chooses when to call it.
    optimizer, scheduler: None where the config names none.
    notices: what differs from what the reader of the config may expect, one sentence each; the engine logs them once.
    """

    batch: BatchSizes
    precision: Precision = field(default_factory=Precision)
    gradient_clipping: float = 1.0
    grad_norm: bool = True
    managed_accumulation: bool = True
    placement: Placement = field(default_factory=Placement)
    optimizer: Optimizer | None = None
    scheduler: Scheduler | None = None
    activation_checkpointing: ActivationCheckpointing = field(default_factory=ActivationCheckpointing)
    dataloader_drop_last: bool = False
    logging: Logging = field(default_factory=Logging)
    csv_monitor: Monitor = field(default_factory=Monitor)
    tensorboard: Monitor = field(default_factory=Monitor)
    flops_profiler: FlopsProfiler = field(default_factory=FlopsProfiler)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    notices: tuple[str, ...] = ()
