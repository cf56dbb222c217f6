"""Activations that leave a small Llama, beside what was predicted of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import offload

pytestmark = pytest.mark.usefixtures("device")

_LAYERS, _HIDDEN, _SEQUENCES, _LENGTH = 8, 256, 2, 256
DEVICE = dict.fromkeys(("optimizer", "gradients", "params"), "device")


def llama(device: torch.device) -> nn.Module:
    """In bf16; its logits weigh little, for the estimate has more copies of them than outlive the forward."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=_HIDDEN,
        intermediate_size=7 * _HIDDEN // 2,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=16,
        use_cache=False,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).to(device, torch.bfloat16)
    return model.train()


def predicted(model: nn.Module, **options: Any) -> offload.StepPrediction:
    found = offload.predict(model, "h200", batches=[_SEQUENCES], length=_LENGTH, **DEVICE, **options)
    (step,) = found.steps
    return step


def left_bytes(model: nn.Module, device: torch.device, activations: Any) -> int:
    """Of the second of two equal steps: the first does not know how much there will be."""
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = offload.wrap(model, optimizer, activations=activations, **DEVICE)
    tokens = torch.zeros(_SEQUENCES, _LENGTH, dtype=torch.long, device=device)
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        left: int = optimizer.stats().activations["offloaded_bytes"]
        optimizer.step()
        optimizer.zero_grad()
    offload.unwrap(model, optimizer)
    return left


@pytest.mark.parametrize("activations", ["host", 0.5])
def test_what_leaves_is_about_what_was_predicted(device: torch.device, activations: Any) -> None:
    """What a Llama saves is known within 10 % (test_prediction.py)."""
    model = llama(device)
    step = predicted(model, checkpointing=False, activations=activations)
    assert left_bytes(model, device, activations) == pytest.approx(step.activation_host_bytes, rel=0.1)


def test_checkpoints_leave_as_predicted(device: torch.device) -> None:
    model = llama(device)
    step = predicted(model, checkpointing=True, activations="checkpoints")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    left = left_bytes(model, device, "checkpoints")
    assert left == step.activation_host_bytes == (_LAYERS - 1) * 2 * _HIDDEN * _SEQUENCES * _LENGTH
