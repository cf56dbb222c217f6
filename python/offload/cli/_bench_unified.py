"""`offload bench unified`: AdamW by the device over states in host memory, beside the host's own update.

`unified` is `optimizer="unified"`: the device reads and writes the states over the link. `managed` is the same kernel
over managed memory that the driver keeps on the host's side. `host` is a step of states on the host to the end of its
last upload, `half` one with half of them updated by each, `device` one of states on the device. All take turns, round
after round, from the same weights and gradients, and all must end with the same bits.
"""

from __future__ import annotations

import argparse
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
from ._device import compute_device, seconds_a_step
from ._progress import now_at
from ._table import Piece

__all__ = ["figures", "pieces", "run"]

_LR = 1e-2  # a bf16 weight of 1 must move in the fewest steps
_PARTS = 8  # parameters, of which some may be updated by the device and others by the host
# Of an element: the lower half of its master, moments, and written too is the host's copy of the weight.
_READ_BYTES, _WRITTEN_BYTES = 2 + 8, 2 + 8 + 2
_PLACES: dict[str, Any] = {
    "device": "device",
    "unified": "unified",
    "half": {"unified": 0.5, "host": 0.5},
    "host": "host",
}
Step = Callable[[], object]


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times steps over 64 Mi bf16 weights (quick: 64 Ki), in 8 parameters. Raises `InvalidArgument` for a bad device.

    Yields a JSON-able dict: `kind` of the device's memory, `seconds` a step by variant, each with `samples`, `median`,
    `p20`, `p80`; of raw copies and, where the device updates states in host memory, `gb_per_s` each way and
    `share_of_link`; `host_over` the others; and under `refused` why a variant was left out.
    """
    device = compute_device(options.device)
    count, rounds, steps = (1 << 16, 3, 2) if options.quick else (64 << 20, 7, 5)
    variants: dict[str, Step] = {}
    weights: dict[str, list[Tensor]] = {}
    refused: dict[str, str] = {}
    for name, make in [*((name, _wrapped) for name in _PLACES), ("managed", _managed)]:
        made = _made_or_refusal(make, name, count // _PARTS, device)
        if isinstance(made, str):
            refused[name] = made
        else:
            weights[name], variants[name] = made
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        now_at(f"round {turn} of {rounds}")
        for name, step in variants.items():
            seconds = seconds_a_step(step, steps, device)
            if turn > 0:  # the first is of first touches
                samples[name].append(seconds)
    _check(weights)
    results = {name: summary(values) for name, values in samples.items()}
    rates = raw_bytes_per_s(device, options.quick)
    # Of the way that takes longer.
    link = max(_READ_BYTES / rates["to_device"], _WRITTEN_BYTES / rates["to_host"]) * count
    over_link = [name for name in ("unified", "managed") if name in results]
    crossing = {name: (_READ_BYTES + _WRITTEN_BYTES) * count / results[name]["median"] for name in over_link}
    yield {
        "name": "unified",
        "device": str(device),
        "kind": offload.unified.classify(device).kind if device.type == "cuda" else None,
        "count": count,
        "seconds": results,
        "gb_per_s": {name: rate / 1e9 for name, rate in (rates | crossing).items()},
        "share_of_link": {name: link / results[name]["median"] for name in over_link},
        "host_over": {
            name: results["host"]["median"] / result["median"] for name, result in results.items() if name != "host"
        },
        "refused": refused,
    }


def _made_or_refusal(
    make: Callable[..., tuple[list[Tensor], Step]], name: str, count: int, device: torch.device
) -> tuple[list[Tensor], Step] | str:
    try:
        return make(name, count, device)
    except (offload.OffloadError, torch.OutOfMemoryError) as error:
        return str(error).partition("\n")[0]


def _wrapped(name: str, count: int, device: torch.device) -> tuple[list[Tensor], Step]:
    model = nn.ParameterList([torch.ones(count, dtype=torch.bfloat16, device=device) for _ in range(_PARTS)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is measured because it is advised against
        _, wrapped = offload.wrap(model, optimizer, optimizer=_PLACES[name], gradients="device")
    for parameter in model:
        parameter.grad = torch.ones_like(parameter)

    def step() -> None:
        wrapped.step()
        wrapped.synchronize()

    return [parameter.detach() for parameter in model], step


def _managed(name: str, count: int, device: torch.device) -> tuple[list[Tensor], Step]:
    kernels, refusal = find_kernels(device)
    if kernels is None:
        raise offload.DeviceError(f"{name} memory needs the kernel: {refusal}")
    hyper = AdamWHyper.of_group(torch.optim.AdamW([torch.zeros(1)], lr=_LR).param_groups[0], decoupled=True)
    hints: dict[str, Any] = {}
    if offload.unified.classify(device).concurrent_managed_access:
        hints = {"preferred_location": "host", "accessed_by": "device"}

    def states(dtype: torch.dtype) -> Tensor:
        return offload.unified.empty(_PARTS * count, dtype=dtype, device=device, side="host", **hints).zero_()

    weight, gradient = (torch.ones(_PARTS * count, dtype=torch.bfloat16, device=device) for _ in range(2))
    remainder, copy = states(torch.int16), states(torch.bfloat16)
    moments = {key: states(torch.float32) for key in ("exp_avg", "exp_avg_sq")}
    addresses = {key: moment.data_ptr() for key, moment in moments.items()}
    taken = 0

    def step() -> dict[str, Tensor]:
        nonlocal taken
        taken += 1
        kernels.update_("adamw", remainder, weight, addresses, gradient, hyper.scalars(taken), copy=copy)
        return moments  # which nothing else keeps

    return list(weight.chunk(_PARTS)), step


def _check(weights: dict[str, list[Tensor]]) -> None:
    first, *others = weights
    if any(bool((weight == 1).any()) for weight in weights[first]):
        raise AssertionError(f"{first} left weights as they were: it did not run")
    for name in others:
        if not all(map(torch.equal, weights[name], weights[first])):
            raise AssertionError(f"the weights of {name} and {first} differ")


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """Milliseconds a step; the ceiling of states in host memory is what the link takes for the longer of both ways."""
    found = []
    for name, one in result["seconds"].items():
        share = result["share_of_link"].get(name)
        ceiling = None if share is None else ("the link, the longer way", one["median"] * share)
        found.append(figure(name, "ms", one, scale=1e3, ceiling=ceiling))
    return found


def pieces(result: Mapping[str, Any]) -> list[Piece]:
    """What was left out, and why."""
    return [f"{name} is left out: {why}" for name, why in result["refused"].items()]
