"""A DeepSpeed config to Settings: the rules that cross keys, and what stages and sections mean here."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from os import PathLike
from typing import Any

from ._check import Report, check, fill
from ._constructors import check_named_placement, resolve_optimizer, resolve_scheduler
from ._read import read
from ._sections import SECTIONS
from ._settings import (
    ActivationCheckpointing,
    Autocast,
    BatchSizes,
    Checkpoint,
    Dtype,
    FlopsProfiler,
    Logging,
    LossScale,
    Monitor,
    Placement,
    Precision,
    Settings,
    Tier,
)

__all__ = ["load", "resolve"]

_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_AUTOCAST_DTYPES: dict[str, Dtype] = {"half": "fp16", "float16": "fp16", "fp16": "fp16"}
_AUTOCAST_DTYPES |= {"bfloat16": "bf16", "bf16": "bf16", "float": "fp32", "float32": "fp32", "fp32": "fp32"}
# What `offload.wrap` takes as disk_block and disk_queue_depth.
_DISK_ALIGNMENT, _MOST_DISK_DEPTH = 4096, 4096
_TIERS: dict[str, Tier] = {"none": "device", "cpu": "host", "nvme": "disk"}


def load(
    config: Mapping[str, Any] | str | PathLike[str],
    *,
    strict: bool = False,
    auto: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings of a DeepSpeed config: a dict, the path of a JSON or Hjson file, or base64 text of one.

    strict: also refuse what DeepSpeed ignores without a word, as misspelt keys; else each is a UserWarning.
    auto: values for keys that say "auto", by dotted path: `{"optimizer.params.lr": 1e-4}`.

    Raises InvalidArgument with every error there is, each with its JSON path, value and rule; see `read` for errors
    of files. `config` is not changed.
    """
    settings, report = resolve(read(config), auto=auto)
    report.raise_refusals(strict)
    for warning in report.deprecations + report.doubts:
        warnings.warn(warning, UserWarning, stacklevel=2)
    if report.no_effect:
        unused = f"no effect here (`offload config explain` says why): {', '.join(report.no_effect)}"
        settings = replace(settings, notices=(*settings.notices, unused))
    return settings


def resolve(
    config: Mapping[str, Any], *, auto: Mapping[str, Any] | None = None, for_trainer: bool = False
) -> tuple[Settings, Report]:
    """The settings, and the report of everything found; with errors in the report, the settings mean nothing.

    for_trainer: "auto" may stand where Hugging Face's Trainer fills it in; such settings have their defaults.
    """
    report = Report(for_trainer)
    # What is read is decided by the config alone: copies, so that nothing done here reaches the caller's.
    config = fill(config, auto or {})
    # accelerate writes an infinite steps_per_print for "never".
    if config.get("steps_per_print") == math.inf:
        config["steps_per_print"] = None
    values = check(SECTIONS[""], config, report)
    settings = Settings(
        batch=_batch_sizes(values, report),
        precision=_precision(values, report),
        gradient_clipping=values["gradient_clipping"],
        grad_norm=values["zero_optimization"]["compute_grad_norm"],
        managed_accumulation=values["managed_gradient_accumulation"],
        placement=_placement(values, report, has_aio=config.get("aio") is not None),
        optimizer=resolve_optimizer(values["optimizer"], report),
        scheduler=resolve_scheduler(values["scheduler"], report),
        activation_checkpointing=ActivationCheckpointing(
            configured="activation_checkpointing" in config,
            **_taken(ActivationCheckpointing, values["activation_checkpointing"]),
        ),
        dataloader_drop_last=values["dataloader_drop_last"],
        logging=Logging(**_taken(Logging, values)),
        csv_monitor=Monitor(**values["csv_monitor"]),
        tensorboard=Monitor(**values["tensorboard"]),
        flops_profiler=FlopsProfiler(**_taken(FlopsProfiler, values["flops_profiler"])),
        checkpoint=Checkpoint(async_save=values["checkpoint"]["writer"]["decoupled"]),
        notices=_notices(config, report),
    )
    if settings.gradient_clipping > 0 and not settings.grad_norm:
        report.errors.append(
            f"zero_optimization.compute_grad_norm=False: gradient_clipping={settings.gradient_clipping:g} needs the "
            "norm: write gradient_clipping: 0.0, or leave compute_grad_norm out"
        )
    check_named_placement(settings.placement, settings.optimizer, report)
    order = {name: position for position, name in enumerate(config)}
    report.entries.sort(key=lambda entry: order.get(entry.path.split(".")[0], len(order)))
    return settings, report


