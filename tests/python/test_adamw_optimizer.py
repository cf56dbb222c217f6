"""offload.AdamW as an optimizer of torch's: what it refuses, closures, and states that move to and from torch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import AdamW, InvalidArgument, StateError
from offload._adamw import check_gradient

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gradients(count: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(6, 4, generator=generator).to(dtype) for _ in range(count)]


def parameter_of(dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, 24).reshape(6, 4).to(dtype))


def steps(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, given: list[Tensor]) -> None:
    for gradient in given:
        parameter.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0: must be >= 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": "1e-3"}, "lr='1e-3': must be >= 0"),
        ({"eps": None}, "eps=None: must be >= 0"),
        ({"betas": 0.9}, "betas=0.9: must be two numbers"),
        ({"betas": ("a", "b")}, r"betas=\('a', 'b'\): must be two numbers"),
        ({"eps": -1e-8}, "eps=-1e-08"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\): must be two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, r"betas=\(0.9,\)"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"amsgrad": True}, "pass amsgrad=False"),
    ],
)
def test_settings_that_are_not_legal(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        AdamW([parameter_of(torch.float32)], **options)


@pytest.mark.parametrize(
    "parameter",
    [
        nn.Parameter(torch.ones(4, dtype=torch.float64)),
        nn.Parameter(torch.ones(4, device="meta")),
        nn.Parameter(torch.ones(4, 4)[:, ::2]),
    ],
    ids=["dtype", "device", "strides"],
)
def test_a_group_that_is_refused_is_not_added(parameter: nn.Parameter) -> None:
    optimizer = AdamW([parameter_of(torch.float32)])
    with pytest.raises(InvalidArgument, match="parameter 1 of the group is .*use offload.wrap"):
        optimizer.add_param_group({"params": [parameter_of(torch.bfloat16), parameter]})
    assert len(optimizer.param_groups) == 1


def test_a_gradient_that_is_refused_changes_nothing() -> None:
    good, bad = parameter_of(torch.float32), parameter_of(torch.float32)
    good.grad, bad.grad = torch.ones(6, 4), torch.ones(6, 4).to_sparse()
    optimizer = AdamW([good, bad])
    with pytest.raises(InvalidArgument, match="shape .6, 4.: gradient has layout torch.sparse_coo.*sparse=False"):
        optimizer.step()
    assert torch.equal(good, parameter_of(torch.float32)) and not optimizer.state
    with pytest.raises(InvalidArgument, match="gradient has dtype torch.float64; legal are float32"):
        check_gradient("weight", torch.ones(4, dtype=torch.float64))


def test_a_closure_computes_gradients_and_its_loss_is_returned() -> None:
    by_closure, by_hand = parameter_of(torch.float32), parameter_of(torch.float32)
    optimizer = AdamW([by_closure])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = by_closure.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    steps(AdamW([by_hand]), by_hand, [2 * by_hand.detach()])
    assert torch.equal(by_closure, by_hand) and loss == parameter_of(torch.float32).square().sum()


def test_a_gradient_of_other_strides_updates_the_same_elements() -> None:
    plain, other = parameter_of(torch.float32), parameter_of(torch.float32)
    (gradient,) = gradients(1, torch.float32)
    steps(AdamW([plain]), plain, [gradient])
    transposed = gradient.t().contiguous().t()
    other.grad = transposed
    assert other.grad.stride() != other.stride()
    AdamW([other]).step()
    assert torch.equal(plain, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_state_goes_on_with_the_same_bits(dtype: torch.dtype) -> None:
    """torch's own load_state_dict would round moments and masters of 16-bit parameters."""
    first, second = gradients(4, dtype)[:2], gradients(4, dtype)[2:]
    parameter = parameter_of(dtype)
    optimizer = AdamW([parameter], lr=1e-2)
    steps(optimizer, parameter, first)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed_parameter = nn.Parameter(parameter.detach().clone())
    resumed = AdamW([resumed_parameter])
    resumed.load_state_dict(saved)
    assert resumed.state[resumed_parameter]["exp_avg"].dtype == torch.float32
    for state, kept in zip(resumed.state.values(), optimizer.state.values(), strict=True):
        assert state.keys() == kept.keys() and all(torch.equal(state[key], kept[key]) for key in kept)
        assert all(state[key].data_ptr() != kept[key].data_ptr() for key in kept)
    steps(optimizer, parameter, second)
    steps(resumed, resumed_parameter, second)
    assert torch.equal(parameter, resumed_parameter)


def test_states_of_torchs_own_are_taken_over_and_given_back() -> None:
    parameter = parameter_of(torch.float32)
    stock = torch.optim.AdamW([parameter], lr=1e-2)
    steps(stock, parameter, gradients(2, torch.float32))
    ours = AdamW([parameter])
    ours.load_state_dict(copy.deepcopy(stock.state_dict()))
    state, kept = ours.state[parameter], stock.state[parameter]
    assert state.keys() == kept.keys() and all(torch.equal(state[key], kept[key]) for key in kept)
    assert ours.param_groups[0]["lr"] == 1e-2
    steps(ours, parameter, gradients(1, torch.float32))
    stock.load_state_dict(ours.state_dict())
    assert stock.state[parameter]["step"] == 3


def test_states_of_amsgrad_are_refused() -> None:
    parameter = parameter_of(torch.float32)
    stock = torch.optim.AdamW([parameter], amsgrad=True)
    steps(stock, parameter, gradients(1, torch.float32))
    with pytest.raises(StateError, match="amsgrad=True"):
        AdamW([parameter]).load_state_dict(stock.state_dict())
