"""The table of keys: what DeepSpeed does beside offloading: many ranks, compilers, tuners, other ways to train."""

from __future__ import annotations

from ._surface import OBJECT, Section, accepted, inert, refused

__all__ = ["ENVIRONMENT", "SECTIONS"]

_ALONE = "One process trains the model, the whole of it."
_COMPILER = "Offloading here needs no compiler. `torch.compile` on the model's blocks works beside it."
_GENERATE = "Training is the same without it; generate with the module itself."
_TUNER = "`offload.wrap` measures and plans by itself."
_BATCHES = "Write the batch sizes that one process trains with, as top-level keys."
_EIGENVALUE = "Goes with `quantize_training`, which is refused."
_SAMPLER = "Choose and order the samples in the data loader."

SECTIONS = (
    Section(
        "compile",
        "DeepCompile.",
        (
            accepted("deepcompile", "bool", False, _COMPILER, aloud=True),
            *inert(
                _COMPILER,
                [
                    ("free_activation", "bool", False),
                    ("free_activation_threshold", "int", 10_485_760),
                    ("offload_activation", "bool", False),
                    ("offload_activation_pin_memory", "bool", True),
                    ("offload_opt_states", "bool", False),
                    ("double_buffer", "bool", True),
                    ("symmetric_memory", "bool", False),
                    ("debug_log", "bool", False),
                    ("offload_parameters", "bool", False),
                    ("sync_before_reduce", "bool", False),
                    ("sync_after_reduce", "bool", False),
                    ("sync_before_allgather", "bool", False),
                    ("sync_after_allgather", "bool", False),
                    ("keep_int_input_tensors", "bool", True),
                    ("keep_all_input_tensors", "bool", False),
                    ("passes", "list?", None),
                    ("autoep_non_moe", "bool", False),
                ],
            ),
        ),
        strict=True,
    ),
    Section(
        "hybrid_engine",
        "Faster generation inside reinforcement learning.",
        (
            accepted("enabled", "bool", False, _GENERATE, aloud=True),
            *inert(
                _GENERATE,
                [
                    ("max_out_tokens", "int", 512),
                    ("inference_tp_size", "int", 1),
                    ("release_inference_cache", "bool", False),
                    ("pin_parameters", "bool", True),
                    ("tp_gather_partition_size", "int", 8),
                    ("enable_cuda_graph", "bool", False),
                ],
            ),
        ),
        strict=True,
    ),
    Section(
        "tensor_parallel",
        "",
        (
            refused("autotp_size", "int", 0, f"{_ALONE} Leave it out.", harmless=(0, 1)),
            *inert(
                _ALONE,
                [
                    ("dtype", "str", "torch.float16"),
                    ("tp_overlap_comm", "bool", False),
                    ("injection_policy_tuple", "list?", None),
                    ("partition_config", OBJECT, None),
                    ("preset_model", "str?", None),
                    ("keep_module_on_host", "bool", False),
                    ("vocab_parallel_lm_head", "bool?", None),
                    ("vocab_parallel_ce_backend", ("torch", "liger"), "torch"),
                ],
            ),
            accepted("tp", "object", {}, _ALONE, also="tensor_parallel"),
            accepted("kernel_inject", "bool", False, _ALONE, also="replace_with_kernel_inject"),
        ),
        strict=True,
    ),
    Section(
        "expert_parallel",
        "",
        inert(
            _ALONE,
            [
                ("enabled", "bool", False),
                ("autoep_size", "int", 1),
                ("expert_tensor_parallel_size", "int", 1),
                ("preset_model", "str?", None),
                ("moe_layer_pattern", "str?", None),
                ("expert_pattern", "str?", None),
                ("router_pattern", "str?", None),
                ("use_grouped_mm", "bool", True),
                ("disable_triton_grouped_mm", "bool", False),
                ("route_norm", "bool?", None),
                ("route_scale", "float", 1.0),
                ("score_apply", "str", "auto"),
                ("combine_impl", "str", "auto"),
                ("score_func", "str", "auto"),
                ("top_k", "int|str", "auto"),
                ("num_expert_groups", "int?", None),
                ("num_limited_groups", "int?", None),
                ("load_balance_coeff", "any", None),
                ("routed_scaling_factor", "float|str", "auto"),
                ("validate_folding_routing", "bool", False),
                ("expert_w1", "str?", None),
                ("expert_w2", "str?", None),
                ("expert_w3", "str?", "unset"),
                ("num_experts_attr", "str?", None),
                ("top_k_attr", "str?", None),
                ("has_shared_experts", "bool?", None),
                ("shared_experts_pattern", "str?", None),
                ("shared_experts_gate_pattern", "str?", None),
                ("expert_activation", "str?", None),
                ("gate_up_impl", "str", "separate"),
                ("row_weighting_impl", "str", "auto"),
                ("async_split_plan", "bool", False),
                ("comm_backend", "str", "comm"),
                ("comm_num_sm", "int", 12),
                ("comm_qp_margin", "int", 4),
                ("comm_max_tokens_per_rank", "int", 0),
            ],
        ),
    ),
    Section(
        "elasticity",
        "Batch sizes for a number of ranks that changes.",
        (
            refused("enabled", "bool", False, _BATCHES),
            *inert(
                _BATCHES,
                [
                    ("max_train_batch_size", "int", 2000),
                    ("micro_batch_sizes", "list", [2, 4, 6]),
                    ("min_gpus", "int", 1),
                    ("max_gpus", "int", 10_000),
                    ("num_gpus_per_node", "int", 1),
                    ("model_parallel_size", "int", 1),
                    ("min_time", "int", 0),
                    ("prefer_larger_batch", "bool", True),
                    ("ignore_non_elastic_batch_info", "bool", False),
                    ("version", "float", 0.2),
                ],
            ),
        ),
    ),
    Section(
        "autotuning",
        "",
        inert(
            _TUNER,
            [
                ("enabled", "bool", False),
                ("fast", "bool", True),
                ("results_dir", "str", "autotuning_results"),
                ("exps_dir", "str", "autotuning_exps"),
                ("overwrite", "bool", True),
                ("start_profile_step", "int", 3),
                ("end_profile_step", "int", 5),
                ("metric_path", "str?", None),
                ("model_info_path", "str?", None),
                ("metric", ("latency", "throughput", "flops"), "throughput"),
                ("tuner_type", ("gridsearch", "random", "model_based"), "gridsearch"),
                ("tuner_early_stopping", "int", 5),
                ("tuner_num_trials", "int", 50),
                ("arg_mappings", OBJECT, None),
                ("max_train_batch_size", "int?", None),
                ("min_train_batch_size", "int", 1),
                ("max_train_micro_batch_size_per_gpu", "int", 1024),
                ("min_train_micro_batch_size_per_gpu", "int", 1),
                ("num_tuning_micro_batch_sizes", "int", 3),
                ("mp_size", "int", 1),
                ("model_info", OBJECT, None),
            ],
        ),
    ),
    Section(
        "eigenvalue",
        "",
        inert(
            _EIGENVALUE,
            [
                ("enabled", "bool", False),
                ("verbose", "bool", False),
                ("max_iter", "int", 100),
                ("tol", "float", 0.01),
                ("stability", "float", 1e-6),
                ("gas_boundary_resolution", "int", 1),
                ("layer_name", "str", "bert.encoder.layer"),
                ("layer_num", "int", 0),
            ],
        ),
    ),
    Section(
        "data_efficiency",
        "Curriculum learning and random layer-token dropping.",
        (
            refused("enabled", "bool", False, _SAMPLER),
            *inert(_SAMPLER, [("seed", "int", 1234), ("data_sampling", "object", {}), ("data_routing", "object", {})]),
        ),
    ),
)

# Environment variables and flags of DeepSpeed's launcher: none is read here, and none is needed.
ENVIRONMENT = (
    ("DS_PIN_MEMORY_BACKEND", "Host memory is page-locked and registered with the device, exactly the bytes in use."),
    ("DS_SKIP_CUDA_CHECK", "No CUDA toolkit is used."),
    ("DS_BUILD_*", "Nothing is compiled when it is first used."),
    ("DS_ACCELERATOR", "The device is the one that the model is on."),
    ("TORCH_EXTENSIONS_DIR", "Nothing is compiled when it is first used."),
    ("--bind_cores_to_rank, --bind_core_list", "Bind with `taskset`: the host update uses the cores that it may."),
)  # fmt: skip
