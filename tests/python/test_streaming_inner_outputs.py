"""Losses of what units made and did not return: kept by a hook, put into a list, taken from a cache. Backward enters
the unit in the middle there, and its weights must be back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from test_streaming_models import WIDTH, assert_streams_exactly, stack
from training import HOST, Block, batches

pytestmark = pytest.mark.usefixtures("device")


class Noting(nn.Module):
    """Adds to a list that it is given a tensor that was made between its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, notes: Any, key: str | None = None) -> Tensor:
        x = torch.tanh(self.first(x))
        note = self.gate(x)
        if key is not None:
            notes[key] = note
        elif isinstance(notes, list):
            notes.append(note)
        else:
            notes.inner.append(note)
        return x + self.last(torch.tanh(note))


class Notes:
    """An object, as caches are: only what the model returns is searched."""

    def __init__(self) -> None:
        self.inner: list[Tensor] = []


class Returning(nn.Module):
    """Returns the notes of its blocks; with a weight of its own it is a unit too."""

    def __init__(self, notes: Callable[[], Any], has_weight: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Noting() for _ in range(4))
        self.scale = nn.Parameter(torch.ones(WIDTH)) if has_weight else None
        self.notes = notes

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        notes = self.notes()
        x = x if self.scale is None else x * self.scale
        for block in self.blocks:
            x = block(x, notes)
        return x, notes


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("used", ["output", "notes", "both"])
@pytest.mark.parametrize("notes", [list, Notes], ids=["list", "object"])
def test_what_the_model_returns_of_its_units(notes: Callable[[], Any], used: str, has_weight: bool) -> None:
    """Nodes that a unit made are that unit's, whichever module returned them."""

    def call(model: nn.Module, step: int) -> Tensor:
        output, noted = model(torch.randn(3, WIDTH))
        values = (noted if isinstance(noted, list) else noted.inner)[:3]  # the last block is in no loss of these
        loss = output.square().mean()
        if used == "output":
            return loss
        return sum((value.square().mean() for value in values), loss if used == "both" else torch.zeros(()))

    assert_streams_exactly(lambda: Returning(notes, has_weight), call)


@pytest.mark.parametrize("how", ["list", "keyword", "dict"])
def test_what_units_put_into_a_list_or_dict(how: str) -> None:
    """Of the caller, who alone has it."""

    def call(model: nn.Module, step: int) -> Tensor:
        notes: Any = {} if how == "dict" else []
        x = torch.randn(3, WIDTH)
        for number, block in enumerate(model):  # type: ignore[arg-type]
            if how == "dict":
                x = block(x, notes, key=str(number))
            else:
                x = block(x, notes=notes) if how == "keyword" else block(x, notes)
        values = list(notes.values()) if how == "dict" else notes
        return values[2].square().mean() + values[0].sum()

    assert_streams_exactly(stack(Noting), call)


@pytest.mark.parametrize("kept", ["output", "input", "input of a pre-hook", "replaced"])
def test_what_hooks_of_parts_keep(kept: str) -> None:
    """Registered before or after wrap, at a model whose output is in no loss."""

    def call(model: nn.Module, step: int) -> Tensor:
        features: list[Tensor] = []
        handles = []
        for block in (model[1], model[2]):  # type: ignore[index]
            if kept == "input of a pre-hook":
                handles.append(block.down.register_forward_pre_hook(lambda _, given: features.append(given[0])))
            elif kept == "input":
                handles.append(block.down.register_forward_hook(lambda _, given, __: features.append(given[0])))
            else:
                handles.append(block.up.register_forward_hook(lambda _, __, output: features.append(output)))
            if kept == "replaced":
                handles.append(block.up.register_forward_hook(lambda _, __, output: output.detach() * 2))
        model(torch.randn(3, WIDTH))
        for handle in handles:
            handle.remove()
        return torch.stack([feature.square().mean() for feature in features]).sum()

    assert_streams_exactly(stack(lambda: Block(WIDTH)), call)


@pytest.mark.parametrize("used", ["attentions of the last layer", "a cache"])
def test_huggingface(used: str) -> None:
    """Attention maps are kept by hooks of transformers' own; a cache passes gradients to the call that filled it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[test]'")

    def build() -> nn.Module:
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        config = transformers.LlamaConfig(vocab_size=64, **size)
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")

    def call(model: nn.Module, step: int) -> Tensor:
        tokens = next(batches(1, seed=step, vocabulary=64))
        if used == "a cache":
            cache = model(input_ids=tokens[:, :3], use_cache=True).past_key_values
            return model(input_ids=tokens[:, 3:], labels=tokens[:, 3:], past_key_values=cache).loss
        attentions = model(input_ids=tokens, output_attentions=True, use_cache=False).attentions
        return attentions[-1].square().sum() + attentions[1].square().sum()

    assert_streams_exactly(build, call)


def test_hooks_of_parts_go_with_unwrap_and_are_one_a_part() -> None:
    model = stack(lambda: Block(WIDTH))()
    part = model[1].up  # type: ignore[index,union-attr]
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **HOST, params="host")
    handle = part.register_forward_hook(lambda *_: None)
    for _ in range(3):
        model(torch.randn(3, WIDTH)).sum().backward()
    assert len(part._forward_hooks) == 2
    handle.remove()
    offload.unwrap(model, optimizer)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing_is_noted_where_only_parts_are_called() -> None:
    model = stack(lambda: Block(WIDTH))()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **HOST, params="host")
    x = torch.randn(3, WIDTH)
    for block in model:  # type: ignore[attr-defined]
        x = block(x)
    assert not optimizer._engine.streaming._made
    model(x)
    assert len(optimizer._engine.streaming._made) == 4
    model(x)
    assert len(optimizer._engine.streaming._made) == 4, "of the latest forward"
