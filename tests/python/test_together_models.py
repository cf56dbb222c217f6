"""Kinds of models with everything off the device: optimizer, gradients, weights and activations. No bit changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from activation_models import MODELS as OTHERS
from activation_models import Model
from offload import _activations
from training import HOST, RESIDENT, Run, assert_same_bits, batches

pytestmark = pytest.mark.usefixtures("device")

ALL = {**HOST, "params": "host", "activations": "host", "prefetch": 1}


def language_loss(model: nn.Module, seed: int) -> Tensor:
    tokens = next(batches(1, seed=seed, vocabulary=64))
    return model(input_ids=tokens, labels=tokens).loss


def gpt2() -> Model:
    import transformers

    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=4, n_head=4)
    return transformers.AutoModelForCausalLM.from_config(config), language_loss


def mixtral() -> Model:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, output_router_logits=True,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config), language_loss


def vision_transformer() -> Model:
    import transformers

    config = transformers.ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_labels=5, hidden_dropout_prob=0.1,
    )  # fmt: skip

    def loss_of(model: nn.Module, seed: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        images = torch.randn(4, 3, 16, 16, generator=generator, device="cpu").to(torch.get_default_device())
        labels = torch.arange(4, device=images.device)
        return model(pixel_values=images.to(model.dtype), labels=labels).loss

    return transformers.ViTForImageClassification(config), loss_of


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(16, 16, batch_first=True) for _ in range(4))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        return self.head(x[:, -1])


def lstm() -> Model:
    def loss_of(model: nn.Module, seed: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        x = torch.randn(4, 9, 16, generator=generator, device="cpu").to(torch.get_default_device())
        return model(x).logsumexp(1).mean()

    return Recurrent(), loss_of


def in_its_dtype(build: Callable[[], Model]) -> Callable[[], Model]:
    """A model whose inputs are made in fp32, as that of a loader that knows no other dtype."""

    def cast(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(argument.to(next(module.parameters()).dtype) for argument in arguments)

    def made() -> Model:
        model, loss_of = build()
        model.register_forward_pre_hook(cast)
        return model, loss_of

    return made


KINDS: dict[str, Callable[[], Model]] = {
    "llama": OTHERS["llama"],
    "gpt2": gpt2,
    "mixtral": mixtral,
    "vision transformer": vision_transformer,
    "encoder": in_its_dtype(OTHERS["encoder"]),
    "convolutions and batch norm": in_its_dtype(OTHERS["convolutional"]),
    "lstm": in_its_dtype(lstm),
}


def training(build: Callable[[], Model], placement: dict[str, Any], precision: str) -> Run:
    torch.manual_seed(0)
    model, loss_of = build()
    model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32).train()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
    run = Run([], [], {}, optimizer, model)
    for step in range(3):
        for micro_batch in range(2):
            kind = torch.get_default_device().type
            with torch.autocast(kind, torch.bfloat16, enabled=precision == "autocast"):
                loss = loss_of(model, 2 * step + micro_batch) / 2
            loss.backward()
            run.losses.append(loss.item())
        run.norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    run.weights = {name: value.clone() for name, value in model.state_dict().items()}
    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_equals_resident(kind: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_activations, "MIN_BYTES", 1)  # the models are small
    run = training(KINDS[kind], ALL, precision)
    assert_same_bits(run, training(KINDS[kind], RESIDENT, precision))
    stats = run.optimizer.stats()
    assert stats.host_bytes["moments"] > 0 and stats.device_bytes.keys() == {"weights", "gradients"}
    assert stats.peak_weight_bytes < 0.8 * stats.host_bytes["weights"]
    assert stats.activations["offloaded_bytes"] > 0.5 * stats.activations["saved_bytes"] > 0
