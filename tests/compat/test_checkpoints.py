"""Checkpoints that DeepSpeed writes, one rank, load: weights, moments, counters and client state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES
from model import Model

import offload
from offload.deepspeed._zero_checkpoint import load_zero_checkpoint

SAVED = [case for case in CASES if "save" in case]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", SAVED, ids=lambda case: case["name"])
def test_its_checkpoint_loads(case: dict[str, Any], theirs: dict[str, Any], folder: Path) -> None:
    expected = theirs[case["name"]]
    assert "error" not in expected, expected["error"]
    torch.manual_seed(1)
    model = Model()
    if "bf16" in case["config"]:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    _, wrapped = offload.wrap(model, optimizer, params="host" if "offload_param" in str(case["config"]) else "device")
    loaded = load_zero_checkpoint(folder / case["name"], model, wrapped)
    assert loaded.client_state["words"] == "of the script"
    assert loaded.client_state["global_steps"] == case["steps"]
    weights = {name: weight.float().tolist() for name, weight in model.state_dict().items()}
    for name, values in expected["weights"].items():
        assert weights[name] == values, name
    group = wrapped.param_groups[0]
    assert group["lr"] == 5e-3 and tuple(group["betas"]) == (0.9, 0.98)
    for parameter, state in wrapped.state_dict()["state"].items():
        assert state["step"] == case["steps"], parameter
        assert state["exp_avg"].abs().sum() > 0
