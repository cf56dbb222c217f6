"""The compute device of a command, and time on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

import offload

__all__ = ["compute_device", "make_deterministic", "seconds_a_step"]


def compute_device(name: str | None) -> torch.device:
    """The device called `name` (None: the accelerator, or the CPU), made current if it is CUDA's, with its index.

    Raises `InvalidArgument` for a device that torch cannot use.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise offload.InvalidArgument(f"device {name!r} is no device that torch knows: use 'cpu' or 'cuda'") from error
    if device.type not in ("cpu", "cuda"):
        raise offload.InvalidArgument(f"device {name!r} is not supported: use 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = device.index or 0
    if index >= count:
        raise offload.InvalidArgument(f"device {name!r} is not there: torch sees {count} CUDA devices")
    torch.cuda.set_device(index)  # streams and timings are of the current device
    return torch.device("cuda", index)


def make_deterministic(device: torch.device) -> None:
    """For runs whose bits are compared: no algorithm may depend on the order of threads. On a CPU torch's do not."""
    if device.type == "cpu":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's first matrix product runs
    # With warn_only=True fused attention would only warn, and add up its gradients in the order of its threads.
    torch.use_deterministic_algorithms(True)
    # A debugging aid that would cost bandwidth.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seconds_a_step(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Of `steps` submitted one behind the other."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # of what was submitted before
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a step returns when it is submitted
    return (time.perf_counter() - start) / steps
