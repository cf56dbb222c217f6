"""What an engine tells while it trains: progress lines, a breakdown of time, scalars for the monitors, FLOPs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ._log import logger
from ._monitor import Monitors
from ._settings import FlopsProfiler, Settings
from .accelerator import get_accelerator

__all__ = ["Report", "see_memory_usage"]

_NOTHING = contextlib.nullcontext()


class Report:
    """Follows the calls of one engine. With nothing switched on it costs a few comparisons a step."""

    def __init__(self, settings: Settings, synchronize: Callable[[], None]) -> None:
        self._logging = settings.logging
        self._flops = settings.flops_profiler
        self.monitor = Monitors(settings)
        self._synchronize = synchronize
        self._seconds: dict[str, float] = {}
        self._losses: list[Tensor] = []

    def timed(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Adds the block's time to the breakdown of the step; work on the device is waited for only to measure it."""
        return self._timed(name) if self._logging.wall_clock_breakdown else _NOTHING

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def keep_loss(self, loss: Tensor) -> None:
        """The loss of a micro-batch, divided by the accumulation: the monitors write their sum."""
        if self.monitor.enabled:
            self._losses.append(loss.detach())

    def after_step(self, *, step: int, skipped: int, samples: int, optimizer: Any, loss_scale: float | None) -> None:
        """Called after every optimizer step, skipped ones too."""
        # Taken first: what cannot be written now is no part of the next step's.
        losses, self._losses = self._losses, []
        times, self._seconds = self._seconds, {}
        if self.monitor.enabled:
            scalars: dict[str, Any] = {"train_loss": torch.stack(losses).sum()} if losses else {}
            scalars["lr"] = optimizer.param_groups[0]["lr"]
            if loss_scale is not None:
                scalars["loss_scale"] = loss_scale
            self.monitor.write_events((f"Train/Samples/{name}", value, samples) for name, value in scalars.items())
        if self._logging.wall_clock_breakdown:
            parts = " | ".join(f"{name}: {seconds * 1e3:.2f} ms" for name, seconds in times.items())
            logger.info("step %d: %s", step, parts)
        if self._logging.memory_breakdown:
            logger.info("memory after step %d:\n%s", step, optimizer.stats())
        every = self._logging.steps_per_print
        if every and step % every == 0:
            rates = [group["lr"] for group in optimizer.param_groups]
            momenta = [group.get("betas", group.get("momentum")) for group in optimizer.param_groups]
            logger.info("step=%d, skipped=%d, lr=%s, mom=%s", step, skipped, rates, momenta)

    def profiled(self, module: nn.Module, step: int) -> contextlib.AbstractContextManager[None]:
        """Counts the floating-point operations of a forward, in the one step that the config names."""
        wanted = self._flops.enabled and step == self._flops.profile_step
        return self._profiled(module) if wanted else _NOTHING

    @contextlib.contextmanager
    def _profiled(self, module: nn.Module) -> Iterator[None]:
        depth = self._flops.module_depth
        # Any depth: no model nests as deep as this.
        with FlopCounterMode(display=False, depth=depth if depth >= 0 else 999) as counter:
            start = time.perf_counter()
            yield
            self._synchronize()
            seconds = time.perf_counter() - start
        _tell(self._flops, counter, module, seconds)


def _tell(settings: FlopsProfiler, counter: FlopCounterMode, module: nn.Module, seconds: float) -> None:
    total = counter.get_total_flops()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    text = (
        f"forward at step {settings.profile_step}: {total:,} FLOPs, {parameters:,} parameters, "
        f"{seconds * 1e3:.2f} ms, {total / seconds / 1e12:.4f} TFLOPS"
    )
    if settings.recompute_fwd_factor:
        text += f"; with recomputation {int(total * (1 + settings.recompute_fwd_factor)):,} FLOPs"
    if settings.detailed:
        counts = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
        text += "".join(f"\n  {name}: {flops:,} FLOPs" for name, flops in counts.items())
    if settings.output_file is None:
        logger.info("%s", text)
    else:
        Path(settings.output_file).write_text(text + "\n")


def see_memory_usage(message: str, force: bool = False) -> None:
    """Logs `message` and what is in use: of torch's memory on the accelerator, now and at most since the last call, and
    of the host's. Without `force` it does nothing, as DeepSpeed's.
    """
    if not force:
        return
    accelerator = get_accelerator()
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(facts[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    now, most = accelerator.memory_allocated(), accelerator.max_memory_allocated()
    logger.info(
        "%s\naccelerator: %.2f GiB, at most %.2f GiB; host: %.2f GiB of %.2f GiB",
        message, *(count / 2**30 for count in (now, most, total - available, total)),
    )  # fmt: skip
    accelerator.reset_peak_memory_stats()
