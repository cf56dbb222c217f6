"""torch.func and vmap of a wrapped model's own parameters, outside of its forward: current values, or a StateError."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import offload
from offload import _pending, _torch_func
from training import HOST, batches, loss_of, make_model

STREAMED = HOST | {"params": "host"}


def squares(weight: Tensor) -> Tensor:
    return (weight * weight).sum()


TRANSFORMS: dict[str, Callable[[Tensor], Any]] = {
    "grad": torch.func.grad(squares),
    "grad and value": lambda weight: torch.func.grad_and_value(squares)(weight)[0],
    "nested grad": lambda weight: torch.func.grad(lambda _: torch.func.grad(squares)(weight).sum())(torch.ones(())),
    "in a dict": lambda weight: torch.func.grad(lambda given: squares(given["weight"]))({"weight": weight})["weight"],
    "vjp": lambda weight: torch.func.vjp(squares, weight)[1](weight.new_ones(()))[0],
    "jacrev": torch.func.jacrev(squares),
    "jacfwd": torch.func.jacfwd(squares),
    "hessian": torch.func.hessian(squares),
    "vmap": torch.func.vmap(lambda row: 2 * row),
    "functionalize": torch.func.functionalize(lambda weight: 2 * weight),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_value_on_its_way_is_waited_for(transform: str) -> None:
    _torch_func.ask_before_torch_func()
    found = []
    for pending in (False, True):
        weight = nn.Parameter(torch.tensor([[3.0, 5.0]]))
        if pending:
            memory, updated = weight.detach().numpy(), weight.detach().numpy().copy()
            memory.fill(0)
            _pending.make_pending(weight, partial(np.copyto, memory, updated))
        found.append(TRANSFORMS[transform](weight))
        assert type(weight) is nn.Parameter
    assert torch.equal(*found)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_weight_that_is_away_is_an_error_that_names_it(transform: str) -> None:
    model = make_model()
    model, _ = offload.wrap(model, torch.optim.AdamW(model.parameters()), **STREAMED)
    name = "blocks.1.up.weight"
    weight = model.get_parameter(name)
    with pytest.raises(offload.StateError, match=rf"{name} is on the host .*full_params"):
        TRANSFORMS[transform](weight)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("placement", [HOST, STREAMED], ids=["host", "params"])
def test_copies_made_inside_full_params_give_the_gradients_of_plain_torch(placement: dict[str, Any]) -> None:
    found = []
    for offloaded in (False, True):
        model = make_model()
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-2)
        if offloaded:
            model, optimizer = offload.wrap(model, optimizer, **placement)
        for tokens in batches(2):
            loss_of(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        if offloaded:
            with offload.full_params(model):
                weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        else:
            weights = {name: p.detach() for name, p in model.named_parameters()}

        def loss(weights: dict[str, Tensor], model: nn.Module = model, tokens: Tensor = tokens) -> Tensor:
            return torch.func.functional_call(model, weights, (tokens[:, :-1],)).square().mean()

        found.append(torch.func.grad(loss)(weights))
    plain, ours = found
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
