"""The part of the engine that saves and loads itself, over `offload.save_checkpoint` and `offload.load_checkpoint`."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import offload

from ._log import logger
from ._settings import Settings
from ._state_dicts import replacing
from ._zero_checkpoint import COUNTERS, ENGINE_ENTRY, is_zero_checkpoint, load_zero_checkpoint

if TYPE_CHECKING:
    from ._engine_optimizer import EngineOptimizer

__all__ = ["EngineCheckpoint"]

_COUNTERS = ("micro_steps", *COUNTERS)

# The last one of any engine, which may still be running: until it is done, `latest` names another checkpoint.
_last_save: offload.CheckpointSave | None = None


class EngineCheckpoint:
    """Checkpoints by DeepSpeed's names and tags; the files are offload's own, whole or not there."""

    settings: Settings
    module: nn.Module
    optimizer: EngineOptimizer | None
    lr_scheduler: Any
    global_steps: int

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Saves model, optimizer, scheduler, loss scale and counters as `save_dir/tag`; returns True.

        tag: None is `global_step<n>`. client_state: what else the run needs, as `offload.save_checkpoint` takes it.
        save_latest: makes it the checkpoint that is loaded without a tag. With `checkpoint.writer.decoupled` the files
        are written while training goes on. exclude_frozen_parameters: weights that do not require gradients are left
        out, as of a base model under adapters; `load_checkpoint` leaves those as the model has them.
        """
        global _last_save
        state = dict(client_state or {})
        if ENGINE_ENTRY in state:
            raise offload.InvalidArgument(
                f"client_state has the key {ENGINE_ENTRY!r}, which the engine uses: rename it"
            )
        state[ENGINE_ENTRY] = self._own_state()
        save = offload.save_checkpoint(
            save_dir,
            self.module,
            self._wrapped_optimizer(),
            tag=f"global_step{self.global_steps}" if tag is None else str(tag),
            client_state=state,
            async_save=self.settings.checkpoint.async_save,
            save_latest=save_latest,
            exclude_frozen=exclude_frozen_parameters,
        )
        _last_save = save
        logger.info("saving checkpoint %s", save.path)
        return True

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Loads what `save_checkpoint` saved, under whatever placement; returns its path and client state.

        Checkpoints that DeepSpeed itself wrote with one rank load too, with weights, optimizer states, schedule, loss
        scale and counters; nothing but tensors and plain values is taken from such files.

        tag: None takes the latest; where there is none, a warning and `(None, None)` are all, as scripts expect that
        try to resume. load_module_only: weights alone, as with the two flags before it off; counters then stay.
        load_module_strict: False loads the weights whose names the model has.

        Raises `StorageError` for a damaged checkpoint and `InvalidArgument` for one that does not fit, and for a
        `custom_load_fn`; what the scheduler's `load_state_dict` raises comes out. Nothing was changed in each case.
        """
        if custom_load_fn is not None:
            raise offload.InvalidArgument(
                "custom_load_fn is not supported: pass load_module_strict=False to load what fits, or change the names "
                "of a state_dict and give it to engine.load_module_state_dict"
            )
        if _last_save is not None:
            _last_save.wait()
        if tag is None and not (Path(load_dir) / "latest").is_file():
            logger.warning("no checkpoint was loaded: %s has no file 'latest'; give a tag", load_dir)
            return None, None
        tag = None if tag is None else str(tag)
        optimizer = self._wrapped_optimizer() if load_optimizer_states and not load_module_only else None
        load = load_zero_checkpoint if is_zero_checkpoint(load_dir, tag) else offload.load_checkpoint
        before: list[dict[str, Any]] = []

        def accept(client_state: dict[str, Any]) -> None:
            """Before weights and states, as a scheduler may refuse what it is given."""
            own = client_state.get(ENGINE_ENTRY)
            if own is not None and not load_module_only:
                before.append(copy.deepcopy(self._own_state()))
                self._go_on_from(own, scale=load_optimizer_states, schedule=load_lr_scheduler_states)

        try:
            loaded = load(load_dir, self.module, optimizer, tag=tag, strict=load_module_strict, accept=accept)
        except BaseException:
            for own in before:
                self._go_on_from(own, scale=load_optimizer_states, schedule=load_lr_scheduler_states)
            raise
        client_state = dict(loaded.client_state)
        client_state.pop(ENGINE_ENTRY, None)
        return str(loaded.path), client_state

    def _own_state(self) -> dict[str, Any]:
        """What a run goes on from beside weights and optimizer states."""
        return {
            **{name: getattr(self, name) for name in _COUNTERS},
            "lr_scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
            "loss_scale": None if self.optimizer is None else self.optimizer.loss_scaler.state_dict(),
        }

    def _go_on_from(self, own: Mapping[str, Any], *, scale: bool, schedule: bool) -> None:
        """own: as `_own_state` gave it; of DeepSpeed's checkpoints it may have less."""
        for name in _COUNTERS:
            setattr(self, name, own.get(name, getattr(self, name)))
        if scale and self.optimizer is not None:
            self.optimizer.loss_scaler.load_state_dict(own["loss_scale"])
        if schedule and self.lr_scheduler is not None and own["lr_scheduler"] is not None:
            self.lr_scheduler.load_state_dict(own["lr_scheduler"])

    def _wrapped_optimizer(self) -> offload.OffloadOptimizer | None:
        return None if self.optimizer is None else self.optimizer.optimizer

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        """`state_dict()` of the model; weights that live on the host are host tensors."""
        state: dict[str, Any] = self.module.state_dict()
        if exclude_frozen_parameters:
            for name, parameter in self.module.named_parameters(remove_duplicate=False):
                if not parameter.requires_grad:
                    state.pop(name, None)
        return state

    def load_module_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads weights by name. checkpoint: those, or a mapping that has them under "module", as DeepSpeed's files."""
        inside = checkpoint.get("module")
        self.module.load_state_dict(inside if isinstance(inside, Mapping) else checkpoint, strict=strict)

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Saves the model's `state_dict()`, in the dtype that it trains in, for `torch.load`; returns True."""
        folder = Path(save_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.module_state_dict(exclude_frozen_parameters)
        with replacing(folder / save_filename) as aside:
            torch.save(state, aside)
        return True

    save_fp16_model = save_16bit_model

    # Accelerate gathers the weights of a stage 3 model through these.

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        return True

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        return self.module_state_dict(exclude_frozen_parameters)
