"""Submodules by DeepSpeed's paths, such as `offload.deepspeed.runtime.lr_schedules`, whose names live elsewhere here.

Each is made when it is imported, from the table below. What is in neither place raises an error that names what to use.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["ROOTS", "Finder", "instead_of"]

_PACKAGE = __name__.rpartition(".")[0] + "."


def _names(text: str, *, home: str) -> dict[str, str]:
    return dict.fromkeys(text.split(), home)


_ZERO = _names("GatheredParameters Init ZeroParamStatus register_external_parameter", home="zero")
_LOG = _names("logger log_dist", home="_log")
_LEAVES = _names("set_z3_leaf_modules unset_z3_leaf_modules", home="_leaf_modules")
_ACCESS = _names(
    """
    safe_get_full_fp32_param safe_get_full_grad safe_get_full_optimizer_state
    safe_set_full_fp32_param safe_set_full_grad safe_set_full_optimizer_state
    safe_get_local_fp32_param safe_get_local_grad safe_get_local_optimizer_state
    safe_set_local_fp32_param safe_set_local_grad safe_set_local_optimizer_state
    safe_update_full_grad_vectorized
    """,
    home="_parameter_access",
)
# By path: the module of this package that has each name, "" for the package itself.
_HOMES = {
    "checkpoint": {},
    "checkpoint.utils": _names("clone_tensors_for_torch_save", home="_state_dicts"),
    "runtime": {},
    "runtime.activation_checkpointing": {},
    "runtime.activation_checkpointing.checkpointing": _names(
        "checkpoint configure is_configured model_parallel_cuda_manual_seed non_reentrant_checkpoint reset",
        home="checkpointing",
    ),
    "runtime.dataloader": _names("RepeatingLoader", home="_data"),
    "runtime.engine": _names("DeepSpeedEngine", home=""),
    "runtime.fp16": {},
    "runtime.fp16.loss_scaler": _names("DynamicLossScaler LossScaler", home="_zero_checkpoint"),
    "runtime.lr_schedules": _names("LRRangeTest OneCycle WarmupCosineLR WarmupDecayLR WarmupLR", home="_schedulers"),
    "runtime.utils": _names("see_memory_usage", home="_reporting"),
    "runtime.zero": _ZERO,
    "runtime.zero.config": _names("ZeroStageEnum", home="_zero_checkpoint"),
    "runtime.zero.offload_config": _names("OffloadDeviceEnum OffloadStateTypeEnum", home="_offload_config"),
    "runtime.zero.partition_parameters": _ZERO | _names("unregister_external_parameter", home="zero"),
    "runtime.zero.stage3": _names(
        "estimate_zero3_model_states_mem_needs_all_live estimate_zero3_model_states_mem_needs_all_cold", home="zero"
    ),
    "runtime.zero.stage_1_and_2": _names(
        "estimate_zero2_model_states_mem_needs_all_live estimate_zero2_model_states_mem_needs_all_cold", home="zero"
    ),
    "utils": _LOG | _LEAVES | _ACCESS | _names("RepeatingLoader", home="_data"),
    "utils.logging": _LOG,
    "utils.tensor_fragment": _ACCESS | _names("fragment_address", home="_zero_checkpoint"),
    "utils.timer": _names("SynchronizedWallClockTimer", home="_timers"),
    "utils.z3_leaf_module": _LEAVES,
    "utils.zero_to_fp32": _names(
        """
        convert_zero_checkpoint_to_fp32_state_dict convert_zero_checkpoint_to_state_dict
        get_fp32_state_dict_from_zero_checkpoint load_state_dict_from_zero_checkpoint
        """,
        home="_state_dicts",
    ),
}
ROOTS = ("checkpoint", "runtime", "utils")

_CONFIG = "pass the config to initialize; `offload config explain` shows what it means"
_EXPERTS = "experts are plain modules here: use the model's own"
_FLOPS = "use the section flops_profiler of the config, or torch.utils.flop_counter"
_INFERENCE = "offload trains; run the plain model for inference"
_LEAF = "leave the call out: which modules travel as one is found from the model; set_z3_leaf_modules is accepted"
_ONE_BIT = "the 1-bit family compresses what ranks exchange, and there is one process: use torch.optim.Adam"
_PIPELINE = "pipeline parallelism is not supported; the plain model trains offloaded on one device"
_RECOMPUTED = "use checkpointing.checkpoint, or torch.utils.checkpoint, which saves torch's random states"
_SEQUENCE = "sequence parallelism is not supported"
_ZERO_OPTIMIZER = "engine.optimizer is one class at every stage, and engine.zero_optimization_stage() says which it is"
# By the last part of a name or by a path, of DeepSpeed's.
_INSTEAD = {
    "CheckpointFunction": _RECOMPUTED,
    "DeepSpeedConfig": _CONFIG,
    "DeepSpeedConfigError": "a config that is refused raises offload.InvalidArgument, a ValueError",
    "DeepSpeedDataLoader": "pass training_data= to initialize, or make a torch.utils.data.DataLoader",
    "DeepSpeedHybridEngine": "train with initialize; generate with the module inside offload.full_params",
    "DeepSpeedOptimizer": _ZERO_OPTIMIZER,
    "DeepSpeedTransformerConfig": "use torch.nn.TransformerEncoderLayer or the model's own layers",
    "DeepSpeedTransformerLayer": "use torch.nn.TransformerEncoderLayer or the model's own layers",
    "DeepSpeedZeroConfig": _CONFIG,
    "DeepSpeedZeroOptimizer": _ZERO_OPTIMIZER,
    "DeepSpeedZeroOptimizer_Stage3": _ZERO_OPTIMIZER,
    "InferenceEngine": _INFERENCE,
    "OnDevice": "build the model under `with torch.device('meta')`, or inside zero.Init",
    "PipelineEngine": _PIPELINE,
    "PipelineModule": _PIPELINE,
    "ThroughputTimer": "divide engine.train_batch_size() by the seconds of a step",
    "add_tuning_arguments": "write the scheduler in the config, or give initialize(lr_scheduler=...) one",
    "autotuning": "offload.wrap measures and plans by itself",
    "checkpoint": "engine.load_checkpoint reads what one rank of DeepSpeed wrote, under any placement",
    "clip_grad_norm_": "write gradient_clipping in the config, or call torch.nn.utils.clip_grad_norm_",
    "compression": "compress the model before or after training",
    "constants": "it is of the inside of DeepSpeed: leave it out",
    "deepspeed4science": "use torch.nn.functional.scaled_dot_product_attention",
    "detach_variable": _RECOMPUTED,
    "elasticity": "there is one process: write its batch sizes in the config",
    "env_report": "`offload env` shows what is installed and found",
    "get_cuda_rng_tracker": _RECOMPUTED,
    "get_z3_leaf_modules": _LEAF,
    "git_version_info": "deepspeed.__version__ is the version whose names these are, offload.__version__ offload's own",
    "groups": "there is one process: offload.deepspeed.comm says so",
    "inference": _INFERENCE,
    "init_inference": _INFERENCE,
    "instrument_w_nvtx": "torch.cuda.nvtx.range, or offload.trace for what offload does",
    "lamb": "LAMB has no update on the host; use AdamW",
    "launcher": "start one process with plain python",
    "linear": "use PEFT's LoRA layers",
    "moe": _EXPERTS,
    "module_inject": "offload replaces no layers: use the model as it is",
    "monitor": "write csv_monitor or tensorboard in the config; engine.monitor.write_events takes other scalars",
    "move_to_device": "value.to(engine.device)",
    "nvme": "`offload bench disk` measures a disk",
    "onebit": _ONE_BIT,
    "op_builder": "nothing is compiled when it is first used: leave the call out",
    "pipe": _PIPELINE,
    "profiling": _FLOPS,
    "replace_transformer_layer": "offload replaces no layers: use the model as it is",
    "runtime.config": _CONFIG,
    "runtime.fp16.onebit": _ONE_BIT,
    "runtime.sequence_parallel": _SEQUENCE,
    "runtime.utils": "memory by kind of tensor is in optimizer.stats(), norms in engine.get_global_grad_norm()",
    "sequence": _SEQUENCE,
    "set_random_seed": "torch.manual_seed(seed), and what else the script draws from",
    "set_z3_leaf_module": _LEAF,
    "set_z3_leaf_modules_by_name": _LEAF,
    "set_z3_leaf_modules_by_suffix": _LEAF,
    "sparse_attention": "use torch.nn.attention.flex_attention, which takes any mask",
    "tp_model_init": "tensor parallelism is not supported",
    "transformer": "use torch.nn.TransformerEncoderLayer or the model's own layers",
}  # fmt: skip


def instead_of(path: str) -> str | None:
    """What to use in place of a dotted name of DeepSpeed's: as the table has it, or a part that it lies in."""
    parts = path.split(".")
    ends = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((_INSTEAD[name] for name in (parts[-1], *ends) if name in _INSTEAD), None)


