"""`deepspeed.utils.safe_get_full_...` and their like give and take the same values under both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from access_script import CASES, run_under


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("access")
    return {library: run_under(library, Path(folder)) for library in ("deepspeed", "offload")}


@pytest.mark.parametrize("name", CASES)
def test_they_are_the_same(name: str, shown: dict[str, dict[str, Any]]) -> None:
    theirs, ours = shown["deepspeed"][name], shown["offload"][name]
    assert ours.keys() == theirs.keys()
    for what, value in theirs.items():
        if value is None:
            assert ours[what] is None, what
            continue
        assert (ours[what].dtype, ours[what].shape) == (value.dtype, value.shape), what
        # Before anything is updated all bits are the same; then torch's AdamW and ours round in another order.
        tolerance = {} if what.startswith("first") else {"rtol": 1e-6, "atol": 1e-9}
        torch.testing.assert_close(ours[what], value, **tolerance or {"rtol": 0.0, "atol": 0.0}, msg=what)
