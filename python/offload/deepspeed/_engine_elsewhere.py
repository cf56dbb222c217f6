"""What DeepSpeed's engine has and this one has not, and what to use instead."""

from __future__ import annotations

__all__ = ["elsewhere"]

_CONFIG = "engine.config is the config as it was given, engine.settings what it means"
_RANKS = "one process trains the whole model: engine.world_size and engine.global_rank"
_REDUCTION = "one process has the whole gradients, in parameter.grad before step()"
_LOADER = "pass training_data= to initialize, or make a torch.utils.data.DataLoader"
_COMPILER = "engine.compile() compiles the model with torch.compile"
_CURRICULUM = "curricula and layer drop belong to the data loader and the model"
_EXPERTS = "experts are plain modules here"
_TUNER = "offload.wrap measures and plans by itself"
_FILES = "engine.save_checkpoint and engine.load_checkpoint are all there is"
_TIMES = "write wall_clock_breakdown in the config"
_OPTIMIZER = "engine.optimizer.optimizer is the wrapped optimizer"
_PROFILER = "use the section flops_profiler of the config, or torch.utils.flop_counter"
_PIPELINE = "pipeline parallelism is not supported; call engine(batch), engine.backward(loss) and engine.step()"
_GONE = "earlier releases of DeepSpeed had it and 0.19.8 has not: leave it out"
_INSIDE = "it is of the inside of DeepSpeed's engine: leave it out"

_NAMES = {
    _CONFIG: """
        aio_config autotp_size bf16_master_weights_and_gradients bf16_optimizer_states communication_data_type
        cpuadam_cores_perc dump_state dynamic_loss_scale_args flops_profiler_enabled fp16_auto_cast
        fp16_master_weights_and_gradients get_data_types gradient_predivide_factor initial_dynamic_scale
        is_sanity_checks_enabled log_level memory_breakdown optimizer_legacy_fusion optimizer_params
        postscale_gradients scheduler_params super_offload swap_tensor_config tensor_parallel_config
        torch_autocast_lower_precision_safe_modules use_node_local_storage zenflow_config _config
    """,
    _RANKS: """
        all_to_all_group checkpoint_mp_rank data_parallel_group dist_backend get_data_parallel_rank
        get_model_parallel_rank get_sequence_parallel_group get_tensor_parallel_rank is_first_weights_partition_group
        loaded_checkpoint_dp_world_size loaded_checkpoint_mp_world_size local_all_to_all_group mesh_device mpu
        seq_data_parallel_group seq_parallel_group use_ds_comm
    """,
    _REDUCTION: """
        all_gather_scalar allreduce_and_copy allreduce_bucket allreduce_no_retain buffered_allreduce_fallback
        coalesce_grad_reduction enable_backward_allreduce gradient_average
    """,
    _LOADER: """
        collate_fn deepspeed_io is_iterable_style_dataset is_map_style_dataset set_data_post_process_func training_data
    """,
    _COMPILER: """
        get_autosp_backend get_autotp_backend get_compile_time get_deepcompile_backend get_deepspeed_compile_backend
        is_deepcompile_active is_deepcompile_enabled register_compile_pass uses_parallelization_pass_only
    """,
    _CURRICULUM: "curriculum_learning_config curriculum_learning_enabled set_custom_curriculum_learning_schedule",
    _EXPERTS: """
        expert_data_parallel_group expert_parallel_group gate_modules load_moe_state_dict moe_layers num_experts
    """,
    _FILES: "checkpoint_engine save_non_zero_checkpoint save_zero_checkpoint",
    "checkpoints load under any placement as they are": "load_universal_checkpoint",
    _TIMES: """
        engine_timers engine_timers_cache flops fwd_duration get_wall_clock_timers print_forward_breakdown timers
        tput_timer
    """,
    _OPTIMIZER: "basic_optimizer client_optimizer get_optimizer_configuration get_type",
    "engine.lr_scheduler": "client_lr_scheduler",
    _PROFILER: "flops_profiler",
    "write csv_monitor or tensorboard in the config, or log from the training loop": (
        "get_summary_writer summary_events summary_writer tensorboard_enabled"
    ),
    "engine.optimizer.cur_scale is the present loss scale": "cur_scale torch_autocast_z0_gradscaler",
    "engine.step() clips as gradient_clipping says": "clip_fp32_gradients",
    "call gc.collect() and gc.disable() in the script": "collect_python_gc",
    "keep the losses in the training loop": "losses",
    "engine.module.named_parameters() has them": "param_names",
    _PIPELINE: "eval_batch inference_batch set_batch_fn set_dataiterator train_batch",
    _GONE: """
        amp_enabled amp_params block_eigenvalue broadcast_src_rank client_model_parameters csr_tensor_module_names
        eigenvalue elasticity_enabled gas_boundary_ctr graph_harvesting is_elastic_model_parallel_supported
        progressive_layer_drop quantize_training sparse_gradients_enabled sparse_tensor_module_names
    """,
    _INSIDE: """
        dont_change_device first_dataloader_check flatten inside_no_sync_ctxt module_forward_post_hook
        module_forward_pre_hook optimized_linear_base_weight_sharding optimized_linear_lora_enabled scale_wrt_gas
        unflatten update_interval warn_unscaled_loss
    """,
}
_INSTEAD = {name: instead for instead, names in _NAMES.items() for name in names.split()}
# Families whose members all have one answer.
_FAMILIES = {
    "autotuning_": _TUNER,
    "checkpoint_serialization_": _FILES,
    "checkpoint_tag_validation_": _FILES,
    "checkpoint_writer_": _FILES,
    "compile_": _COMPILER,
    "curriculum_": _CURRICULUM,
    "data_efficiency_": _CURRICULUM,
    "data_sampling_": _CURRICULUM,
    "eigenvalue_": _GONE,
    "flops_profiler_": _CONFIG,
    "pld_": _GONE,
    "random_ltd_": _CURRICULUM,
    "sparse_all": _REDUCTION,
    "zero_": _CONFIG,
}


def elsewhere(name: str) -> str | None:
    """What to use in place of an attribute of DeepSpeed's engine; None for a name that neither engine has."""
    if name in _INSTEAD:
        return _INSTEAD[name]
    return next((instead for family, instead in _FAMILIES.items() if name.startswith(family)), None)
