"""A model under one way of training, and what is measured of it: what `offload bench train` and `largest` compare."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import offload

from ._bench_model import build
from ._bench_spread import summary
from ._model_shapes import ModelShape, shapes

__all__ = [
    "AHEAD",
    "KINDS",
    "LEARNING_RATE",
    "NO_LIMIT",
    "ROUNDED",
    "Compute",
    "Offloaded",
    "Place",
    "Run",
    "Size",
    "Training",
    "free_bytes",
    "plain_adamw",
    "release",
    "wrap_options",
]

KINDS = ("optimizer", "gradients", "params", "activations")
LEARNING_RATE = 1e-4
NO_LIMIT = 1 << 62  # bytes: what does not fit shows when it is allocated, and is reported
# States are made in the first, and the second has all of them and two micro-batches: its peak is the run's peak.
_WARMUP_STEPS = 2
_WARMUP_MICRO_BATCHES = 2

ROUNDED = ("int8", "fp8")  # places of activations: on the host, in a lossy format
AHEAD = "ahead"  # place of params: on the host, and a forward goes on while they are updated (`run_ahead=`)
# "host", "device", AHEAD, one of ROUNDED, or the share on the host; of the optimizer also "unified", or shares by
# place.
Place = str | float | Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, and what its steps take.

    tokens: of a step, one or several numbers of them; a multiple of `sequence`. micro_batch: tokens of a backward, of
    all of a step where that has fewer. steps: timed ones of a run.
    """

    shape: ModelShape
    tokens: tuple[int, ...]
    sequence: int
    steps: int
    micro_batch: int
    checkpointing: bool = True

    @property
    def count(self) -> int:
        """Parameters of the model."""
        return sum(map(math.prod, shapes(self.shape)))

    def micro_batches(self, tokens: int) -> int:
        return max(1, tokens // self.micro_batch)

    def build(self, home: torch.device, compute: torch.device) -> nn.Module:
        return build(self.shape, self.sequence, home, compute, checkpointing=self.checkpointing)


class Training:
    """One way to train a model: plain torch, unless a subclass says otherwise."""

    single_micro_batch = False  # whether its steps have only one

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self._model, self._optimizer = model, optimizer

    def backward(self, tokens: Tensor, micro_batches: int, *, last: bool) -> Tensor:
        """Forward and backward of one of so many micro-batches of a step; returns its part of the loss."""
        loss: Tensor = self._model(input_ids=tokens, labels=tokens).loss / micro_batches
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self) -> None:
        if self._optimizer is None:
            self._model.zero_grad()
            return
        self._optimizer.step()
        self._optimizer.zero_grad()

    def rest(self) -> None:
        """Returns when nothing of it goes on, so that something else can be measured."""

    def counters(self) -> Mapping[str, float]:
        """What grows from step to step: seconds and bytes."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What else there is to report, ready for JSON."""
        return {}


class Compute(Training):
    """Forward and backward alone, of one micro-batch: a step of several computes as long as so many of these."""

    single_micro_batch = True

    def __init__(self, size: Size, device: torch.device) -> None:
        super().__init__(size.build(device, device), None)


def wrap_options(places: Mapping[str, Place]) -> dict[str, Any]:
    """Of `offload.wrap`."""
    options: dict[str, Any] = dict(places)
    if places.get("activations") in ROUNDED:
        options |= {"activations": "host", "activation_format": places["activations"]}
    if places.get("params") == AHEAD:
        options |= {"params": "host", "run_ahead": True}
    return options


class Offloaded(Training):
    """`offload.wrap` with what `places` names on the host and everything else on the device."""

    def __init__(
        self,
        size: Size,
        device: torch.device,
        places: Mapping[str, Place],
        *,
        device_budget: int | str | None = NO_LIMIT,
        host_budget: int | str | None = None,
    ) -> None:
        self.places = {kind: places.get(kind, "device") for kind in KINDS}
        options = wrap_options(self.places)
        model = size.build(torch.device("cpu") if options["params"] == "host" else device, device)
        self._wrapped: offload.OffloadOptimizer
        model, self._wrapped = offload.wrap(
            model,
            torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE),
            device=str(device),
            device_budget=device_budget,
            host_budget=host_budget,
            **options,
        )
        super().__init__(model, self._wrapped)

    def rest(self) -> None:
        self._wrapped.synchronize()

    def counters(self) -> Mapping[str, float]:
        stats = self._wrapped.stats()
        moved = {lane: stats.transfers[f"{lane}_bytes"] for lane in ("to_host", "to_device")}
        return {"update_s": stats.update_s, "exposed_s": stats.exposed_s, **moved}

    def facts(self) -> dict[str, Any]:
        return {"places": self.places, "stats": self._wrapped.stats().to_dict()}


