"""The forecast of a step beside the engine itself, on a clock that only copies and compute move."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import offload
from engine_clock import Block, EngineClock
from offload import Machine, ParameterSize, forecast, unit_works

pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.cpu_only]

_UNITS, _WEIGHTS = 4, 2
_ELEMENTS = 160 << 10  # larger than what shares an upload with others
_BYTES = 2 * _ELEMENTS

HOST = {"optimizer": "host", "gradients": "host", "params": "device"}
# By name: placements, micro-batches, clipping, rates in weights a second, seconds of forward and backward of a unit.
SETTINGS: dict[str, tuple[dict[str, Any], int, bool, tuple[float, float], tuple[float, float]]] = {
    "host": (HOST, 1, False, (2, 2), (1, 2)),
    "host, clipped": (HOST, 1, True, (2, 2), (1, 2)),
    "host, slow to_host": (HOST, 1, True, (0.5, 2), (1, 2)),
    "host, slow to_device": (HOST, 1, True, (2, 0.4), (1, 2)),
    "host, three micro-batches": (HOST, 3, True, (2, 2), (1, 2)),
    "host, three micro-batches, slow links": (HOST, 3, False, (0.7, 0.6), (1, 2)),
    "host, not lazy": (HOST | {"lazy": False}, 1, True, (2, 1), (1, 2)),
    "half of the states": (HOST | {"optimizer": 0.5}, 1, True, (1, 1), (1, 2)),
    "optimizer alone": (HOST | {"gradients": "device"}, 1, True, (1, 1), (1, 2)),
    "optimizer alone, two micro-batches": (HOST | {"gradients": "device"}, 2, False, (1, 1), (1, 2)),
    "gradients alone": (HOST | {"optimizer": "device"}, 1, True, (2, 1), (1, 2)),
    "gradients alone, two micro-batches": (HOST | {"optimizer": "device"}, 2, True, (2, 1), (1, 2)),
    "all": (HOST | {"params": "host", "prefetch": 1}, 1, True, (2, 2), (1, 2)),
    "all, slow to_device": (HOST | {"params": "host", "prefetch": 1}, 1, True, (2, 0.5), (1, 2)),
    "all, prefetch 2": (HOST | {"params": "host", "prefetch": 2}, 1, True, (2, 0.5), (1, 2)),
    "all, two micro-batches": (HOST | {"params": "host", "prefetch": 1}, 2, True, (1, 0.8), (1, 2)),
    "device": ({"optimizer": "device", "gradients": "device", "params": "device"}, 2, True, (1, 1), (1, 2)),
}


def predicted(name: str) -> float:
    options, micro_batches, clips, (to_host, to_device), seconds = SETTINGS[name]
    sizes = [
        ParameterSize(f"{unit}.weights.{number}", _ELEMENTS, 2, "bfloat16", unit=str(unit))
        for unit in range(_UNITS)
        for number in range(_WEIGHTS)
    ]
    config = offload.Config(**options)
    on_meta = nn.Sequential(*(Block(None, 0, 0, _WEIGHTS, _ELEMENTS) for _ in range(_UNITS))).to("meta")  # type: ignore[arg-type]
    works = unit_works(sizes, offload.estimate(on_meta, **options), config, {work.unit: seconds for work in sizes})
    machine = Machine(to_host * _BYTES, to_device * _BYTES, host_update=1e30, device_update=1e30, synchronous=True)
    return forecast(
        works,
        machine,
        micro_batches=micro_batches,
        clips=clips,
        prefetch=config.prefetch or 1,
        lazy=config.lazy,
    ).seconds


def measured(name: str, monkeypatch: pytest.MonkeyPatch) -> float:
    options, micro_batches, clips, (to_host, to_device), seconds = SETTINGS[name]
    clock = EngineClock(monkeypatch, to_host=to_host * _BYTES, to_device=to_device * _BYTES)
    model: nn.Module = nn.Sequential(*(Block(clock, *seconds, _WEIGHTS, _ELEMENTS) for _ in range(_UNITS)))
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = offload.wrap(model, optimizer, activations="device", **options)
    began = []
    for _ in range(5):
        began.append(clock.seconds)
        for _ in range(micro_batches):
            model(torch.zeros(1, dtype=torch.bfloat16)).sum().backward()
        if clips:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    offload.unwrap(model, optimizer)
    # States are made, and orders recorded, in the first steps.
    return (began[-1] - began[-3]) / 2


@pytest.fixture(scope="module")
def steps() -> dict[str, float]:
    """Seconds of a step of every setting by the engine."""
    found = {}
    for name in SETTINGS:
        with pytest.MonkeyPatch.context() as patch:
            found[name] = measured(name, patch)
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_the_engine_takes_the_seconds_of_the_forecast(name: str, steps: dict[str, float]) -> None:
    assert steps[name] == pytest.approx(predicted(name), rel=1e-3)


def test_the_forecast_orders_settings_as_the_engine_does(steps: dict[str, float]) -> None:
    for one, other in itertools.combinations(SETTINGS, 2):
        if abs(steps[one] - steps[other]) > 1e-3 * steps[one]:
            assert (steps[one] < steps[other]) == (predicted(one) < predicted(other)), f"{one} and {other}"
