"""offload.save_checkpoint() and load_checkpoint(): bits, placements, what is refused, and what plain torch reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from test_checkpoints import assert_bits, bits_of, steps
from training import HOST, RESIDENT, TinyLM, make_model

pytestmark = pytest.mark.usefixtures("device")

STREAMED = {**HOST, "params": "host"}
PLACEMENTS = {"host": HOST, "resident": RESIDENT, "streamed": STREAMED}


def wrapped(
    dtype: torch.dtype, placement: dict[str, Any], *, seed: int = 0, tied: bool = True
) -> tuple[TinyLM, offload.OffloadOptimizer]:
    model = make_model(dtype, seed=seed, tied=tied)
    return offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("saved", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_every_placement_loads_what_every_other_saved(
    saved: dict[str, Any], dtype: torch.dtype, async_save: bool, tmp_path: Path
) -> None:
    model, optimizer = wrapped(dtype, saved)
    steps(model, optimizer)
    expected = bits_of(model, optimizer)
    save = offload.save_checkpoint(
        tmp_path, model, optimizer, tag="first", client_state={"epoch": 2}, async_save=async_save
    )
    steps(model, optimizer, seed=3)
    save.wait()
    gone_on = bits_of(model, optimizer)
    for placement in PLACEMENTS.values():
        other, resumed = wrapped(dtype, placement, seed=5)
        steps(other, resumed, count=1, seed=2)
        loaded = offload.load_checkpoint(tmp_path, other, resumed)
        assert (loaded.tag, loaded.client_state) == ("first", {"epoch": 2})
        assert_bits(bits_of(other, resumed), expected)
        steps(other, resumed, seed=3)
        assert_bits(bits_of(other, resumed), gone_on)
