"""Other libraries that offload, as ways to train the models of `offload bench train`: each as its own manual says.

What each trains is not always the same: `precision` says so beside its figures.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import offload

from ._bench_run import LEARNING_RATE, Size, Training
from ._table import format_bytes

__all__ = ["PEERS", "Unavailable", "leaving_the_group"]

_OF_THE_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_FP32_STATES = "bf16 compute, fp32 masters and moments"
_BF16_STATES = "bf16 weights and moments, no fp32 masters: not the same training"


class Unavailable(Exception):
    """A peer that is not here, and why."""


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(str(error)) from error


def _require_host_bytes(size_bytes: int, host_budget: int | str | None) -> None:
    """A process that takes more than there is would be killed, with all that it measured.

    host_budget: what the user says that there is; a virtual machine may have more than it shows before it is used.
    """
    given = offload.Config(host_budget=host_budget).host_budget_bytes
    available = offload.environment()["host"]["available_bytes"] if given is None else given
    if size_bytes > available:
        raise offload.OutOfHostMemory(
            f"needs about {format_bytes(size_bytes)} of host memory; {format_bytes(available)} are available"
        )


def _join_group_of_one(device: torch.device) -> None:
    """What FSDP2 and DeepSpeed want even for one process."""
    if distributed.is_initialized():
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group(backend, store=store, rank=0, world_size=1)


@contextlib.contextmanager
def leaving_the_group() -> Iterator[None]:
    """No process group of a peer, and nothing of the environment that it is made from, is left after the context."""
    before = {name: os.environ.get(name) for name in _OF_THE_GROUP}
    try:
        yield
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Peer(Training):
    precision: str

    def facts(self) -> dict[str, Any]:
        return {"precision": self.precision}


class Fsdp2(_Peer):
    """torch FSDP2 with `CPUOffloadPolicy`: weights, gradients and states on the host, all of them fp32."""

    precision = _FP32_STATES

    def __init__(self, size: Size, device: torch.device, host_budget: int | str | None = None) -> None:
        fsdp = _imported("torch.distributed.fsdp")
        if not hasattr(fsdp, "fully_shard"):
            raise Unavailable(f"torch {torch.__version__} has no FSDP2")
        # Weight, gradient and two moments; pinned ones in powers of two.
        _require_host_bytes(18 * size.count, host_budget)
        _join_group_of_one(device)
        model = size.build(torch.device("cpu"), device).float()
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)  # only parameters are taken there
        options = {
            "mesh": init_device_mesh(device.type, (1,)),
            "mp_policy": fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
            "offload_policy": fsdp.CPUOffloadPolicy(pin_memory=device.type != "cpu"),
        }
        for block in model.get_submodule("model.layers").children():
            fsdp.fully_shard(block, **options)
        fsdp.fully_shard(model, **options)
        super().__init__(model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True))


class TorchAo(_Peer):
    """torchao's `CPUOffloadOptimizer`: states on the host; gradients stay too, as it cannot add up offloaded ones."""

    precision = _BF16_STATES

    def __init__(self, size: Size, device: torch.device, host_budget: int | str | None = None) -> None:
        optim = _imported("torchao.optim")
        if device.type == "cpu":
            raise Unavailable("torchao's CPUOffloadOptimizer needs streams of an accelerator; there are none on a CPU")
        # Weight, gradient and two moments; pinned ones in powers of two.
        _require_host_bytes(9 * size.count, host_budget)
        model = size.build(device, device)
        optimizer = optim.CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, lr=LEARNING_RATE, fused=True)
        super().__init__(model, optimizer)


class DeepSpeed(_Peer):
    """DeepSpeed ZeRO-Offload: stage 2 with states and gradients on the host."""

    precision = _FP32_STATES

    def __init__(self, size: Size, device: torch.device, host_budget: int | str | None = None) -> None:
        # What its launcher sets for one process.
        os.environ.update(RANK="0", LOCAL_RANK=str(device.index or 0), WORLD_SIZE="1")
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            deepspeed = _imported("deepspeed")
            # Master, two moments and gradient in fp32, a gradient of 16 bits twice.
            _require_host_bytes(20 * size.count, host_budget)
            _join_group_of_one(device)
            deepspeed.init_distributed(dist_init_required=False)
            model = size.build(device, device)
            self._engine, *_ = deepspeed.initialize(
                model=model, model_parameters=model.parameters(), config=self._config(size, device)
            )
        super().__init__(self._engine, None)

    @staticmethod
    def _config(size: Size, device: torch.device) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": size.micro_batch // size.sequence,
            # How many micro-batches a step has is told with each: steps of several sizes are measured.
            "gradient_accumulation_steps": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {
                "stage": 2,
                "overlap_comm": True,
                "contiguous_gradients": True,
                "offload_optimizer": {"device": "cpu", "pin_memory": device.type != "cpu"},
            },
            "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": 0.01}},
            "steps_per_print": sys.maxsize,
        }

    def backward(self, tokens: Tensor, micro_batches: int, *, last: bool) -> Tensor:
        self._engine.set_gradient_accumulation_boundary(last)
        loss: Tensor = self._engine(input_ids=tokens, labels=tokens).loss / micro_batches
        self._engine.backward(loss)
        return loss.detach()

    def step(self) -> None:
        self._engine.step()


PEERS: dict[str, Callable[[Size, torch.device, int | str | None], Training]] = {
    "fsdp2": Fsdp2,
    "torchao": TorchAo,
    "deepspeed": DeepSpeed,
}