def plain_adamw(size: Size, device: torch.device) -> Training:
    """Plain torch on the bf16 weights: no fp32 masters, bf16 moments, so not the same training."""
    model = size.build(device, device)
    return Training(model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True))


class _Steps:
    """The timed steps of one number of tokens."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.counted: dict[str, float] = {}

    def count(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        for name, value in after.items():
            self.counted[name] = self.counted.get(name, 0) + value - before[name]

    def result(self, tokens: int, micro_batches: int) -> dict[str, Any]:
        step = summary(self.seconds)
        row: dict[str, Any] = {
            "tokens": tokens,
            "micro_batches": micro_batches,
            "step_s": step,
            "tokens_per_s": tokens / step["median"],
        }
        if "to_host" in self.counted:
            row["moved_bytes"] = {lane: self.counted[lane] / len(self.seconds) for lane in ("to_host", "to_device")}
        if self.counted.get("update_s", 0) > 0:
            row["hidden_share"] = min(1.0, max(0.0, 1 - self.counted["exposed_s"] / self.counted["update_s"]))
        return row


class Run:
    """One of the runs: warmed up, its steps timed in blocks, by tokens a step."""

    def __init__(self, start: Callable[[], Training], size: Size, device: torch.device) -> None:
        self._size, self._device = size, device
        self._losses: list[float] = []
        self._steps: dict[int, _Steps] = {}
        # Runs beside this one rest meanwhile: what is allocated above their bytes is this one's.
        bytes_before = _start_peak(device)
        began = time.perf_counter()
        self._training = start()
        for _ in range(_WARMUP_STEPS):
            self._step(min(max(size.tokens), _WARMUP_MICRO_BATCHES * size.micro_batch))
        self._rest()
        self._setup_s = time.perf_counter() - began
        self._peak_device_bytes = _peak(device, bytes_before)

    def block(self, tokens: int, steps: int) -> None:
        """Times `steps` steps. One before them is not timed: its update hides behind the first, as theirs do."""
        if self._training.single_micro_batch:
            tokens = min(tokens, self._size.micro_batch)
        timed = self._steps.setdefault(tokens, _Steps())
        self._step(tokens)
        before = self._training.counters()
        for _ in range(steps):
            start = time.perf_counter()
            self._step(tokens)
            timed.seconds.append(time.perf_counter() - start)
        timed.count(before, self._training.counters())
        self._rest()

    def _step(self, tokens: int) -> None:
        if self._training.single_micro_batch:
            tokens = min(tokens, self._size.micro_batch)
        count = self._size.micro_batches(tokens)
        total = torch.zeros((), device=self._device)
        for number, micro_batch in enumerate(self._random(tokens).chunk(count)):
            total += self._training.backward(micro_batch, count, last=number == count - 1)
        self._training.step()
        # Reading the loss waits for everything given to the compute stream, as a loop that logs does.
        self._losses.append(total.item())

    def _random(self, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(len(self._losses))
        shape = (tokens // self._size.sequence, self._size.sequence)
        return torch.randint(self._size.shape.vocabulary, shape, generator=generator).to(self._device)

    def _rest(self) -> None:
        """Nothing of this run goes on while another one is measured."""
        self._training.rest()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def result(self) -> dict[str, Any]:
        return {
            "setup_s": self._setup_s,
            "peak_device_bytes": self._peak_device_bytes,
            "losses": self._losses,
            "steps": [one.result(tokens, self._size.micro_batches(tokens)) for tokens, one in self._steps.items()],
            **self._training.facts(),
        }


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def release(device: torch.device) -> None:
    """What the last run held goes back to the device, also from torch's cache: the next one may need all of it."""
    gc.collect()  # models and hooks refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _start_peak(device: torch.device) -> int:
    """Bytes allocated now; the peak is counted from here."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device, bytes_before: int) -> int | None:
    """The peak above `bytes_before`; None on the CPU, which does not count."""
    return torch.cuda.max_memory_allocated(device) - bytes_before if device.type == "cuda" else None
