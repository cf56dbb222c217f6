"""What a lazy step costs: how well the host update hides, and what hooks and HostGrad add to a model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import offload

from ._bench_figures import Figure, figure
from ._bench_spread import summary
from ._device import compute_device
from ._progress import now_at

__all__ = ["figures", "hook_costs", "hook_figures", "run", "sleep_on", "wait_for_compute"]

_BLOCKS = 64  # the update of the first block is what nothing hides, so it should be a small part


class SleepingBlock(nn.Module):
    """A block whose compute is a sleep: it takes time, no memory bandwidth and, on the CPU, no core."""

    def __init__(self, elements: int, sleep: Callable[[float], None]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(elements, dtype=torch.bfloat16))
        self.sleep = sleep
        self.sleep_s = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.sleep(self.sleep_s)
        return x + self.weight[0]  # one element read, a dense gradient of the whole weight


class ManyParameters(nn.Module):
    """A block of `count` tiny parameters: its cost is what is done per module and per parameter."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(64)) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = x * scale
        return x


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Both measurements; times in seconds (overlap) and microseconds (hooks)."""
    device = compute_device(options.device)
    overlap = _overlap(options.quick, device)
    yield {"device": str(device), "overlap": overlap, "hooks": _hooks(options.quick, device)}


def wait_for_compute(device: torch.device) -> None:
    """Ends a timing: work on a CUDA device goes on after the call that submitted it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def sleep_on(device: torch.device) -> Callable[[float], None]:
    """A sleep of so many seconds that takes its turn in the compute stream."""
    if device.type == "cpu":
        return time.sleep
    spin: Callable[[int], None] = torch.cuda._sleep
    cycles = 100_000_000
    spin(cycles)  # the clock of an idle device is low: let it rise before it is measured
    wait_for_compute(device)
    start = time.perf_counter()
    spin(cycles)
    wait_for_compute(device)
    cycles_per_s = cycles / (time.perf_counter() - start)
    return lambda seconds: spin(int(seconds * cycles_per_s))


def _overlap(quick: bool, device: torch.device) -> dict[str, Any]:
    elements = (1 << 16) if quick else (1 << 21)
    repeats = 5 if quick else 15
    sleep = sleep_on(device)
    blocks = [SleepingBlock(elements, sleep) for _ in range(_BLOCKS)]
    model: nn.Module = nn.Sequential(*blocks).to(device)
    model, optimizer = offload.wrap(
        model, torch.optim.AdamW(model.parameters(), lr=1e-3), optimizer="host", gradients="host", device=str(device)
    )
    x = torch.zeros(1, dtype=torch.bfloat16, device=device)

    def timed(*, update: bool) -> float:
        start = time.perf_counter()
        model(x).sum().backward()
        if update:
            optimizer.step()
        optimizer.zero_grad()
        wait_for_compute(device)
        return time.perf_counter() - start

    def host_update() -> float:
        """Seconds from `step()` until every new weight is on the device, with nothing to hide behind."""
        model(x).sum().backward()
        wait_for_compute(device)
        start = time.perf_counter()
        optimizer.step()
        optimizer.synchronize()
        elapsed = time.perf_counter() - start
        optimizer.zero_grad()
        return elapsed

    for _ in range(3):  # first touches and the recording of the first step
        host_update()
    sleep_s = summary([host_update() for _ in range(repeats)])["median"]
    for block in blocks:
        block.sleep_s = sleep_s / _BLOCKS

    computes, steps, updates, hidden = [], [], [], []
    for number in range(repeats):
        now_at(f"overlap, round {number + 1} of {repeats}")
        computes.append(timed(update=False))
        updates.append(host_update())
        timed(update=True)
        # Steady state: each of these forwards runs while the update of the step before it does.
        before = optimizer.stats()
        steps += [timed(update=True) for _ in range(3)]
        after = optimizer.stats()
        hidden.append(1 - (after.exposed_s - before.exposed_s) / (after.update_s - before.update_s))
        optimizer.synchronize()
    offload.unwrap(model, optimizer)
    compute, step, update = summary(computes), summary(steps), summary(updates)
    return {
        "synthetic": "the compute is a sleep in each block's forward, as long in all as the host update",
        "elements": _BLOCKS * elements,
        "blocks": _BLOCKS,
        "sleep_s": sleep_s,
        "compute_s": compute,
        "update_s": update,
        "step_s": step,
        "hidden_share": summary(hidden),
        "step_over_larger": step["median"] / max(compute["median"], update["median"]),
        "step_over_sum": step["median"] / (compute["median"] + update["median"]),
    }


def _hooks(quick: bool, device: torch.device) -> dict[str, Any]:
    return hook_costs(8 if quick else 32, 5 if quick else 25, device)


def hook_costs(units: int, repeats: int, device: torch.device, **where: str) -> dict[str, Any]:
    """What wrapping adds to forward and backward of tiny blocks, as a cost a unit and a cost a parameter.

    where: what `offload.wrap` is to place on the host besides optimizer and gradients.
    """
    now_at("what hooks add")
    few, many = 1, 9
    added = {count: summary(_added_us(units, count, repeats, device, where)) for count in (few, many)}
    per_parameter = (added[many]["median"] - added[few]["median"]) / (units * (many - few))
    return {
        "units": units,
        "added_us": {f"{count} parameters a unit": value for count, value in added.items()},
        "us_per_parameter": per_parameter,
        "us_per_unit": added[few]["median"] / units - few * per_parameter,
    }


def _added_us(units: int, count: int, repeats: int, device: torch.device, where: Mapping[str, str]) -> list[float]:
    """Microseconds that a forward and backward of the wrapped model takes longer than that of a plain one."""

    def build() -> nn.Module:
        return nn.Sequential(*(ManyParameters(count) for _ in range(units))).to(device)

    def timed(model: nn.Module) -> float:
        start = time.perf_counter()
        model(x).sum().backward()
        wait_for_compute(device)
        elapsed = time.perf_counter() - start
        model.zero_grad()
        return elapsed

    x = torch.ones(64, device=device)
    plain, wrapped = build(), build()
    options: dict[str, Any] = {"optimizer": "host", "gradients": "host", **where}
    wrapped, optimizer = offload.wrap(wrapped, torch.optim.AdamW(wrapped.parameters()), device=str(device), **options)
    for model in (plain, wrapped):
        timed(model)
    samples = [(timed(wrapped) - timed(plain)) * 1e6 for _ in range(repeats)]
    offload.unwrap(wrapped, optimizer)
    return samples


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """A step beside the larger of its compute and its host update, and what hooks add."""
    overlap = result["overlap"]
    larger = max(overlap["compute_s"]["median"], overlap["update_s"]["median"])
    return [
        figure("step", "s", overlap["step_s"], ceiling=("the larger of compute and update", larger)),
        figure("compute", "s", overlap["compute_s"], side="ceiling"),
        figure("host update, not hidden", "s", overlap["update_s"]),
        figure("hidden of the host update", "share", overlap["hidden_share"], better="higher"),
        *hook_figures(result["hooks"]),
    ]


def hook_figures(hooks: Mapping[str, Any]) -> list[Figure]:
    """Of what `hook_costs` gave: microseconds that they add to a forward and backward of a unit."""
    return [
        figure(f"hooks, {name}", "us a unit", added, scale=1 / hooks["units"])
        for name, added in hooks["added_us"].items()
    ]
