"""`offload bench largest`: the largest model that this card and its host can train, by the plan and by training it.

The model grows in depth at the width of a published one. For every share of the optimizer states on the host, with
weights on the device and on the host, the plan says how deep it may be; the deepest of all is trained for a few steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

import offload
from offload import Plan

from ._bench_figures import Figure, figure
from ._bench_run import Offloaded, Place, Run, Size, release
from ._device import compute_device, make_deterministic
from ._model_shapes import MODELS, TINY, ModelShape
from ._progress import now_at
from ._table import Piece, Table, format_bytes

__all__ = ["figures", "largest", "pieces", "run"]

_WIDTHS: dict[str, tuple[ModelShape, int, int]] = {  # shape, tokens a step and of a sequence
    "tiny": (TINY, 64, 32),
    "8b": (dataclasses.replace(MODELS["Llama-3.1-8B"], vocabulary=32768), 8192, 2048),
}
# Of what is free, as `wrap` does where no budget is given: the rest is for activations, and for everyone else.
_DEVICE_SHARE, _HOST_SHARE = 0.75, 0.9
# The least offloaded first: of two that are as deep it is the faster.
_ON_HOST: tuple[Place, ...] = ("device", *(tenths / 10 for tenths in range(1, 10)), "host")
_STEPS = 2


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Derives it and trains it. Bytes; tokens a second.

    Yields a JSON-able dict, the last one complete: `layers`, `parameters`, `places` and `plan` (bytes by tier and kind)
    of the largest model, both budgets, and `run`, as of `bench train`, or `does_not_fit`.
    """
    device = compute_device(options.device)
    shape, tokens, sequence = _WIDTHS[options.size or ("8b" if device.type == "cuda" else "tiny")]
    device_bytes, host_bytes = _budgets(options, device)
    layers, places, plan = largest(shape, device_bytes, host_bytes)
    size = Size(dataclasses.replace(shape, layers=layers), (tokens,), sequence, _STEPS, tokens)
    result: dict[str, Any] = {
        "name": "largest",
        "device": str(device),
        "device_budget_bytes": device_bytes,
        "host_budget_bytes": host_bytes,
        "layers": layers,
        "parameters": size.count,
        "places": places,
        "plan": {"device": dataclasses.asdict(plan.device), "host": dataclasses.asdict(plan.host)},
        "tokens": tokens,
    }
    yield result
    if options.derive_only:
        return
    now_at("training it")
    make_deterministic(device)
    start = partial(Offloaded, size, device, places, device_budget=device_bytes, host_budget=host_bytes)
    try:
        trained = Run(start, size, device)
        trained.block(tokens, _STEPS)
        yield result | {"run": trained.result()}
    except (torch.OutOfMemoryError, offload.OutOfHostMemory) as error:
        yield result | {"does_not_fit": str(error).partition("\n")[0]}
    release(device)


def _budgets(options: argparse.Namespace, device: torch.device) -> tuple[int, int]:
    """Bytes for weights, states and gradients on the device and on the host."""
    given = offload.Config(device_budget=options.device_budget, host_budget=options.host_budget)
    on_device, on_host = given.device_budget_bytes, given.host_budget_bytes
    if device.type == "cpu" and (on_device is None or on_host is None):
        raise offload.InvalidArgument(
            "on the CPU both tiers are one memory: give --device-budget and --host-budget, such as 1GiB and 4GiB"
        )
    if on_device is None:
        on_device = int(torch.cuda.mem_get_info(device)[0] * _DEVICE_SHARE)
    if on_host is None:
        on_host = int(offload.environment()["host"]["available_bytes"] * _HOST_SHARE)
    return on_device, on_host


def largest(shape: ModelShape, device_bytes: int, host_bytes: int) -> tuple[int, dict[str, Place], Plan]:
    """The most layers of this width that the plan places within both budgets: layers, places and plan.

    Raises `InvalidArgument` if not even one fits.
    """
    model = functools.lru_cache(maxsize=4)(partial(_on_meta, shape))

    def fitting(layers: int, places: Mapping[str, Place]) -> Plan | None:
        options: dict[str, Any] = dict(places)
        plan = offload.estimate(model(layers), **options)
        return plan if plan.device.total <= device_bytes and plan.host.total <= host_bytes else None

    best: tuple[int, dict[str, Place], Plan] | None = None
    for params in ("device", "host"):
        for states in _ON_HOST:
            places: dict[str, Place] = {"optimizer": states, "gradients": "host", "params": params}
            layers = best[0] if best else 0
            if fitting(layers + 1, places) is None:
                continue
            step = 1
            while fitting(layers + 2 * step, places):
                step *= 2
            layers += step
            while step := step // 2:  # layers fit, and 2 * step more do not
                if fitting(layers + step, places):
                    layers += step
            plan = fitting(layers, places)
            assert plan is not None
            best = layers, places, plan
    if best is None:
        raise offload.InvalidArgument(
            f"not one layer of hidden size {shape.hidden} fits {format_bytes(device_bytes)} on the device and "
            f"{format_bytes(host_bytes)} on the host: raise the budgets"
        )
    return best


def _on_meta(shape: ModelShape, layers: int) -> torch.nn.Module:
    meta = torch.device("meta")
    return Size(dataclasses.replace(shape, layers=layers), (1,), 1, 1, 1).build(meta, meta)


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """Its steps, where it was trained."""
    steps = result.get("run", {}).get("steps", ())
    return [figure(f"step of {row['tokens']:,} tokens", "s", row["step_s"]) for row in steps]


def pieces(result: dict[str, Any]) -> list[Piece]:
    """The table of a result."""
    places = ", ".join(f"{kind} {place}" for kind, place in result["places"].items())
    about = f"{result['parameters']:,} parameters, {result['layers']} layers on {result['device']}: {places}"
    rows = [("tier", "planned", "budget")]
    for tier in ("device", "host"):
        planned = sum(result["plan"][tier].values())
        rows.append((tier, format_bytes(planned), format_bytes(result[f"{tier}_budget_bytes"])))
    shown: list[Piece] = [about, Table(rows)]
    if "does_not_fit" in result:
        shown.append(f"does not fit: {result['does_not_fit']}")
    if "run" in result:
        (row,) = result["run"]["steps"]
        shown.append(f"trained: {row['tokens_per_s']:,.0f} tokens/s at {row['tokens']:,} tokens a step")
    return shown
