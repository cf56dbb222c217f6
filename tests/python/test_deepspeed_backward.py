"""Which backward the engine's step follows: its own, or that of a loss which it has scaled."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import offload
from deepspeed_training import STAGES, config_of
from training import batches, loss_of, make_model, same_bits

pytestmark = pytest.mark.usefixtures("device")

ON_HOST = STAGES["stage 3, all on the host"]
# Whose loss the engine divides or scales.
CHANGED: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulation": 2},
    "static scale": {"fp16": {"enabled": True, "loss_scale": 64}},
    "dynamic scale": {"fp16": {"enabled": True, "initial_scale_power": 8}},
    "both": {"accumulation": 2, "fp16": {"enabled": True, "initial_scale_power": 8}},
}


def engine_of(**keys: Any) -> Any:
    engine, *_ = offload.initialize(model=make_model(), config=config_of(**{"zero": ON_HOST, **keys}))
    return engine


def trained(engine: Any, backward: Any) -> dict[str, torch.Tensor]:
    for tokens in batches(4):
        backward(engine, loss_of(engine, tokens))
        engine.step()
    return {name: weight.clone() for name, weight in engine.module.state_dict().items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    for name, weight in left.items():
        assert same_bits(right[name], weight), name


@pytest.mark.parametrize("keys", CHANGED.values(), ids=CHANGED.keys())
def test_backward_of_a_loss_that_was_neither_divided_nor_scaled_is_refused(keys: dict[str, Any]) -> None:
    engine = engine_of(**keys)
    (tokens,) = batches(1)
    with pytest.raises(offload.StateError, match=r"call engine\.backward\(loss\) or engine\.scale"):
        loss_of(engine, tokens).backward()
    engine.zero_grad()
    engine.backward(loss_of(engine, tokens))
    engine.step()
    with pytest.raises(offload.StateError, match=r"engine\.backward"):  # that backward was another one
        loss_of(engine, tokens).backward()


@pytest.mark.parametrize("keys", [{}, *CHANGED.values()], ids=["neither", *CHANGED])
def test_backward_of_the_scaled_loss_is_the_engines(keys: dict[str, Any]) -> None:
    own = trained(engine_of(**keys), lambda engine, loss: engine.backward(loss))
    assert_equal(trained(engine_of(**keys), lambda engine, loss: engine.scale(loss).backward()), own)


def test_a_loss_that_is_neither_divided_nor_scaled_may_go_backward_by_itself() -> None:
    own = trained(engine_of(), lambda engine, loss: engine.backward(loss))
    assert_equal(trained(engine_of(), lambda engine, loss: loss.backward()), own)


def test_gradients_that_are_not_kept_are_nobodys_business() -> None:
    engine = engine_of(zero=STAGES["stage 1"], accumulation=2)
    (tokens,) = batches(1)
    (gradient,) = torch.autograd.grad(loss_of(engine, tokens), engine.module.norm.weight)
    assert gradient.abs().sum() > 0 and engine.module.norm.weight.grad is None


def test_another_batch_size_begins_and_ends_it() -> None:
    engine = engine_of()
    (tokens,) = batches(1)
    for size in (8, 4):
        engine.set_train_batch_size(size)
        if size == 8:
            with pytest.raises(offload.StateError, match="gradient_accumulation_steps is 2"):
                loss_of(engine, tokens).backward()
            engine.zero_grad()
    loss_of(engine, tokens).backward()
    engine.step()


def test_destroy_leaves_no_hook_and_the_model_can_go() -> None:
    engine = engine_of(accumulation=2)
    trained(engine, lambda engine, loss: engine.backward(loss))
    gone = weakref.ref(engine_of(accumulation=2).module)
    gc.collect()
    assert gone() is None
    model = engine.module
    engine.destroy()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.parametrize("value", [torch.ones(2), 1.0])
def test_what_is_no_loss_is_refused(value: Any) -> None:
    with pytest.raises(offload.InvalidArgument, match=r"scale\(\) was given"):
        engine_of().scale(value)


# --- the caller counts ------------------------------------------------------------------------------------------


def test_an_engine_that_does_not_count_divides_all_the_same() -> None:
    """As DeepSpeed's: by gradient_accumulation_steps, unless told not to; and samples are those that came."""
    engine = engine_of(accumulation=2, managed_gradient_accumulation=False)
    counted = engine_of(accumulation=2)
    for tokens in batches(2):
        assert not engine.is_gradient_accumulation_boundary()
        assert engine.backward(loss_of(engine, tokens)) == counted.backward(loss_of(counted, tokens))
        counted.step()
    engine.step()
    assert (engine.global_steps, engine.global_samples) == (counted.global_steps, counted.global_samples) == (1, 8)
    assert_equal(engine.module.state_dict(), counted.module.state_dict())
    engine.backward(loss_of(engine, next(batches(1))), scale_wrt_gas=False)
    engine.step()
    assert (engine.global_steps, engine.global_samples) == (2, 12)
    with pytest.raises(offload.StateError, match="each step\\(\\) updates"):
        engine.set_gradient_accumulation_boundary(True)
