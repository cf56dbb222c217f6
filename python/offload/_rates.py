"""What this machine reaches, measured in well under a second: what the plan weighs host and device updates by."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from . import _native
from ._adamw import FORMATS, AdamWHyper, adamw_step_, round_to_weight
from ._hybrid import Rates
from ._kernels import find_kernels
from ._probe import probe_device, probe_host

__all__ = ["measure_rates"]

_HYPER = AdamWHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, decoupled=True, maximize=False)
# Larger than the caches that they are to miss; less where memory is short.
_HOST_ELEMENTS, _DEVICE_ELEMENTS = 32 << 20, 8 << 20
_COPY_BYTES = 64 << 20
_LEAST_SHARE = 16  # of free memory, at most one part in so many is taken
_ROUNDS = 3


def measure_rates(device: torch.device, *, pin: bool) -> Rates:
    """Bytes a second of copies between host and `device`, and of AdamW over bf16 weights on both, each by itself.

    pin: whether host memory is page-locked. Where the device's update has no kernel, torch operations are timed, by the
    bytes that the kernel would move. The best of a few runs counts; what they use of both memories is small, and free
    afterwards.
    """
    to_host, to_device = _copy_rates(device, pin=pin)
    return Rates(to_host, to_device, _host_update(), _device_update(device))


def _copy_rates(device: torch.device, *, pin: bool) -> tuple[float, float]:
    free_bytes = min(probe_device(str(device)).free_bytes, probe_host().available_bytes)
    count = _at_most(_COPY_BYTES, free_bytes)
    here = torch.zeros(count, dtype=torch.uint8, device="cpu", pin_memory=pin and device.type == "cuda")
    there = torch.zeros_like(here, device=device)
    to_host = _seconds(device, lambda: here.copy_(there, non_blocking=True))
    to_device = _seconds(device, lambda: there.copy_(here, non_blocking=True))
    return count / to_host, count / to_device


def _host_update() -> float:
    """Over split masters, as bf16 weights have on the host: 26 bytes an element."""
    count = _at_most(_HOST_ELEMENTS, probe_host().available_bytes // 14)
    gradient, weight = (torch.full((count,), 0.01, dtype=torch.bfloat16, device="cpu") for _ in range(2))
    remainder = torch.zeros(count, dtype=torch.int16, device="cpu")
    exp_avg, exp_avg_sq = (torch.zeros(count, dtype=torch.float32, device="cpu") for _ in range(2))

    def update() -> None:
        _native.update_states(
            gradient=gradient.data_ptr(),
            gradient_format=FORMATS[torch.bfloat16],
            master=remainder.data_ptr(),
            master_format=_native.MASTER_SPLIT,
            weight=weight.data_ptr(),
            weight_format=FORMATS[torch.bfloat16],
            exp_avg=exp_avg.data_ptr(),
            exp_avg_sq=exp_avg_sq.data_ptr(),
            count=count,
            scalars=_HYPER.native_scalars(2),
        )

    return 26 * count / _seconds(torch.device("cpu"), update)


def _device_update(device: torch.device) -> float:
    """Over fp32 masters, as states on the device have them: 28 bytes an element."""
    found = find_kernels(device).kernels
    count = _at_most(_DEVICE_ELEMENTS, probe_device(str(device)).free_bytes // 64)  # with torch's temporaries
    gradient, weight = (torch.full((count,), 0.01, dtype=torch.bfloat16, device=device) for _ in range(2))
    master, exp_avg, exp_avg_sq = (torch.zeros(count, dtype=torch.float32, device=device) for _ in range(3))
    scalars = _HYPER.scalars(2)

    def update() -> None:
        if found is None:
            adamw_step_(master, exp_avg, exp_avg_sq, gradient, scalars)
            weight.copy_(round_to_weight(master, weight.dtype))
        else:
            moments = {"exp_avg": exp_avg.data_ptr(), "exp_avg_sq": exp_avg_sq.data_ptr()}
            found.update_("adamw", master, weight, moments, gradient, scalars)

    return 28 * count / _seconds(device, update)


def _at_most(wanted: int, free: int) -> int:
    return max(1, min(wanted, free // _LEAST_SHARE))


def _seconds(device: torch.device, work: Callable[[], Tensor | None]) -> float:
    """The shortest of a few runs, after one of first touches."""
    best = float("inf")
    for turn in range(1 + _ROUNDS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn > 0:
            best = min(best, time.perf_counter() - start)
    return best
