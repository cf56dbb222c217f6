"""`offload bench train`: a Llama-shaped bf16 model, offloaded beside resident, against the bound of a step.

`--device-cap` limits what torch may allocate in the offloaded run alone: a larger model trains beside itself resident.

Four runs of the same model on the same random tokens, with deterministic algorithms:
  offloaded  what was asked for on the host
  resident   the same library with everything on the device; its losses must have the same bits
  torch      plain `torch.optim.AdamW(fused=True)` on the bf16 weights: no fp32 masters, bf16 moments, other losses
  compute    forward and backward alone, without hooks and without an update
Where all of them fit at once they take turns, block of steps after block; otherwise each is freed before the next.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import offload

from ._bench import summary
from ._bench_adamw import streaming_bytes_per_s
from ._bench_link import raw_bytes_per_s
from ._bench_model import build
from ._device import compute_device, make_deterministic
from ._model_shapes import MODELS, TINY, ModelShape, shapes
from ._table import format_bytes, table

__all__ = ["KINDS", "run", "text"]

KINDS = ("optimizer", "gradients", "params", "activations")
_RUNS = ("offloaded", "resident", "torch", "compute")
_LEARNING_RATE = 1e-4
_WARMUP_STEPS = 2  # states are made in the first, and the second has all of them: its peak is the run's peak
_BLOCKS = 3  # of runs that take turns
# All runs at once: 4 bytes a parameter offloaded and 14 on the host, 16 resident, 8 in torch, 4 computing; and the
# gradients that are added up meanwhile.
_BYTES_OF_ALL_RUNS = 48
_SHARE_FOR_ALL_RUNS = 0.5
# DRAM bytes a parameter of the host update with split masters: docs/benchmarks.md, the bound of a step.
_UPDATE_BYTES = 30
_NO_LIMIT = 1 << 62  # bytes: what does not fit shows when it is allocated, and is reported


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and what a step takes: tokens in all, at most in a micro-batch and a sequence; timed steps of a run."""

    shape: ModelShape
    tokens: int
    sequence: int
    steps: int
    micro_batch: int = 0

    @property
    def micro_batches(self) -> int:
        return self.tokens // self.micro_batch


_SIZES = {
    "tiny": Size(TINY, 64, 32, 6),
    "1b": Size(MODELS["Llama-3.2-1B"], 16384, 2048, 15),
    "8b": Size(MODELS["Llama-3.1-8B"], 8192, 2048, 6),
}


def _size(options: argparse.Namespace) -> Size:
    """The size that was asked for. Raises `InvalidArgument` for tokens that do not fill whole sequences."""
    size = _SIZES[options.size]
    tokens = options.tokens or size.tokens
    if tokens > size.sequence and tokens % size.sequence:
        raise offload.InvalidArgument(
            f"--tokens {tokens}: give at most {size.sequence}, one sequence, or a multiple of it"
        )
    sequence = min(tokens, size.sequence)
    micro_batch = options.micro_batch or tokens
    if tokens % micro_batch or micro_batch % sequence:
        raise offload.InvalidArgument(
            f"--micro-batch {micro_batch}: give a multiple of {sequence}, one sequence, that divides {tokens}, the "
            "tokens of a step"
        )
    return dataclasses.replace(
        size,
        shape=dataclasses.replace(size.shape, vocabulary=options.vocabulary or size.shape.vocabulary),
        tokens=tokens,
        sequence=sequence,
        steps=options.steps or (2 if options.quick else size.steps),
        micro_batch=micro_batch,
    )


