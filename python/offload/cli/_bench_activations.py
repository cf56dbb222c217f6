"""`offload bench activations`: activations on the host, beside torch's `save_on_cpu` and beside none off the device.

The same forward and backward in each way, in turns, round after round, and all must give the same gradients bit for
bit. What bounds a way that moves so many bytes is the larger of compute and copies, in forward and in backward:
max(forward, bytes / rate to the host) + max(backward, bytes / rate to the device), all of it measured in the same run.

On a CPU `save_on_cpu` copies each tensor once, to the host's memory, and reads it there in backward; ours copies both
ways, as on a card, on threads that take their turns with the compute. How well copies fill the link is measured apart,
by a model that saves as much and computes next to nothing; the link of the CPU device, which is `memmove`, is given a
rate for that.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import offload

from .. import _native
from ._bench_copies import MODES, raw_bytes_per_s
from ._bench_figures import Figure, Side, figure
from ._bench_run import release
from ._bench_spread import summary
from ._bench_step import wait_for_compute
from ._device import compute_device
from ._peak import measured_peak
from ._progress import now_at
from ._table import Piece, format_bytes

__all__ = ["figures", "pieces", "run"]

_RESIDENT, _PEER = "resident", "torch save_on_cpu"
Way = AbstractContextManager[Any]
_KIB = 2**10
_UNITS = 24
# Of the CPU device's link, in the measurement of its share: far under what `memmove` reaches, as in `bench swap`.
_CAP_BYTES_PER_S = 5e8


class _Size(NamedTuple):
    tokens: int
    width: int
    depth: int
    dtype: torch.dtype
    rounds: int


_QUICK = _Size(tokens=512, width=128, depth=4, dtype=torch.float32, rounds=3)
_ON_CPU = _Size(tokens=4096, width=256, depth=8, dtype=torch.float32, rounds=9)
_ON_CUDA = _Size(tokens=8192, width=4096, depth=12, dtype=torch.bfloat16, rounds=9)


class Block(nn.Module):
    """The MLP of a transformer block; what it saves is nine times its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return y


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times them. Seconds and bytes; raises `InvalidArgument` for a device that cannot be used.

    Yields a JSON-able dict: `link_bytes_per_s` of raw copies; `forward_s` and `backward_s` with nothing off the device;
    by way under `ways`: `step_s`, the `bytes` that left in a forward, and of a way that moves any `bound_s` and
    `share_of_bound`; on CUDA `peak_device_bytes`, above what was there before the forward; and `link`: the `share` of
    its rate `bytes_per_s` that copies reach when there is nothing to compute.
    """
    device = compute_device(options.device)
    size = _QUICK if options.quick else _ON_CUDA if device.type == "cuda" else _ON_CPU
    rates = raw_bytes_per_s(device, options.quick)
    passes = _Passes(size, device)
    regions = {
        "offload": offload.offload_activations(device),
        "offload, keep=0": offload.offload_activations(device, keep=0),
    }
    # Pinned also on the CPU, where it pins nothing: else it would not copy at all.
    ways: dict[str, Way] = {_RESIDENT: contextlib.nullcontext(), _PEER: save_on_cpu(pin_memory=True), **regions}
    peaks = {name: passes.check(name, way) for name, way in ways.items()}
    steps: dict[str, list[float]] = {name: [] for name in ways}
    forwards = []
    for number in range(size.rounds):
        now_at(f"round {number + 1} of {size.rounds}")
        for name, way in ways.items():
            forward_s, seconds = passes.seconds(way, split=name == _RESIDENT)
            steps[name].append(seconds)
            if name == _RESIDENT:
                forwards.append(forward_s)
    moved = {name: region.stats()["offloaded_bytes"] for name, region in regions.items()}
    if not all(moved.values()):
        raise AssertionError(f"a way that offloads moved nothing: {moved}")
    moved |= {_RESIDENT: 0, _PEER: passes.saved_bytes()}
    for name, way in ways.items():
        passes.check(name, way)
    forward = summary(forwards)
    backward = summary([step - first for step, first in zip(steps[_RESIDENT], forwards, strict=True)])
    compute = forward["median"], backward["median"]
    del passes, regions, ways  # their memory goes before more is taken
    release(device)
    yield {
        "name": "activations",
        "device": str(device),
        **size._asdict(),
        "dtype": str(size.dtype),
        "link_bytes_per_s": rates,
        "forward_s": forward,
        "backward_s": backward,
        "ways": {
            name: {**_way(steps[name], moved[name], rates, compute), "peak_device_bytes": peaks[name]} for name in steps
        },
        "link": _link(device, rates, quick=options.quick),
    }


def _way(steps: list[float], moved: int, rates: Mapping[str, float], compute: tuple[float, float]) -> dict[str, Any]:
    """What is to be said of one: its steps, and how far they are from what compute and link allow."""
    step = summary(steps)
    found: dict[str, Any] = {"step_s": step, "bytes": moved}
    if moved:
        copies = moved / rates["to_host"], moved / rates["to_device"]
        found["bound_s"] = sum(map(max, compute, copies))
        found["share_of_bound"] = found["bound_s"] / step["median"]
    return found


class _Saving(torch.autograd.Function):
    """Saves fresh memory, and computes nothing with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, nbytes: int) -> Tensor:
        ctx.save_for_backward(torch.empty(nbytes, dtype=torch.uint8, device=x.device))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (_,) = ctx.saved_tensors  # reading it is what brings it back
        return gradients[0], None


