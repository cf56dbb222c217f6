"""The same script and JSON under DeepSpeed and under offload: losses, rates, norms, skipped steps, loss scales."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from cases import CASES


def flat(values: Any) -> Iterator[float]:
    if isinstance(values, list):
        for value in values:
            yield from flat(value)
    else:
        yield values


def close(value: float, expected: float, tolerance: float) -> bool:
    return value == expected or math.isclose(value, expected, rel_tol=tolerance, abs_tol=0.0)


@pytest.mark.timeout(900)  # the first one compiles DeepSpeed's optimizer and runs all trainings
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_agrees_step_by_step(case: dict[str, Any], theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    expected, seen, tolerance = theirs[case["name"]], ours[case["name"]], case["tolerance"]
    assert "error" not in expected, expected["error"]
    assert "error" not in seen, seen["error"]
    assert len(seen["losses"]) == len(expected["losses"])
    assert seen["losses"][0] == expected["losses"][0]
    for number, (loss, wanted) in enumerate(zip(seen["losses"], expected["losses"], strict=True)):
        assert close(loss, wanted, tolerance.loss), f"loss of micro-batch {number}: {loss}, DeepSpeed's is {wanted}"
    for number, (step, wanted) in enumerate(zip(seen["steps"], expected["steps"], strict=True)):
        for key in ("lr", "skipped", "scale"):
            assert step[key] == wanted[key], f"{key} after step {number}"
        if wanted["norm"] is not None:  # DeepSpeed has none where no optimizer of its own is around the client's
            assert close(step["norm"], wanted["norm"], tolerance.norm), f"norm of step {number}"
    assert seen["weights"].keys() == expected["weights"].keys()
    pairs = [
        (value, wanted)
        for name, values in expected["weights"].items()
        for value, wanted in zip(flat(seen["weights"][name]), flat(values), strict=True)
    ]
    assert max(abs(value - wanted) for value, wanted in pairs) <= tolerance.weight
    assert sum(value == wanted for value, wanted in pairs) >= tolerance.same_weights * len(pairs)


def test_the_cases_are_what_their_names_say(theirs: dict[str, Any]) -> None:
    for case in CASES:
        skipped = theirs[case["name"]]["steps"][-1]["skipped"]
        overflows = "fp16" in case["config"] and case["config"]["fp16"].get("loss_scale", 0) != 512
        assert (skipped > 0) == overflows, case["name"]
    for name in ("fp16 window", "fp16 window, consecutive hysteresis"):
        scales = [step["scale"] for step in theirs[name]["steps"]]
        assert any(after > before for before, after in pairwise(scales)), "the scale rises, too"
