"""`offload bench adamw`: the host AdamW beside the machine's streaming ceiling and its peers, in one run.

All variants take turns, round after round, so that a noisy minute of the machine meets all of them. The ceiling of a
variant is the best median over streaming passes with the same reads and writes on the same buffers: plain and
non-temporal stores, with and without software prefetch, one thread and all.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._adamw import FORMATS, AdamWHyper
from ._bench_figures import Figure, figure
from ._bench_spread import summary
from ._progress import now_at

__all__ = ["figures", "run", "streaming_bytes_per_s"]

_HYPER = AdamWHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, decoupled=True, maximize=False)
_STEP = 10  # the step number whose bias correction is applied: any but the first
# How gradient, master and working weight are stored, and the moments beside them.
_FORMATS = {
    "fp32": ("fp32", torch.float32),
    "bf16": ("bf16", torch.float32),
    "split": ("split", torch.float32),
    "split bf16 moments": ("split", torch.bfloat16),
    "split int8 moments": ("split", torch.uint8),
    "bf16 master int8 moments": ("own", torch.uint8),
}
# Which peers do the same work; those of all other formats update fp32 states in fp32.
_PEERS_OF = {
    "fp32": ("torch fp32 fused", "deepspeed fp32"),
    "bf16": ("torch bf16 casts + fused",),
    "bf16 master int8 moments": ("torch fp32 fused", "bitsandbytes 8-bit"),
}
_FP32_PEERS = ("torch fp32 fused",)
_MASTER_FORMATS = {
    torch.float32: _native.MASTER_FLOAT32,
    torch.int16: _native.MASTER_SPLIT,
    torch.bfloat16: _native.MASTER_BFLOAT16,
}
_MOMENT_FORMATS = {
    torch.float32: _native.MOMENTS_FLOAT32,
    torch.bfloat16: _native.MOMENTS_BFLOAT16,
    torch.uint8: _native.MOMENTS_INT8,
}


@dataclass
class _Variant:
    """One thing to time; `moved` is a tensor that each call must change (None: a streaming pass)."""

    name: str
    call: Callable[[], object]
    moved: Tensor | None = None
    ceiling_of: str | None = None
    seconds: list[float] = field(default_factory=list)

    def measure(self) -> None:
        before = None if self.moved is None else self.moved[::4097].clone()
        start = time.perf_counter()
        self.call()
        self.seconds.append(time.perf_counter() - start)
        if before is not None and self.moved is not None and torch.equal(before, self.moved[::4097]):
            raise AssertionError(f"{self.name} left its weights as they were: it did not run")


@dataclass
class _Buffers:
    """The host memory of one format, in the order in which the update takes it."""

    name: str
    gradient: Tensor
    master: Tensor  # fp32, the int16 remainder of a split master, or a bf16 weight that is its own
    weight: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    scales: Tensor  # of int8 moments: one for each block of the first, and of the second

    @classmethod
    def make(cls, name: str, count: int) -> _Buffers:
        kind, moments = _FORMATS[name]
        dtype = torch.float32 if kind == "fp32" else torch.bfloat16
        weight = None if kind in ("fp32", "own") else torch.randn(count).to(dtype)
        master = torch.zeros(count, dtype=torch.int16) if kind == "split" else torch.randn(count)
        if kind == "own":
            master = master.to(dtype)
        gradient = torch.randn(count).to(dtype)
        second = torch.full((count,), 127 if moments == torch.uint8 else 1e-4, dtype=moments)
        scales = torch.full((2, -(-count // _native.MOMENT_BLOCK)), 1e-4)
        return cls(name, gradient, master, weight, torch.zeros(count, dtype=moments), second, scales)

    @property
    def is_split(self) -> bool:
        return self.master.dtype == torch.int16

    @property
    def bytes_an_element(self) -> int:
        """Bytes read plus bytes written for one element, without an int8 block's scale (4 bytes in 256 elements)."""
        own = 2 * self.exp_avg.element_size() + self.master.element_size()
        weight = 0 if self.weight is None else self.weight.element_size() * (2 if self.is_split else 1)
        return self.gradient.element_size() + 2 * own + weight

    def update(self, isa: str) -> None:
        _native.update_states(
            gradient=self.gradient.data_ptr(),
            gradient_format=FORMATS[self.gradient.dtype],
            master=self.master.data_ptr(),
            master_format=_MASTER_FORMATS[self.master.dtype],
            weight=0 if self.weight is None else self.weight.data_ptr(),
            weight_format=_native.FLOAT32 if self.weight is None else FORMATS[self.weight.dtype],
            exp_avg=self.exp_avg.data_ptr(),
            exp_avg_sq=self.exp_avg_sq.data_ptr(),
            count=self.gradient.numel(),
            scalars=_HYPER.native_scalars(_STEP),
            isa=isa,
            moment_format=_MOMENT_FORMATS[self.exp_avg.dtype],
            exp_avg_scales=self.scales[0].data_ptr(),
            exp_avg_sq_scales=self.scales[1].data_ptr(),
        )

    def stream(self, non_temporal: bool, prefetch: bool, threads: int) -> None:
        read, update, write = _native.ACCESS_READ, _native.ACCESS_UPDATE, _native.ACCESS_WRITE
        arrays = [
            (self.gradient, read),
            (self.master, update),
            (self.exp_avg, update),
            (self.exp_avg_sq, update),
        ]
        if self.weight is not None:
            arrays.append((self.weight, update if self.is_split else write))
        _native.streaming_pass(
            [(tensor.data_ptr(), tensor.element_size(), access) for tensor, access in arrays],
            self.gradient.numel(),
            non_temporal=non_temporal,
            prefetch=prefetch,
            threads=threads,
        )

    def updates(self) -> list[_Variant]:
        return [
            _Variant(f"offload {self.name} {isa}", partial(self.update, isa), self.master, self.name)
            for isa in _native.available_isas()
        ]

    def passes(self) -> list[_Variant]:
        threads = sorted({1, _native.shared_thread_count()})
        return [
            _Variant(
                f"stream {self.name} {'non-temporal' if nt else 'plain'}{' prefetch' if pf else ''} {n} threads",
                # 0 asks for the shared pool: a pool made for the call would be timed with its threads' start
                partial(self.stream, nt, pf, 1 if n == 1 else 0),
                ceiling_of=self.name,
            )
            for nt, pf, n in itertools.product((False, True), (False, True), threads)
        ]


