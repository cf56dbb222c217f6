"""A GradStore for tests: host bytes of its own, copies that run when they are asked to, and poison."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from offload._host_grad import GradCell, HostGrad, StepGradient, hold


class Bytes:
    """Host bytes that hold NaN patterns until `land()` runs their copy; they are their own ticket."""

    def __init__(self, source: Tensor) -> None:
        self._source: Tensor | None = source
        self.memory = torch.full((source.numel() * source.itemsize,), 0xFF, dtype=torch.uint8)

    @property
    def address(self) -> int:
        return self.memory.data_ptr()

    @property
    def ticket(self) -> Bytes:
        return self

    @property
    def done(self) -> bool:
        return self._source is None

    def wait(self, timeout_s: float | None = None) -> bool:
        self.land()
        return True

    def land(self) -> None:
        """Copies, and then poisons the device memory: it was given away, so nobody may read it any more."""
        if self._source is not None:
            source, self._source = self._source, None
            ctypes.memmove(self.memory.data_ptr(), source.data_ptr(), self.memory.numel())
            ctypes.memset(source.data_ptr(), 0xFF, self.memory.numel())


class HostStore:
    """Copies run at once, or with `delayed=True` at the last moment: when the bytes are needed, in lane order."""

    def __init__(self, *, delayed: bool = False) -> None:
        self.learned: dict[Any, dict[str, int]] = {}
        self.delayed = delayed
        self.to_host_count = 0
        self.to_device_count = 0
        self.prefetch_count = 0
        self.awaited_count = 0  # of those
        self.widened_count = 0
        self.refuse = False
        self.stream = 0
        self._lane: list[Bytes] = []

    def compute_stream(self) -> int:
        return self.stream

    def to_host(self, tensor: Tensor) -> Bytes:
        if self.refuse:
            raise MemoryError("refused by the test")
        assert type(tensor) is Tensor
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
        self.to_host_count += 1
        held = Bytes(tensor)
        self._lane.append(held)
        if not self.delayed:
            self.land()
        return held

    def land(self) -> None:
        for held in self._lane:
            held.land()
        self._lane = []

    def to_device(self, held: Bytes, out: Tensor) -> None:
        self.to_device_count += 1
        self.land()
        assert out.numel() * out.itemsize == held.memory.numel()
        ctypes.memmove(out.data_ptr(), held.address, held.memory.numel())

    def widened(self, tensor: Tensor) -> Tensor:
        self.widened_count += 1
        return tensor.to(torch.float32)

    def start_upload(self, held: Bytes, out: Tensor) -> tuple[Bytes, Tensor]:
        """`out` holds NaN patterns until wait_upload()."""
        ctypes.memset(out.data_ptr(), 0xFF, held.memory.numel())
        self.prefetch_count += 1
        return held, out

    def wait_upload(self, upload: tuple[Bytes, Tensor]) -> None:
        self.awaited_count += 1
        self.to_device(*upload)


def attach(module: torch.nn.Module, store: HostStore) -> None:
    """Holds the gradients of every parameter from now on."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda _, parameter=parameter, name=name: hold(parameter, name, store) and None
            )


def cell_of(gradient: Tensor | None) -> GradCell:
    assert isinstance(gradient, HostGrad), f"a plain gradient: {type(gradient)}"
    return gradient.cell


def as_the_optimizer_reads(step: StepGradient, shape: torch.Size) -> Tensor:
    """Applies the factors as csrc/optimizer/update_rules.h does: each in fp32, rounded to the gradient's dtype."""
    for ticket in step.tickets:
        ticket.wait()
    flat = step.bytes.memory.clone().view(step.dtype)
    for kind, address, value, _ in step.factors:
        number = ctypes.c_float.from_address(address).value if address else value
        factor = torch.full((flat.numel(),), number, dtype=torch.float32)
        wide = flat.to(torch.float32)
        wide = (wide * factor, wide / factor, wide * (1 / factor))[kind]
        flat = wide.to(step.dtype)
    return torch.as_strided(flat, shape, step.strides)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Same shape, dtype and bits; a NaN equals any NaN."""
    left, right = left.detach().clone(), right.detach().clone()
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[left.itemsize]
    left, right = left.contiguous(), right.contiguous()
    return bool(((left.view(bits) == right.view(bits)) | (left.isnan() & right.isnan())).all())
