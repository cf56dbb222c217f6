"""Every public name of DeepSpeed's engine is here as what it is there, or raises and names what to use."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import pytest
from deepspeed.runtime.engine import DeepSpeedEngine
from model import Model
from torch import nn

import offload
from offload.deepspeed._engine_elsewhere import elsewhere

METHODS = {name for name in set(dir(DeepSpeedEngine)) - set(dir(nn.Module)) if not name.startswith("_")}
# Properties, and what it assigns to itself.
VALUES = {name for name in METHODS if not callable(getattr(DeepSpeedEngine, name))} | {
    node.attr
    for node in ast.walk(ast.parse(inspect.getsource(DeepSpeedEngine)))
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    if isinstance(node.value, ast.Name) and node.value.id == "self" and not node.attr.startswith("_")
}


@pytest.fixture(scope="module")
def engine() -> Any:
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}, "gradient_clipping": 0.0}
    engine, *_ = offload.initialize(model=Model(), config=config)
    return engine


@pytest.mark.parametrize("name", sorted(METHODS | VALUES))
def test_each_name(engine: Any, name: str) -> None:
    if hasattr(engine, name):
        # A name may be both: wall_clock_breakdown is a method, and assigned to somewhere.
        kinds = {True} if name in METHODS - VALUES else {False} if name in VALUES - METHODS else {True, False}
        assert callable(getattr(engine, name)) in kinds
    else:
        assert elsewhere(name) is not None


def test_the_names_are_those_of_the_engine() -> None:
    assert {"backward", "save_checkpoint", "loss_scale", "global_steps", "is_compiled"} <= METHODS | VALUES
