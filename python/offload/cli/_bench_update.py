"""`offload bench update`: AdamW over states that stay on the device, beside copies in its memory and beside torch.

The ceiling is what a copy within the device's memory moves in the same run: an update of an fp32 weight reads 16 bytes
an element and writes 12, a copy as many as it writes. All variants take turns, round after round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import offload

from ._bench_figures import Figure, figure
from ._bench_spread import summary
from ._device import compute_device, seconds_a_step
from ._progress import now_at
from ._table import Piece

__all__ = ["figures", "pieces", "run"]

# Weight, options of `wrap`, and what is read and written of an element: gradient, master and moments; a bf16 weight is
# written beside an fp32 master. Scales of int8 moments are left out.
_FORMATS: dict[str, tuple[torch.dtype, dict[str, Any], int]] = {
    "fp32": (torch.float32, {}, 4 + 2 * 12),
    "bf16": (torch.bfloat16, {}, 2 + 2 * 12 + 2),
    "bf16, bf16 moments": (torch.bfloat16, {"moments": "bf16"}, 2 + 2 * 8 + 2),
    "bf16, int8 moments": (torch.bfloat16, {"moments": "int8"}, 2 + 2 * 6 + 2),
    "bf16 master, int8 moments": (torch.bfloat16, {"moments": "int8", "master": "bf16"}, 2 + 2 * 4),
}
_PEERS = {"offload fp32": "torch fp32 fused", "offload bf16": "torch bf16 casts + fused"}
_LR = 1e-2  # a bf16 weight of 1 must move in the fewest steps
Step = Callable[[], object]


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times steps over 128 Mi elements (quick: 64 Ki). Raises `InvalidArgument` for a device that cannot be used.

    Yields a JSON-able dict: `seconds` a step by variant, each with `samples`, `median`, `p20`, `p80`; of ours and of
    the copy `gb_per_s`, and `share_of_copy`; `fallbacks`, which is empty when the kernel ran.
    """
    device = compute_device(options.device)
    count, rounds, steps = (1 << 16, 3, 2) if options.quick else (128 << 20, 9, 10)
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    variants: dict[str, Step] = {"copy": lambda: target.copy_(source)}
    wrapped = {name: _wrapped(dtype, form, count, device) for name, (dtype, form, _) in _FORMATS.items()}
    variants |= {f"offload {name}": partial(optimizer.step) for name, (_, optimizer) in wrapped.items()}
    variants |= {"torch fp32 fused": _torch_fused(count, device), "torch bf16 casts + fused": _casts(count, device)}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        now_at(f"round {turn} of {rounds}")
        for name, step in variants.items():
            seconds = seconds_a_step(step, steps, device)
            if turn > 0:  # the first is of lazily made states and first touches
                samples[name].append(seconds)
    for name, (weight, _) in wrapped.items():
        if bool((weight == 1).any()):
            raise AssertionError(f"offload {name} left weights as they were: it did not run")
    results = {name: summary(values) for name, values in samples.items()}
    rates = {"copy": 2 * source.nbytes / results["copy"]["median"]}
    for name, (_, _, moved) in _FORMATS.items():
        rates[f"offload {name}"] = moved * count / results[f"offload {name}"]["median"]
    yield {
        "name": "update",
        "device": str(device),
        "count": count,
        "seconds": results,
        "gb_per_s": {name: rate / 1e9 for name, rate in rates.items()},
        "share_of_copy": {name: rate / rates["copy"] for name, rate in rates.items() if name != "copy"},
        "fallbacks": list(wrapped["fp32"][1].stats().fallbacks),
    }


def _wrapped(
    dtype: torch.dtype, form: dict[str, Any], count: int, device: torch.device
) -> tuple[Tensor, offload.OffloadOptimizer]:
    model = nn.ParameterList([torch.ones(count, dtype=dtype, device=device)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR)
    _, wrapped = offload.wrap(model, optimizer, optimizer="device", gradients="device", **form)
    model[0].grad = torch.ones_like(model[0])
    return model[0].detach(), wrapped


def _torch_fused(count: int, device: torch.device) -> Step:
    weight = nn.Parameter(torch.ones(count, device=device))
    weight.grad = torch.ones_like(weight)
    return torch.optim.AdamW([weight], fused=True, lr=_LR).step


def _casts(count: int, device: torch.device) -> Step:
    """What plain torch needs for a bf16 weight with an fp32 master."""
    master = nn.Parameter(torch.ones(count, device=device))
    weight, gradient = (torch.ones(count, dtype=torch.bfloat16, device=device) for _ in range(2))
    master.grad = torch.empty_like(master)
    optimizer = torch.optim.AdamW([master], fused=True, lr=_LR)

    def step() -> None:
        assert master.grad is not None
        master.grad.copy_(gradient)
        optimizer.step()
        weight.copy_(master.detach())

    return step


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """Milliseconds a step; the ceiling of an update is what a copy would take for as many bytes."""
    seconds, found = result["seconds"], []
    for name, one in seconds.items():
        if name not in result["share_of_copy"]:
            found.append(figure(name, "ms", one, side="ceiling" if name == "copy" else "peer", scale=1e3))
            continue
        ceiling = "a copy within the device", one["median"] * result["share_of_copy"][name]
        peers = {_PEERS[name]: seconds[_PEERS[name]]} if name in _PEERS else {}
        found.append(figure(name, "ms", one, scale=1e3, ceiling=ceiling, peers=peers))
    return found


def pieces(result: Mapping[str, Any]) -> list[Piece]:
    """Which slower way was taken, and why."""
    return list(result["fallbacks"])
