"""optimizer.state_of(parameter) and optimizer.write_state(parameter, ...): one state without the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from offload._engine import StateWatch
from test_checkpoints import assert_bits, bits_of, steps
from test_save_checkpoint import PLACEMENTS, wrapped
from training import HOST, batches, loss_of, make_model

pytestmark = pytest.mark.usefixtures("device", "disk_calls")


def values_like(parameter: torch.Tensor, seed: int) -> torch.Tensor:
    """Of no bf16 value and no tie between two."""
    return torch.rand(parameter.shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu") + 0.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*PLACEMENTS, "disk"])
def test_what_is_written_is_what_loading_it_gives(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    disk = {"optimizer": "disk", "gradients": "host", "params": "disk", "disk_path": tmp_path}
    placement = PLACEMENTS.get(name, disk)
    model, optimizer = wrapped(dtype, placement)
    steps(model, optimizer)
    parameter = model.blocks[1].up.weight
    index = next(i for i, p in enumerate(optimizer.param_groups[0]["params"]) if p is parameter)
    new = {key: values_like(parameter, seed) for seed, key in enumerate(("exp_avg", "exp_avg_sq", "master"))}

    other, loaded = wrapped(dtype, placement)
    other.load_state_dict(model.state_dict())
    state = optimizer.state_dict()
    state["state"][index] |= {key: value for key, value in new.items() if key != "master" or dtype != torch.float32}
    loaded.load_state_dict(state)
    with torch.no_grad(), offload.full_params(other, [other.blocks[1].up.weight]):
        other.blocks[1].up.weight.copy_(new["master"])

    optimizer.write_state(parameter, new)
    for key, value in optimizer.state_of(parameter).items():
        assert torch.equal(torch.as_tensor(value).cpu(), torch.as_tensor(optimizer.state[parameter][key]).cpu()), key
        if key in new:
            assert torch.equal(value.cpu(), new[key]), key
    weight = model.state_dict()["blocks.1.up.weight"].cpu()
    assert torch.equal(weight, new["master"].to(dtype)), "at once"
    for one, its in ((model, optimizer), (other, loaded)):
        steps(one, its, seed=3)
    assert_bits(bits_of(model, optimizer), bits_of(other, loaded))


def test_a_state_is_shown_before_the_first_step_and_a_frozen_parameter_has_none() -> None:
    model = make_model(torch.bfloat16)
    model.norm.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = offload.wrap(model, torch.optim.AdamW(trained), **HOST)
    state = optimizer.state_of(model.head.weight)
    assert state["step"] == 0 and not state["exp_avg"].any() and model.head.weight not in optimizer.state
    optimizer.write_state(model.head.weight, {"exp_avg": torch.ones_like(state["exp_avg"])})
    assert optimizer.state_of(model.head.weight)["exp_avg"].all()
    assert optimizer.state_of(model.norm.weight) == {}
    with pytest.raises(offload.InvalidArgument, match=r"norm\.weight has no optimizer state"):
        optimizer.write_state(model.norm.weight, {"exp_avg": torch.ones(24)})


@pytest.mark.parametrize("name", PLACEMENTS)
def test_gradients_are_those_of_the_parameters(name: str) -> None:
    model, optimizer = wrapped(torch.bfloat16, PLACEMENTS[name])
    steps(model, optimizer)
    assert optimizer.gradients() == []
    loss_of(model, next(batches(1))).backward()
    model.norm.weight.grad = None
    own = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
    assert len(own) == len(list(model.parameters())) - 1
    assert all(found is gradient for found, gradient in zip(optimizer.gradients(), own, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_class(dtype: torch.dtype) -> None:
    def run(write: Any) -> dict[str, torch.Tensor]:
        model = make_model(dtype)
        model, optimizer = offload.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **HOST)
        steps(model, optimizer)
        write(model, optimizer)
        steps(model, optimizer, seed=3)
        return bits_of(model, optimizer)

    def by_loading(model: Any, optimizer: Any) -> None:
        state = optimizer.state_dict()
        state["state"][0]["momentum_buffer"] = values_like(model.embedding.weight, 1)
        optimizer.load_state_dict(state)

    def alone(model: Any, optimizer: Any) -> None:
        optimizer.write_state(model.embedding.weight, {"momentum_buffer": values_like(model.embedding.weight, 1)})

    assert_bits(run(alone), run(by_loading))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"exp_avg": torch.zeros(24), "sum": torch.zeros(24)}, "has no 'sum'; it has exp_avg, exp_avg_sq, master"),
        ({"exp_avg": torch.zeros(23)}, r"exp_avg has shape \(23,\), not \(24,\)"),
        ({"master": torch.full((24,), torch.nan)}, "master contains NaN"),
        ({"master": torch.zeros(24, dtype=torch.int64)}, "must be a tensor of floating-point values"),
    ],
)
def test_what_is_refused_changes_nothing(values: dict[str, torch.Tensor], message: str) -> None:
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **HOST)
    steps(model, optimizer)
    before = bits_of(model, optimizer)
    with pytest.raises(offload.InvalidArgument, match=message):
        optimizer.write_state(model.norm.weight, {"exp_avg_sq": torch.ones(24), **values})
    assert_bits(bits_of(model, optimizer), before)


def test_a_save_that_is_running_is_told_before() -> None:
    model = make_model(torch.bfloat16)
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **HOST)
    steps(model, optimizer)
    seen: list[torch.Tensor] = []
    moment = optimizer.state_of(model.norm.weight)["exp_avg"]
    watch = StateWatch(lambda: seen.append(moment.clone()), lambda _: None, lambda: None, keeps_disk=False)
    optimizer._engine.watch_states(watch)
    before = moment.clone()
    with pytest.raises(offload.InvalidArgument, match="has no 'sum'"):
        optimizer.write_state(model.norm.weight, {"sum": torch.ones(24)})
    assert seen == []
    optimizer.write_state(model.norm.weight, {"exp_avg": torch.ones(24)})
    assert len(seen) == 1 and torch.equal(seen[0], before) and not torch.equal(moment, before)
    optimizer._engine.watch_states(None)
