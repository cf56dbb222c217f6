"""More of what a user does: hooks that read and change what they are given, exceptions in them, other edits, refusals.

Actions as in `any_order`, and the rules that draw them.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import Tensor, nn

import any_order
import offload
from any_order import Side, loss_of
from plain_pair import Fault

SEEDS = st.integers(0, 5)
INDICES = st.integers(0, 15)
RAISED: dict[str, type[BaseException]] = {"fault": Fault, "interrupt": KeyboardInterrupt}


class Hook:
    """Of any kind. Copies and pickles with its module, log and all."""

    def __init__(self, kind: str, how: str, log: list[Tensor]) -> None:
        self.kind, self.how, self.log = kind, how, log

    def __call__(self, *given: Any) -> Any:
        if self.how in RAISED:
            raise RAISED[self.how]
        return getattr(self, self.kind)(*given)

    def see(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self.log.append(value.detach().clone())

    def tensor(self, gradient: Tensor) -> Tensor | None:
        self.see(gradient)
        return {"see": None, "scale": gradient * 0.5, "other": gradient.clamp(-0.01, 0.01)}[self.how]

    def accumulated(self, p: Tensor) -> None:
        """After autograd has added to `p.grad`."""
        assert p.grad is not None
        if self.how == "see":
            self.see(p.grad.norm())
        elif self.how == "scale":
            p.grad.mul_(0.5)
        elif self.how == "other":
            p.grad = p.grad * 2
        elif self.how == "drop":
            p.grad = None

    def before(self, module: nn.Module, inputs: Any) -> Any:
        self.see(inputs[0])
        return (inputs[0] * 0.5, *inputs[1:]) if self.how in ("scale", "other") else None

    def after(self, module: nn.Module, inputs: Any, output: Tensor) -> Any:
        if self.how == "other":  # the weights count in the output, and are used out of their own forward
            return output + sum(p.float().sum() for p in module.parameters() if p.requires_grad) * 0.01
        self.see(output)
        return output * 0.5 if self.how == "scale" else None

    def before_backward(self, module: nn.Module, of_output: Any) -> Any:
        self.see(of_output[0])
        return (of_output[0] * 0.5,) if self.how in ("scale", "other") else None

    def after_backward(self, module: nn.Module, of_input: Any, of_output: Any) -> Any:
        self.see(of_input[0])
        change = self.how in ("scale", "other") and of_input[0] is not None
        return (of_input[0] * 0.5, *of_input[1:]) if change else None

    def step(self, optimizer: Any, *_: Any) -> None:
        for p in optimizer.param_groups[0]["params"]:
            if p.grad is not None and self.how in ("scale", "other"):
                p.grad.mul_(0.5)
            elif p.grad is not None:
                self.see(p.grad.norm())


KINDS = ("tensor", "accumulated", "before", "after", "before_backward", "after_backward", "step")
HOWS = ("see", "scale", "other", "drop")


def registered(side: Side, kind: str, how: str, index: int) -> Any:
    hook = Hook(kind, how, side.log)
    p = side.parameters[index % len(side.parameters)]
    modules = [side.model, side.model.head, side.model.embedding, *side.model.blocks, side.model.blocks[0].up]
    module = modules[index % len(modules)]
    if kind in ("before", "before_backward", "after_backward") and module in modules[:3:2]:
        module = side.model.blocks[1]  # tokens are no numbers to be changed, and have no gradient
    register: dict[str, Callable[[Any], Any]] = {
        "tensor": p.register_hook,
        "accumulated": p.register_post_accumulate_grad_hook,
        "before": module.register_forward_pre_hook,
        "after": module.register_forward_hook,
        "before_backward": module.register_full_backward_pre_hook,
        "after_backward": module.register_full_backward_hook,
        "step": side.optimizer.register_step_pre_hook,
    }
    return register[kind](hook)


def hook(side: Side, kind: str, how: str, index: int) -> None:
    side.handles.append(registered(side, kind, how if kind == "accumulated" or how != "drop" else "see", index))


def unhook(side: Side, which: int) -> None:
    side.handles.pop(which % len(side.handles)).remove()


def fault_in_hook(side: Side, seed: int, kind: str, index: int, how: str) -> Any:
    """The user catches what was raised, and goes on."""
    handle = registered(side, kind, how, index)
    try:
        loss_of(side, seed).backward()
        if kind == "step":
            side.graphs.clear()
            side.optimizer.step()
    except KeyboardInterrupt:
        return how
    finally:
        handle.remove()


def micro_batch_with(side: Side, seed: int, how: str) -> None:
    """What torch has around a forward and its backward."""
    graph, errors = torch.autograd.graph, []

    def run() -> None:
        loss_of(side, seed).backward()

    def caught() -> None:
        try:
            run()
        except Exception as error:
            errors.append(error)

    if how == "thread":
        thread = threading.Thread(target=caught)
        thread.start()
        thread.join()
    elif how == "several":  # a hook over the gradients of several parameters
        with side.full():
            trained = [p for p in side.parameters if p.requires_grad][::4]
            seen = Hook("tensor", "see", side.log)
            handle = graph.register_multi_grad_hook(trained, lambda all_of: [seen.see(g) for g in all_of])
        try:
            run()
        finally:
            handle.remove()
    else:
        contexts = {
            "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
            "save_on_cpu": graph.save_on_cpu,
            "saved": lambda: graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor),
        }
        with contexts[how]():
            run()
    for error in errors:
        raise error


def fault_in_closure(side: Side, seed: int, after: bool) -> None:
    side.graphs.clear()

    def closure() -> Tensor:
        side.optimizer.zero_grad()
        loss = loss_of(side, seed)
        if after:
            loss.backward()
        raise Fault

    side.optimizer.step(closure)


def backward_of_all(side: Side, how: str) -> None:
    """Of several graphs in one pass."""
    graphs, side.graphs = side.graphs, []
    if how == "sum":
        torch.stack(graphs).sum().backward()
    else:
        torch.autograd.backward(graphs)


def edit_gradients(side: Side, index: int, how: str) -> Any:
    p = side.parameters[index % len(side.parameters)]
    if how == "wrong":
        p.grad = torch.zeros(3, 3, 3)  # refused
    elif how == "delete":
        del p.grad
    elif how == "model":
        side.model.zero_grad()
    found = [p.grad for p in side.parameters if p.grad is not None]
    if p.grad is None or not found:
        return "no gradient"
    if how == "imul":
        p.grad *= 0.5
    elif how == "item":
        p.grad[0] *= 2
    elif how == "columns":
        p.grad[..., ::2] *= 0.5
    elif how == "out":
        torch.mul(p.grad, 0.5, out=p.grad)
    elif how == "clamp":
        p.grad.clamp_(-0.01, 0.01)
    elif how == "sign":
        torch.sign(p.grad, out=p.grad)
    elif how == "copy":
        p.grad.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
    elif how == "foreach":
        torch._foreach_mul_(found, 0.5)
    elif how == "foreach add":
        torch._foreach_add_(found, found, alpha=0.5)
    elif how == "add other":
        other = next(
            (q.grad for q in side.parameters if q is not p and q.shape == p.shape and q.grad is not None), None
        )
        if other is not None:
            p.grad.add_(other)
    elif how == "shared":  # by two parameters
        q = next(q for q in reversed(side.parameters) if q.shape == p.shape)
        q.grad = p.grad
    elif how == "held" and side.held is not None:
        side.held.mul_(0.5)
    elif how == "nested":
        p.grad.mul_(p.grad.abs().max())
    return [p.grad.sum().clone(), (p.grad != 0).any(), p.grad.max().item(), p.grad.tolist()]


@torch.no_grad()
def data_replaced(side: Side, index: int) -> None:
    """Another tensor of the same form in its place."""
    side.graphs.clear()
    p = side.parameters[index % len(side.parameters)]
    with side.full():
        p.data = torch.linspace(-0.5, 0.5, p.numel()).view(p.shape).to(p.dtype)
    if hasattr(side.optimizer, "resync"):
        side.optimizer.resync()


def freeze(side: Side, which: int, trains: bool) -> None:
    """A part of the model, or all of it."""
    side.graphs.clear()
    part = side.model if which == 3 else side.model.blocks[which]
    part.requires_grad_(trains)


def moved(side: Side, how: str) -> Any:
    """Where it is already, which changes nothing."""
    dtype = side.parameters[0].dtype
    if how != "to" and any(p.grad is not None and p.grad.dtype != dtype for p in side.parameters):
        return "torch would narrow gradients, and a wrapped pair refuses to"
    there = torch.device(side.device_type)
    moves: dict[str, tuple[Any, ...]] = {"to": (there,), "dtype": (dtype,), "both": (there, dtype)}
    side.model.to(*moves[how])
    return [(p.shape, p.dtype, str(p.device), p.requires_grad) for p in side.parameters]


def with_other_weights(side: Side, seed: int) -> Any:
    """functional_call over the halves of the weights: gradients are theirs."""
    with side.full():
        others = {name: (p.detach() * 0.5).requires_grad_() for name, p in side.model.named_parameters()}
    tokens = torch.arange(6).view(2, 3)
    torch.manual_seed(seed)
    output = torch.func.functional_call(side.model, others, (tokens,))
    output.float().square().mean().backward()
    return [output.detach(), [value.grad for value in others.values()]]


def evaluate_training(side: Side, seed: int, autocast: bool) -> Any:
    """Without a graph, and in the mode of training."""
    with torch.no_grad():
        return loss_of(side, seed, autocast).clone()


# --- what is refused, with nothing changed ------------------------------------------------------------------


def _wrapped_again(side: Side) -> None:
    offload.wrap(side.model, torch.optim.SGD(side.model.parameters(), lr=0.1))


def _double_backward(side: Side) -> None:
    """Of weights that come and go."""
    if side.optimizer.plan.params == "device" or not any(p.requires_grad for p in side.parameters):
        raise offload.StateError("it is legal, or there is nothing to do")
    side.model.eval()
    try:
        loss_of(side, 0).backward(create_graph=True)
    finally:
        side.model.train()


def _other_shapes(side: Side) -> None:
    saved = copy.deepcopy(side.optimizer.state_dict())
    saved["param_groups"][0]["params"] = saved["param_groups"][0]["params"][1:]
    side.optimizer.load_state_dict(saved)


REFUSED: dict[str, tuple[Callable[[Side], Any], type[Exception]]] = {
    "wrap": (_wrapped_again, offload.StateError),
    "unwrap": (lambda side: offload.unwrap(side.model, ()), offload.InvalidArgument),
    "group": (
        lambda side: side.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.float64))]}),
        offload.InvalidArgument,
    ),
    "state": (lambda side: setattr(side.optimizer, "state", {0: {}}), offload.StateError),
    "copy": (lambda side: copy.deepcopy(side.optimizer), offload.StateError),
    "load": (_other_shapes, offload.InvalidArgument),
    "scale": (lambda side: side.optimizer.step(grad_scale=torch.ones(2)), offload.InvalidArgument),
    "double backward": (_double_backward, offload.StateError),
}


class HookRules:
    """Rules of `test_any_order.AnyOrder`."""

    both: Any
    plain: Side
    own: Side

    @rule(kind=st.sampled_from(KINDS), how=st.sampled_from(HOWS), index=INDICES)
    def hook(self, kind: str, how: str, index: int) -> None:
        self.both(hook, kind, how, index)

    @precondition(lambda self: self.plain.handles)
    @rule(which=INDICES)
    def unhook(self, which: int) -> None:
        self.both(unhook, which)

    @rule(seed=SEEDS, kind=st.sampled_from(KINDS), index=INDICES, how=st.sampled_from(list(RAISED)))
    def fault_in_hook(self, seed: int, kind: str, index: int, how: str) -> None:
        self.both(fault_in_hook, seed, kind, index, how)

    @rule(seed=SEEDS, how=st.sampled_from(["thread", "anomaly", "several", "save_on_cpu", "saved"]))
    def micro_batch_with(self, seed: int, how: str) -> None:
        self.both(micro_batch_with, seed, how)

    @rule(seed=SEEDS, after=st.booleans())
    def fault_in_closure(self, seed: int, after: bool) -> None:
        self.both(fault_in_closure, seed, after)

    @precondition(lambda self: self.plain.graphs)
    @rule(how=st.sampled_from(["sum", "together"]))
    def backward_of_all(self, how: str) -> None:
        self.both(backward_of_all, how)

    @rule(index=INDICES, how=st.sampled_from(
        ["wrong", "delete", "model", "imul", "item", "columns", "out", "clamp", "sign", "copy", "foreach",
         "foreach add", "add other", "shared", "held", "nested"]
    ))  # fmt: skip
    def edit_gradients(self, index: int, how: str) -> None:
        self.both(edit_gradients, index, how)

    @rule(index=INDICES)
    def data_replaced(self, index: int) -> None:
        self.both(data_replaced, index)

    @rule(which=st.integers(0, 3), trains=st.booleans())
    def freeze(self, which: int, trains: bool) -> None:
        self.both(freeze, which, trains)

    @rule(how=st.sampled_from(["to", "dtype", "both"]))
    def moved(self, how: str) -> None:
        self.both(moved, how)

    @rule(seed=SEEDS)
    def with_other_weights(self, seed: int) -> None:
        self.both(with_other_weights, seed)

    @rule(seed=SEEDS, autocast=st.booleans())
    def evaluate_training(self, seed: int, autocast: bool) -> None:
        self.both(evaluate_training, seed, autocast)

    @rule(what=st.sampled_from(list(REFUSED)))
    def refused(self, what: str) -> None:
        """On the wrapped side alone; the pair goes on."""
        if what == "double backward":
            self.both(any_order.logged)
            self.both(any_order.zero_grad, True)
        if what == "scale" and self.own.optimizer._optimizer_step_pre_hooks:
            return  # which run before it
        action, error = REFUSED[what]
        with pytest.raises(error):
            action(self.own)
        if what == "double backward":  # some were added to
            self.own.optimizer.zero_grad()
            self.own.log.clear()
        self.both(any_order.states)
