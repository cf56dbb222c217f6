"""Small models of many kinds, and their training inside a region: to compare activations on and off the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from programs import HANG_S
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import offload
from offload._activation_region import ActivationRegion
from training import TinyLM, batches, loss_of, same_bits

Model = tuple[nn.Module, Callable[[nn.Module, int], Tensor]]


def _tokens(seed: int, vocabulary: int = 40) -> Tensor:
    return next(batches(1, seed=seed, vocabulary=vocabulary))


def tiny_lm(**options: bool) -> Model:
    return TinyLM(**options), lambda model, seed: loss_of(model, _tokens(seed))


def frozen() -> Model:
    model, loss = tiny_lm()
    model.embedding.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    return model, loss


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = TinyLM()
        self.reentrant = reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.inner.embedding(tokens)
        for block in self.inner.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.inner.head(self.inner.norm(x))


def checkpointed(reentrant: bool) -> Model:
    return Checkpointed(reentrant), lambda model, seed: loss_of(model, _tokens(seed))


def llama(layers: int = 3, width: int = 32) -> Model:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    return model, lambda model, seed: model(input_ids=_tokens(seed, 64), labels=_tokens(seed, 64)).loss


def gpt2() -> Model:
    import transformers

    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    model = transformers.AutoModelForCausalLM.from_config(config)  # with its dropout
    return model, lambda model, seed: model(input_ids=_tokens(seed, 64), labels=_tokens(seed, 64)).loss


def encoder() -> Model:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return model, lambda model, seed: model(_noise(seed, 4, 12, 32)).pow(2).mean()


def convolutional() -> Model:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 36, 5),
    ).to(memory_format=torch.channels_last)  # fmt: skip
    return (
        model,
        lambda model, seed: (
            model(_noise(seed, 4, 3, 16, 16).contiguous(memory_format=torch.channels_last)).logsumexp(1).mean()
        ),
    )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 16, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def lstm() -> Model:
    return Recurrent(), lambda model, seed: model(_noise(seed, 4, 9, 12)).logsumexp(1).mean()


class Experts(nn.Module):
    """Which experts run, and which of their outputs reach the loss, changes from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(4))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().flatten()
            if len(rows) > 0:
                seen = expert(x[rows])
                if index % 2 == 0:  # the others were computed in vain
                    out = out.index_add(0, rows, seen)
        return self.head(x + out)


def experts() -> Model:
    return Experts(), lambda model, seed: model(_noise(seed, 24, 16)).logsumexp(1).mean()


def _noise(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cpu").to(torch.get_default_device())


MODELS: dict[str, Callable[[], Model]] = {
    "tiny": tiny_lm,
    "tied": lambda: tiny_lm(tied=True),
    "frozen": frozen,
    "checkpointed": lambda: checkpointed(False),
    "checkpointed reentrant": lambda: checkpointed(True),
    "llama": llama,
    "gpt2": gpt2,
    "encoder": encoder,
    "convolutional": convolutional,
    "lstm": lstm,
    "experts": experts,
}


def region_of(device: torch.device, **options: Any) -> ActivationRegion:
    """Everything leaves, unless the options say otherwise."""
    return offload.offload_activations(device, **({"min_bytes": 1, "keep": 0} | options))


def pool_of(region: ActivationRegion) -> Any:
    return region._activations._lanes._pool


def assert_nothing_left(region: ActivationRegion) -> None:
    activations = region._activations
    end = time.monotonic() + HANG_S
    # The thread that autograd has for a card lets go of a backward that failed after the error was raised here.
    while pool_of(region).stats()["live_count"] > 0 and time.monotonic() < end:
        time.sleep(0.001)
    assert pool_of(region).stats()["live_count"] == 0
    activations.settle()
    assert (activations._live_bytes, activations._device_bytes, activations._host_bytes) == (0, 0, 0)
    assert not activations._ahead and not activations._known and not activations._living


def train(name: str, region: Any, autocast: bool = False) -> tuple[list[float], list[Tensor]]:
    torch.manual_seed(0)
    model, loss_of = MODELS[name]()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        for micro_batch in range(2):
            with region, torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=autocast):
                loss = loss_of(model, 2 * step + micro_batch)
            loss.backward()
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return losses, [value.clone() for value in model.state_dict().values()]


def assert_equal_runs(one: tuple[list[float], list[Tensor]], other: tuple[list[float], list[Tensor]]) -> None:
    assert one[0] == other[0]
    for value, expected in zip(one[1], other[1], strict=True):
        assert same_bits(value, expected)


def small(region: Any, x: Tensor) -> Tensor:
    with region:
        return (x.sin() * x.exp()).sin().sum()


class Watch(torch.autograd.Function):
    """Saves its input and shows in backward what came back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.seen.append(ctx.saved_tensors[0])
        return gradient, None
