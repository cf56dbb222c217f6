"""What scripts read and call of the engine: each works, or raises and names what to use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import offload
import offload.deepspeed as deepspeed
from deepspeed_training import STAGES, config_of
from offload.deepspeed._engine_elsewhere import _INSTEAD, elsewhere
from training import batches, loss_of, make_model

pytestmark = pytest.mark.usefixtures("device")

WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.5, "warmup_num_steps": 0}}
DYNAMIC = {"enabled": True, "initial_scale_power": 4}
STATIC = {"enabled": True, "loss_scale": 64}


def engine_of(**keys: Any) -> Any:
    engine, *_ = deepspeed.initialize(model=make_model(), config=config_of(accumulation=2, **keys))
    return engine


# Public scripts, Hugging Face's Trainer and Accelerate use these of the engine.
READS: dict[str, Callable[[Any], Any]] = {
    "train_batch_size": lambda e: e.train_batch_size() == 8,
    "train_micro_batch_size_per_gpu": lambda e: e.train_micro_batch_size_per_gpu() == 4,
    "gradient_accumulation_steps": lambda e: e.gradient_accumulation_steps() == 2,
    "managed_gradient_accumulation": lambda e: e.managed_gradient_accumulation() is True,
    "get_batch_info": lambda e: e.get_batch_info() == (8, 4, 2),
    "local_rank": lambda e: (e.local_rank, e.global_rank, e.world_size, e.dp_world_size) == (0, 0, 1, 1),
    "sequence_parallel_size": lambda e: e.sequence_parallel_size == e.seq_dp_world_size == e.mp_world_size == 1,
    "has_moe_layers": lambda e: not (e.has_moe_layers or e.pipeline_parallelism),
    "device": lambda e: e.device == next(e.module.parameters()).device,
    "config": lambda e: e.config["gradient_accumulation_steps"] == 2,
    "module": lambda e: e.module.embedding is e.embedding,
    "training": lambda e: e.train().training and not e.eval().training,
    "fp16_enabled": lambda e: (e.fp16_enabled(), e.bfloat16_enabled()) == (False, False),
    "torch_autocast_enabled": lambda e: (e.torch_autocast_enabled(), e.torch_autocast_dtype()) == (False, None),
    "zero_optimization_stage": lambda e: e.zero_optimization() and e.zero_optimization_stage() == 2,
    "zero_optimization_partition_weights": lambda e: e.zero_optimization_partition_weights() is False,
    "zero_optimization_partition_gradients": lambda e: e.zero_optimization_partition_gradients() is True,
    "zero_gather_16bit_weights_on_model_save": lambda e: e.zero_gather_16bit_weights_on_model_save() is True,
    "zero_offload_optimizer": lambda e: e.zero_offload_optimizer() and not e.zero_offload_param(),
    "gradient_clipping": lambda e: e.gradient_clipping() == 0.0,
    "steps_per_print": lambda e: e.steps_per_print() is None and e.wall_clock_breakdown() is False,
    "dataloader_drop_last": lambda e: e.dataloader_drop_last() is False,
    "optimizer_name": lambda e: (e.optimizer_name(), e.scheduler_name()) == ("adamw", "WarmupLR"),
    "get_lr": lambda e: e.get_lr() == [0.5] and e.get_mom() == [(0.9, 0.999)],
    "lr_scheduler": lambda e: e.lr_scheduler.get_last_lr() == [0.5],
    "counters": lambda e: (e.global_steps, e.micro_steps, e.global_samples, e.skipped_steps) == (1, 2, 8, 0),
    "get_global_grad_norm": lambda e: e.get_global_grad_norm() > 0,
    "is_gradient_accumulation_boundary": lambda e: e.is_gradient_accumulation_boundary() is False,
    "was_step_applied": lambda e: e.was_step_applied() is True,
    "optimizer": lambda e: isinstance(e.optimizer, torch.optim.Optimizer) and e.optimizer.overflow is False,
    "optimizer.optimizer": lambda e: isinstance(e.optimizer.optimizer, offload.OffloadOptimizer),
    "optimizer.loss_scaler": lambda e: e.optimizer.loss_scaler.loss_scale == e.optimizer.loss_scaler.cur_scale == 1.0,
    "monitor": lambda e: e.monitor.enabled is False and e.monitor.write_events([("loss", 1.0, 8)]) is None,
    "training_dataloader": lambda e: e.training_dataloader is None,
    "is_compiled": lambda e: e.is_compiled is False,
    "allreduce_gradients": lambda e: e.allreduce_gradients() is None,
    "empty_partition_cache": lambda e: e.empty_partition_cache() is None,
    "module_state_dict": lambda e: e.module_state_dict().keys() == e.module.state_dict().keys(),
}


@pytest.fixture
def trained() -> Any:
    engine = engine_of(zero=STAGES["stage 2, optimizer on the host"], scheduler=WARMUP)
    for tokens in batches(2):
        engine.backward(loss_of(engine, tokens))
        engine.step()
    return engine


@pytest.mark.parametrize("name", READS)
def test_it_works(trained: Any, name: str) -> None:
    assert READS[name](trained)


@pytest.mark.parametrize(
    ("keys", "fixed", "dynamic", "present"),
    [({}, 0.0, False, 1.0), ({"fp16": DYNAMIC}, 0.0, True, 16.0), ({"fp16": STATIC}, 64.0, False, 64.0)],
)
def test_loss_scale_is_the_fixed_one_of_the_config(
    keys: dict[str, Any], fixed: float, dynamic: bool, present: float
) -> None:
    engine = engine_of(zero=STAGES["stage 1"], **keys)
    assert (engine.loss_scale(), engine.dynamic_loss_scale()) == (fixed, dynamic)
    assert (
        engine.optimizer.cur_scale == engine.optimizer.loss_scale == engine.optimizer.loss_scaler.cur_scale == present
    )


def test_without_an_optimizer_there_are_no_rates() -> None:
    config = {key: value for key, value in config_of().items() if key != "optimizer"}
    engine, *_ = deepspeed.initialize(model=make_model(), config=config)
    assert engine.get_lr() == engine.get_mom() == [] and engine.get_global_grad_norm() is None


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("cur_scale", "engine.optimizer.cur_scale"),
        ("summary_events", "csv_monitor"),
        ("zero_sub_group_size", "engine.settings"),
        ("train_batch", "pipeline parallelism is not supported"),
        ("autotuning_enabled", "offload.wrap measures"),
        ("data_parallel_group", "engine.world_size"),
        ("timers", "wall_clock_breakdown"),
        ("checkpoint_tag_validation_enabled", "save_checkpoint"),
        ("sparse_allreduce", "parameter.grad"),
        ("client_lr_scheduler", "engine.lr_scheduler"),
        ("sparse_tensor_module_names", "earlier releases of DeepSpeed had it"),
        ("pld_enabled", "leave it out"),
        ("curriculum_scheduler_legacy", "belong to the data loader"),
        ("tensorboard_enabled", "write csv_monitor or tensorboard"),
    ],
)
def test_what_is_not_there_names_what_to_use(trained: Any, name: str, instead: str) -> None:
    with pytest.raises(AttributeError, match=rf"the engine has no '{name}': .*{instead}"):
        getattr(trained, name)


def test_the_table_has_only_what_is_not_there(trained: Any) -> None:
    assert [name for name in _INSTEAD if hasattr(trained, name)] == []
    assert elsewhere("embedding") is None
    trained.module.timers = 3  # the model's own goes before the table
    assert trained.timers == 3
    del trained.module.timers
