"""An optimizer of torch's own over the weights of a wrapped model is told of, where nobody steps the wrapped one."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from torch import nn

import offload
from offload import _foreign_steps
from test_frameworks import Tokens, needs_accelerate
from training import HOST, RESIDENT, batches, loss_of, make_model, same_bits
from what_lives import collect

pytestmark = pytest.mark.usefixtures("device")

STREAMED = HOST | {"params": "host"}
TOLD = "is not the optimizer that offload.wrap returned, and it is the one that trains"


def wrapped(placement: dict[str, str] = HOST, **model: Any) -> tuple[nn.Module, offload.OffloadOptimizer]:
    made = make_model(**model)
    return offload.wrap(made, torch.optim.AdamW(made.parameters(), lr=1e-2), **placement)


def step(model: nn.Module, optimizer: Any, *, seed: int = 1) -> None:
    loss_of(model, next(batches(1, seed=seed))).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    model.zero_grad()


def global_hooks() -> list[Any]:
    return list(torch_optimizer._global_optimizer_post_hooks.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("placement", [HOST, HOST | {"gradients": "device"}, RESIDENT], ids=["host", "states", "none"])
def test_it_is_told_once_and_trains_as_in_plain_torch(placement: dict[str, str], dtype: torch.dtype) -> None:
    plain = make_model(dtype)
    expected = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    model = copy.deepcopy(plain)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **placement)
    foreign = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step(model, foreign)
    with pytest.warns(UserWarning, match=rf"this AdamW {TOLD} embedding.weight and 21 more weights") as told:
        step(model, foreign)
    assert [Path(warning.filename).name for warning in told] == [Path(__file__).name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, foreign)
    for _ in range(3):
        step(plain, expected)
    values = plain.state_dict()
    assert all(same_bits(value, values[name]) for name, value in model.state_dict().items())
    assert optimizer.stats().steps == 0


def test_it_is_told_after_the_wrapped_one_has_stepped() -> None:
    model, optimizer = wrapped()
    step(model, optimizer)
    foreign = torch.optim.SGD(model.parameters(), lr=1e-2)
    step(model, foreign)
    with pytest.warns(UserWarning, match=f"this SGD {TOLD}"):
        step(model, foreign)


def test_a_streamed_weight_names_the_optimizer_of_wrap() -> None:
    model, _ = wrapped(STREAMED)
    with pytest.raises(
        offload.StateError, match=r"is on the host or on disk.*the optimizer that offload\.wrap returned"
    ):
        step(model, torch.optim.AdamW(model.parameters()))


class Sharp(torch.optim.Optimizer):
    """Steps another optimizer inside its own step, over the same groups, as SAM and Lookahead do."""

    def __init__(self, within: torch.optim.Optimizer) -> None:
        super().__init__(within.param_groups, {})
        self.within = within

    def step(self, closure: Any = None) -> None:
        self.within.step()


@pytest.mark.filterwarnings("error")
def test_what_is_meant_is_silent() -> None:
    """Weights of nobody else, turns with the wrapped optimizer, steps around its own, several wrapped ones, others."""
    model = make_model()
    halves = list(model.blocks.parameters()), list(model.head.parameters())
    optimizers = [torch.optim.AdamW(half) for half in halves]
    model, (first, second) = offload.wrap(model, optimizers, **HOST)
    beside = torch.optim.SGD(model.embedding.parameters(), lr=0.1)
    other = make_model(depth=1)
    elsewhere = torch.optim.AdamW(other.parameters())
    in_turn, around = torch.optim.SGD(halves[0], lr=0.1), Sharp(first)
    for _ in range(3):
        step(model, beside)
        step(other, elsewhere)
        step(model, around)
        step(model, second)
        step(model, in_turn)


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of a model that was unwrapped nor, from the next one on, of a model that was dropped."""
    # Other tests may have dropped models.
    monkeypatch.setattr(torch_optimizer, "_global_optimizer_post_hooks", OrderedDict())
    monkeypatch.setattr(_foreign_steps, "_seen", weakref.WeakKeyDictionary())
    monkeypatch.setattr(_foreign_steps, "_handles", [])
    model, optimizer = wrapped()
    dropped, its = wrapped(depth=1)
    assert len(global_hooks()) == 1
    foreign = torch.optim.SGD(dropped.parameters(), lr=0.1)
    step(dropped, foreign)
    kept = list(dropped.parameters())
    del dropped, its
    collect()
    for parameter in kept:
        parameter.grad = torch.zeros_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        foreign.step()
        offload.unwrap(model, optimizer)
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            step(model, plain)
    assert not global_hooks()


@needs_accelerate
def test_a_trainer_without_optimizers_is_told_of(tmp_path: Path, device: torch.device) -> None:
    import transformers

    if device.type != "cpu":  # the sampler of Trainer's loader works on the CPU, where torch 2.6 forgets the default
        torch.set_default_device(None)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(vocab_size=64, **size))
    model, _ = offload.wrap(model, torch.optim.AdamW(model.parameters()), device=device, **HOST)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], disable_tqdm=True,
        use_cpu=device.type == "cpu",
    )  # fmt: skip
    with pytest.warns(UserWarning, match=rf"this AdamW {TOLD}.*optimizers=\(optim, scheduler\)") as told:
        transformers.Trainer(model=model, args=arguments, train_dataset=Tokens()).train()
    assert sum(TOLD in str(warning.message) for warning in told) == 1
