"""Other weights that are swapped in and out, as averages are for an evaluation: wherever weights and states live."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from test_disk_states import on_disk
from training import HOST, Run, assert_same_bits, batches, loss_of, make_model, same_bits, train

pytestmark = pytest.mark.usefixtures("device", "disk_calls")

FORMATS = pytest.mark.parametrize(
    ("dtype", "master"),
    [(torch.bfloat16, "split"), (torch.bfloat16, "fp32"), (torch.float16, "fp32")],
    ids=["split", "bf16 and fp32", "fp16 and fp32"],
)
PLACES = pytest.mark.parametrize(
    ("params", "optimizer"), [("host", "host"), ("host", "disk"), ("disk", "host"), ("disk", "disk")]
)


def placed(path: Path, params: str, optimizer: str, master: str) -> dict[str, Any]:
    if "disk" in (params, optimizer):
        return on_disk(path, params=params, optimizer=optimizer, master=master)
    return {**HOST, "params": params, "master": master}


def begin(model: nn.Module, placement: dict[str, Any]) -> tuple[nn.Module, offload.OffloadOptimizer]:
    model = copy.deepcopy(model)
    return offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)


@torch.no_grad()
def swap(model: nn.Module, others: list[Tensor]) -> None:
    """The model has the values of `others` afterwards, and they the model's."""
    with offload.full_params(model):
        for parameter, other in zip(model.parameters(), others, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(other)
            other.copy_(kept)


def averages(model: nn.Module) -> list[Tensor]:
    return [torch.full_like(parameter, 0.01) for parameter in model.parameters()]


def trained(model: nn.Module, placement: dict[str, Any], each_step: Callable[..., None] | None = None) -> Run:
    return train(*begin(model, placement), steps=5, each_step=each_step)


@FORMATS
@PLACES
def test_what_comes_back_is_as_if_it_had_never_left(
    params: str, optimizer: str, dtype: torch.dtype, master: str, tmp_path: Path
) -> None:
    model = make_model(dtype, width=64)
    others = averages(model)

    def evaluated(step: int, model: nn.Module, wrapped: offload.OffloadOptimizer) -> None:
        for _ in range(step % 3):
            swap(model, others)
            with torch.no_grad():
                loss_of(model, next(batches(1)))
            swap(model, others)

    expected = trained(model, {**HOST, "master": master})
    assert_same_bits(trained(model, placed(tmp_path, params, optimizer, master), evaluated), expected)


@FORMATS
@PLACES
def test_what_does_not_come_back_is_where_training_goes_on(
    params: str, optimizer: str, dtype: torch.dtype, master: str, tmp_path: Path
) -> None:
    model = make_model(dtype, width=64)
    others = averages(model)

    def edited(step: int, model: nn.Module, wrapped: offload.OffloadOptimizer) -> None:
        swap(model, others)
        if step == 1:
            others[3][3:5] = 0.25
        swap(model, others)
        if step == 2:  # and nothing of these
            with torch.no_grad(), offload.full_params(model):
                model.blocks[1].up.weight.mul_(0.9)

    expected = trained(model, {**HOST, "master": master}, edited)
    assert_same_bits(trained(model, placed(tmp_path, params, optimizer, master), edited), expected)


@FORMATS
@PLACES
def test_masters_are_saved_while_other_weights_are_in_the_model(
    params: str, optimizer: str, dtype: torch.dtype, master: str, tmp_path: Path
) -> None:
    model = make_model(dtype, width=64)
    placement = placed(tmp_path / "disk", params, optimizer, master)
    (tmp_path / "disk").mkdir()
    first, wrapped = begin(model, placement)
    train(first, wrapped, steps=2)
    before = copy.deepcopy(wrapped.state_dict())
    others = averages(first)
    swap(first, others)
    own = [value.clone() for value in others]
    saved = wrapped.state_dict()["state"]
    assert all(same_bits(saved[i][key], value) for i, state in before["state"].items() for key, value in state.items())
    offload.save_checkpoint(tmp_path / "saved", first, wrapped, tag="a", async_save=True).wait()
    swap(first, others)
    expected = train(first, wrapped, steps=2)
    offload.unwrap(first, wrapped)

    resumed, again = begin(make_model(dtype, width=64, seed=7), placement)
    train(resumed, again, steps=1)
    offload.load_checkpoint(tmp_path / "saved", resumed, again)
    swap(resumed, own)
    assert_same_bits(train(resumed, again, steps=2), expected)


def test_weights_that_are_only_read_move_no_states_on_disk(tmp_path: Path) -> None:
    model, optimizer = begin(make_model(torch.bfloat16, width=64), placed(tmp_path, "host", "disk", "split"))
    train(model, optimizer, steps=2)
    optimizer.state_dict()  # its updates have ended
    before = optimizer._engine.homes.store.store.stats()
    for _ in range(2):
        with offload.full_params(model):
            pass
    assert optimizer._engine.homes.store.store.stats() == before


ON_HOST = {"optimizer": "host", "gradients": "device"}, "to_host"
ON_DEVICE = {"optimizer": "device", "gradients": "host"}, "on_device"


@pytest.mark.parametrize(
    ("kind", "params", "placement", "lost"),
    [
        (torch.optim.AdamW, "device", *ON_HOST),
        (torch.optim.AdamW, "host", *ON_HOST),
        (torch.optim.AdamW, "device", *ON_DEVICE),
        (torch.optim.AdamW, "host", *ON_DEVICE),
        (torch.optim.SGD, "device", *ON_HOST),
        (torch.optim.SGD, "host", *ON_HOST),
        (torch.optim.SGD, "device", *ON_DEVICE),
    ],
)
def test_a_step_that_is_refused_takes_no_weights_over(
    kind: type[torch.optim.Optimizer],
    params: str,
    placement: dict[str, Any],
    lost: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Masters have bits that no weight has: what was in their place until it was refused would have cost them."""

    def refuse(*_: Any, **__: Any) -> None:
        raise offload.OutOfHostMemory("asked for by the test")

    model = make_model(torch.bfloat16)
    model, optimizer = offload.wrap(model, kind(model.parameters(), lr=1e-2), params=params, **placement)
    train(model, optimizer, steps=2)
    others = averages(model)
    loss_of(model, next(batches(1))).backward()
    before = copy.deepcopy(optimizer.state_dict())
    swap(model, others)
    with monkeypatch.context() as changed, pytest.raises(offload.OutOfHostMemory, match="asked for by the test"):
        changed.setattr(optimizer._engine.lanes, lost, refuse)
        optimizer.step()
    swap(model, others)
    after = optimizer.state_dict()["state"]
    assert all(same_bits(after[i][key], value) for i, state in before["state"].items() for key, value in state.items())
    optimizer.step()
