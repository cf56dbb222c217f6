"""`initialize`: from a model and a DeepSpeed config to a training engine."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import offload

from . import _config, checkpointing
from ._casting import cast_model
from ._data import EngineLoader
from ._engine import Engine
from ._engine_optimizer import EngineOptimizer
from ._log import logger, show_log
from ._loss_scale import make_loss_scale
from ._optimizers import check_placement, make_optimizer, make_scheduler
from ._placement import Placed, check_values, is_wrapped, wrap_options
from ._settings import Settings
from .accelerator import get_accelerator
from .comm import require_one_process

__all__ = ["add_config_arguments", "initialize"]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: dict[str, Any] | str | Path | None = None,
    mesh_param: tuple[int, ...] | None = None,
    config_params: dict[str, Any] | str | Path | None = None,
    *,
    strict: bool = False,
    auto: Mapping[str, Any] | None = None,
) -> tuple[Engine, EngineOptimizer | None, EngineLoader | None, Any]:
    """Makes a training engine of a model, as `deepspeed.initialize` does.

    Args:
        args: a namespace whose `deepspeed_config` is the config, where `config` is not given.
        model: the module to train, on the CPU or the accelerator. It is cast as `fp16` and `bf16` say. It goes to the
            accelerator; weights that `offload_param` puts on the host go there straight, and never whole to the device.
        optimizer: a torch optimizer over the model's parameters, or a callable that takes parameters and returns one;
            it goes before the one that the config names. Without either, the engine only runs forward, with weights on
            the host where `offload_param` puts them.
        model_parameters: parameters or groups for the config's optimizer; None takes all that require gradients.
        training_data: a data set; the third result is then a loader of micro-batches of it.
        lr_scheduler: a scheduler, or a callable that takes the optimizer and returns one; it goes before the config's.
        collate_fn: makes a micro-batch of a list of samples.
        config: a DeepSpeed config: a dict, the path of a JSON or HJSON file, or its text in base64. `config_params`
            is its old name.
        strict: also refuse what DeepSpeed ignores without a word, as misspelt keys; else each is a UserWarning.
        auto: values for keys that say "auto", by dotted path: `{"optimizer.params.lr": 1e-4}`.
        mpu, mesh_param: accepted where they describe one process. distributed_port, dist_init_required: accepted; there
            is nothing to set up.

    Returns:
        The engine, its optimizer, the loader and the scheduler; None for what there is not.

    Raises:
        InvalidArgument: a config, model or optimizer that is not legal, or `WORLD_SIZE` above 1.
        OutOfHostMemory: the host cannot hold what the config puts there.
        A config, data set or optimizer class that is refused leaves the model as it was; what `offload.wrap` refuses,
        and a scheduler, leave a plain model that is cast and moved, and the optimizer's groups as they were.
    """
    require_one_process()
    if not isinstance(model, nn.Module):
        raise offload.InvalidArgument(f"model is a {type(model).__name__}: give a torch.nn.Module")
    check_values(model)
    if mpu is not None and mpu.get_model_parallel_world_size() != 1:
        raise offload.InvalidArgument("mpu= splits the model over processes: one process is supported; leave it out")
    if mesh_param is not None and any(size != 1 for size in mesh_param):
        raise offload.InvalidArgument(f"mesh_param={mesh_param}: one process is supported; leave it out")
    given = _config_of(args, config, config_params)
    settings = _config.load(given, strict=strict, auto=auto)
    if is_wrapped(model):
        raise offload.StateError("this model has an engine already: call its destroy() first")
    show_log()
    for notice in settings.notices:
        logger.info("%s", notice)
    if settings.logging.dump_state:
        logger.info("%s", settings)

    if settings.activation_checkpointing.configured and not checkpointing.is_configured():
        checkpointing.configure()

    device = get_accelerator().torch_device
    # What can be refused comes before the cast, which is not undone: that would take a second copy of the weights.
    plain = _optimizer(optimizer, model, model_parameters, settings)
    if plain is not None:
        check_placement(settings.placement, plain)
    loader = None
    if training_data is not None:
        loader = EngineLoader(
            training_data,
            settings.batch.micro,
            collate_fn=collate_fn,
            drop_last=settings.dataloader_drop_last,
            on_accelerator=device.type != "cpu",
        )
    cast_model(model, settings.precision)
    if settings.placement.params == "device":
        model.to(device)
    options = wrap_options(settings.placement) | {"device": str(device), "grad_dtype": settings.precision.grad_dtype}
    groups = [] if plain is None else [_settings_of(group) for group in plain.param_groups]
    placed = Placed(model, plain, options)
    try:
        wrapped = None
        if placed.wrapped is not None:
            wrapped = EngineOptimizer(
                placed.wrapped,
                make_loss_scale(settings),
                clip_norm=settings.gradient_clipping,
                skip_bad_steps=settings.precision.skip_bad_steps,
                takes_norm=settings.grad_norm,
            )
            logger.info("%s", "; ".join(placed.wrapped.plan.reason))
        scheduler = _scheduler(lr_scheduler, placed.wrapped, settings)
        engine = Engine(settings, given, placed, wrapped, scheduler, loader, device)
    except BaseException:
        placed.unwrap()
        # A schedule begins with its own learning rates, and what comes next would take them for the optimizer's.
        for group, before in zip([] if plain is None else plain.param_groups, groups, strict=True):
            parameters = group["params"]
            group.clear()
            group.update({"params": parameters, **before})
        raise
    return engine, wrapped, loader, scheduler


def _config_of(args: Any, config: Any, config_params: Any) -> Any:
    """The one config that was given."""
    candidates = {
        "config": config,
        "config_params": config_params,
        "args.deepspeed_config": getattr(args, "deepspeed_config", None),
    }
    given = {name: value for name, value in candidates.items() if value is not None}
    if len(given) != 1:
        raise offload.InvalidArgument(
            f"{' and '.join(given)} are both given: keep one"
            if given
            else "no config: pass config= to initialize, or --deepspeed_config on the command line"
        )
    return next(iter(given.values()))


def _optimizer(optimizer: Any, model: nn.Module, parameters: Any, settings: Settings) -> torch.optim.Optimizer | None:
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    if optimizer is None and settings.optimizer is None:
        return None
    chosen = [p for p in model.parameters() if p.requires_grad] if parameters is None else list(parameters)
    if optimizer is None:
        assert settings.optimizer is not None
        return make_optimizer(settings.optimizer, chosen)
    made = optimizer(chosen) if callable(optimizer) else None
    if not isinstance(made, torch.optim.Optimizer):
        raise offload.InvalidArgument(
            f"optimizer is a {type(optimizer).__name__}: give a torch.optim.Optimizer, or a callable that makes one"
        )
    return made


def _settings_of(group: dict[str, Any]) -> dict[str, Any]:
    """A copy of all but the parameters: a learning rate may be a tensor, which schedules write to."""
    return {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}


def _scheduler(lr_scheduler: Any, optimizer: offload.OffloadOptimizer | None, settings: Settings) -> Any:
    if optimizer is None:
        return None
    if lr_scheduler is not None:
        is_made = hasattr(lr_scheduler, "step")
        return lr_scheduler if is_made else lr_scheduler(optimizer)
    return None if settings.scheduler is None else make_scheduler(settings.scheduler, optimizer)


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds `--deepspeed` and `--deepspeed_config` to a parser, and returns it."""
    group = parser.add_argument_group("DeepSpeed", "the config of the training engine")
    group.add_argument("--deepspeed", action="store_true", help="accepted; the script decides what it means")
    group.add_argument("--deepspeed_config", type=str, default=None, help="a DeepSpeed config: a JSON file")
    return parser
