"""A wrapped model is not converted: each way to do it is refused at the call, with nothing changed."""

from __future__ import annotations

import copy
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from training import HOST, RESIDENT, batches, loss_of, make_model, same_bits
from what_lives import all_gone, collect

pytestmark = pytest.mark.usefixtures("device")

PLACEMENTS = {"resident": RESIDENT, "host": HOST, "streamed": {**HOST, "params": "host"}}
Convert = Callable[[nn.Module], Any]
CONVERSIONS: dict[str, Convert] = {
    "double": lambda model: model.double(),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to a dtype": lambda model: model.to(torch.float64),
    "to a device and a dtype": lambda model: model.to(next(model.parameters()).device, torch.float16),
    "as another tensor": lambda model: model.to(torch.empty(0, dtype=torch.float64)),
    "type": lambda model: model.type(torch.float64),
    "to meta": lambda model: model.to("meta"),
    "to_empty": lambda model: model.to_empty(device=next(model.parameters()).device),
    "any function": lambda model: model._apply(lambda tensor: tensor.clone()),
}
torchs_apply = nn.Module._apply


class Held(nn.Module):
    """What a model is a part of, with a part of its own that comes first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(2))
        self.model = model


@pytest.fixture
def no_other_model() -> None:
    """Those of other tests may wait for the collector."""
    collect()


def wrapped(placement: dict[str, str], **options: Any) -> tuple[nn.Module, offload.OffloadOptimizer]:
    model = make_model(**options)
    return offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)


def step(model: nn.Module, optimizer: Any, seed: int) -> Tensor:
    loss = loss_of(model, next(batches(1, seed=seed)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_a_conversion_is_refused_with_nothing_changed(convert: Convert, placement: dict[str, str]) -> None:
    def run(tried: bool) -> list[Tensor]:
        model, optimizer = wrapped(placement)
        model.register_buffer("scale", torch.ones(3))
        held, found = Held(model), []
        for seed in range(3):
            if tried:
                for part in (model, model.blocks[1], held):
                    with pytest.raises(offload.StateError, match="of a wrapped model would .*nothing was changed"):
                        convert(part)
                assert {tensor.dtype for tensor in (*held.parameters(), *held.buffers())} == {torch.float32}
                assert not any(tensor.is_meta for tensor in (*held.parameters(), *held.buffers()))
            found.append(step(model, optimizer, seed))
        return [*found, *model.state_dict().values()]

    for one, other in zip(run(tried=True), run(tried=False), strict=True):
        assert same_bits(one, other)


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_what_is_no_conversion_is_not_refused(placement: dict[str, str], device: torch.device) -> None:
    """Of the model itself, and of models beside it."""
    model, optimizer = wrapped(placement)
    for same in (
        lambda: model.float(), lambda: model.to(device), lambda: model.to(device, torch.float32, non_blocking=True),
        lambda: model.to(torch.float32), lambda: model.to(torch.empty(0, device=device)),
        lambda: model.blocks[0].float(),
    ):  # fmt: skip
        step(model, optimizer, 1)
        same()
    assert nn.Linear(2, 2).half().weight.dtype == torch.float16
    held = Held(model)
    held.seen = held.seen.double()
    assert held.float().seen.dtype == torch.float32
    step(model, optimizer, 2)


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_a_copy_and_an_unwrapped_model_are_plain(placement: dict[str, str]) -> None:
    model, optimizer = wrapped(placement)
    step(model, optimizer, 1)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert {p.dtype for p in other.double().parameters()} == {torch.float64}
    with pytest.raises(offload.StateError, match="would become"):
        model.double()
    model, _ = offload.unwrap(model, optimizer)
    assert {p.dtype for p in model.double().parameters()} == {torch.float64}


@pytest.mark.usefixtures("no_other_model")
def test_torchs_own_function_is_back_with_the_last_model() -> None:
    first, second = wrapped(HOST), wrapped(HOST)
    assert nn.Module._apply is not torchs_apply
    offload.unwrap(*first)
    with pytest.raises(offload.StateError, match="would become"):
        second[0].half()
    offload.unwrap(*second)
    assert nn.Module._apply is torchs_apply


@pytest.mark.usefixtures("no_other_model")
def test_another_function_that_was_put_over_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    model, optimizer = wrapped(HOST)
    beneath = nn.Module._apply

    def theirs(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        calls.append(self)
        return beneath(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "_apply", theirs)
        model, _ = offload.unwrap(model, optimizer)
        assert nn.Module._apply is theirs and model.half().head.weight.dtype == torch.float16
        again, optimizer = wrapped(HOST)
        with pytest.raises(offload.StateError, match="would become"):
            again.half()
        assert calls and nn.Module._apply is theirs
    offload.unwrap(again, optimizer)
    assert nn.Module._apply is torchs_apply


def test_parameters_that_outlive_a_dropped_model_are_the_users() -> None:
    model, optimizer = wrapped(HOST)
    engine, kept = weakref.ref(optimizer._engine), nn.ParameterList(model.blocks[0].parameters())
    step(model, optimizer, 1)
    optimizer.synchronize()
    del model, optimizer
    assert all_gone([engine])
    assert {p.dtype for p in kept.half()} == {torch.float16}


def test_a_recurrent_layer_still_sees_that_its_weights_were_changed() -> None:
    """Its own `_apply` has forgotten which they were before it asks."""
    layer = nn.LSTM(3, 3)
    layer, optimizer = offload.wrap(layer, torch.optim.AdamW(layer.parameters()), **HOST)
    known = [one() for one in layer._flat_weight_refs]
    with pytest.raises(offload.StateError, match="weight_ih_l0 of a wrapped model would become"):
        layer.half()
    assert all(one() is other for one, other in zip(layer._flat_weight_refs, known, strict=True)) and len(known) == 4
    layer(torch.ones(2, 1, 3))[0].sum().backward()
    optimizer.step()


def test_a_compiled_model_trains_while_another_is_refused() -> None:
    model, optimizer = wrapped(HOST)
    model.blocks[0].compile(backend="eager")
    step(model, optimizer, 1)
    with pytest.raises(offload.StateError, match="would become"):
        model.half()
    step(model, optimizer, 2)


@pytest.mark.parametrize("placement", [RESIDENT, HOST], ids=["resident", "host"])
def test_a_parameter_of_another_shape_is_told_in_words(placement: dict[str, str]) -> None:
    """As transformers' `resize_token_embeddings` makes one: by another value for `.data`."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **placement)
    weight = model[1].weight
    where = str(weight.device)
    weight.data = torch.zeros(5, 3, device=weight.device)
    weight.grad = torch.ones_like(weight)
    told = (
        rf"^1\.weight: became torch\.float32 of shape \(5, 3\), strides \(3, 1\), on {where} after wrap, its state is "
        rf"for torch\.float32 of shape \(2, 3\), strides \(3, 1\), on {where}; call offload\.unwrap before"
    )
    with pytest.raises(offload.StateError, match=told):
        optimizer.step()
