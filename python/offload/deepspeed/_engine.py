"""Engine: the training engine that scripts written for DeepSpeed expect, over `offload.wrap`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import offload

from ._casting import TORCH_DTYPES, cast
from ._data import EngineLoader
from ._engine_checkpoint import EngineCheckpoint
from ._engine_elsewhere import elsewhere
from ._engine_optimizer import EngineOptimizer
from ._engine_settings import EngineSettings
from ._log import logger
from ._placement import Placed
from ._reporting import Report
from ._settings import BatchSizes, Settings

__all__ = ["Engine"]


class Engine(EngineSettings, EngineCheckpoint, nn.Module):
    """What `offload.initialize` returns first. One loop serves any accumulation:

        loss = engine(batch); engine.backward(loss); engine.step()

    `step()` updates at the boundary of the accumulation and counts at the other micro-batches. What is not an
    attribute of the engine is looked up in `module`, the model.

    micro_steps, global_steps, global_samples, skipped_steps: micro-batches, optimizer steps (skipped ones too),
    samples and skipped steps so far. optimizer, lr_scheduler, training_dataloader: as `initialize` returned them.
    monitor: writes scalars to what the config enables, the script's own too.
    """

    def __init__(
        self,
        settings: Settings,
        config: dict[str, Any],
        placed: Placed,
        optimizer: EngineOptimizer | None,
        lr_scheduler: Any,
        loader: EngineLoader | None,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.config = config
        self.module = placed.module
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.training_dataloader = loader
        self.device = device
        self.micro_steps = self.global_steps = self.global_samples = self.skipped_steps = 0
        self._placed: Placed | None = placed
        self._micro_batches = 0  # that went backward since the last update
        self._report = Report(settings, self._synchronize)
        self.monitor = self._report.monitor
        self._boundary: bool | None = None  # as set by the caller
        self._step_applied = False
        self._inside_no_sync = False
        self._set_batch(settings.batch)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None:
                raise
            instead = elsewhere(name)
            if instead is not None and not hasattr(module, name):
                raise AttributeError(f"the engine has no {name!r}: {instead}") from None
            return getattr(module, name)

    # --- forward, backward, step ------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The model's forward, under autocast where the config asks for it."""
        precision = self.settings.precision
        if precision.cast_inputs:
            inputs, kwargs = cast((inputs, kwargs), TORCH_DTYPES[precision.dtype])
        module = self.module
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if precision.autocast is not None:
            autocast = torch.autocast(self.device.type, TORCH_DTYPES[precision.autocast.dtype])
        with self._report.timed("forward"), self._report.profiled(module, self.global_steps + 1), autocast:
            return module(*inputs, **kwargs)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Backward of `loss` (a scalar) divided by the accumulation steps, under the loss scale; returns the quotient.

        scale_wrt_gas: False leaves the division to the caller.
        """
        optimizer = self._require_optimizer("backward")
        _check_loss("backward", loss)
        loss = self._share_of(loss, scale_wrt_gas)
        with self._report.timed("backward"):
            optimizer.backward(loss, retain_graph=retain_graph)
        self._count(loss)
        return loss

    def scale(self, loss: Tensor) -> Tensor:
        """What `backward(loss)` runs backward from, for scripts that call `.backward()` of the result themselves."""
        optimizer = self._require_optimizer("scale")
        _check_loss("scale", loss)
        loss = self._share_of(loss, divided=True)
        scaled = optimizer.scale(loss)
        self._count(loss)
        return scaled

    def _share_of(self, loss: Tensor, divided: bool) -> Tensor:
        """The share of a micro-batch in the step."""
        return loss / self._batch.accumulation if divided and self._batch.accumulation > 1 else loss

    def _count(self, share: Tensor) -> None:
        """A micro-batch that went backward; one whose backward failed is none."""
        self._report.keep_loss(share)
        self._micro_batches += 1

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """At the boundary: unscale, check, clip, update, clear the gradients, and step the scheduler with `lr_kwargs`.

        A step whose gradients overflowed changes nothing but the loss scale, and the scheduler waits.

        An update counts in `global_steps` as soon as it is made. What fails after that (the scheduler, a monitor)
        leaves it so: go on with the next micro-batch, as another `step()` would be another step.
        """
        optimizer = self._require_optimizer("step")
        if self._inside_no_sync:
            raise offload.StateError("step() was called inside no_sync(): leave the context first")
        self._step_applied = optimizer.guard.expected = False
        if self.is_gradient_accumulation_boundary() or not self.settings.managed_accumulation:
            added = self._batch.train if self.settings.managed_accumulation else self._batch.micro * self._micro_batches
            samples = self.global_samples + added
            before = optimizer.steps_over, self.micro_steps, self.global_steps, self.skipped_steps
            with self._report.timed("step"):
                try:
                    try:
                        optimizer.step()
                        optimizer.zero_grad()
                        if not optimizer.overflow and self.lr_scheduler is not None:
                            self.lr_scheduler.step(**(lr_kwargs or {}))
                    finally:  # a schedule may read the counters: they change after it, and whatever becomes of it
                        self._count_step(optimizer, samples, *before)
                finally:  # again: Ctrl-C may have come before that was over
                    self._count_step(optimizer, samples, *before)
            if optimizer.overflow:
                logger.info("gradients overflowed: step skipped, the loss scale is %g", optimizer.loss_scale)
            self._report.after_step(
                step=self.global_steps,
                skipped=self.skipped_steps,
                samples=self.global_samples,
                optimizer=optimizer,
                loss_scale=optimizer.loss_scale if self.fp16_enabled() else None,
            )
        else:
            self.micro_steps += 1

    def _count_step(
        self, optimizer: EngineOptimizer, samples: int, steps_over: int, micro_steps: int, steps: int, skipped: int
    ) -> None:
        """If the step is over, it counts. samples: with those of it; the others: what was counted before it."""
        if optimizer.steps_over != steps_over:
            self._step_applied = not optimizer.overflow
            self.skipped_steps = skipped + optimizer.overflow
            self.global_steps = steps + 1
            self.global_samples = samples
            self._micro_batches = 0
            self.micro_steps = micro_steps + 1

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch is the last one before an update.

        False with `managed_gradient_accumulation: false`: only the caller of `step()` knows.
        """
        if self._boundary is not None:
            return self._boundary
        return self.settings.managed_accumulation and (self.micro_steps + 1) % self._batch.accumulation == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """From now on the caller says which micro-batch is the last one, and the engine stops counting."""
        if not self.settings.managed_accumulation:
            raise offload.StateError(
                "set_gradient_accumulation_boundary() with managed_gradient_accumulation: false, where each step() "
                "updates: leave one of them out"
            )
        self._boundary = bool(is_boundary)

    def was_step_applied(self) -> bool:
        """Whether the last `step()` updated the model: False inside an accumulation and after an overflow."""
        return self._step_applied

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of every parameter."""
        self.module.zero_grad(set_to_none)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Marks backwards that only accumulate. One process has nothing to synchronise; `step()` is refused inside."""
        if self._inside_no_sync:
            raise offload.StateError("no_sync() is entered already: leave it first")
        self._inside_no_sync = True
        try:
            yield
        finally:
            self._inside_no_sync = False

    def allreduce_gradients(self, bucket_size: int | None = None) -> None:
        """Does nothing: one process has the whole gradients."""

    def empty_partition_cache(self) -> None:
        """Does nothing: weights leave the device after their use."""

    def compile(self, backend: Any = "inductor", compile_kwargs: dict[str, Any] | None = None, **ignored: Any) -> None:
        """Compiles the model in place with torch.compile; `compile_kwargs` are passed on."""
        self.module.compile(backend=backend, **(compile_kwargs or {}))

    @property
    def is_compiled(self) -> bool:
        return self.module._compiled_call_impl is not None

    # --- what scripts read and set ----------------------------------------------------------------------------

    def get_lr(self) -> list[float]:
        """The learning rate of each group; none without an optimizer."""
        return [group["lr"] for group in self._groups()]

    def set_lr(self, lr: float) -> None:
        """One learning rate for every group; a scheduler overwrites it at its next step."""
        for group in self._require_optimizer("set_lr").param_groups:
            group["lr"] = lr

    def get_mom(self) -> list[Any]:
        """`momentum` of each group, or its `betas`."""
        return [group.get("betas", group.get("momentum")) for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        return [] if self.optimizer is None else self.optimizer.param_groups

    def get_global_grad_norm(self) -> float | None:
        """L2 norm of the gradients of the last step, unscaled, before clipping; inf where it was skipped.

        None before the first step, and with `compute_grad_norm: false` where nothing else takes it.
        """
        return None if self.optimizer is None else self.optimizer.global_grad_norm

    def _require_optimizer(self, name: str) -> EngineOptimizer:
        if self._placed is None:
            raise offload.StateError(f"{name}() after destroy(): the engine is gone, its module is a plain model")
        if self.optimizer is None:
            raise offload.StateError(
                f"{name}() needs an optimizer: pass optimizer= to initialize, or name one in the config"
            )
        return self.optimizer

    def _set_batch(self, batch: BatchSizes) -> None:
        """Gradients of a loss that is to be divided, or scaled, may come of the engine's own backward alone."""
        self._batch = batch
        if self.optimizer is None:
            return
        reason = None
        if batch.accumulation > 1:
            reason = f"gradient_accumulation_steps is {batch.accumulation}, by which the engine divides"
        elif self.optimizer.loss_scale != 1.0 or self.optimizer.dynamic_loss_scale:
            reason = "the engine scales the loss"
        self.optimizer.guard.require(reason, self.module.parameters())

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # --- where things are -------------------------------------------------------------------------------------

    def offload_states(
        self, include: Any = None, device: Any = "cpu", pin_memory: bool = True, non_blocking: bool = False
    ) -> None:
        """Moves optimizer states, gradients and weights to the host until `reload_states()`; no bit changes.

        What the config keeps there anyway stays. Everything moves, whatever `include` names, and is back on the host
        when this returns. Raises `InvalidArgument` for another `device` than the CPU. After an error, such as
        `OutOfHostMemory`, everything is where it was.
        """
        optimizer = self._require_optimizer("offload_states")
        if str(getattr(device, "value", device)) not in ("cpu", "none"):
            raise offload.InvalidArgument(f"offload_states(device={device!r}): legal is 'cpu'")
        self._move(optimizer, "host")

    def reload_states(self, non_blocking: bool = False) -> None:
        """Moves everything back to where the config wants it; after an error it is on the host still."""
        self._move(self._require_optimizer("reload_states"), None)

    def _move(self, optimizer: EngineOptimizer, tier: str | None) -> None:
        assert self._placed is not None
        try:
            self._placed.move(tier)
        finally:
            assert self._placed.wrapped is not None
            optimizer.optimizer = self._placed.wrapped

    def destroy(self) -> None:
        """Ends the engine: `module` becomes a plain model with its weights. Calling it again does nothing.

        Raises what `offload.unwrap` does, such as the error of an update in flight; the engine then goes on.
        """
        if self._placed is not None:
            self._placed.unwrap()
        self._placed = None
        if self.optimizer is not None:
            self.optimizer.guard.remove()


def _check_loss(name: str, loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise offload.InvalidArgument(
            f"{name}() was given a {type(loss).__name__}{shape}: give the loss, a tensor of one element"
        )
