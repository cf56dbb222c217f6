"""`offload bench plan`: what `offload.forecast` predicts of a step, beside steps of the engine on the CPU device.

The links are HostDevice's own, capped in real time, so that a step is bound by what the caps say and not by the noise
of the machine. Compute is real: bf16 matrix products by one thread of torch, beside one worker thread of the host
update, so that two cores are enough for both. All rates are measured once, before the first setting: compute alone, the
host update while a model computes and copies run, the device's own update of what a placement leaves there, and the
norms of clipping. No setting is measured before all of them are predicted.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import offload
from offload import Machine, ParameterSize

from .. import _native
from ._bench_figures import Figure, figure
from ._bench_model import sizes_of
from ._bench_spread import summary
from ._table import Piece, Table

__all__ = ["figures", "pieces", "run"]

_TOLERANCE = 0.15
_PREFETCH = 1
_MB = 1e6


@dataclasses.dataclass(frozen=True)
class Shape:
    """So many units of `weights` square matrices, and a last one that maps to `outputs`."""

    units: int
    weights: int
    width: int
    outputs: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the grid. link: bytes a second to the host and to the device."""

    shape: str
    placement: str
    micro_batches: int
    clips: bool
    link: tuple[float, float]


_SHAPES = {
    "deep": Shape(units=12, weights=2, width=768, outputs=768, tokens=48),
    "wide": Shape(units=4, weights=4, width=1024, outputs=1024, tokens=32),
    "head": Shape(units=6, weights=3, width=640, outputs=8192, tokens=48),
}
_QUICK_SHAPES = {"deep": Shape(units=3, weights=2, width=256, outputs=256, tokens=32)}
_PLACEMENTS: dict[str, dict[str, Any]] = {
    "optimizer+gradients": {"optimizer": "host", "gradients": "host", "params": "device"},
    "optimizer": {"optimizer": "host", "gradients": "device", "params": "device"},
    "gradients": {"optimizer": "device", "gradients": "host", "params": "device"},
    "optimizer:0.5+gradients": {"optimizer": 0.5, "gradients": "host", "params": "device"},
    "optimizer+gradients+params": {"optimizer": "host", "gradients": "host", "params": "host"},
}
_MICRO_BATCHES = (1, 4)
_LINKS = ((120 * _MB, 120 * _MB), (240 * _MB, 80 * _MB), (300 * _MB, 300 * _MB))


