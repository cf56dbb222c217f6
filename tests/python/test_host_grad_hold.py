"""hold(): which gradients leave, which stay as they are, which are refused, and what user hooks see."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch import Tensor, nn

from grad_store import HostStore, cell_of, same_bits
from offload._errors import InvalidArgument, StateError
from offload._grad_cell import Owner
from offload._host_grad import HostGrad, hold


def test_thousands_of_gradients_cost_none_no_reference() -> None:
    """Those of None end the process when they are used up; from Python 3.12 on it has no count."""
    store, parameter = HostStore(), nn.Parameter(torch.ones(3))
    parameter.register_post_accumulate_grad_hook(lambda p: hold(p, "weight", store) and None)
    before = sys.getrefcount(None)
    for _ in range(2000):
        (parameter * 2).sum().backward()
        parameter.grad = None
    assert sys.getrefcount(None) > before - 1000


def test_create_graph_leaves_a_gradient_with_history() -> None:
    parameter = nn.Parameter(torch.ones(3))
    store = HostStore()
    parameter.register_post_accumulate_grad_hook(lambda p: hold(p, "weight", store) and None)
    (parameter**3).sum().backward(create_graph=True)
    assert type(parameter.grad) is Tensor and parameter.grad.requires_grad
    (second,) = torch.autograd.grad(parameter.grad.sum(), parameter)
    assert second.tolist() == [6.0, 6.0, 6.0]
    parameter.grad = None
    (parameter**2).sum().backward()
    assert isinstance(parameter.grad, HostGrad)
    (parameter**3).sum().backward(create_graph=True)
    assert type(parameter.grad) is Tensor and parameter.grad.tolist() == [5.0, 5.0, 5.0]


def test_sparse_and_complex_gradients_are_refused_by_name() -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding.weight.register_post_accumulate_grad_hook(lambda p: hold(p, "embed.weight", HostStore()) and None)
    with pytest.raises(InvalidArgument, match=r"'embed\.weight' is sparse"):
        embedding(torch.tensor([1, 2])).sum().backward()
    parameter = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    parameter.register_post_accumulate_grad_hook(lambda p: hold(p, "phase", HostStore()) and None)
    with pytest.raises(InvalidArgument, match="'phase' is complex"):
        parameter.abs().sum().backward()


def test_gradients_that_stay_plain() -> None:
    flat = torch.zeros(20)
    cases = {
        "flat buffer": flat[:6].view(2, 3),
        "all of a flat buffer": torch.zeros(6).view(2, 3),
        "part of a larger memory": flat.detach()[2:8].view(2, 3).detach(),
        "overlapping": torch.zeros(1).expand(2, 3).detach(),
        "empty": torch.zeros(0, 3),
    }
    for case, gradient in cases.items():
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient
        assert hold(parameter, "weight", HostStore()) is None, case
        assert parameter.grad is gradient, case
    parameter = nn.Parameter(torch.zeros(3))
    assert hold(parameter, "weight", HostStore()) is None
    parameter.grad = nn.Parameter(torch.zeros(3), requires_grad=False)
    assert hold(parameter, "weight", HostStore()) is None


@pytest.mark.parametrize("ours_first", [False, True])
def test_user_hooks_before_and_after_ours(ours_first: bool) -> None:
    """A tensor hook replaces the gradient; post-accumulate hooks edit it and keep it, before or after ours."""
    seen: dict[str, list[Tensor]] = {"plain": [], "held": []}
    results = {}
    for kind in ("plain", "held"):
        parameter = nn.Parameter(torch.ones(4))
        store = HostStore(delayed=True)

        def ours(_: Tensor, parameter: nn.Parameter = parameter, store: HostStore = store) -> None:
            hold(parameter, "weight", store)

        def user(p: Tensor, kind: str = kind) -> None:
            seen[kind].append(p.grad)
            p.grad.clamp_(max=2.5)
            p.grad[0] = 7

        parameter.register_hook(lambda g: g * 3)
        if kind == "held" and ours_first:
            parameter.register_post_accumulate_grad_hook(ours)
        parameter.register_post_accumulate_grad_hook(user)
        if kind == "held" and not ours_first:
            parameter.register_post_accumulate_grad_hook(ours)
        for _ in range(2):
            (parameter * torch.tensor([1.0, 0.1, 0.2, 5.0])).sum().backward()
        results[kind] = parameter.grad
        assert isinstance(parameter.grad, HostGrad) == (kind == "held")
    assert same_bits(results["plain"], results["held"])
    # What the hooks kept is the gradient itself, in torch and here: it shows the later sum.
    for plain, held in zip(seen["plain"], seen["held"], strict=True):
        assert same_bits(plain, held)


def test_assigned_gradient_is_honoured_and_stays_aliased() -> None:
    mine = torch.ones(4)
    parameter = nn.Parameter(torch.zeros(4))
    store = HostStore(delayed=True)
    parameter.register_post_accumulate_grad_hook(lambda p: hold(p, "weight", store) and None)
    parameter.grad = mine
    (parameter * 2).sum().backward()
    assert isinstance(parameter.grad, HostGrad)
    assert mine.tolist() == parameter.grad.tolist() == [3.0] * 4
    mine[0] = 9
    assert parameter.grad.tolist() == [9.0, 3.0, 3.0, 3.0]
    del mine
    (parameter * 2).sum().backward()
    assert cell_of(parameter.grad).owner is Owner.HOST
    assert parameter.grad.tolist() == [11.0, 5.0, 5.0, 5.0]


def test_a_gradient_that_is_referred_to_only_while_its_hooks_run_still_leaves_in_backward() -> None:
    """As older torch does: the gradient departs when the next one is held, the last one at the end."""
    store = HostStore(delayed=True)
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    kept: list[Tensor] = []
    owners: list[list[Owner]] = []

    def after(_: Tensor) -> None:
        owners.append([p.grad.cell.owner for p in parameters if isinstance(p.grad, HostGrad)])
        kept.clear()

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: kept.append(p.grad.view(-1)))
        parameter.register_post_accumulate_grad_hook(lambda p: hold(p, "weight", store) and None)
        parameter.register_post_accumulate_grad_hook(after)
    sum((p * 2).sum() for p in parameters).backward()
    assert [row.count(Owner.DEVICE) for row in owners] == [1, 1, 1] and len(owners[-1]) == 3
    assert all(cell_of(p.grad).owner is Owner.HOST for p in parameters)
    assert all(p.grad.tolist() == [2.0] * 3 for p in parameters)


def test_concurrent_backward_passes_are_refused() -> None:
    parameter = nn.Parameter(torch.ones(3))
    last = nn.Parameter(torch.ones(3))
    store = HostStore()
    parameter.register_post_accumulate_grad_hook(lambda p: hold(p, "weight", store) and None)
    inside, leave = threading.Event(), threading.Event()

    def pause(gradient: Tensor) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert leave.wait(60)

    def loss() -> Tensor:
        early = last * 1  # autograd runs what forward made last first
        early.register_hook(pause)
        return early.sum() + (parameter * 2).sum()

    first = threading.Thread(target=lambda: loss().backward())
    first.start()
    assert inside.wait(60)
    assert isinstance(parameter.grad, HostGrad), "the first pass has not reached the parameter"
    with pytest.raises(StateError, match="two backward passes at once write the gradient of 'weight'"):
        loss().backward()
    leave.set()
    first.join()
    parameter.grad = None
    loss().backward()  # one after the other: legal
    loss().backward()
