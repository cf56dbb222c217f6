"""What module hooks are to torch.compile: it calls them, and compiles neither them nor what they call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload._hooks import ForwardHook, ModuleHook


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Outer(nn.Module):
    """The hooks are on a part, so that another function's compilation comes to them."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Affine()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + 1


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("of", [lambda outer: outer.part, lambda outer: outer], ids=["of a part", "of the whole"])
def test_compiled_code_calls_hooks_and_compiles_nothing_of_them(of: Callable[[Outer], nn.Module]) -> None:
    graphs: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    def computes(given: Tensor) -> Tensor:
        return given.sin()

    calls: list[str] = []

    def before() -> None:
        calls.append("before")
        computes(torch.ones(3))

    def after(_: Any, output: Tensor) -> None:
        calls.append("after")
        computes(output)

    outer = Outer()
    of(outer).register_forward_pre_hook(ModuleHook(before), prepend=True)
    of(outer).register_forward_hook(ForwardHook(after), always_call=True)
    compiled: Any = torch.compile(outer, backend=backend)
    x = torch.arange(4.0)
    for _ in range(3):
        assert torch.equal(compiled(x), x + 1)
    assert calls == ["before", "after"] * 3
    assert not [code for code in graphs if "sin" in code]


def test_an_own_compiled_part_still_is_after_hooks_were_called() -> None:
    """The hooks of one call turn compilation off for themselves only."""
    graphs: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    part = Affine()
    part.register_forward_pre_hook(ModuleHook(lambda: None), prepend=True)
    x = torch.arange(4.0)
    part(x)
    compiled: Any = torch.compile(lambda given: given.cos(), backend=backend)
    assert torch.equal(compiled(x), x.cos())
    assert [code for code in graphs if "cos" in code]
