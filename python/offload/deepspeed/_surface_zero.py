"""The table of keys: `zero_optimization` and the sections inside it."""

from __future__ import annotations

from typing import Any

from ._surface import OBJECT, Key, Section, accepted, honoured, inert, refused

__all__ = ["SECTIONS"]

_ALONE = "One process has nobody to exchange gradients or weights with."
_UNITS = "Weights travel by whole units of the model, as many ahead as the device budget holds."
_WINDOW = "States on disk pass through a window of host memory, of a size that the host's memory decides."
_OVERLAP = "States are always read ahead of their update, and written behind it."
_CACHE = "Weights on disk pass through a cache of host memory, of a size that the host's memory decides."

_MOE_BLOCKS = [
    f"transformers.models.{module}.modeling_{module}.{name}SparseMoeBlock"
    for module, name in (("mixtral", "Mixtral"), ("qwen2_moe", "Qwen2Moe"), ("qwen3_moe", "Qwen3Moe"))
]


def _stage3(name: str, kind: str, default: object, text: str, **more: Any) -> Key:
    """A key that DeepSpeed reads with and without its prefix `stage3_`."""
    return accepted(f"stage3_{name}", kind, default, text, also=name, **more)


_ZERO = (
    honoured(
        "stage",
        (0, 1, 2, 3),
        0,
        "With one process there is nothing to shard: the stages train alike. `offload_param` needs stage 3.",
    ),
    honoured("offload_optimizer", OBJECT, None, "Where optimizer states and gradients live; at every stage."),
    honoured("offload_param", OBJECT, None, "Where the weights live between their uses; stage 3."),
    accepted(
        "zenflow",
        OBJECT,
        None,
        "The exact host update runs behind forward and backward instead; no gradient is late, and "
        "`gradient_accumulation_steps` stays as written.",
        aloud=True,
    ),
    accepted("leaf_module", OBJECT, None, "Which modules travel as one is found from the model."),
    accepted("sub_group_size", "int", 1_000_000_000, "The host update picks its own tiles.", low=0),
    *(
        accepted(name, "int", 500_000_000, f"{_ALONE} There are no buckets.", low=0, trainer=trainer)
        for name, trainer in (("reduce_bucket_size", "hidden_size squared"), ("allgather_bucket_size", None))
    ),
    *inert(
        _ALONE,
        [
            ("reduce_scatter", "bool", True),
            ("use_multi_rank_bucket_allreduce", "bool", True),
            ("allgather_partitions", "bool", True),
            ("round_robin_gradients", "bool", False),
            ("zero_quantized_weights", "bool", False),
            ("zero_quantized_nontrainable_weights", "bool", False),
            ("zero_quantized_gradients", "bool", False),
            ("zeropp_loco_param", OBJECT, None),
            ("mics_hierarchical_params_gather", "bool", False),
            ("mics_shard_size", "int", -1),
        ],
    ),
    accepted("zero_hpz_partition_size", "int", 1, _ALONE, low=0),
    accepted("overlap_comm", "bool?", None, "Copies always overlap with compute."),
    accepted("contiguous_gradients", "bool", True, "A gradient on the host always lies in one block."),
    accepted("ignore_unused_parameters", "bool", True, "A parameter without a gradient is always left as it is."),
    honoured(
        "compute_grad_norm",
        "bool",
        True,
        "`false`: `get_global_grad_norm()` is None where no check for overflow takes the norm; not with clipping.",
    ),
    accepted("parameter_alignment", "bool", False, "Parameters always begin at multiples of 256 bytes."),
    accepted("load_from_fp32_weights", "bool", True, "Checkpoints hold the exact master weights; those are read."),
    accepted("elastic_checkpoint", "bool", False, "Checkpoints always load under other placements and devices."),
    accepted("pipeline_loading_checkpoint", "bool", False, "Checkpoints are always read in pieces."),
    _stage3("prefetch_bucket_size", "int", 50_000_000, _UNITS, low=0, trainer="0.9 hidden_size squared"),
    _stage3("param_persistence_threshold", "int", 100_000, _UNITS, low=0, trainer="10 hidden_size"),
    _stage3("model_persistence_threshold", "int", 2**63 - 1, _UNITS, low=0),
    _stage3("max_live_parameters", "int", 1_000_000_000, _UNITS, low=0),
    _stage3("max_reuse_distance", "int", 1_000_000_000, _UNITS, low=0),
    _stage3("module_granularity_threshold", "int", 0, _UNITS),
    _stage3("use_all_reduce_for_fetch_params", "bool", False, _ALONE),
    _stage3("allgather_sequential", "bool", False, _ALONE),
    _stage3(
        "gather_16bit_weights_on_model_save",
        "bool",
        False,
        "A saved model is always whole.",
        trainer="Accelerate's zero3_save_16bit_model",
    ),
    accepted("memory_efficient_linear", "bool", True, "Weights are fetched by hooks; no linear layer is replaced."),
    accepted("override_module_apply", "bool", True, "`Module.apply` needs no replacement here."),
    accepted("log_trace_cache_warnings", "bool", False, "There is no trace cache."),
    accepted("enable_sanity_checks", "bool", False, "The checks of the engine are always on."),
    accepted("save_muon_momentum_buffer_in_memory", "bool", False, "Muon is not available."),
    refused("legacy_stage1", "bool", False, "Leave it out; DeepSpeed has dropped it too."),
    refused("grad_hooks", "bool", None, "Leave it out, as DeepSpeed wants too: gradients always leave by hooks."),
    accepted("cpu_offload", "bool?", None, "Old spelling.", now="offload_optimizer", now_value={"device": "cpu"}),
    accepted("cpu_offload_param", "bool?", None, "Old spelling.", now="offload_param", now_value={"device": "cpu"}),
    accepted("cpu_offload_use_pin_memory", "bool?", None, "Old; DeepSpeed reads it no more. Write `pin_memory`."),
    accepted(
        "stage3_gather_fp16_weights_on_model_save",
        "bool",
        False,
        "Old spelling.",
        now="stage3_gather_16bit_weights_on_model_save",
    ),
)  # fmt: skip