def _children(path: str) -> list[str]:
    inside = [name.removeprefix(path + ".") for name in _HOMES if name.startswith(path + ".")]
    return [name for name in inside if "." not in name]


def _refusal(path: str) -> str:
    parent = path.rpartition(".")[0]
    there = (
        (*_HOMES[parent], *_children(parent)) if parent in _HOMES else (*ROOTS, "accelerator", "comm", "ops", "zero")
    )
    return f"offload.deepspeed has no {path!r}: {instead_of(path) or 'it has ' + ', '.join(there)}"


class Finder(MetaPathFinder, Loader):
    """Finds the submodules of the table; asked last, after those that are files."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_PACKAGE):
            return None
        inside = fullname.removeprefix(_PACKAGE)
        if inside in _HOMES:
            return ModuleSpec(fullname, self, is_package=True)
        # Without a `name`: `from package import name` would replace an error that has one by its own, which says less.
        raise ModuleNotFoundError(_refusal(inside))

    def create_module(self, spec: ModuleSpec) -> None:
        """A plain module will do."""

    def exec_module(self, module: ModuleType) -> None:
        path = module.__name__.removeprefix(_PACKAGE)
        homes, children = _HOMES[path], _children(path)

        def get(name: str) -> Any:
            if name in homes:
                return getattr(importlib.import_module("." + homes[name], _PACKAGE.rstrip(".")), name)
            if name in children:
                return importlib.import_module(f"{module.__name__}.{name}")
            if name.startswith("__"):
                raise AttributeError(name)
            raise AttributeError(_refusal(f"{path}.{name}"))

        module.__all__ = [*homes, *children]  # type: ignore[attr-defined]
        module.__getattr__ = get  # type: ignore[method-assign]