class Run:
    """One of the runs: its model, warmed up, and what was measured of it."""

    def __init__(self, name: str, size: Size, device: torch.device, options: argparse.Namespace) -> None:
        self.name = name
        self._size, self._device = size, device
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._update_s = self._blocked_s = 0.0
        # Runs beside this one rest meanwhile: what is allocated above their bytes is this one's.
        bytes_before = _start_peak(device)
        streamed = name == "offloaded" and "params" in options.offload
        home = torch.device("cpu") if streamed else device
        self._model = build(size.shape, size.sequence, home, device, checkpointing=not options.no_checkpointing)
        self._offloaded: offload.OffloadOptimizer | None = None
        self._optimizer = self._make_optimizer(options)
        for _ in range(_WARMUP_STEPS):
            self._step()
        self._rest()
        self.peak_device_bytes = _peak(device, bytes_before)

    def _make_optimizer(self, options: argparse.Namespace) -> torch.optim.Optimizer | None:
        if self.name == "compute":
            return None
        fused = self.name == "torch"
        optimizer = torch.optim.AdamW(self._model.parameters(), lr=_LEARNING_RATE, fused=fused or None)
        if fused:
            return optimizer
        on_host = options.offload if self.name == "offloaded" else []
        self._model, self._offloaded = offload.wrap(
            self._model,
            optimizer,
            device=str(self._device),
            device_budget=_NO_LIMIT,
            host_budget=options.host_budget,
            **{kind: "host" if kind in on_host else "device" for kind in KINDS},
        )
        return self._offloaded

    def block(self, steps: int) -> None:
        """Times `steps` steps. One before them is not timed: its update hides behind the first, as theirs do."""
        self._step()
        before = self._offloaded.stats() if self._offloaded else None
        for _ in range(steps):
            start = time.perf_counter()
            self._step()
            self.seconds.append(time.perf_counter() - start)
        if before is not None and self._offloaded:
            after = self._offloaded.stats()
            self._update_s += after.update_s - before.update_s
            self._blocked_s += after.blocked_s - before.blocked_s
        self._rest()

    def _step(self) -> None:
        micro_batches = self._tokens(len(self.losses)).chunk(self._size.micro_batches)
        total = torch.zeros((), device=self._device)
        for tokens in micro_batches:
            loss: Tensor = self._model(input_ids=tokens, labels=tokens).loss / len(micro_batches)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if self._optimizer is None:
            self._model.zero_grad()
        else:
            self._optimizer.step()
            self._optimizer.zero_grad()
        # Reading the loss waits for everything given to the compute stream, as a loop that logs does.
        self.losses.append(total.item())

    def _tokens(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        shape = (self._size.tokens // self._size.sequence, self._size.sequence)
        return torch.randint(self._size.shape.vocabulary, shape, generator=generator).to(self._device)

    def _rest(self) -> None:
        """Nothing of this run goes on while another one is measured."""
        if self._offloaded:
            self._offloaded.synchronize()
        _synchronize(self._device)

    def result(self) -> dict[str, Any]:
        step = summary(self.seconds)
        measured: dict[str, Any] = {
            "step_s": step,
            "tokens_per_s": self._size.tokens / step["median"],
            "losses": self.losses,
            "peak_device_bytes": self.peak_device_bytes,
        }
        if self._offloaded:
            measured["stats"] = self._offloaded.stats().to_dict()
            if self._update_s > 0:
                measured["hidden_share"] = min(1.0, max(0.0, 1 - self._blocked_s / self._update_s))
        return measured


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times the runs. Seconds, bytes, and bandwidths in bytes a second.

    Yields a JSON-able dict whenever a run has ended, the last one complete: `runs` by name (`step_s`, `tokens_per_s`,
    `peak_device_bytes`, `losses`; only `does_not_fit` for one that the device cannot hold); `bound`, the parts of the
    step's lower bound; `share_of_bound`, `hidden_share` and `losses_equal_resident` of the offloaded run.
    """
    size = _size(options)
    device = compute_device(options.device)
    cap = _fraction(options.device_cap, device)
    make_deterministic(device)
    count = sum(map(math.prod, shapes(size.shape)))
    fits = count * _BYTES_OF_ALL_RUNS < _SHARE_FOR_ALL_RUNS * _free_bytes(device)
    interleaved = fits and cap is None  # a cap is of one run
    result: dict[str, Any] = {
        "name": "train",
        "size": options.size,
        "device": str(device),
        "parameters": count,
        "tokens_a_step": size.tokens,
        "micro_batch_tokens": size.micro_batch,
        "sequence_tokens": size.sequence,
        "offload": sorted(options.offload),
        "device_cap_gib": options.device_cap,
        "gradient_checkpointing": not options.no_checkpointing,
        "interleaved": interleaved,
        "rates_bytes_per_s": _rates(device, quick=options.quick or options.size == "tiny"),
        "runs": {},
    }
    for names in [_RUNS] if interleaved else [(name,) for name in _RUNS]:
        with _capped(device, cap if names == ("offloaded",) else None):
            result["runs"] |= _measure(names, size, device, options)
        _free(device)
        yield result | _conclusions(result)


def _measure(names: Sequence[str], size: Size, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Results by name of runs that take turns."""
    results: dict[str, Any] = {}
    runs: list[Run] = []
    for name in names:
        started = _start(name, size, device, options)
        if isinstance(started, Run):
            runs.append(started)
        else:
            results[name] = {"does_not_fit": started}
    blocks = min(_BLOCKS, size.steps) if len(names) > 1 else 1
    for number in range(blocks):
        for one in runs:
            one.block(size.steps // blocks + (number < size.steps % blocks))
    return results | {one.name: one.result() for one in runs}


def _start(name: str, size: Size, device: torch.device, options: argparse.Namespace) -> Run | str:
    """The run, warmed up, or why the device cannot hold it."""
    try:
        return Run(name, size, device, options)
    except torch.OutOfMemoryError as error:
        return str(error).partition("\n")[0]


def _conclusions(result: dict[str, Any]) -> dict[str, Any]:
    """What the runs so far allow to say of the offloaded one."""
    runs = {name: one for name, one in result["runs"].items() if "step_s" in one}
    if "offloaded" not in runs:
        return {}
    offloaded = runs["offloaded"]
    concluded: dict[str, Any] = {"hidden_share": offloaded.get("hidden_share")}
    if "resident" in runs:
        concluded["losses_equal_resident"] = offloaded["losses"] == runs["resident"]["losses"]
        concluded["step_over_resident"] = offloaded["step_s"]["median"] / runs["resident"]["step_s"]["median"]
    if "compute" in runs:
        count, rates = result["parameters"], result["rates_bytes_per_s"]
        # Gradients cross to the host and weights or gradients back, whichever of the kinds is offloaded. In every
        # micro-batch gradients leave, and streamed weights come for forward and for backward. Activations do not count.
        micro_batches = result["tokens_a_step"] // result["micro_batch_tokens"]
        departures = micro_batches if "gradients" in result["offload"] else 1
        uploads = 2 * micro_batches if "params" in result["offload"] else 1
        bound = {
            "compute_s": runs["compute"]["step_s"]["median"],
            "to_host_s": 2 * count * departures / rates["to_host"],
            "to_device_s": 2 * count * uploads / rates["to_device"],
        }
        if "optimizer" in result["offload"]:
            bound["host_update_s"] = _UPDATE_BYTES * count / rates["host_memory"]
        concluded["bound"] = bound
        concluded["bound_by"] = max(bound, key=lambda part: bound[part])
        concluded["share_of_bound"] = max(bound.values()) / offloaded["step_s"]["median"]
    return concluded


def _fraction(cap_gib: float | None, device: torch.device) -> float | None:
    """The share of the device's memory that `cap_gib` GiB are. Raises `InvalidArgument` where nothing can be capped."""
    if cap_gib is None:
        return None
    if device.type != "cuda":
        raise offload.InvalidArgument(f"--device-cap {cap_gib:g}: only CUDA's allocator can be capped, not {device}")
    total = torch.cuda.mem_get_info(device)[1]
    if cap_gib * 2**30 > total:
        raise offload.InvalidArgument(f"--device-cap {cap_gib:g}: {device} has {total / 2**30:.1f} GiB")
    return cap_gib * 2**30 / total


@contextlib.contextmanager
def _capped(device: torch.device, fraction: float | None) -> Iterator[None]:
    """Torch allocates at most this share of the device's memory inside the context."""
    if fraction is None:
        yield
        return
    torch.cuda.set_per_process_memory_fraction(fraction, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _rates(device: torch.device, *, quick: bool) -> dict[str, float]:
    """The machine's own bandwidths, before any model takes its memory."""
    elements = (1 if quick else 64) << 20
    rates = raw_bytes_per_s(device, quick) | {
        "host_memory": streaming_bytes_per_s("split", elements, 3 if quick else 9)
    }
    _free(device)
    return rates


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_peak(device: torch.device) -> int:
    """Bytes allocated now; the peak is counted from here."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device, bytes_before: int) -> int | None:
    """The peak above `bytes_before`; None on the CPU, which does not count."""
    return torch.cuda.max_memory_allocated(device) - bytes_before if device.type == "cuda" else None


def _free(device: torch.device) -> None:
    """What the last run held goes back to the device, also from torch's cache: the next one may need all of it."""
    gc.collect()  # models and hooks refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def text(result: dict[str, Any]) -> str:
    """The table of a result."""
    rows = [("run", "step s", "p20", "p80", "tokens/s", "device peak")]
    for name, one in result["runs"].items():
        if "step_s" not in one:
            rows.append((name, "does not fit", "", "", "", ""))
            continue
        step, peak = one["step_s"], one["peak_device_bytes"]
        times = [f"{step[key]:.4f}" for key in ("median", "p20", "p80")]
        rows.append((name, *times, f"{one['tokens_per_s']:,.0f}", "-" if peak is None else format_bytes(peak)))
    lines = [f"{result['size']}, {result['parameters']:,} parameters on {result['device']}", table(rows)]
    if "losses_equal_resident" in result:
        equal = "equal bit for bit" if result["losses_equal_resident"] else "NOT EQUAL"
        lines.append(f"losses of offloaded and resident: {equal}")
    if "bound" in result:
        parts = ", ".join(f"{name} {seconds:.4f}" for name, seconds in result["bound"].items())
        lines.append(f"bound: {parts}; share of it reached: {result['share_of_bound']:.3f}")
    if result.get("hidden_share") is not None:
        lines.append(f"host update hidden: {result['hidden_share']:.3f}")
    return "\n".join(lines)
