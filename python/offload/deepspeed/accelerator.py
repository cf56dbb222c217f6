"""`get_accelerator()`: the compute device by the names that DeepSpeed scripts use."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import torch

import offload

__all__ = ["Accelerator", "get_accelerator"]


class Accelerator:
    """The CUDA device of this process, or the CPU where there is none or `DS_ACCELERATOR=cpu` asks for it.

    Memory figures are bytes, of torch's allocator; they are 0 on a CPU. What is not here is looked up in `torch.cuda`,
    or in `torch.cpu` and `torch`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._modules: tuple[Any, ...] = (torch.cpu, torch) if name == "cpu" else (torch.cuda,)

    def __getattr__(self, name: str) -> Any:
        for module in self.__dict__.get("_modules", ()):
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"the accelerator {self.__dict__.get('_name')!r} has no {name!r}")

    @property
    def torch_device(self) -> torch.device:
        """The device of this process."""
        if self._name == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def device(self, device_index: int | None = None) -> contextlib.AbstractContextManager[Any]:
        """Inside the context this device is the current one."""
        return contextlib.nullcontext() if self._name == "cpu" else torch.cuda.device(device_index)

    def device_name(self, device_index: int | None = None) -> str:
        """`"cuda"`, `"cuda:1"` or `"cpu"`."""
        return self._name if device_index is None or self._name == "cpu" else f"{self._name}:{device_index}"

    def current_device(self) -> int:
        return self.torch_device.index or 0

    def current_device_name(self) -> str:
        return str(self.torch_device)

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

    def memory_reserved(self, device_index: int | None = None) -> int:
        return 0 if self._name == "cpu" else torch.cuda.memory_reserved(device_index)

    def max_memory_reserved(self, device_index: int | None = None) -> int:
        return 0 if self._name == "cpu" else torch.cuda.max_memory_reserved(device_index)

    memory_cached, max_memory_cached = memory_reserved, max_memory_reserved  # their names of old

    def total_memory(self, device_index: int | None = None) -> int:
        """Of the device; on a CPU of the host."""
        return self._memory(device_index)[1]

    def available_memory(self, device_index: int | None = None) -> int:
        """Of the device what is free; on a CPU of the host."""
        return self._memory(device_index)[0]

    def _memory(self, device_index: int | None) -> tuple[int, int]:
        if self._name != "cpu":
            return torch.cuda.mem_get_info(device_index)
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page

    def memory_stats(self, device_index: int | None = None) -> dict[str, Any]:
        return {} if self._name == "cpu" else torch.cuda.memory_stats(device_index)

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        if self._name != "cpu":
            torch.cuda.reset_peak_memory_stats(device_index)

    reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats  # its names of old

    def is_bf16_supported(self) -> bool:
        return self._name == "cpu" or torch.cuda.is_bf16_supported()

    def is_fp64_supported(self) -> bool:
        return True

    def is_fp16_supported(self) -> bool:
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.float16] + ([torch.bfloat16] if self.is_bf16_supported() else [])

    def is_synchronized_device(self) -> bool:
        """Whether an operation has ended when its call returns."""
        return self._name == "cpu"

    use_host_timers = resolves_data_dependency = handles_memory_backpressure = is_synchronized_device

    def range_push(self, msg: str, domain: str | None = None, category: str | None = None) -> None:
        """Begins a range that a profiler shows."""
        if self._name != "cpu":
            torch.cuda.nvtx.range_push(msg)  # type: ignore[no-untyped-call]

    def range_pop(self, domain: str | None = None) -> None:
        """Ends the last one."""
        if self._name != "cpu":
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]

    def communication_backend_name(self) -> str:
        return "gloo" if self._name == "cpu" else "nccl"

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def pin_memory(self, tensor: torch.Tensor, make_copy: bool = True, match_shape: bool = True) -> torch.Tensor:
        """A copy on locked pages; on a CPU the tensor itself. The other two arguments are accepted."""
        return tensor if self._name == "cpu" else tensor.pin_memory()

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned()

    def random(self) -> Any:
        """Where the generators are set and read."""
        return torch.random if self._name == "cpu" else torch.cuda.random

    def default_generator(self, device_index: int | None = None) -> torch.Generator:
        if self._name == "cpu":
            return torch.default_generator
        return torch.cuda.default_generators[self.current_device() if device_index is None else device_index]

    def default_stream(self, device_index: int | None = None) -> Any:
        """The stream of work that names none."""
        return torch.cpu.current_stream() if self._name == "cpu" else torch.cuda.default_stream(device_index)

    def lazy_call(self, callback: Callable[[], Any]) -> None:
        """Calls `callback`, once the device is in use."""
        callback() if self._name == "cpu" else torch.cuda._lazy_call(callback)  # type: ignore[no-untyped-call]

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