class _SavingBlock(nn.Module):
    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.nbytes = nbytes

    def forward(self, x: Tensor) -> Tensor:
        saved: Tensor = _Saving.apply(x * self.scale, self.nbytes)  # type: ignore[no-untyped-call]
        return saved


def _link(device: torch.device, raw: Mapping[str, float], *, quick: bool) -> dict[str, Any]:
    """The share of the link's rate that a wrapped model's activations reach: in forward one way, then back."""
    nbytes = _KIB * (256 if quick else 4 << 10 if device.type == "cpu" else 128 << 10)
    model: nn.Module = nn.Sequential(*(_SavingBlock(nbytes) for _ in range(_UNITS))).to(device)
    model, optimizer = offload.wrap(
        model,
        torch.optim.SGD(model.parameters()),
        device=str(device),
        optimizer="device",
        gradients="device",
        params="device",
        activations="host",
    )
    rates = dict(raw)
    native = optimizer._engine.device
    if isinstance(native, _native.HostDevice):
        rates = dict.fromkeys(raw, _CAP_BYTES_PER_S)
        for lane in MODES["both"]:
            native.limit(lane, _CAP_BYTES_PER_S)
    x = torch.zeros(1, device=device)
    samples = []
    for _ in range(3 if quick else 7):
        start = time.perf_counter()
        model(x).sum().backward()
        wait_for_compute(device)
        seconds = time.perf_counter() - start
        moved = optimizer.stats().activations["offloaded_bytes"]
        samples.append(sum(moved / rate for rate in rates.values()) / seconds)
    offload.unwrap(model, optimizer)
    return {
        "units": _UNITS,
        "unit_bytes": nbytes,
        "moved_bytes": moved,
        "bytes_per_s": rates,
        "share": summary(samples[1:]),  # the first obtains host memory
    }


class _Passes:
    """Forward and backward of one model over one input."""

    def __init__(self, size: _Size, device: torch.device) -> None:
        torch.manual_seed(0)
        self._model = nn.Sequential(*(Block(size.width) for _ in range(size.depth))).to(device, size.dtype)
        self._x = torch.randn(size.tokens, size.width, device=device, dtype=size.dtype)
        self._expected: list[Tensor] | None = None

    def seconds(self, way: Way, *, split: bool = False) -> tuple[float, float]:
        """Of the forward, and of all. Only where they are to be split is the forward's end waited for."""
        self._model.zero_grad()
        wait_for_compute(self._x.device)
        start = time.perf_counter()
        with way:
            loss = self._model(self._x).square().mean()
        if split:
            wait_for_compute(self._x.device)
        forward_s = time.perf_counter() - start
        loss.backward()
        wait_for_compute(self._x.device)
        return forward_s, time.perf_counter() - start

    def check(self, name: str, way: Way) -> int | None:
        """A pass whose gradients must have the bits of the first that was checked; its peak of bytes on a CUDA device.

        The CPU's peak would count what a peer has on the host, as it is the device, too.
        """
        self._model.zero_grad()
        if self._x.is_cuda:
            live_bytes = torch.cuda.memory_allocated(self._x.device)
            with measured_peak(self._x.device, live_bytes) as peak:
                self.seconds(way)
            peak_bytes = peak.nbytes - live_bytes
        else:
            self.seconds(way)
            peak_bytes = None
        gradients = [parameter.grad.clone() for parameter in self._model.parameters() if parameter.grad is not None]
        if self._expected is None:
            self._expected = gradients
        if not all(map(torch.equal, gradients, self._expected)):
            raise AssertionError(f"{name} gives other gradients: activations came back changed")
        return peak_bytes

    def saved_bytes(self) -> int:
        """Bytes of all that autograd saves in a forward, weights included: what moves if every saved tensor does."""
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        self.seconds(saved_tensors_hooks(count, lambda tensor: tensor))
        return total


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """Forward and backward in each way, and what copies reach of the link."""
    ways = result["ways"]
    peers = {_PEER: ways[_PEER]["step_s"]}
    found = []
    for name, way in ways.items():
        side: Side = "peer" if name == _PEER else "ceiling" if name == _RESIDENT else "ours"
        bound = ("the larger of compute and copies", way["bound_s"]) if way["bytes"] else None
        beside = peers if side == "ours" else None
        found.append(figure(f"step, {name}", "s", way["step_s"], side=side, ceiling=bound, peers=beside))
    share = result["link"]["share"]
    found.append(figure("copies, nothing else", "share of the link", share, better="higher", ceiling=("the link", 1.0)))
    return found


def pieces(result: Mapping[str, Any]) -> list[Piece]:
    """What left, and over which link."""
    rates = ", ".join(f"{lane} {rate / 1e9:.2f}" for lane, rate in result["link_bytes_per_s"].items())
    shown: list[Piece] = [f"{result['device']}, raw copies in GB/s: {rates}; gradients are equal bit for bit"]
    for name, way in result["ways"].items():
        peak = "" if way["peak_device_bytes"] is None else f", peak {format_bytes(way['peak_device_bytes'])}"
        shown.append(f"{name}: {format_bytes(way['bytes'])} left the device{peak}")
    return shown
