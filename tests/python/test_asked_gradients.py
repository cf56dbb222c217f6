"""Gradients that are asked for in other ways than `loss.backward()` are those of plain torch, to the bit, wherever
weights, gradients, activations and states are, and training goes on to the same bits afterwards."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, functional, graph
from torch.utils.checkpoint import checkpoint

import offload
from offload import _activations
from training import HOST, batches, loss_of, make_model, same_bits

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning", "ignore:.*jit.script:DeprecationWarning"),
]

STREAMED = HOST | {"params": "host"}
PLACEMENTS: dict[str, dict[str, str]] = {
    "optimizer": {"optimizer": "host", "gradients": "device"},
    "gradients": HOST,
    "params": STREAMED,
    "activations": HOST | {"activations": "host"},
    "all": STREAMED | {"activations": "host"},
}
WIDTH = 24
WAIT_S = 120


@pytest.fixture(autouse=True)
def _small_activations_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_activations, "MIN_BYTES", 1)


class Side:
    """A model in plain torch (no placement) or wrapped. SGD runs as torch's own, so both make the same bits."""

    def __init__(self, placement: dict[str, str] | None) -> None:
        self.model: Any = make_model()
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.is_wrapped = placement is not None
        if placement is not None:
            self.model, self.optimizer = offload.wrap(self.model, self.optimizer, **placement)
        self.tokens = next(batches(1, seed=5))
        self.parameters = dict(self.model.named_parameters())

    def steps(self, count: int, seed: int) -> list[float]:
        losses = []
        for tokens in batches(count, seed=seed):
            loss = loss_of(self.model, tokens)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def loss(self) -> Tensor:
        return loss_of(self.model, self.tokens)

    def other_loss(self) -> Tensor:
        return self.model(self.tokens[:, :-1]).square().mean()

    def embedded(self) -> Tensor:
        return self.model.embedding(self.tokens[:, :-1])

    def loss_from(self, x: Tensor) -> Tensor:
        for block in self.model.blocks:
            x = block(x)
        return self.model.head(self.model.norm(x)).square().mean()

    def full(self) -> Any:
        return offload.full_params(self.model) if self.is_wrapped else contextlib.nullcontext()

    def of(self, *names: str) -> list[nn.Parameter]:
        return [self.parameters[name] for name in names]

    def gradients(self) -> list[Tensor]:
        """All of them; a zero for None."""
        found = [torch.zeros(1) if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        self.optimizer.zero_grad()
        return found


def values(*shape: int) -> Tensor:
    torch.manual_seed(3)
    return torch.randn(*shape)


# --- backward(inputs=) and autograd.grad --------------------------------------------------------------------


def backward_of_some(side: Side) -> list[Tensor]:
    side.loss().backward(inputs=side.of("blocks.1.up.weight", "head.weight"))
    return side.gradients()


def backward_of_one(side: Side) -> list[Tensor]:
    side.loss().backward(inputs=side.parameters["norm.weight"])
    return side.gradients()


def backward_adds_up(side: Side) -> list[Tensor]:
    side.loss().backward()
    side.other_loss().backward(inputs=side.of("embedding.weight", "blocks.2.down.bias"))
    return side.gradients()


def of_all_parameters(side: Side) -> list[Tensor]:
    gradients = torch.autograd.grad(side.loss(), list(side.parameters.values()))
    assert all(type(gradient) is Tensor for gradient in gradients)
    assert all(p.grad is None for p in side.parameters.values())
    side.loss()  # the weights have come and gone again
    return list(gradients)


def with_a_hook(side: Side) -> list[Tensor]:
    (weight,) = side.of("blocks.1.up.weight")
    handle = weight.register_hook(lambda gradient: gradient * 3)
    (gradient,) = torch.autograd.grad(side.loss(), weight)
    handle.remove()
    return [gradient]


def retained(side: Side) -> list[Tensor]:
    loss = side.loss()
    first = torch.autograd.grad(loss, side.of("head.weight"), retain_graph=True)
    second = torch.autograd.grad(loss, list(side.parameters.values()), retain_graph=True)
    loss.backward()
    return [*first, *second, *side.gradients()]


def unused(side: Side) -> list[Tensor]:
    loss = side.model.blocks[0](values(2, 3, WIDTH)).sum()
    asked = side.of("blocks.0.up.weight", "head.weight")
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(loss, asked, retain_graph=True)
    first, none = torch.autograd.grad(loss, asked, retain_graph=True, allow_unused=True)
    assert none is None
    return [first, *torch.autograd.grad(loss, asked, materialize_grads=True)]


def frozen(side: Side) -> list[Tensor]:
    weight = side.parameters["blocks.1.down.weight"].requires_grad_(False)
    loss = side.loss()
    with pytest.raises(RuntimeError, match="One of the differentiated Tensors does not require grad"):
        torch.autograd.grad(loss, [weight])
    weight.requires_grad_()
    loss.backward()
    return side.gradients()


def several_losses(side: Side) -> list[Tensor]:
    torch.autograd.backward([side.loss(), side.other_loss()], [torch.tensor(1.0), torch.tensor(0.5)])
    return side.gradients()


def several_losses_for_some(side: Side) -> list[Tensor]:
    torch.autograd.backward([side.loss(), side.other_loss()], inputs=side.of("blocks.0.up.bias"))
    return side.gradients()


def edges(side: Side) -> list[Tensor]:
    loss = side.loss()
    places = [graph.get_gradient_edge(parameter) for parameter in side.parameters.values()]
    found = torch.autograd.grad(loss, places, retain_graph=True)
    loss.backward(inputs=places[2:5])
    return [*found, *side.gradients()]


def several_gradients_hooked(side: Side) -> list[Tensor]:
    seen: list[Tensor] = []
    weights = list(side.model.blocks[1].parameters())
    handles = [
        graph.register_multi_grad_hook(weights, lambda gradients: seen.extend(g.clone() for g in gradients)),
        graph.register_multi_grad_hook(weights, lambda gradient: seen.append(gradient.clone()), mode="any"),
    ]
    side.loss().backward()
    for handle in handles:
        handle.remove()
    return [*seen, *side.gradients()]


# --- gradients of inputs and of what lies between -----------------------------------------------------------


def saliency(side: Side) -> list[Tensor]:
    x = side.embedded().detach().requires_grad_()
    return list(torch.autograd.grad(side.loss_from(x), x))


def adversarial(side: Side) -> list[Tensor]:
    x = side.embedded()
    delta = torch.zeros_like(x, requires_grad=True)
    side.loss_from(x + delta).backward(inputs=[delta])
    assert delta.grad is not None
    side.loss_from(side.embedded() + 0.1 * delta.grad.sign()).backward()
    return [delta.grad, *side.gradients()]


def hidden(side: Side) -> list[Tensor]:
    kept: list[Tensor] = []
    handle = side.model.blocks[1].register_forward_hook(lambda _, __, output: kept.append(output))
    loss = side.loss()
    handle.remove()
    (gradient,) = torch.autograd.grad(loss, kept, retain_graph=True)
    loss.backward(inputs=[*kept, side.parameters["blocks.0.up.weight"]])
    assert kept[0].grad is not None
    return [gradient, kept[0].grad, *side.gradients()]


def batched(side: Side) -> list[Tensor]:
    x = side.embedded().detach().requires_grad_()
    rows = side.model.norm(side.model.blocks[0](x)).sum((0, 1))
    asked = [x, side.parameters["norm.weight"]]
    return list(torch.autograd.grad(rows, asked, torch.eye(WIDTH), is_grads_batched=True))


def output_hooked(side: Side) -> list[Tensor]:
    seen: list[Tensor] = []
    output = side.model(side.tokens[:, :-1])

    def twice(gradient: Tensor) -> Tensor:
        seen.append(gradient.clone())
        return gradient * 2

    output.register_hook(twice)
    output.square().mean().backward()
    return [*seen, *side.gradients()]


def weight_read_in_a_hook(side: Side) -> list[Tensor]:
    seen: list[Tensor] = []

    def read(module: Any, _: Any, output: Tensor) -> None:
        output.register_hook(lambda _: seen.append(module.up.weight.detach().clone()))

    handle = side.model.blocks[1].register_forward_hook(read)
    side.loss().backward()
    handle.remove()
    return [*seen, *side.gradients()]


# --- transforms ---------------------------------------------------------------------------------------------


def jacobians(side: Side) -> list[Tensor]:
    def call(x: Tensor) -> Tensor:
        return side.model.norm(side.model.blocks[0](x)).sum(0)

    ways: list[dict[str, Any]] = [{}, {"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}]
    return [functional.jacobian(call, values(2, WIDTH), **way) for way in ways]


def vector_jacobian(side: Side) -> list[Tensor]:
    return list(functional.vjp(side.loss_from, values(2, 3, WIDTH)))


def forward_mode(side: Side) -> list[Tensor]:
    found = []
    for context in (contextlib.nullcontext, torch.no_grad):
        with context(), forward_ad.dual_level():
            x = values(2, 3, WIDTH)
            value, tangent = forward_ad.unpack_dual(side.loss_from(forward_ad.make_dual(x, torch.ones_like(x))))
            assert tangent is not None
            found += [value.detach().clone(), tangent.detach().clone()]
    return found


def forward_and_backward(side: Side) -> list[Tensor]:
    with forward_ad.dual_level():
        handle = side.model.embedding.register_forward_hook(
            lambda _, __, output: forward_ad.make_dual(output, torch.ones_like(output))
        )
        loss = side.loss()
        handle.remove()
        value, tangent = forward_ad.unpack_dual(loss)
        assert tangent is not None
        value.backward()
        return [tangent.detach().clone(), *side.gradients()]


def own_weights_called(side: Side) -> list[Tensor]:
    torch.func.functional_call(side.model, side.parameters, (side.tokens[:, :-1],)).square().mean().backward()
    return side.gradients()


def copies_differentiated(side: Side) -> list[Tensor]:
    with side.full():
        copies = {name: value.detach().clone() for name, value in side.parameters.items()}

    def loss(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return torch.func.functional_call(side.model, weights, (tokens[None],)).square().mean()

    tokens = side.tokens[:, :-1]
    of_samples = torch.func.vmap(torch.func.grad(loss), (None, 0))(copies, tokens)
    return [*of_samples.values(), *torch.func.grad(loss)(copies, tokens[0]).values()]


def checkpointed(side: Side) -> list[Tensor]:
    def call(x: Tensor, use_reentrant: bool) -> Tensor:
        for block in side.model.blocks:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return side.model.head(side.model.norm(x)).square().mean()

    x = side.embedded()
    found = torch.autograd.grad(call(x, False), [x, *side.model.blocks.parameters()])
    x = side.embedded()
    with pytest.raises(RuntimeError, match="incompatible"):
        torch.autograd.grad(call(x, True), x)
    call(side.embedded(), True).backward()
    return [*found, *side.gradients()]


# --- what is around backward --------------------------------------------------------------------------------


def anomalies(side: Side) -> list[Tensor]:
    with torch.autograd.set_detect_anomaly(True):
        side.loss().backward()
    return side.gradients()


def saved_copies(side: Side) -> list[Tensor]:
    with graph.saved_tensors_hooks(lambda saved: saved.detach().clone(), lambda saved: saved):
        loss = side.loss()
    loss.backward()
    return side.gradients()


def saved_on_cpu(side: Side) -> list[Tensor]:
    with graph.save_on_cpu():
        loss = side.loss()
    loss.backward()
    return side.gradients()


def mutated(side: Side) -> list[Tensor]:
    """What is written to is saved outside of the model's forward."""
    with graph.allow_mutation_on_saved_tensors():
        output = side.model(side.tokens[:, :-1])
        sine = output.sin()
        loss = (output * sine).square().mean()
        with torch.no_grad():
            sine.zero_()
        loss.backward()
    return side.gradients()


def in_one_thread(side: Side) -> list[Tensor]:
    with torch.autograd.set_multithreading_enabled(False):
        side.loss().backward()
    return side.gradients()


def in_a_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(WAIT_S)


def in_another_thread(side: Side) -> list[Tensor]:
    loss = side.loss()
    in_a_thread(lambda: loss.backward(retain_graph=True))
    found = in_a_thread(lambda: torch.autograd.grad(loss, list(side.parameters.values())))
    return [*side.gradients(), *found]


def all_in_another_thread(side: Side) -> list[Tensor]:
    in_a_thread(lambda: side.loss().backward())
    return side.gradients()


def in_a_pool(side: Side) -> list[Tensor]:
    with ThreadPoolExecutor(3) as pool:
        meet = threading.Barrier(3)
        for future in [pool.submit(meet.wait, WAIT_S) for _ in range(3)]:  # so that there are three threads
            future.result(WAIT_S)
        first, second = side.loss(), side.other_loss()
        for loss in (first, second, side.loss()):
            pool.submit(loss.backward).result(WAIT_S)
    return side.gradients()


CASES: Sequence[Callable[[Side], list[Tensor]]] = (
    backward_of_some, backward_of_one, backward_adds_up, of_all_parameters, with_a_hook, retained, unused, frozen,
    several_losses, several_losses_for_some, edges, several_gradients_hooked,
    saliency, adversarial, hidden, batched, output_hooked, weight_read_in_a_hook,
    jacobians, vector_jacobian, forward_mode, forward_and_backward, own_weights_called, copies_differentiated,
    checkpointed, anomalies, saved_copies, saved_on_cpu, mutated, in_one_thread, in_another_thread,
    all_in_another_thread, in_a_pool,
)  # fmt: skip


def outcome(case: Callable[[Side], list[Tensor]], placement: dict[str, str] | None) -> tuple[list[float], list[Tensor]]:
    side = Side(placement)
    losses = side.steps(1, seed=2)
    found = [value.detach().clone() for value in case(side)]
    losses += side.steps(2, seed=3)
    if placement is not None:
        stats = side.optimizer.stats()
        assert stats.transfers["to_device_bytes"] > 0 and stats.transfers["to_host_bytes"] > 0
        assert sum(stats.host_bytes.values()) > 0
    return losses, [*found, *side.model.state_dict().values()]


def assert_equal(one: tuple[list[float], list[Tensor]], other: tuple[list[float], list[Tensor]], name: str) -> None:
    assert one[0] == other[0], name
    assert len(one[1]) == len(other[1]), name
    assert all(same_bits(left, right) for left, right in zip(one[1], other[1], strict=True)), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_it_is_that_of_plain_torch(case: Callable[[Side], list[Tensor]]) -> None:
    expected = outcome(case, None)
    for name, placement in PLACEMENTS.items():
        assert_equal(outcome(case, placement), expected, name)


def test_saved_tensor_hooks_that_somebody_has_forbidden() -> None:
    """What leaves needs them: torch's refusal has the words of who forbade them."""

    def forbidden(side: Side) -> list[Tensor]:
        with graph.disable_saved_tensors_hooks("no hooks here"):
            if "activations" not in placement:
                side.loss().backward()
                return side.gradients()
            if side.is_wrapped:
                with pytest.raises(RuntimeError, match="no hooks here"):
                    side.loss()
        return []

    for placement in PLACEMENTS.values():
        assert_equal(outcome(forbidden, placement), outcome(forbidden, None), str(placement))


def test_a_saved_tensor_that_is_written_to_inside_the_forward() -> None:
    """Our hooks are the inner ones there, and refuse what the context around them allows."""

    def increase(tensor: Tensor) -> None:
        with torch.no_grad():
            tensor.add_(1)

    def written(side: Side) -> list[Tensor]:
        if not side.is_wrapped:
            return []
        handle = side.model.head.register_forward_hook(lambda _, args, __: increase(args[0]))
        with graph.allow_mutation_on_saved_tensors():
            loss = side.loss()
            handle.remove()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        side.optimizer.zero_grad()
        return []

    placement = PLACEMENTS["activations"]
    assert_equal(outcome(written, placement), outcome(written, None), "activations")


# --- gradients of gradients ---------------------------------------------------------------------------------


def penalty_of_the_input(side: Side) -> list[Tensor]:
    x = side.embedded().detach().requires_grad_()
    loss = side.loss_from(x)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + gradient.square().sum()).backward()
    return side.gradients()


def penalty_of_weights(side: Side) -> list[Tensor]:
    gradients = torch.autograd.grad(side.loss(), list(side.parameters.values()), create_graph=True)
    torch.stack([gradient.square().sum() for gradient in gradients]).sum().backward()
    return side.gradients()


def curvature(side: Side) -> list[Tensor]:
    x = values(2, 3, WIDTH)
    return [
        *functional.hvp(side.loss_from, x, torch.ones_like(x)),
        *functional.jvp(side.loss_from, x, torch.ones_like(x)),
        functional.hessian(lambda x: side.model.blocks[0](x).square().sum(), values(1, WIDTH)),
    ]


@pytest.mark.parametrize("case", [penalty_of_the_input, penalty_of_weights, curvature], ids=lambda case: case.__name__)
@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_gradient_of_a_gradient(name: str, case: Callable[[Side], list[Tensor]]) -> None:
    """Over weights that come and go it is refused outside of `full_params`, and made inside."""
    placement = PLACEMENTS[name]
    if "params" not in placement:
        assert_equal(outcome(case, placement), outcome(case, None), name)
        return

    def refused(side: Side) -> list[Tensor]:
        if side.is_wrapped:
            with pytest.raises(offload.StateError, match=r"create_graph=True.*offload\.full_params\(model\)"):
                case(side)
            side.optimizer.zero_grad()
            assert all(p.grad is None for p in side.parameters.values())
        return []

    def inside(side: Side) -> list[Tensor]:
        with side.full():
            return case(side)

    assert_equal(outcome(refused, placement), outcome(refused, None), name)
    assert_equal(outcome(inside, placement), outcome(inside, None), name)


def test_the_second_backward_may_come_after_full_params() -> None:
    def outlived(side: Side) -> list[Tensor]:
        with side.full():
            loss = side.loss()
            gradients = torch.autograd.grad(loss, list(side.parameters.values()), create_graph=True)
            penalty = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        side.other_loss()
        (loss + penalty).backward()
        return side.gradients()

    assert_equal(outcome(outlived, STREAMED), outcome(outlived, None), "params")


def test_under_a_default_device(device: torch.device) -> None:
    """It is asked of every call before a weight is: who called is behind it."""
    for case in (edges, several_gradients_hooked, a_weight_to_begin_with):
        with torch.device(device):
            assert_equal(outcome(case, STREAMED), outcome(case, None), case.__name__)


# --- what is read without asking ----------------------------------------------------------------------------


def a_weight_to_begin_with(side: Side) -> list[Tensor]:
    x = values(WIDTH).requires_grad_()
    with side.full():
        (x * 2).backward(side.parameters["norm.weight"])
        assert x.grad is not None
        return [x.grad, *torch.autograd.grad(x * 3, x, grad_outputs=side.parameters["norm.bias"])]


def test_a_weight_as_the_gradient_that_backward_begins_with() -> None:
    """Torch asks for its size, and then reads it."""

    for name, placement in PLACEMENTS.items():
        assert_equal(outcome(a_weight_to_begin_with, placement), outcome(a_weight_to_begin_with, None), name)
    streamed = Side(STREAMED)
    x = values(WIDTH).requires_grad_()
    with pytest.raises(offload.StateError, match=r"norm\.weight is on the host or on disk"):
        (x * 2).backward(streamed.parameters["norm.weight"])
    assert x.grad is None


@pytest.mark.cpu_only
def test_a_weight_that_waits_for_its_update_is_waited_for() -> None:
    side, plain = Side(HOST), Side(None)
    found = []
    for each in (plain, side):
        each.loss().backward()
        if each.is_wrapped:
            each.optimizer._engine.device.hold("to_device")
        each.optimizer.step()
        if each.is_wrapped:
            timer = threading.Timer(0.1, each.optimizer._engine.device.release, ["to_device"])
            timer.start()
        x = torch.zeros(WIDTH, requires_grad=True)
        (x * 2).backward(each.parameters["norm.weight"])
        assert x.grad is not None
        found.append(x.grad)
    timer.join()
    assert same_bits(*found)


@pytest.mark.parametrize("name", ["params", "all"])
def test_torch_func_is_refused_a_weight_that_is_away(name: str) -> None:
    """It would read memory that is not there."""

    def own_weights(side: Side) -> list[Tensor]:
        def loss(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(side.model, weights, (side.tokens[:, :-1],)).square().mean()

        if side.is_wrapped:
            for transformed in (torch.func.grad(loss), torch.func.grad(torch.func.grad(loss))):
                with pytest.raises(
                    offload.StateError, match=r"is on the host or on disk.*full_params.*take copies of weights"
                ):
                    transformed(side.parameters)
        return []

    assert_equal(outcome(own_weights, PLACEMENTS[name]), outcome(own_weights, None), name)
