"""A run that is killed with SIGKILL again and again, and resumed each time, ends with the bits of one never stopped."""

from __future__ import annotations

import multiprocessing
import random
import signal
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from killed_run import MICRO_BATCHES, SAVE_EVERY, STEPS, Death, Life, live
from training import HOST, RESIDENT, same_bits

OPTIMIZER_ALONE = {"optimizer": "host", "gradients": "device"}


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Each process is forked from a server that has imported torch and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "offload"])  # torch.optim imports dynamo at first use
    return context


def run_life(processes: ForkServerContext, folder: Path, dtype: torch.dtype, scaled: bool, life: Life) -> None:
    process = processes.Process(target=live, args=(folder, dtype, scaled, life))
    process.start()
    process.join()
    assert process.exitcode == (0 if life.death is None else -signal.SIGKILL)


def checkpoint_of(folder: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["step"] == STEPS
    return saved


def assert_equal(name: str, one: Any, other: Any) -> None:
    assert type(one) is type(other), name
    if isinstance(one, torch.Tensor):
        assert same_bits(one, other), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_equal(f"{name}.{key}", one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), name
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_equal(f"{name}.{index}", left, right)
    else:
        assert one == other or (one != one and other != other), name  # the norm of gradients that overflowed is NaN


def deaths(seed: int) -> list[Death]:
    """Moments all over the run, among them the middle of a save; some undo steps that were not saved yet."""
    generator = random.Random(seed)
    moments: list[Any] = [*range(1, MICRO_BATCHES + 1), "stepped", "saving"]
    generator.shuffle(moments)
    chosen = []
    for index, moment in enumerate(moments):
        step = 2 * index + generator.randint(1, 3)
        if moment == "saving":
            step = step // SAVE_EVERY * SAVE_EVERY + SAVE_EVERY - 1
        chosen.append(Death(step, moment, saved_bytes=generator.randint(1, 60_000)))
    return chosen


PLACEMENTS: dict[str, list[dict[str, Any]]] = {
    "host": [HOST],
    "another each time": [HOST, RESIDENT, OPTIMIZER_ALONE, {**HOST, "master": "fp32"}, RESIDENT],
}


@pytest.mark.parametrize(
    ("dtype", "scaled"),
    [(torch.bfloat16, False), (torch.float32, True), (torch.float16, False)],
    ids=["bf16", "fp32 with GradScaler", "fp16"],
)
def test_killed_and_resumed_equals_never_stopped(
    dtype: torch.dtype, scaled: bool, processes: ForkServerContext, tmp_path: Path
) -> None:
    straight = tmp_path / "straight"
    straight.mkdir()
    run_life(processes, straight, dtype, scaled, Life(HOST))
    expected = checkpoint_of(straight)
    assert len(expected["losses"]) == STEPS * MICRO_BATCHES
    if scaled:
        assert expected["scaler"]["scale"] != 2.0**20
    for seed, (name, placements) in enumerate(PLACEMENTS.items()):
        folder = tmp_path / name
        folder.mkdir()
        for index, death in enumerate([*deaths(seed), None]):
            placement = placements[index % len(placements)]
            run_life(processes, folder, dtype, scaled, Life(placement, death, rewrap=index % 2 == 1))
        assert checkpoint_of(folder)["losses"] == expected["losses"]
        assert_equal(name, checkpoint_of(folder), expected)


def test_a_save_that_was_killed_leaves_the_checkpoint_before_it(processes: ForkServerContext, tmp_path: Path) -> None:
    death = Death(3, "saving", saved_bytes=10_000)
    run_life(processes, tmp_path, torch.bfloat16, False, Life(HOST, death))
    assert (tmp_path / "checkpoint.unfinished").stat().st_size == 10_000
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
