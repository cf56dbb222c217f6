"""What one step costs, unit by unit: bytes by placement, and the seconds of a transformer's compute."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import offload
from offload import ParameterSize, UnitWork, transformer_compute, unit_works
from offload._plan import make_plan

_COUNT = 1000


def size(name: str, **more: Any) -> ParameterSize:
    given: dict[str, Any] = {"itemsize": 2, "dtype_name": "bfloat16", "unit": name.partition(".")[0]} | more
    return ParameterSize(name, _COUNT, **given)


MODEL = [size("a.one"), size("a.two"), size("b.one"), size("b.frozen", trainable=False)]


def works(parameters: list[ParameterSize] = MODEL, **places: Any) -> dict[str, UnitWork]:
    config = offload.Config(device_budget=1 << 40, host_budget=1 << 40, **places)
    plan = make_plan(
        parameters,
        config,
        device_kind="cuda",
        device_bytes=1 << 40,
        host_bytes=1 << 40,
        gradient_itemsize=config.gradient_itemsize,
    )
    return {work.name: work for work in unit_works(parameters, plan, config, {"a": (1.0, 2.0)})}


def fields(work: UnitWork) -> dict[str, int]:
    """Its bytes, but for those that are none."""
    return {name: value / _COUNT for name, value in vars(work).items() if name.endswith("_bytes") and value}


HOST = {"optimizer": "host", "gradients": "host", "params": "device"}
# Bytes a parameter of the trained one of `b`; its frozen one has a weight of 2.
CASES: list[tuple[dict[str, Any], dict[str, float]]] = [
    # An update on the host may begin in backward where gradients leave and weights stay.
    (HOST, {"gradient_bytes": 2, "host_update_bytes": 30, "backup_bytes": 12, "upload_bytes": 2}),
    (
        HOST | {"master": "fp32"},
        {"gradient_bytes": 2, "host_update_bytes": 32, "backup_bytes": 14, "upload_bytes": 2},
    ),
    (HOST | {"gradients": "device"}, {"step_to_host_bytes": 2, "host_update_bytes": 30, "upload_bytes": 2}),
    (HOST | {"optimizer": "device"}, {"gradient_bytes": 2, "step_to_device_bytes": 2, "device_update_bytes": 28}),
    (HOST | {"optimizer": "device", "gradients": "device"}, {"device_update_bytes": 28}),
    (HOST | {"params": "host"}, {"gradient_bytes": 2, "host_update_bytes": 30, "weight_bytes": 4}),
    (
        {"optimizer": "device", "gradients": "device", "params": "host"},
        {"step_to_device_bytes": 2, "step_to_host_bytes": 2, "device_update_bytes": 28, "weight_bytes": 4},
    ),
    (
        HOST | {"optimizer": "disk", "disk_path": "somewhere"},
        {
            **{"gradient_bytes": 2, "host_update_bytes": 30, "upload_bytes": 2},
            **{"disk_read_bytes": 10, "disk_write_bytes": 10},
        },
    ),
    (
        HOST | {"params": "disk", "disk_path": "somewhere"},
        {"gradient_bytes": 2, "host_update_bytes": 30, "weight_bytes": 4, "stored_bytes": 4},
    ),
]


@pytest.mark.parametrize(("places", "expected"), CASES)
def test_bytes_by_placement(places: dict[str, Any], expected: dict[str, float]) -> None:
    made = works(**places)
    assert list(made) == ["a", "b"]
    assert fields(made["b"]) == expected
    assert (made["a"].forward_seconds, made["a"].backward_seconds, made["b"].forward_seconds) == (1.0, 2.0, 0.0)


def test_states_that_stay_have_their_gradients_beside_them() -> None:
    made = works(**(HOST | {"optimizer": 0.5}))  # of three trained parameters one stays
    assert fields(made["a"]) == {
        **{"device_update_bytes": 28, "gradient_bytes": 2},
        **{"host_update_bytes": 30, "backup_bytes": 12, "upload_bytes": 2},
    }


def test_weights_that_stay_are_uploaded_after_their_update() -> None:
    made = works([size("root", stays=True), size("a.one")], **(HOST | {"params": "host"}))
    assert fields(made["root"]) == {"gradient_bytes": 2, "host_update_bytes": 30, "upload_bytes": 2}
    assert "upload_bytes" not in fields(made["a"])


def test_activations_count_where_they_leave() -> None:
    config = offload.Config(device_budget=1 << 40, host_budget=1 << 40, activations="host")
    plan = make_plan(MODEL, config, device_kind="cuda", device_bytes=1 << 40, host_bytes=1 << 40)
    (a, b) = unit_works(MODEL, plan, config, {}, activation_bytes={"a": 7})
    assert (a.activation_bytes, b.activation_bytes) == (7, 0)
    assert a.saved_bytes == [3, 4] and b.saved_bytes == []  # of two parameters
    (a, b) = unit_works(MODEL, plan, config, {}, activation_bytes={"a": 7, "b": 5}, checkpointed={"b"})
    assert a.saved_bytes == [3, 4] and b.saved_bytes == [5]
    (a, b) = unit_works(
        MODEL, dataclasses.replace(plan, activations="checkpoints"), config, {}, {"a": 7, "b": 5}, checkpointed={"b"}
    )
    assert (a.activation_bytes, b.activation_bytes) == (0, 5)


def test_a_unit_is_followed_in_its_large_parameters_and_their_chunks() -> None:
    def parts(*counts: int) -> int:
        parameters = [ParameterSize(f"u.{n}", count, 2, "bfloat16", unit="u") for n, count in enumerate(counts)]
        return works(parameters, **HOST)["u"].parts

    assert parts(1000) == 1 and parts(1000, 1000, 1000) == 3
    assert parts(1000, 1000, 10) == 2  # the scale of a norm
    assert parts(12 << 20) == 3  # chunks of 4 Mi elements
    assert parts(1 << 30) == 8


def test_compute_of_a_transformer() -> None:
    parameters = [size("embedding.weight"), size("a.one"), size("a.two")]
    plain = transformer_compute(
        parameters, tokens=10, flops=1e3, checkpointing=False, lookups=["embedding.weight"], attention={"a": 500.0}
    )
    assert plain == {"embedding": (0.0, 0.0), "a": (45.0, 90.0)}
    again = transformer_compute(parameters, tokens=10, flops=1e3, checkpointing=True)
    assert again["a"] == (40.0, 120.0)