def _torch_fused(count: int) -> _Variant:
    parameter = torch.nn.Parameter(torch.randn(count))
    parameter.grad = torch.randn(count)
    optim = torch.optim.AdamW([parameter], lr=_HYPER.lr, weight_decay=_HYPER.weight_decay, fused=True)
    return _Variant("torch fp32 fused", optim.step, parameter.detach())


def _torch_bf16(count: int) -> _Variant:
    """What plain torch needs for bf16 training with fp32 states: casts around its fused AdamW (it refuses mixed)."""
    master = torch.nn.Parameter(torch.randn(count))
    weight, gradient = torch.randn(count).bfloat16(), torch.randn(count).bfloat16()
    master.grad = torch.empty(count)
    optim = torch.optim.AdamW([master], lr=_HYPER.lr, weight_decay=_HYPER.weight_decay, fused=True)

    def step() -> None:
        assert master.grad is not None
        master.grad.copy_(gradient)
        optim.step()
        weight.copy_(master.detach())

    return _Variant("torch bf16 casts + fused", step, master.detach())


def _deepspeed(count: int) -> _Variant:
    with contextlib.redirect_stdout(sys.stderr):  # it builds its kernels aloud; stdout is for results
        adam = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
        parameter = torch.nn.Parameter(torch.randn(count))
        parameter.grad = torch.randn(count)
        optim = adam([parameter], lr=_HYPER.lr, weight_decay=_HYPER.weight_decay, adamw_mode=True)
    return _Variant("deepspeed fp32", optim.step, parameter.detach())


def _bitsandbytes(count: int) -> _Variant:
    """Its 8-bit AdamW over bf16 weights without masters, which on a CPU is a composition of torch's operations."""
    adamw = importlib.import_module("bitsandbytes").optim.AdamW8bit
    parameter = torch.nn.Parameter(torch.randn(count).bfloat16())
    parameter.grad = torch.randn(count).bfloat16()
    optim = adamw([parameter], lr=_HYPER.lr, weight_decay=_HYPER.weight_decay)
    return _Variant("bitsandbytes 8-bit", optim.step, parameter.detach())


