"""`offload bench swap`: streamed weights: what touching a unit costs, and how well uploads fill the link.

The link of the CPU device is `memmove`, so it is given a rate for the second and third measurement: a share of it
shows what the order of copies loses, not how fast the machine is. A CUDA device has its own, measured first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import offload

from .. import _native
from ._bench_copies import raw_bytes_per_s
from ._bench_figures import Figure, figure
from ._bench_spread import summary
from ._bench_step import hook_costs, hook_figures, sleep_on, wait_for_compute
from ._device import compute_device
from ._progress import now_at
from ._table import Piece

__all__ = ["figures", "pieces", "run"]

_UNITS = 24
_KIB = 2**10
# Of the CPU device: so far under what `memmove` reaches that the copy itself and Python's part of a touch, which a
# link with an engine of its own does not have, are a small part of it.
_CAP_BYTES_PER_S = 5e8
_STEPS = 3  # in a sample: the link is to stay busy from one step to the next, too

Spin = Callable[[float], None]


def _spin_on(device: torch.device) -> Spin:
    """Computes for so many seconds. On the CPU it keeps its core, as compute does: a thread that slept wakes up cold,
    and the hooks that run next take ten times as long."""
    if device.type != "cpu":
        return sleep_on(device)

    def spin(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return spin


class _Spinning(torch.autograd.Function):
    """Computes in forward and as long again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spin: Spin, seconds: float) -> Tensor:
        ctx.spin, ctx.seconds = spin, seconds
        spin(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.spin(ctx.seconds)
        return gradients[0], None, None


class StreamedBlock(nn.Module):
    """A large frozen weight, of which one element is read, and a tiny trained one, so that backward comes through.

    Nothing but the uploads of weights is on the link, and nothing but `spin` computes.
    """

    def __init__(self, nbytes: int, spin: Spin) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(nbytes // 2, dtype=torch.bfloat16), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        self.spin = spin
        self.compute_s = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale + self.weight[0]
        if self.compute_s == 0:
            return x
        computed: Tensor = _Spinning.apply(x, self.spin, self.compute_s)  # type: ignore[no-untyped-call]
        return computed


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Three measurements: `hooks` in microseconds, `link` and `balance` in seconds and shares.

    link: the share of the link's rate that uploads reach while nothing computes. balance: the time of a step over the
    larger of compute and transfer, when both are equal.
    """
    device = compute_device(options.device)
    quick = options.quick
    rate = _CAP_BYTES_PER_S if device.type == "cpu" else raw_bytes_per_s(device, quick)["to_device"]
    hooks = hook_costs(_UNITS, 5 if quick else 100, device, params="host")
    unit_kib = 256 if quick else 4 << 10 if device.type == "cpu" else 128 << 10
    streamed = StreamedModel(device, rate, nbytes=unit_kib * _KIB)
    yield {
        "name": "swap",
        "device": str(device),
        "link_bytes_per_s": rate,
        "link_is": "a rate given to the CPU device" if device.type == "cpu" else "raw copies, measured first",
        "hooks": hooks,
        "units": _UNITS,
        "unit_bytes": streamed.nbytes,
        **streamed.measure(2 if quick else 7),
    }


class StreamedModel:
    """The wrapped model of the second and third measurement, on a link of `rate` bytes/s."""

    def __init__(self, device: torch.device, rate: float, *, nbytes: int) -> None:
        self.nbytes = nbytes
        self._device = device
        self._rate = rate
        spin = _spin_on(device)
        self._blocks = [StreamedBlock(nbytes, spin) for _ in range(_UNITS)]
        model: nn.Module = nn.Sequential(*self._blocks).to(device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._model, self._optimizer = offload.wrap(
            model, torch.optim.AdamW(trained), optimizer="host", gradients="host", params="host", device=str(device)
        )
        native = self._optimizer._engine.device
        if isinstance(native, _native.HostDevice):
            native.limit("to_device", rate)
        self._x = torch.zeros(1, dtype=torch.bfloat16, device=device)

    def measure(self, repeats: int) -> dict[str, Any]:
        self._seconds_and_bytes()  # the first step records the order
        shares, transfers = [], []
        for number in range(repeats):
            now_at(f"uploads alone, round {number + 1} of {repeats}")
            seconds, moved = self._seconds_and_bytes()
            shares.append(moved / seconds / self._rate)
            transfers.append(moved / self._rate)
        transfer = summary(transfers)
        # Each touch uploads one unit: so much compute a touch is equal to it.
        for block in self._blocks:
            block.compute_s = self.nbytes / self._rate
        computes, steps = [], []
        self._seconds_and_bytes()
        for number in range(repeats):
            now_at(f"balance, round {number + 1} of {repeats}")
            computes.append(self._compute_s())
            steps.append(self._seconds_and_bytes()[0])
        compute, step = summary(computes), summary(steps)
        offload.unwrap(self._model, self._optimizer)
        return {
            "link": {"transfer_s": transfer, "share": summary(shares)},
            "balance": {
                "synthetic": "forward and backward of each block compute, nothing of use, as long as its upload takes",
                "compute_s": compute,
                "transfer_s": transfer,
                "step_s": step,
                "step_over_larger": step["median"] / max(compute["median"], transfer["median"]),
            },
        }

    def _seconds_and_bytes(self) -> tuple[float, float]:
        """Of a step, in a row of several; bytes to the device."""
        before = self._optimizer.stats().transfers["to_device_bytes"]
        start = time.perf_counter()
        for _ in range(_STEPS):
            self._model(self._x).sum().backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        wait_for_compute(self._device)
        seconds = time.perf_counter() - start
        moved = self._optimizer.stats().transfers["to_device_bytes"] - before
        return seconds / _STEPS, moved / _STEPS

    def _compute_s(self) -> float:
        """The compute of a step alone: it takes a little longer than it was asked to."""
        start = time.perf_counter()
        for block in self._blocks:
            for _ in ("forward", "backward"):
                block.spin(block.compute_s)
        wait_for_compute(self._device)
        return time.perf_counter() - start


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """What hooks add, what uploads reach of the link, and a step whose compute is as long as its uploads."""
    link, balance = result["link"], result["balance"]
    larger = max(balance["compute_s"]["median"], balance["transfer_s"]["median"])
    return [
        figure("uploads, nothing else", "share of the link", link["share"], better="higher", ceiling=("the link", 1.0)),
        figure("step", "s", balance["step_s"], ceiling=("the larger of compute and transfer", larger)),
        figure("compute", "s", balance["compute_s"], side="ceiling"),
        *hook_figures(result["hooks"]),
    ]


def pieces(result: Mapping[str, Any]) -> list[Piece]:
    """Which link it was, and what hooks cost apart from each other."""
    hooks, rate = result["hooks"], f"{result['link_bytes_per_s'] / 1e9:.2f} GB/s, {result['link_is']}"
    costs = f"{hooks['us_per_unit']:.1f} us a unit and {hooks['us_per_parameter']:.1f} us a parameter"
    return [f"{result['device']}, link: {rate}", f"hooks: {costs}"]
