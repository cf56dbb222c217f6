"""Any order of what users do, with states in formats that are rounded: the same bits in every placement.

Plain torch has no such formats, so the other pair is wrapped too: with everything on the device, and nothing lazy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

import offload
from any_order import Side
from plain_optimizers import OPTIMIZERS
from plain_pair import Model
from test_any_order import AnyOrder, run_programs

pytestmark = pytest.mark.usefixtures("device")

SYNCHRONOUS = {"optimizer": "device", "gradients": "device", "params": "device", "activations": "device", "lazy": False}
ROUNDED = ("AdamW", "AdamW up", "Adam", "Lion")


class RoundedOrder(AnyOrder):
    """The formats are those of all pairs of a program."""

    kinds_of_optimizers = ROUNDED
    formats: dict[str, Any]

    def placement(self, data: Any) -> dict[str, Any]:
        drawn = super().placement(data)
        if not hasattr(self, "formats"):
            self.formats = {
                "moments": data.draw(st.sampled_from(["bf16", "int8"]), label="moments"),
                "rounding_seed": data.draw(st.sampled_from([0, 3]), label="seed"),
            }
            if self.dtype == "bf16":
                self.formats["master"] = data.draw(st.sampled_from(["auto", "bf16"]), label="master")
        if drawn["optimizer"] == "disk":  # moments there are fp32
            drawn["optimizer"] = "host"
        if drawn["params"] == "disk" and self.formats.get("master") == "bf16":
            drawn["params"] = "host"
        return drawn | self.formats | {"grad_dtype": None}

    def sides(self, model: Model, other: Model, left_out: bool, data: Any) -> tuple[Side, Side]:
        placement = self.placement(data)
        kind, options = OPTIMIZERS[self.kind]
        one, optimizer = offload.wrap(
            model, kind(self.first_parameters(model, left_out), **options), **(placement | self.formats | SYNCHRONOUS)
        )
        side = Side(one, optimizer, wrapped=True)
        side.fixed = SYNCHRONOUS
        two, optimizer = offload.wrap(other, kind(self.first_parameters(other, left_out), **options), **placement)
        return side, Side(two, optimizer, wrapped=True)


def test_any_order_with_rounded_states(
    monkeypatch: pytest.MonkeyPatch, disk_calls: Any, disk_path: str, tmp_path: Path
) -> None:
    run_programs(RoundedOrder, monkeypatch, disk_path, tmp_path, programs=6)
