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


_ZERO = _names(
    "GatheredParameters Init ZeroParamStatus register_external_parameter unregister_external_parameter", home="zero"
)
_LOG = _names("logger log_dist", home="_log")
_LEAVES = _names("set_z3_leaf_modules unset_z3_leaf_modules", home="_leaf_modules")
# By path: the module of this package that has each name, "" for the package itself.
_HOMES = {
    "runtime": {},
    "runtime.activation_checkpointing": {},
    "runtime.activation_checkpointing.checkpointing": _names(
        "checkpoint configure is_configured model_parallel_cuda_manual_seed non_reentrant_checkpoint reset",
        home="checkpointing",
    ),
    "runtime.dataloader": _names("RepeatingLoader", home="_data"),
    "runtime.engine": _names("DeepSpeedEngine", home=""),
    "runtime.lr_schedules": _names("LRRangeTest OneCycle WarmupCosineLR WarmupDecayLR WarmupLR", home="_schedulers"),
    "runtime.utils": _names("see_memory_usage", home="_reporting"),
    "runtime.zero": _ZERO,
    "runtime.zero.offload_config": _names("OffloadDeviceEnum OffloadStateTypeEnum", home="_offload_config"),
    "runtime.zero.partition_parameters": _ZERO,
    "runtime.zero.stage3": _names(
        "estimate_zero3_model_states_mem_needs_all_live estimate_zero3_model_states_mem_needs_all_cold", home="zero"
    ),
    "runtime.zero.stage_1_and_2": _names(
        "estimate_zero2_model_states_mem_needs_all_live estimate_zero2_model_states_mem_needs_all_cold", home="zero"
    ),
    "utils": _LOG | _LEAVES | _names("RepeatingLoader", home="_data"),
    "utils.logging": _LOG,
    "utils.z3_leaf_module": _LEAVES,
}
ROOTS = ("runtime", "utils")

_EXPORT = "offload.export_checkpoint(directory, 'model.safetensors', dtype='fp32') writes the weights of a checkpoint"
_LEAF = "leave the call out: which modules travel as one is found from the model; set_z3_leaf_modules is accepted"
_STATE = "optimizer.state[parameter] has 'master' (of 16-bit weights) and the moments, live"
_PIPELINE = "pipeline parallelism is not supported; the plain model trains offloaded on one device"
_INFERENCE = "offload trains; run the plain model for inference"
# By the last part of a name or by a path, of DeepSpeed's.
_INSTEAD = {
    "DeepSpeedConfig": "pass the config to initialize; `offload config explain` shows what it means",
    "DeepSpeedHybridEngine": "train with initialize; generate with the module inside offload.full_params",
    "DeepSpeedTransformerLayer": "use torch.nn.TransformerEncoderLayer or the model's own layers",
    "DeepSpeedDataLoader": "pass training_data= to initialize, or make a torch.utils.data.DataLoader",
    "InferenceEngine": _INFERENCE,
    "OnDevice": "build the model under `with torch.device('meta')`, or inside zero.Init",
    "PipelineModule": _PIPELINE,
    "autotuning": "offload.wrap measures and plans by itself",
    "checkpoint": "engine.load_checkpoint reads what one rank of DeepSpeed wrote, under any placement",
    "compression": "compress the model before or after training",
    "convert_zero_checkpoint_to_fp32_state_dict": _EXPORT,
    "get_fp32_state_dict_from_zero_checkpoint": _EXPORT,
    "get_z3_leaf_modules": _LEAF,
    "groups": "there is one process: offload.deepspeed.comm says so",
    "inference": _INFERENCE,
    "init_inference": _INFERENCE,
    "lamb": "LAMB has no update on the host; use AdamW",
    "launcher": "start one process with plain python",
    "load_state_dict_from_zero_checkpoint": "engine.load_checkpoint, or offload.load_checkpoint(directory, model)",
    "moe": "experts are plain modules here: use the model's own",
    "module_inject": "offload replaces no layers: use the model as it is",
    "monitor": "write csv_monitor or tensorboard in the config, or log from the training loop",
    "pipe": _PIPELINE,
    "profiling": "use the section flops_profiler of the config, or torch.utils.flop_counter",
    "runtime.config": "pass the config to initialize; `offload config explain` shows what it means",
    "runtime.utils": "memory by kind of tensor is in optimizer.stats(), norms in engine.get_global_grad_norm()",
    "safe_get_full_fp32_param": _STATE,
    "safe_get_full_grad": "parameter.grad, before step()",
    "safe_get_full_optimizer_state": _STATE,
    "safe_set_full_fp32_param": "write the parameter inside zero.GatheredParameters",
    "safe_set_full_optimizer_state": _STATE,
    "sequence": "sequence parallelism is not supported",
    "set_z3_leaf_module": _LEAF,
    "set_z3_leaf_modules_by_name": _LEAF,
    "set_z3_leaf_modules_by_suffix": _LEAF,
    "tp_model_init": "tensor parallelism is not supported",
    "utils.zero_to_fp32": _EXPORT,
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
