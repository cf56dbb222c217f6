"""`get_accelerator()`: the compute device by the names that DeepSpeed scripts use."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

import offload

__all__ = ["Accelerator", "get_accelerator"]


class Accelerator:
    """The CUDA device of this process, or the CPU where there is none or `DS_ACCELERATOR=cpu` asks for it.

    Memory figures are bytes, of torch's allocator; they are 0 on a CPU. What is not here is looked up in
    `torch.cuda` or `torch.cpu`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._module: Any = getattr(torch, name)

    def __getattr__(self, name: str) -> Any:
        module = self.__dict__.get("_module")
        if module is None or not hasattr(module, name):
            raise AttributeError(f"the accelerator {self.__dict__.get('_name')!r} has no {name!r}")
        return getattr(module, name)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        if self._name == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def device_name(self, device_index: int | None = None) -> str:
        """`"cuda"`, `"cuda:1"` or `"cpu"`."""
        return self._name if device_index is None or self._name == "cpu" else f"{self._name}:{device_index}"

    def current_device(self) -> int:
        return self.device.index or 0

    def current_device_name(self) -> str:
        return str(self.device)

    def set_device(self, device_index: int) -> None:
        if self._name != "cpu":
            torch.cuda.set_device(device_index)

    def device_count(self) -> int:
        return 1 if self._name == "cpu" else torch.cuda.device_count()

    def is_available(self) -> bool:
        return True

    def synchronize(self, device_index: int | None = None) -> None:
        if self._name != "cpu":
            torch.cuda.synchronize(device_index)

    def empty_cache(self) -> None:
        if self._name != "cpu":
            torch.cuda.empty_cache()

    def memory_allocated(self, device_index: int | None = None) -> int:
        return 0 if self._name == "cpu" else torch.cuda.memory_allocated(device_index)

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return 0 if self._name == "cpu" else torch.cuda.max_memory_allocated(device_index)

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        if self._name != "cpu":
            torch.cuda.reset_peak_memory_stats(device_index)

    def is_bf16_supported(self) -> bool:
        return self._name == "cpu" or torch.cuda.is_bf16_supported()

    def is_fp16_supported(self) -> bool:
        return True

    def communication_backend_name(self) -> str:
        return "gloo" if self._name == "cpu" else "nccl"

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        return tensor if self._name == "cpu" else tensor.pin_memory()

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._name


def get_accelerator() -> Accelerator:
    """The accelerator of this process, always the same object."""
    asked = os.environ.get("DS_ACCELERATOR", "")
    if asked not in ("", "auto", "cpu", "cuda"):
        raise offload.InvalidArgument(f"DS_ACCELERATOR={asked}: legal are 'cpu' and 'cuda'")
    name = asked if asked in ("cpu", "cuda") else "cuda" if torch.cuda.is_available() else "cpu"
    return _accelerator(name)


@functools.cache
def _accelerator(name: str) -> Accelerator:
    if name == "cuda" and not torch.cuda.is_available():
        raise offload.InvalidArgument("DS_ACCELERATOR=cuda: torch sees no CUDA device; unset it, or install its driver")
    return Accelerator(name)