def _installed_peers(count: int) -> tuple[list[_Variant], dict[str, str]]:
    """Those of other packages that can be made here and step once, and why the others cannot."""
    found: list[_Variant] = []
    absent: dict[str, str] = {}
    for package, make in (("deepspeed", _deepspeed), ("bitsandbytes", _bitsandbytes)):
        if importlib.util.find_spec(package) is None:
            absent[package] = "not installed"
            continue
        now_at(f"{package}: loading, or building at its first use")
        try:
            variant = make(count)
            variant.measure()
        except Exception as error:  # a peer may fail in any way, which costs no other figure
            absent[package] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        else:
            found.append(variant)
    return found, absent


def _measure(variants: list[_Variant], rounds: int) -> None:
    """All variants take turns; once before that untimed: first touches, lazily made states, threads."""
    for variant in variants:
        variant.measure()
        variant.seconds.clear()
    for number in range(rounds):
        now_at(f"round {number + 1} of {rounds}")
        for variant in variants:
            variant.measure()


def streaming_bytes_per_s(name: str, count: int, rounds: int) -> float:
    """Bytes a second, read and written, of the fastest streaming pass over `count` elements of the format `name`."""
    buffers = _Buffers.make(name, count)
    passes = buffers.passes()
    _measure(passes, rounds)
    seconds: float = min(summary(one.seconds)["median"] for one in passes)
    return buffers.bytes_an_element * count / seconds


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times one step over 64 Mi elements (quick: 4 Mi). Seconds; shares are of the streaming ceiling.

    Yields a JSON-able dict: `variants`, each with `name`, `samples`, `median`, `p20`, `p80` in seconds,
    `ns_an_element` and, where there is one, its `format`, `share_of_ceiling` and `gb_per_s`; and `absent_peers`.
    """
    count = (4 if options.quick else 64) << 20
    rounds = 7 if options.quick else 9
    all_buffers = [_Buffers.make(name, count) for name in _FORMATS]
    variants = [variant for buffers in all_buffers for variant in buffers.passes() + buffers.updates()]
    peers, absent = _installed_peers(count)
    variants += [_torch_fused(count), _torch_bf16(count), *peers]
    _measure(variants, rounds)

    results = {variant.name: {"name": variant.name, **summary(variant.seconds)} for variant in variants}
    for buffers in all_buffers:
        passes = [v.name for v in variants if v.ceiling_of == buffers.name and v.moved is None]
        ceiling = min(passes, key=lambda name: results[name]["median"])
        for variant in variants:
            if variant.ceiling_of == buffers.name:
                result = results[variant.name]
                result["format"] = buffers.name
                result["bytes_an_element"] = buffers.bytes_an_element
                result["gb_per_s"] = buffers.bytes_an_element * count / result["median"] / 1e9
                result["share_of_ceiling"] = results[ceiling]["median"] / result["median"]
                result["ceiling"] = ceiling
    for result in results.values():
        result["ns_an_element"] = result["median"] / count * 1e9
    yield {
        "name": "adamw",
        "count": count,
        "threads": _native.shared_thread_count(),
        "active_isa": _native.active_isa(),
        "variants": list(results.values()),
        "absent_peers": absent,
    }


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """Nanoseconds an element of our updates, of the best streaming pass of each format, and of the peers."""
    variants = {one["name"]: one for one in result["variants"]}
    # Which streaming pass is the best of its format changes from run to run.
    ceilings = {one["ceiling"]: one["format"] for one in variants.values() if "ceiling" in one}
    scale = 1e9 / result["count"]
    found = []
    for name, one in variants.items():
        if name.startswith("offload "):
            peers = {peer: variants[peer] for peer in _PEERS_OF.get(one["format"], _FP32_PEERS) if peer in variants}
            ceiling = "streaming", variants[one["ceiling"]]["median"]
            found.append(figure(name, "ns an element", one, scale=scale, ceiling=ceiling, peers=peers))
        elif name in ceilings:
            found.append(figure(f"streaming, {ceilings[name]}", "ns an element", one, side="ceiling", scale=scale))
        elif not name.startswith("stream "):
            found.append(figure(name, "ns an element", one, side="peer", scale=scale))
    return found
