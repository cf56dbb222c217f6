"""The public names of DeepSpeed's modules are here as what they are there, or raise and name what to use."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

import offload.deepspeed as ours
from offload.deepspeed import _submodules
from offload.deepspeed.accelerator import Accelerator

# What an accelerator has for DeepSpeed's own use alone: its extensions, graphs, pinned memory and launcher.
INSIDE = {
    "build_extension", "capture_to_graph", "create_graph", "create_op_builder", "export_envs", "get_compile_backend",
    "get_op_builder", "get_rss", "is_current_stream_capturing", "is_triton_supported", "op_builder_dir", "pin_empty",
    "pin_empty_like", "pin_memory_alignment", "prefer_triton_grouped_mm", "register_host_memory", "replay_graph",
    "reset_rss", "set_compile_backend", "set_visible_devices_envs", "supports_nvtx_domain", "unpin_memory",
    "unregister_host_memory", "visible_devices_envs",
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(_submodules._HOMES))
def test_what_is_offered_is_there_with_its_arguments(path: str) -> None:
    theirs = importlib.import_module(f"deepspeed.{path}")
    for name in _submodules._HOMES[path]:
        own, other = getattr(importlib.import_module(f"offload.deepspeed.{path}"), name), getattr(theirs, name)
        assert callable(own) == callable(other), name
        if inspect.isfunction(other) and inspect.isfunction(own):
            assert names_of(own)[: len(names_of(other))] == names_of(other), name


def names_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", sorted(name for name in dir(CPU_Accelerator) if not name.startswith("_")))
def test_accelerators(name: str) -> None:
    if name in INSIDE:
        return
    own, other = getattr(Accelerator("cpu"), name), inspect.getattr_static(CPU_Accelerator, name)
    assert callable(own)
    if inspect.isfunction(other) and inspect.ismethod(own):
        wanted = [p.name for p in inspect.signature(other).parameters.values()][1:]
        assert names_of(own)[: len(wanted)] == wanted


@pytest.mark.parametrize("name", sorted(set(ours.comm.__all__) - {"ReduceOp", "require_one_process"}))
def test_collectives(name: str) -> None:
    """Keywords of theirs are accepted; none of ours has another place."""
    function = getattr(importlib.import_module("deepspeed.comm"), name)
    if names_of(function) == ["args", "kwargs"]:  # under a decorator that takes the time
        function = inspect.getclosurevars(function).nonlocals["func"]
    own, other = inspect.signature(getattr(ours.comm, name)).parameters, names_of(function)
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
    assert takes_more or set(other) <= set(own)
    placed = [name for name, p in own.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert other[: len(placed)] == placed


@pytest.mark.parametrize("module", ["accelerator", "checkpointing", "comm", "ops", "zero"])
def test_the_modules_are_found_by_both_ways(module: str) -> None:
    assert getattr(ours, module) is importlib.import_module(f"offload.deepspeed.{module}")