def _taken(settings: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the settings, a dataclass, have fields of the same names for."""
    return {each.name: values[each.name] for each in fields(settings) if each.name in values}


def _notices(config: Mapping[str, Any], report: Report) -> tuple[str, ...]:
    notices = list(report.notices)
    if "gradient_clipping" not in config:
        notices.append(
            "gradient_clipping is not in the config: gradients are clipped to a norm of 1.0, DeepSpeed's default since "
            "June 2026 (it was 0.0, no clipping); write 0.0 to clip nothing"
        )
    return tuple(notices)


def _batch_sizes(values: Mapping[str, Any], report: Report) -> BatchSizes:
    train, micro, accumulation = (values[name] for name in _BATCH_KEYS)
    unknown = BatchSizes(1, 1, 1)
    if report.unfilled.intersection(_BATCH_KEYS):
        return unknown
    given = ", ".join(f"{name}={values[name]}" for name in _BATCH_KEYS if values[name] is not None)
    if train is None and micro is None:
        if not any(error.startswith(_BATCH_KEYS) for error in report.errors):
            report.errors.append(
                f"{given or 'no batch size is given'}: write train_batch_size or train_micro_batch_size_per_gpu"
                + ("; `wrap_options` needs none" if report.for_trainer else "")
            )
        return unknown
    if micro is None:
        accumulation = accumulation or 1
        micro = train // accumulation
    elif train is None:
        accumulation = accumulation or 1
        train = micro * accumulation
    elif accumulation is None:
        accumulation = train // micro
    if train != micro * accumulation or not micro or not accumulation:
        processes, rest = divmod(train, micro * accumulation) if micro and accumulation else (0, 0)
        report.errors.append(
            f"{given}: a step of {processes} processes, and there is one: write gradient_accumulation_steps: "
            f"{train // micro} for the same step, or train_batch_size: {micro * accumulation}"
            if processes > 1 and not rest
            else f"{given}: train_batch_size must be train_micro_batch_size_per_gpu times gradient_accumulation_steps "
            "(there is one process)"
        )
    return BatchSizes(train, micro, accumulation)


def _precision(values: Mapping[str, Any], report: Report) -> Precision:
    fp16, bf16, cast = values["fp16"], values["bf16"], values["torch_autocast"]
    if fp16["enabled"] and bf16["enabled"]:
        report.errors.append("fp16.enabled and bf16.enabled: both are true: keep one")
    autocast = None
    if cast["enabled"]:
        autocast = Autocast(_AUTOCAST_DTYPES[(cast["dtype"] or "bf16").removeprefix("torch.")])
    dtype: Dtype = "fp16" if fp16["enabled"] else "bf16" if bf16["enabled"] else "fp32"
    wanted = values["data_types"]["param_dtype"]
    if wanted not in (None, dtype):
        report.errors.append(f"data_types.param_dtype={wanted!r}: fp16 and bf16 make the parameters {dtype}")
    sums = values["data_types"]["grad_accum_dtype"]
    if sums not in (None, "fp32", dtype):
        report.errors.append(f"data_types.grad_accum_dtype={sums!r}: {dtype} gradients add up in {dtype} or in fp32")
    scaled = dtype == "fp16" or (autocast is not None and autocast.dtype == "fp16")
    return Precision(
        dtype=dtype,
        loss_scale=_loss_scale(fp16, report) if scaled else None,
        cast_inputs=fp16["enabled"] and fp16["auto_cast"],
        skip_bad_steps=scaled or (dtype == "bf16" and bf16["check_grad_overflow"]),
        autocast=autocast,
        grad_dtype="fp32" if sums == "fp32" else None,
        buffer_dtype=values["data_types"]["buffer_dtype"],
        keep_in_fp32=_keep_in_fp32(values["data_types"]["keep_in_fp32_modules"], report),
    )


def _keep_in_fp32(given: Any, report: Report) -> tuple[str, ...] | None:
    if given == "auto":
        return None
    if isinstance(given, str) or not all(isinstance(pattern, str) for pattern in given):
        report.errors.append(
            f"data_types.keep_in_fp32_modules={given!r}: must be 'auto' or a list of patterns of buffer names"
        )
        return ()
    return tuple(given)


def _loss_scale(fp16: Mapping[str, Any], report: Report) -> LossScale:
    if not fp16["loss_scale"]:
        for name in ("loss_scale_window", "min_loss_scale"):
            if fp16[name] <= 0:
                report.errors.append(f"fp16.{name}={fp16[name]}: must be more than 0 where the loss scale adapts")
    return LossScale(
        static=fp16["loss_scale"] or None,
        initial_scale_power=fp16["initial_scale_power"],
        window=fp16["loss_scale_window"],
        hysteresis=fp16["hysteresis"],
        consecutive_hysteresis=fp16["consecutive_hysteresis"],
        min_scale=float(fp16["min_loss_scale"]),
    )


def _placement(values: Mapping[str, Any], report: Report, *, has_aio: bool) -> Placement:
    zero = values["zero_optimization"]
    stage, optimizer, params = zero["stage"], zero["offload_optimizer"], zero["offload_param"]
    for name, section in (("offload_param", params), ("offload_optimizer", optimizer)):
        if section["device"] == "nvme" and not section["nvme_path"]:
            report.errors.append(f"zero_optimization.{name}.device='nvme': needs nvme_path, a directory")
    if params["device"] != "none" and stage < 3:
        report.doubts.append(
            f"zero_optimization.offload_param.device={params['device']!r}: read at stage 3 only, and the stage is "
            f"{stage}: the weights stay on the device, as with DeepSpeed; write 'stage': 3"
        )
    if optimizer["device"] != "none" and stage == 0:
        report.notices.append("zero_optimization.stage=0: offload_optimizer is honoured at this stage too")
    sections = [section for section in (optimizer, params) if section["device"] != "none"]
    tier = _TIERS[optimizer["device"]]
    weights = _TIERS[params["device"]] if stage == 3 else "device"
    on_disk = [section for section, place in ((optimizer, tier), (params, weights)) if place == "disk"]
    paths = tuple(dict.fromkeys(str(section["nvme_path"]) for section in on_disk))
    return Placement(
        stage=stage,
        optimizer=tier,
        gradients="host" if tier == "disk" else tier,
        params=weights,
        activations="host" if values["activation_checkpointing"]["cpu_checkpointing"] else "device",
        optimizer_ratio=optimizer["ratio"],
        pin_memory=any(section["pin_memory"] for section in sections) if sections else True,
        disk_path=paths or None,
        **(_disk_lanes(values["aio"]) if has_aio and on_disk else {}),
    )


def _disk_lanes(aio: Mapping[str, Any]) -> dict[str, int]:
    block = -(-aio["block_size"] // _DISK_ALIGNMENT) * _DISK_ALIGNMENT
    depth = min(aio["queue_depth"] * aio["intra_op_parallelism"], _MOST_DISK_DEPTH)
    return {"disk_block": block, "disk_queue_depth": depth}
