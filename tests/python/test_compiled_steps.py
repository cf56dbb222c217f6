"""A training step that torch.compile was given as a whole: the same bits, and nothing of offload is compiled."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from programs import Programs
from torch import Tensor, nn

import offload
from offload._pending import PendingParameter
from test_asked_gradients import (
    a_weight_to_begin_with,
    assert_equal,
    edges,
    outcome,
    several_gradients_hooked,
)
from training import HOST, RESIDENT, batches, loss_of, make_model, same_bits

pytestmark = pytest.mark.usefixtures("device")

STREAMED = HOST | {"params": "host"}
PLACEMENTS = {
    "resident": RESIDENT,
    "host": HOST,
    "params": STREAMED,
    "activations": STREAMED | {"activations": "host"},
    "ahead": HOST | {"params": "device", "speculate": "1MiB"},
}

Step = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def trained(placement: dict[str, Any], steps: int, prepare: Callable[[Step, Any], Step]) -> Any:
    """What `steps` steps found, the weights after them, and the optimizer. `prepare`: of a step and the optimizer."""
    model = make_model()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = offload.wrap(model, optimizer, **placement)

    def step(tokens: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        norm = optimizer.grad_norm()
        optimizer.step(grad_scale=0.3 / (norm + 0.3))
        return loss

    step = prepare(step, optimizer)
    found = [step(tokens).item() for tokens in batches(steps)]
    optimizer.synchronize()
    return found, list(model.state_dict().values()), optimizer


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_compiled_step_has_the_bits_of_one_that_is_not(placement: str) -> None:
    graphs: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    def compiled(step: Step, _: Any) -> Step:
        return torch.compile(step, backend=backend)

    expected, weights, optimizer = trained(PLACEMENTS[placement], 5, lambda step, _: step)
    offload_bytes = optimizer.stats().host_bytes
    assert bool(offload_bytes.get("moments")) == (placement != "resident")
    found, compiled_weights, _ = trained(PLACEMENTS[placement], 5, compiled)
    assert found == expected
    assert all(same_bits(a, b) for a, b in zip(compiled_weights, weights, strict=True))
    assert any("layer_norm" in code or "gelu" in code for code in graphs), "the model was not compiled"


@pytest.mark.parametrize("placement", ["host", "params"])
def test_a_compiled_optimizer_step(placement: str) -> None:
    """As torch's own recipe has it: the call alone is compiled."""

    def compiled(step: Step, optimizer: Any) -> Step:
        optimizer.step = torch.compile(optimizer.step, backend="eager")
        return step

    expected, weights, _ = trained(PLACEMENTS[placement], 3, lambda step, _: step)
    found, compiled_weights, _ = trained(PLACEMENTS[placement], 3, compiled)
    assert found == expected
    assert all(same_bits(a, b) for a, b in zip(compiled_weights, weights, strict=True))


def test_compiled_code_that_reads_weights_waits_for_their_update() -> None:
    def total(model: nn.Module) -> Tensor:
        return torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum()

    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
    compiled: Any = torch.compile(total, backend="eager")
    for tokens in batches(3):
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert any(isinstance(parameter, PendingParameter) for parameter in model.parameters())
        seen = compiled(model).item()
        assert seen == total(model).item()


def test_a_graph_that_must_not_break_is_told_why_it_does() -> None:
    model = make_model()
    model, _ = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    told = "reason" in inspect.signature(torch.compiler.disable).parameters  # older torch names the hook alone
    why = "offload moves weights and gradients there: compile without fullgraph=True" if told else "ModuleHook"
    with pytest.raises(Exception, match=why):
        compiled(next(batches(1))[:, :-1])


LAST_CALL = """
import torch
from offload._uncompiled import not_compiled
vars(torch._C._dynamo.eval_frame).pop("set_code_exec_strategy", None)  # as torch 2.6 is
@not_compiled
def call(): print("called", flush=True)
class Last:
    def __del__(self, call=call): call()
last = Last()
"""


def test_what_is_not_compiled_may_be_called_first_when_the_program_ends(programs: Programs) -> None:
    assert programs.run(LAST_CALL) == (0, "called\n", "")


def test_under_what_torch_2_6_puts_around_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it shall not be compiled; with a newer torch there is nothing around it."""
    uncompiled = torch._disable_dynamo(PendingParameter.__torch_function__.__func__)  # type: ignore[attr-defined]
    monkeypatch.setattr(PendingParameter, "__torch_function__", classmethod(uncompiled))
    for case in (edges, several_gradients_hooked, a_weight_to_begin_with):
        assert_equal(outcome(case, STREAMED), outcome(case, None), case.__name__)