class Block(nn.Module):
    """One unit of a model."""

    def __init__(self, weights: int, inputs: int, outputs: int) -> None:
        super().__init__()
        widths = [inputs] * weights + [outputs]
        self.layers = nn.ModuleList(
            nn.Linear(before, after, bias=False, dtype=torch.bfloat16) for before, after in itertools.pairwise(widths)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Head(Block):
    """The last unit, of another size."""


def _grid(quick: bool) -> list[Setting]:
    """Every shape, placement and number of micro-batches, with links and clipping in turn."""
    shapes = _QUICK_SHAPES if quick else _SHAPES
    crossed = itertools.product(shapes, _PLACEMENTS, _MICRO_BATCHES)
    return [
        Setting(shape, placement, micro_batches, number % 2 == 0, _LINKS[number % len(_LINKS)])
        for number, (shape, placement, micro_batches) in enumerate(crossed)
    ]


def _build(shape: Shape, device: str = "cpu") -> nn.Module:
    with torch.device(device):
        blocks = [Block(shape.weights, shape.width, shape.width) for _ in range(shape.units)]
        return nn.Sequential(*blocks, Head(1, shape.width, shape.outputs))


def _backward(model: nn.Module, shape: Shape, micro_batches: int) -> tuple[float, float]:
    """Seconds of forward and of backward of so many micro-batches, sums of their gradients included."""
    x = torch.ones(shape.tokens, shape.width, dtype=torch.bfloat16)
    forward = backward = 0.0
    for _ in range(micro_batches):
        start = time.perf_counter()
        loss = model(x).float().mean()
        middle = time.perf_counter()
        loss.backward()
        forward, backward = forward + middle - start, backward + time.perf_counter() - middle
    return forward, backward


# --- what the prediction is made of -------------------------------------------------------------------------


def _measure_rates(grid: Sequence[Setting], quick: bool) -> dict[str, Any]:
    """Seconds of compute alone, by shape and micro-batches, and bytes a second of updates and norms."""
    shapes = _QUICK_SHAPES if quick else _SHAPES
    repeats = 3 if quick else 9
    models = {name: _build(shape) for name, shape in shapes.items()}
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {(one.shape, one.micro_batches): [] for one in grid}
    for _ in range(1 + repeats):  # in turn: what else the machine does is in all of them
        for (name, micro_batches), samples in seconds.items():
            samples.append(_backward(models[name], shapes[name], micro_batches))
            models[name].zero_grad()
    compute = {}
    for (name, micro_batches), samples in seconds.items():
        forward, backward = (summary([one[way] / micro_batches for one in samples[1:]]) for way in (0, 1))
        compute[f"{name}/{micro_batches}"] = {"forward_s": forward, "backward_s": backward}
    shape = shapes[grid[0].shape]
    return {
        "compute": compute,
        "host_update": _host_update(shape, repeats),
        "device_update": {
            f"{name}/{placement}": _device_update(other, placement, repeats)
            for name, other in shapes.items()
            for placement in _PLACEMENTS
        },
        "norm": _norm(shape, repeats),
    }


def _host_update(shape: Shape, repeats: int) -> float:
    """Bytes a second of the pipeline's own updates, behind the next forward and beside copies that are not capped."""
    model, optimizer = _wrapped(shape, "optimizer+gradients", None)
    rates = []
    for _ in range(1 + repeats):
        before = optimizer.stats().update_s
        _backward(model, shape, 1)
        optimizer.step()
        optimizer.zero_grad()
        _backward(model, shape, 1)  # the update runs beside it
        optimizer.synchronize()
        optimizer.zero_grad()
        rates.append(
            _traffic(shape, "optimizer+gradients", "host_update_bytes") / (optimizer.stats().update_s - before)
        )
    offload.unwrap(model, optimizer)
    return float(summary(rates[1:])["median"])


def _device_update(shape: Shape, placement: str, repeats: int) -> float | None:
    """Bytes a second of the update of the states that a placement leaves on the device; None where it leaves none.

    Of all of them in turn, as in a step: a state that is updated again and again stays in the caches.
    """
    plan, model = _plan(shape, placement), _build(shape)
    kept = {name: parameter for name, parameter in model.named_parameters() if plan.keeps_state(name)}
    if not kept:
        return None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in kept)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(kept.values(), lr=1e-4)
    places = dict.fromkeys(("optimizer", "gradients", "params", "activations"), "device")
    model, optimizer = offload.wrap(model, optimizer, config=places, device="cpu")
    seconds = []
    for _ in range(1 + repeats):
        for parameter in kept.values():
            parameter.grad = torch.full_like(parameter, 0.01)
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    offload.unwrap(model, optimizer)
    return _traffic(shape, placement, "device_update_bytes") / float(summary(seconds[1:])["median"])


def _norm(shape: Shape, repeats: int) -> float:
    """Bytes a second of the norms of gradients."""
    gradients = [torch.ones_like(parameter) for parameter in _build(shape).parameters()]
    nbytes = sum(gradient.numel() * gradient.element_size() for gradient in gradients)
    rates = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        for gradient in gradients:
            torch._foreach_norm([gradient])
        rates.append(nbytes / (time.perf_counter() - start))
    return float(summary(rates[1:])["median"])


def _sizes(shape: Shape) -> list[ParameterSize]:
    return sizes_of(_build(shape, "meta"))


