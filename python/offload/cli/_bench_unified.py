"""`offload bench unified`: AdamW by the device over states in host memory, beside the host's own update.

`unified` is `optimizer="unified"`: the device reads and writes the states over the link. `mapped pinned` is the same
kernel over page-locked memory, which every card reads: where there is no coherent link it shows what such reads and
writes cost. `host` is a step of states on the host to the end of its last upload, `device` one of states on the device.
All take turns, round after round, from the same weights and gradients, and all must end with the same bits.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import offload

from .._adamw import AdamWHyper
from .._kernels import find_kernels
from ._bench_copies import raw_bytes_per_s
from ._bench_figures import Figure, figure
from ._bench_spread import summary
from ._device import compute_device
from ._progress import now_at
from ._table import Piece

__all__ = ["figures", "pieces", "run"]

_LR = 1e-2  # a bf16 weight of 1 must move in the fewest steps
_STATE_BYTES = 12  # of an element: master and moments, each read and written in a step
Step = Callable[[], object]


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times steps over 64 Mi bf16 weights (quick: 64 Ki). Raises `InvalidArgument` for a device that cannot be used.

    Yields a JSON-able dict: `kind` of the device's memory, `seconds` a step by variant, each with `samples`, `median`,
    `p20`, `p80`; of raw copies and, where the device updates states in host memory, `gb_per_s` each way and
    `share_of_link`; `host_over` the others; and under `refused` why a variant was left out.
    """
    device = compute_device(options.device)
    count, rounds, steps = (1 << 16, 3, 2) if options.quick else (64 << 20, 7, 5)
    variants: dict[str, Step] = {}
    weights: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    for name, make in (("device", _wrapped), ("unified", _wrapped), ("mapped pinned", _pinned), ("host", _wrapped)):
        made = _made_or_refusal(make, name, count, device)
        if isinstance(made, str):
            refused[name] = made
        else:
            weights[name], variants[name] = made
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        now_at(f"round {turn} of {rounds}")
        for name, step in variants.items():
            seconds = _seconds(step, steps, device)
            if turn > 0:  # the first is of first touches
                samples[name].append(seconds)
    _check(weights)
    results = {name: summary(values) for name, values in samples.items()}
    rates = raw_bytes_per_s(device, options.quick)
    slower = min(rates["to_host"], rates["to_device"])
    over_link = [name for name in ("unified", "mapped pinned") if name in results]
    each_way = {name: _STATE_BYTES * count / results[name]["median"] for name in over_link}
    yield {
        "name": "unified",
        "device": str(device),
        "kind": offload.unified.classify(device).kind if device.type == "cuda" else None,
        "count": count,
        "seconds": results,
        "gb_per_s": {name: rate / 1e9 for name, rate in (rates | each_way).items()},
        "share_of_link": {name: rate / slower for name, rate in each_way.items()},
        "host_over": {
            name: results["host"]["median"] / result["median"] for name, result in results.items() if name != "host"
        },
        "refused": refused,
    }


def _made_or_refusal(
    make: Callable[..., tuple[Tensor, Step]], name: str, count: int, device: torch.device
) -> tuple[Tensor, Step] | str:
    try:
        return make(name, count, device)
    except (offload.OffloadError, torch.OutOfMemoryError) as error:
        return str(error).partition("\n")[0]


def _wrapped(place: str, count: int, device: torch.device) -> tuple[Tensor, Step]:
    model = nn.ParameterList([torch.ones(count, dtype=torch.bfloat16, device=device)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is measured because it is advised against
        _, wrapped = offload.wrap(model, optimizer, optimizer=place, gradients="device")
    model[0].grad = torch.ones_like(model[0])

    def step() -> None:
        wrapped.step()
        wrapped.synchronize()

    return model[0].detach(), step


def _pinned(name: str, count: int, device: torch.device) -> tuple[Tensor, Step]:
    """Page-locked memory has one address for both sides, which torch does not show as the device's: launched as is."""
    kernels, refusal = find_kernels(device)
    if kernels is None:
        raise offload.DeviceError(f"{name} memory needs the kernel: {refusal}")
    hyper = AdamWHyper.of_group(torch.optim.AdamW([torch.zeros(1)], lr=_LR).param_groups[0], decoupled=True)
    weight, gradient = (torch.ones(count, dtype=torch.bfloat16, device=device) for _ in range(2))
    master = torch.ones(count, device="cpu", pin_memory=True)
    moments = {key: torch.zeros(count, device="cpu", pin_memory=True) for key in ("exp_avg", "exp_avg_sq")}
    addresses = {key: moment.data_ptr() for key, moment in moments.items()}
    taken = 0

    def step() -> dict[str, Tensor]:
        nonlocal taken
        taken += 1
        kernels.update_("adamw", master, weight, addresses, gradient, hyper.scalars(taken))
        return moments  # which nothing else keeps

    return weight, step


def _check(weights: dict[str, Tensor]) -> None:
    first, *others = weights
    if bool((weights[first] == 1).any()):
        raise AssertionError(f"{first} left weights as they were: it did not run")
    for name in others:
        if not torch.equal(weights[name], weights[first]):
            raise AssertionError(f"the weights of {name} and {first} differ")


def _seconds(step: Step, steps: int, device: torch.device) -> float:
    """Of one step, of `steps` one behind the other."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # of what other variants submitted
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a step of the device returns when it is submitted
    return (time.perf_counter() - start) / steps


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """Milliseconds a step; the ceiling of states in host memory is what the link takes for them, one way."""
    found = []
    for name, one in result["seconds"].items():
        share = result["share_of_link"].get(name)
        ceiling = None if share is None else ("the link, one way", one["median"] * share)
        found.append(figure(name, "ms", one, scale=1e3, ceiling=ceiling))
    return found


def pieces(result: Mapping[str, Any]) -> list[Piece]:
    """What was left out, and why."""
    return [f"{name} is left out: {why}" for name, why in result["refused"].items()]
