"""The names of DeepSpeed that public scripts use most: each is there, or its error names what to use."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("device")

# By what files of public repositories import and look up, DeepSpeed's own left out.
THERE = """
    initialize add_config_arguments init_distributed get_accelerator DeepSpeedEngine __version__ logger
    zero.Init zero.GatheredParameters zero.register_external_parameter
    zero.estimate_zero3_model_states_mem_needs_all_live
    comm.get_rank comm.get_local_rank comm.get_world_size comm.barrier comm.all_reduce comm.broadcast
    comm.is_initialized comm.comm.is_initialized
    accelerator.get_accelerator
    checkpointing.checkpoint checkpointing.configure checkpointing.is_configured checkpointing.reset
    checkpointing.non_reentrant_checkpoint
    ops.adam.DeepSpeedCPUAdam ops.adam.FusedAdam ops.lion.FusedLion ops.adagrad.DeepSpeedCPUAdagrad
    runtime.engine.DeepSpeedEngine runtime.utils.see_memory_usage runtime.dataloader.RepeatingLoader
    runtime.lr_schedules.WarmupLR runtime.lr_schedules.WarmupDecayLR runtime.lr_schedules.WarmupCosineLR
    runtime.activation_checkpointing.checkpointing.checkpoint
    runtime.fp16.loss_scaler.LossScaler runtime.fp16.loss_scaler.DynamicLossScaler
    runtime.zero.GatheredParameters runtime.zero.config.ZeroStageEnum
    runtime.zero.partition_parameters.ZeroParamStatus runtime.zero.partition_parameters.GatheredParameters
    runtime.zero.stage3.estimate_zero3_model_states_mem_needs_all_live
    runtime.zero.stage_1_and_2.estimate_zero2_model_states_mem_needs_all_live
    runtime.zero.offload_config.OffloadDeviceEnum runtime.zero.offload_config.OffloadStateTypeEnum
    checkpoint.utils.clone_tensors_for_torch_save
    utils.logger utils.log_dist utils.logging.logger utils.RepeatingLoader utils.set_z3_leaf_modules
    utils.safe_get_full_fp32_param utils.safe_get_full_grad utils.safe_get_full_optimizer_state
    utils.safe_set_full_fp32_param utils.safe_set_full_grad utils.safe_set_full_optimizer_state
    utils.tensor_fragment.fragment_address utils.timer.SynchronizedWallClockTimer
    utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint
    utils.zero_to_fp32.load_state_dict_from_zero_checkpoint
    utils.zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict
"""
ELSEWHERE = """
    DeepSpeedConfig OnDevice PipelineModule init_inference tp_model_init add_tuning_arguments
    checkpoint.constants checkpoint.ds_to_universal
    inference.engine.InferenceEngine launcher.runner moe.layer.MoE monitor.monitor.MonitorMaster
    ops.lamb.FusedLamb ops.op_builder.CPUAdamBuilder ops.op_builder.FusedAdamBuilder ops.sparse_attention
    ops.transformer.DeepSpeedTransformerLayer ops.deepspeed4science.DS4Sci_EvoformerAttention
    pipe.LayerSpec pipe.PipelineModule profiling.flops_profiler.FlopsProfiler
    profiling.flops_profiler.get_model_profile
    runtime.activation_checkpointing.checkpointing.CheckpointFunction
    runtime.activation_checkpointing.checkpointing.get_cuda_rng_tracker
    runtime.config.DeepSpeedConfig runtime.dataloader.DeepSpeedDataLoader
    runtime.fp16.onebit.zoadam.ZeroOneAdam runtime.pipe.module.PipelineModule
    runtime.sequence_parallel.ulysses_sp.UlyssesSPAttentionHF
    runtime.utils.clip_grad_norm_ runtime.utils.set_random_seed runtime.utils.move_to_device
    runtime.zero.config.DeepSpeedZeroConfig runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3
    runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer
    sequence.layer.DistributedAttention utils.groups utils.instrument_w_nvtx utils.timer.ThroughputTimer
    env_report git_version_info.version elasticity
"""


def found(name: str) -> Any:
    """As `from deepspeed.a.b import c` finds it."""
    path, _, last = f"offload.deepspeed.{name}".rpartition(".")
    scope: dict[str, Any] = {}
    exec(f"from {path} import {last}", scope)
    return scope[last]


@pytest.mark.parametrize("name", THERE.split())
def test_it_is_there(name: str) -> None:
    value: Any = importlib.import_module("offload.deepspeed")
    for part in name.split("."):  # as `deepspeed.a.b.c` finds it
        value = getattr(value, part)
    assert found(name) is value is not None


@pytest.mark.parametrize("name", ELSEWHERE.split())
def test_what_is_not_names_what_to_use(name: str) -> None:
    with pytest.raises(ImportError, match=r"offload\.deepspeed has no '") as raised:
        found(name)
    assert ": it has " not in str(raised.value)