def _plan(shape: Shape, placement: str) -> offload.Plan:
    return offload.estimate(_build(shape, "meta"), **_PLACEMENTS[placement])


def _works(shape: Shape, placement: str, compute: Mapping[str, tuple[float, float]]) -> tuple[offload.UnitWork, ...]:
    config = offload.Config(**_PLACEMENTS[placement])
    return offload.unit_works(_sizes(shape), _plan(shape, placement), config, compute)


def _traffic(shape: Shape, placement: str, field: str) -> int:
    return sum(getattr(work, field) for work in _works(shape, placement, {}))


def _predict(setting: Setting, shape: Shape, rates: Mapping[str, Any]) -> offload.StepForecast:
    measured = rates["compute"][f"{setting.shape}/{setting.micro_batches}"]
    forward, backward = (measured[way]["median"] for way in ("forward_s", "backward_s"))
    sizes = _sizes(shape)
    total = sum(size.numel for size in sizes)
    compute: dict[str, tuple[float, float]] = {}
    for size in sizes:
        before = compute.get(size.unit, (0.0, 0.0))
        norm = size.numel * size.itemsize / rates["norm"] if setting.clips else 0.0
        share = size.numel / total
        compute[size.unit] = before[0] + share * forward, before[1] + share * backward + norm
    works = _works(shape, setting.placement, compute)
    device_update = rates["device_update"][f"{setting.shape}/{setting.placement}"]
    machine = Machine(*setting.link, rates["host_update"], device_update, synchronous=True)
    return offload.forecast(
        works, machine, micro_batches=setting.micro_batches, prefetch=_PREFETCH, clips=setting.clips
    )


# --- the run ------------------------------------------------------------------------------------------------


def _wrapped(
    shape: Shape, placement: str, link: tuple[float, float] | None, **more: Any
) -> tuple[nn.Module, offload.OffloadOptimizer]:
    """A model on a HostDevice with these caps; None: without."""
    model = _build(shape)
    to_host, to_device = link or (0.0, 0.0)
    # The engine opens its device without arguments, as there is no public way to a slower link.
    capped = functools.partial(_native.HostDevice, to_host_bytes_per_s=to_host, to_device_bytes_per_s=to_device)
    with mock.patch.object(_native, "HostDevice", capped):
        return offload.wrap(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-4),
            device="cpu",
            activations="device",
            prefetch=_PREFETCH,
            poison=False,
            **(_PLACEMENTS[placement] | more),
        )


def _measure(setting: Setting, shape: Shape, steps: int) -> list[float]:
    """Seconds of each of `steps` steps in a row, after two that make states and record orders."""
    model, optimizer = _wrapped(shape, setting.placement, setting.link)
    seconds = []
    for _ in range(2 + steps):
        start = time.perf_counter()
        _backward(model, shape, setting.micro_batches)
        if setting.clips:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    offload.unwrap(model, optimizer)
    return seconds[2:]


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """One thread of torch, and one of the host update where this process has not updated anything before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch.dict(os.environ, OFFLOAD_NUM_THREADS="1"):
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _keep_freed_memory() -> None:
    """Torch's intermediate results stay in malloc's heap, for the rest of the process.

    Else each is of new pages that the kernel clears, or not, as the heap happens to be: up to 100 MB a step.
    """
    mmap_threshold, trim_threshold = -3, -1  # of glibc's malloc.h
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has no such thing
        libc.mallopt(mmap_threshold, 32 << 20)  # the most that glibc takes
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Predicts every setting, then measures each. Rates in bytes a second, times in seconds.

    Yields a JSON-able dict whenever there is something new: `rates`; `rows` with `predicted_s`, `bound_s` and
    `bound_by`, and once measured `step_s` and `error`, the share by which the prediction is too long; `within`, the
    share of measured rows whose error is at most `tolerance`.
    """
    grid = _grid(options.quick)
    shapes = _QUICK_SHAPES if options.quick else _SHAPES
    if not options.quick:
        _keep_freed_memory()
    with _one_thread_each():
        if options.predictions is None:
            result = _predictions(grid, shapes, options.quick)
        else:
            result = _read_predictions(options.predictions, grid)
        yield result
        if options.predict_only:
            return
        for number, setting in enumerate(grid):
            steps = summary(_measure(setting, shapes[setting.shape], 2 if options.quick else 5))
            rows = list(result["rows"])
            error = rows[number]["predicted_s"] / steps["median"] - 1
            rows[number] = rows[number] | {"step_s": steps, "error": error}
            errors = [abs(row["error"]) for row in rows if "error" in row]
            within = sum(one <= _TOLERANCE for one in errors) / len(errors)
            result = result | {"rows": rows, "within": within}
            yield result