_OFFLOAD_OPTIMIZER = (
    honoured(
        "device",
        ("none", "cpu", "nvme"),
        "none",
        "`cpu`: optimizer states, master weights and gradients live in host memory, and the host updates. `nvme`: the "
        "states and master weights of Adam, AdamW, Lion and Adagrad live in files under `nvme_path`, at every stage.",
        trainer="Accelerate's offload_optimizer_device",
    ),
    honoured(
        "nvme_path",
        "path?",
        None,
        "Where the files of `nvme` are; made if it is not there. They are private, and go with the process.",
        trainer="Accelerate's offload_optimizer_nvme_path",
    ),
    honoured("pin_memory", "bool", True, "Host memory is page-locked, exactly the bytes in use."),
    honoured(
        "ratio",
        "float",
        1.0,
        "The share of the optimizer states, by bytes, that is on the host and updated there; the model's first "
        "parameters stay. Adam, AdamW, Lion and Adagrad; others take 0 or 1. With `nvme` all of them leave.",
        low=0,
        high=1,
    ),
    accepted("buffer_count", "int", 4, _WINDOW, low=0),
    accepted("pipeline_read", "bool", False, _OVERLAP),
    accepted("pipeline_write", "bool", False, _OVERLAP),
    accepted("fast_init", "bool", False, "States are always made on disk, a piece at a time."),
    accepted(
        "super_offload",
        "bool",
        False,
        "The exact host update runs behind forward and backward instead, and no step is ever rolled back.",
        aloud=True,
    ),
    accepted("cpuadam_cores_perc", "float", 0.8, "The host update takes the cores that are free.", low=0, high=1),
    refused("buffer_size", "int", None, "Leave it out: it belongs to `offload_param`. DeepSpeed refuses it here too."),
)  # fmt: skip

_OFFLOAD_PARAM = (
    honoured(
        "device",
        ("none", "cpu", "nvme"),
        "none",
        "`cpu`: weights live in host memory and visit the device unit by unit. `nvme`: they live in files under "
        "`nvme_path`, and host memory is a cache of them; Adam, AdamW, Lion and Adagrad can train them there. "
        "Other optimizers take `cpu`, and `offload_optimizer` on `cpu` too.",
        trainer="Accelerate's offload_param_device",
    ),
    honoured(
        "nvme_path",
        "path?",
        None,
        "As that of `offload_optimizer`. Where the two differ, states and weights are striped over both.",
        trainer="Accelerate's offload_param_nvme_path",
    ),
    honoured("pin_memory", "bool", True, "Host memory is page-locked, exactly the bytes in use."),
    accepted("buffer_count", "int", 5, _CACHE, low=0),
    accepted("buffer_size", "int", 100_000_000, _CACHE, low=0),
    accepted("max_in_cpu", "int", 1_000_000_000, _CACHE, low=0),
)

_ZENFLOW = (
    accepted("topk_ratio", "float", 0.1, "See `zenflow`.", low=0, high=1),
    accepted("auto_ratio", "float", 0.99, "See `zenflow`.", low=0, high=1),
    accepted("pt_reserved_cores_perc", "float", 0.5, "See `zenflow`.", low=0, high=1),
    *inert(
        "See `zenflow`.",
        [
            ("select_strategy", ("auto", "step", "epoch"), "auto"),
            ("select_interval", "int|str", "auto"),
            ("update_interval", "int|str", "auto"),
            ("overlap_step", "bool", False),
            ("offload", "bool", False),
            ("full_warm_up_rounds", "int", 0),
            ("steps_per_epoch", "int?", None),
        ],
    ),
)

SECTIONS = (
    Section(
        "zero_optimization",
        "The stage, and what leaves the device. `true` in place of the object is the old spelling of stage 1.",
        _ZERO,
        strict=True,
    ),
    Section("zero_optimization.offload_optimizer", "", _OFFLOAD_OPTIMIZER, strict=True),
    Section("zero_optimization.offload_param", "Read at stage 3 only, as in DeepSpeed.", _OFFLOAD_PARAM, strict=True),
    Section(
        "zero_optimization.zenflow",
        "ZenFlow delays part of the update, which changes what is learnt. Here the whole update is exact and hidden.",
        _ZENFLOW,
        strict=True,
    ),
    Section(
        "zero_optimization.leaf_module",
        "",
        inert(
            "Which modules travel as one is found from the model.",
            [("classes", "list", _MOE_BLOCKS), ("names", "list", []), ("name_suffixes", "list", [])],
        ),
        strict=True,
    ),
)
