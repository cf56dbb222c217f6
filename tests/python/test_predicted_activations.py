"""Activations that leave a small Llama, beside what was predicted of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import offload

pytestmark = pytest.mark.usefixtures("device")

_LAYERS, _HIDDEN, _SEQUENCES, _LENGTH = 8, 256, 2, 256
_ELEMENTS = _SEQUENCES * _LENGTH * _HIDDEN  # of a block's input
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
    kind = next(model.parameters()).device.type  # which kernels torch has decides what attention saves
    card = dataclasses.replace(offload.Hardware.preset("h200"), kind=kind)
    found = offload.predict(model, card, batches=[_SEQUENCES], length=_LENGTH, **DEVICE, **options)
    (step,) = found.steps
    return step


def left(model: nn.Module, device: torch.device, activations: Any, form: Any = "exact") -> dict[str, int]:
    """Of the second of two equal steps: the first does not know how much there will be. The counters of activations,
    and as host_bytes what they took there."""
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = offload.wrap(model, optimizer, activations=activations, activation_format=form, **DEVICE)
    tokens = torch.zeros(_SEQUENCES, _LENGTH, dtype=torch.long, device=device)
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        stats = optimizer.stats()
        optimizer.step()
        optimizer.zero_grad()
    offload.unwrap(model, optimizer)
    return {**stats.activations, "host_bytes": stats.host_peak_bytes["activations"]}


@pytest.mark.parametrize("activations", ["host", 0.5])
def test_what_leaves_is_about_what_was_predicted(device: torch.device, activations: Any) -> None:
    """What a Llama saves is known within 10 % (test_prediction.py)."""
    model = llama(device)
    step = predicted(model, checkpointing=False, activations=activations)
    assert left(model, device, activations)["offloaded_bytes"] == pytest.approx(step.activation_host_bytes, rel=0.1)


def test_checkpoints_leave_as_predicted(device: torch.device) -> None:
    model = llama(device)
    step = predicted(model, checkpointing=True, activations="checkpoints")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = left(model, device, "checkpoints")
    assert found["offloaded_bytes"] == (_LAYERS - 1) * 2 * _ELEMENTS
    assert found["sent_bytes"] == step.activation_sent_bytes == found["offloaded_bytes"]
    assert found["host_bytes"] == step.activation_host_bytes == found["offloaded_bytes"]


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_checkpoints_in_a_byte_an_element_leave_as_predicted(device: torch.device, form: Any) -> None:
    """To the byte: a code an element, and a scale for every 256."""
    model = llama(device)
    step = predicted(model, checkpointing=True, activations="checkpoints", activation_format=form)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = left(model, device, "checkpoints", form)
    assert found["offloaded_bytes"] == (_LAYERS - 1) * 2 * _ELEMENTS
    assert found["sent_bytes"] == step.activation_sent_bytes == (_LAYERS - 1) * (_ELEMENTS + _ELEMENTS // 64)
    assert found["host_bytes"] == step.activation_host_bytes == found["sent_bytes"]


@pytest.mark.parametrize("activations", ["host", 0.5])
def test_what_leaves_in_a_byte_an_element_is_about_what_was_predicted(device: torch.device, activations: Any) -> None:
    model = llama(device)
    exact = predicted(model, checkpointing=False, activations=activations)
    step = predicted(model, checkpointing=False, activations=activations, activation_format="int8")
    found = left(model, device, activations, "int8")
    assert found["sent_bytes"] == pytest.approx(step.activation_sent_bytes, rel=0.1)
    assert found["host_bytes"] == pytest.approx(step.activation_host_bytes, rel=0.1)
    share = step.activation_sent_bytes / exact.activation_sent_bytes
    assert share < 0.5
    for lane in ("to_host", "to_device"):
        assert step.busy[lane] == pytest.approx(share * exact.busy[lane])
