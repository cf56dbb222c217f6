"""Weights on disk when the disk refuses, fails or lies.

A failed read is told with the weight, the file and the offset, and tried again at the next use. What a failed write, or
a failed update, leaves is refused from then on; unwrap gives a plain pair, and the last checkpoint is good.
"""

from __future__ import annotations

import copy
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from test_disk_states import begin
from test_disk_states_faults import FAULTS, Calls, flip_a_bit, scratch_files
from test_disk_weights import budget_for, deep, weights_on_disk
from training import HOST, Run, assert_same_bits, batches, loss_of, same_bits, train

pytestmark = pytest.mark.usefixtures("device", "disk_calls")


@pytest.fixture(params=["io_uring", "threads"])
def backend(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each back-end that this kernel gives; files go to tmp_path / "disk"."""
    name: str = request.param
    monkeypatch.setenv("OFFLOAD_DISK_BACKEND", name)
    (tmp_path / "disk").mkdir()
    try:
        offload.unwrap(*begin(deep(), weights_on_disk(tmp_path / "disk")))
    except offload.StorageError as refusal:
        assert name == "io_uring" and "io_uring" in str(refusal)
        pytest.skip("this kernel gives no io_uring")
    yield name


def squeezed(path: Path, **options: Any) -> dict[str, Any]:
    """A placement whose cache holds two of the units."""
    placement = weights_on_disk(path, **options)
    return placement | {"host_budget": budget_for(deep(torch.bfloat16), placement)}


def evaluated(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return loss_of(model, next(batches(1, seed=4)))


def reading(backend: str) -> str:
    return "uring_read" if backend == "io_uring" else "pread"


def writing(backend: str) -> str:
    return "uring_write" if backend == "io_uring" else "pwrite"


def continue_from_checkpoint(tmp_path: Path, model: nn.Module, plain: Any, placement: dict[str, Any]) -> None:
    """The checkpoint is that of two steps, and goes on as training that nothing happened to."""
    assert isinstance(plain, torch.optim.AdamW)
    model, optimizer = offload.wrap(model, plain, **placement)
    offload.load_checkpoint(tmp_path / "saved", model, optimizer)
    undisturbed = train(*begin(deep(torch.bfloat16), HOST), steps=2)
    expected = train(undisturbed.model, undisturbed.optimizer, steps=2)
    assert_same_bits(train(model, optimizer, steps=2), expected)
    offload.unwrap(model, optimizer)


def is_told(model: nn.Module, loss: Tensor, path: Path) -> bool:
    """Whether an evaluation raises the error of a read; else it gives `loss`."""
    try:
        assert same_bits(evaluated(model), loss)
        return False
    except offload.StorageError as failure:
        assert failure.errno == errno.EIO and str(path) in str(failure)
        assert "weights on disk: reading" in str(failure) and "offset" in str(failure)
        return True


# --- reads --------------------------------------------------------------------------------------------------


def test_a_failed_read_is_told_and_tried_again(backend: str, tmp_path: Path, disk_calls: Calls) -> None:
    placement = squeezed(tmp_path / "disk")
    expected = train(*begin(deep(torch.bfloat16), HOST), steps=2)
    trained = train(*begin(deep(torch.bfloat16), placement), steps=2)
    model, told = trained.model, 0
    loss = evaluated(expected.model)
    for nth in range(1, 90, 8):
        disk_calls.fail(reading(backend), nth, errno.EIO)
        told += is_told(model, loss, tmp_path / "disk") + is_told(model, loss, tmp_path / "disk")
        disk_calls.fail(reading(backend), 1 << 40, errno.EIO)
        assert same_bits(evaluated(model), loss)
    assert told >= 2
    expected = train(expected.model, expected.optimizer, steps=2)
    assert_same_bits(train(model, trained.optimizer, steps=2), expected)


def test_what_a_disk_has_lost_is_refused_and_given_up(tmp_path: Path, backend: str, disk_calls: Calls) -> None:
    placement = squeezed(tmp_path / "disk")
    trained = train(*begin(deep(torch.bfloat16), placement), steps=2)
    model, optimizer = trained.model, trained.optimizer
    optimizer.synchronize()
    offload.save_checkpoint(tmp_path / "saved", model, optimizer, tag="good")
    flip_a_bit(disk_calls, backend, tmp_path / "disk")
    for _ in range(2):
        with pytest.raises(offload.StorageError, match=r"[\w.]+: weights on disk: reading .*checksum differs"):
            evaluated(model)
    with pytest.raises(offload.StorageError, match="checksum differs"):
        model.state_dict()
    with pytest.raises(offload.StorageError, match="checksum differs"):
        offload.unwrap(model, optimizer)
    with pytest.raises(offload.StateError, match=r"checkpoint.*checksum differs"):
        evaluated(model)
    with pytest.warns(UserWarning, match=r"the disk has lost blocks.*NaN"):
        model, plain = offload.unwrap(model, optimizer)
    assert list((tmp_path / "disk").iterdir()) == [] and list(scratch_files(tmp_path / "disk")) == []
    lost = [value.isnan().any().item() for value in model.state_dict().values()]
    assert any(lost) and all(type(p) is nn.Parameter for p in model.parameters())
    continue_from_checkpoint(tmp_path, model, plain, placement)


# --- steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_while_training(fault: str, backend: str, tmp_path: Path, disk_calls: Calls) -> None:
    placement = squeezed(tmp_path / "disk", optimizer="host" if backend == "threads" else "disk")
    trained = train(*begin(deep(torch.bfloat16), placement), steps=2)
    model, optimizer = trained.model, trained.optimizer
    optimizer.synchronize()
    offload.save_checkpoint(tmp_path / "saved", model, optimizer, tag="good")
    cause, _ = FAULTS[fault]
    cause(disk_calls, backend, tmp_path / "disk")
    with pytest.raises(offload.StorageError, match=r"at offset \d+ of") as failure:
        train(model, optimizer, steps=2)
    assert failure.value.errno in (errno.EIO, None) and str(tmp_path / "disk") in str(failure.value)
    plain = given_up(model, optimizer)
    assert list((tmp_path / "disk").iterdir()) == [] and list(scratch_files(tmp_path / "disk")) == []
    continue_from_checkpoint(tmp_path, model, plain, placement)


def given_up(model: nn.Module, optimizer: offload.OffloadOptimizer) -> Any:
    """The plain optimizer: after a failure the first call may tell of it once more."""
    try:
        return offload.unwrap(model, optimizer)[1]
    except (offload.StorageError, offload.StateError):
        return offload.unwrap(model, optimizer)[1]


@pytest.mark.parametrize("optimizer_on", ["host", "disk"])
def test_a_write_fails_at_every_nth_call(
    optimizer_on: str, tmp_path: Path, disk_calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFLOAD_DISK_BACKEND", "threads")
    (tmp_path / "disk").mkdir()
    placement = squeezed(tmp_path / "disk", optimizer=optimizer_on)
    expected = train(*begin(deep(torch.bfloat16), HOST), steps=4)
    trained = train(*begin(deep(torch.bfloat16), placement), steps=2)
    offload.save_checkpoint(tmp_path / "saved", trained.model, trained.optimizer, tag="good")
    offload.unwrap(trained.model, trained.optimizer)
    failed = 0
    for nth, code in zip(range(1, 400, 57), (errno.EIO, errno.ENOSPC) * 9, strict=False):
        model, optimizer = begin(deep(torch.bfloat16), placement)
        disk_calls.fail("pwrite", nth, code)
        try:
            run = train(model, optimizer, steps=4)
            optimizer.synchronize()
        except offload.StorageError as failure:
            failed += 1
            assert failure.errno == code and "writing" in str(failure) and str(tmp_path / "disk") in str(failure)
            with pytest.raises(offload.StateError, match=r"checkpoint.*writing \d+ bytes at offset"):
                evaluated(model)
            plain = offload.unwrap(model, optimizer)[1]
            continue_from_checkpoint(tmp_path, model, plain, placement)
        else:
            disk_calls.fail("pwrite", 1 << 40, code)
            assert_same_bits(run, expected)
            offload.unwrap(model, optimizer)
        assert list((tmp_path / "disk").iterdir()) == []
    assert failed >= 3


# --- refused at wrap ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "nth"), [("allocate", 1), ("pwrite", 1), ("pwrite", 40)])
def test_a_refusal_at_wrap_leaves_a_plain_pair(
    call: str, nth: int, tmp_path: Path, disk_calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFLOAD_DISK_BACKEND", "threads")
    placement = squeezed(tmp_path)
    model = deep(torch.bfloat16)
    expected = train(*begin(model, HOST), steps=3)
    twin = copy.deepcopy(model)
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    disk_calls.fail(call, nth, errno.ENOSPC)
    with pytest.raises(offload.StorageError) as refusal:
        offload.wrap(twin, plain, **placement)
    assert refusal.value.errno == errno.ENOSPC and str(tmp_path) in str(refusal.value)
    assert list(tmp_path.iterdir()) == [] and list(scratch_files(tmp_path)) == []
    assert all(type(p) is nn.Parameter and p.untyped_storage().nbytes() > 0 for p in twin.parameters())
    assert all(same_bits(*pair) for pair in zip(twin.parameters(), model.parameters(), strict=True))
    assert not twin._forward_pre_hooks and not plain.state
    trained: Run = train(*offload.wrap(twin, plain, **placement), steps=3)
    assert_same_bits(trained, expected)
