"""Kinds of models: Hugging Face, compiled, checkpointed. Offloaded equals resident, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import offload
from training import HOST, RESIDENT, assert_offloaded, assert_same_bits, batches, loss_of, make_model, wrapped_run

pytestmark = pytest.mark.usefixtures("device")


def test_huggingface_llama_trains_exactly() -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip

    def run(placement: dict[str, str]) -> tuple[list[float], offload.OffloadOptimizer]:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=3e-3), **placement)
        losses = []
        for tokens in batches(5, vocabulary=64):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, optimizer

    host, optimizer = run(HOST)
    assert_offloaded(optimizer)
    assert host == run(RESIDENT)[0]


@pytest.mark.parametrize("compiled", ["blocks", "model"])
def test_compiled_models_train_exactly(compiled: str) -> None:
    def run(placement: dict[str, str]) -> list[float]:
        torch._dynamo.reset()
        model = make_model()
        if compiled == "blocks":
            for block in model.blocks:
                block.compile(backend="eager")
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        call = torch.compile(model, backend="eager") if compiled == "model" else model
        losses = []
        for tokens in batches(4):
            loss = loss_of(call, tokens)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    assert run(HOST) == run(RESIDENT)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.inner.embedding(tokens)
            for block in self.inner.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.inner.head(self.inner.norm(x))

    model = Checkpointed()
    assert_same_bits(wrapped_run(model, HOST, micro_batches=2), wrapped_run(model, RESIDENT, micro_batches=2))


def test_gradient_accumulation_prefetches_in_backward_order() -> None:
    """The upload of an earlier sum has started before its own backward asks for it."""
    model = make_model()
    offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
    tokens = next(batches(1))
    loss_of(model, tokens).backward()
    prefetched = []
    for name, p in model.named_parameters():

        def look(_: torch.Tensor, name: str = name, p: nn.Parameter = p) -> None:
            if p.grad.cell._upload is not None:
                prefetched.append(name)

        p.register_hook(look)
    loss_of(model, tokens).backward()
    names = [name for name, _ in model.named_parameters()]
    assert len(prefetched) >= len(names) // 2, prefetched
