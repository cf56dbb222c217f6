"""Small models and training loops that several tests run in two ways and compare bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import offload

HOST = {"optimizer": "host", "gradients": "host"}
RESIDENT = {"optimizer": "device", "gradients": "device"}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class TinyLM(nn.Module):
    """Embedding, blocks and a head that is tied to the embedding when asked."""

    def __init__(self, vocabulary: int = 40, width: int = 24, depth: int = 3, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> TinyLM:
    torch.manual_seed(seed)
    return TinyLM(**options).to(dtype)


def batches(count: int, seed: int = 1, vocabulary: int = 40, size: int = 4, length: int = 6) -> Iterator[Tensor]:
    """The same tokens on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(count):
        tokens = torch.randint(0, vocabulary, (size, length + 1), generator=generator, device="cpu")
        yield tokens.to(torch.get_default_device())


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@dataclass
class Run:
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    optimizer: Any
    model: nn.Module


def train(
    model: nn.Module,
    optimizer: Any,
    *,
    steps: int = 6,
    micro_batches: int = 1,
    clip: float | None = 0.5,
    scheduler: Any = None,
    set_to_none: bool = True,
    each_step: Callable[[int, nn.Module, Any], None] | None = None,
) -> Run:
    """An ordinary loop; what it records is compared between placements."""
    data = batches(steps * micro_batches)
    losses, norms = [], []
    for step in range(steps):
        for _ in range(micro_batches):
            loss = loss_of(model, next(data)) / micro_batches
            loss.backward()
            losses.append(loss.item())
        if clip is not None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        if each_step is not None:
            each_step(step, model, optimizer)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return Run(losses, norms, weights, optimizer, model)


def wrapped_run(
    model: nn.Module, placement: dict[str, str], *, adamw: dict[str, Any] | None = None, **loop: Any
) -> Run:
    """Trains a copy of `model` under `placement`."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), **(adamw or {"lr": 1e-2}))
    model, wrapped = offload.wrap(model, optimizer, **placement)
    return train(model, wrapped, **loop)


def assert_same_bits(one: Run, other: Run) -> None:
    assert one.losses == other.losses
    assert one.norms == other.norms
    assert one.weights.keys() == other.weights.keys()
    for name in one.weights:
        assert same_bits(one.weights[name], other.weights[name]), name


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Wherever the two are: what is away from a CUDA device is shown in host memory."""
    one, other = one.cpu(), other.cpu()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.int8}[one.element_size()]
    return one.dtype == other.dtype and bool(torch.equal(one.view(integer), other.view(integer)))


def assert_offloaded(optimizer: offload.OffloadOptimizer) -> None:
    """An offload test in which nothing left the device proves nothing."""
    stats = optimizer.stats()
    assert stats.host_bytes["moments"] > 0 and stats.host_bytes["master"] > 0
    assert "moments" not in stats.device_bytes
    assert stats.transfers["to_host_bytes"] > 0 and stats.transfers["to_device_bytes"] > 0