def _predictions(grid: Sequence[Setting], shapes: Mapping[str, Shape], quick: bool) -> dict[str, Any]:
    rates = _measure_rates(grid, quick)
    rows = []
    for setting in grid:
        step = _predict(setting, shapes[setting.shape], rates)
        rows.append(
            dataclasses.asdict(setting)
            | {"predicted_s": step.seconds, "bound_s": step.bound_seconds, "bound_by": step.bound_by}
            | {"exposed_s": dict(step.exposed)}
        )
    return {
        "name": "plan",
        "device": "cpu",
        "torch_threads": torch.get_num_threads(),
        "update_threads": _native.shared_thread_count(),  # known now: the rates were measured
        "tolerance": _TOLERANCE,
        "rates": rates,
        "rows": rows,
    }


def _read_predictions(path: Any, grid: Sequence[Setting]) -> dict[str, Any]:
    """Those that an earlier run wrote. Raises `InvalidArgument` for those of another grid."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())["results"]["plan"]
        settings = [{name: row[name] for name in dataclasses.asdict(grid[0])} for row in result["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise offload.InvalidArgument(
            f"--predictions {path}: {error!r}: give what offload bench plan --predict-only --json wrote"
        ) from error
    if settings != [json.loads(json.dumps(dataclasses.asdict(setting))) for setting in grid]:
        raise offload.InvalidArgument(
            f"--predictions {path}: its settings are others than those of this run; predict again, with --quick or "
            "without as now"
        )
    return result


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """Steps that were measured; the ceiling is the bound that the forecast gives."""
    found = []
    for row in result["rows"]:
        if "step_s" in row:
            clipped = ", clipped" if row["clips"] else ""
            name = f"{row['shape']}, {row['placement']}, {row['micro_batches']} micro-batches{clipped}"
            found.append(figure(name, "ms", row["step_s"], scale=1e3, ceiling=("the bound", row["bound_s"])))
    return found


def pieces(result: Mapping[str, Any]) -> list[Piece]:
    """What was predicted and measured."""
    header = (
        "shape",
        "placement",
        "micro-batches",
        "clipped",
        "link MB/s",
        "bound",
        "predicted s",
        "measured s",
        "error",
    )
    rows: list[Sequence[str]] = [header]
    for row in result["rows"]:
        link = "/".join(f"{rate / _MB:.0f}" for rate in row["link"])
        measured = [f"{row['step_s']['median']:.3f}", f"{row['error']:+.1%}"] if "error" in row else ["-", "-"]
        rows.append(
            (
                row["shape"],
                row["placement"],
                str(row["micro_batches"]),
                "yes" if row["clips"] else "no",
                link,
                row["bound_by"],
                f"{row['predicted_s']:.3f}",
                *measured,
            )
        )
    shown: list[Piece] = [Table(rows, left=2, below={3: "clipped", 4: "link MB/s", 5: "bound by"})]
    if "within" in result:
        shown.append(f"within {result['tolerance']:.0%}: {result['within']:.0%} of {len(result['rows'])} settings")
    return shown
