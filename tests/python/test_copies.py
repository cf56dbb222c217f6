"""Copies: a copied or pickled model is plain, current and independent; an optimizer is copied by its state_dict."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import offload
from training import HOST, batches, loss_of, make_model, same_bits


def trained(*, pending: bool) -> tuple[nn.Module, Any]:
    """A model after a step, with gradients held; pending: its update waits for the first who asks."""
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
    loss_of(model, next(batches(1))).backward()
    optimizer.step()
    if not pending:
        optimizer.synchronize()
    return model, optimizer


def through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


MODEL_COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_file,
    "a copy of a copy": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(through_file(model)))),
}


def assert_plain(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert type(parameter) is nn.Parameter
        assert not vars(parameter) and not parameter._backward_hooks
        assert not parameter._post_accumulate_grad_hooks  # type: ignore[attr-defined]
        assert type(parameter.grad) in (type(None), torch.Tensor)


@pytest.mark.parametrize("pending", [False, True], ids=["current", "pending"])
@pytest.mark.parametrize("name", MODEL_COPIES)
def test_a_copied_model_is_plain_current_and_independent(name: str, pending: bool) -> None:
    model, optimizer = trained(pending=pending)
    copied = MODEL_COPIES[name](model)
    assert_plain(copied)
    plain = copy.deepcopy(copied)
    before = {key: value.clone() for key, value in copied.state_dict().items()}
    for key, value in model.state_dict().items():
        assert same_bits(before[key], value)

    # The original steps on: the copy stays. The copy trains as any model: nothing of ours runs.
    submitted = optimizer.stats().transfers
    for candidate in (copied, plain):
        its = torch.optim.AdamW(candidate.parameters(), lr=1e-2)
        for tokens in batches(2):
            loss_of(candidate, tokens).backward()
            assert_plain(candidate)
            its.step()
            its.zero_grad()
    assert optimizer.stats().transfers == submitted
    optimizer.step()
    optimizer.synchronize()
    trained_copy = copied.state_dict()
    assert not same_bits(trained_copy["head.weight"], model.state_dict()["head.weight"])

    # And it can be wrapped itself.
    copied, wrapped = offload.wrap(copied, torch.optim.AdamW(copied.parameters()), **HOST)
    loss_of(copied, next(batches(1))).backward()
    wrapped.step()
    assert wrapped.stats().transfers["to_host_bytes"] > 0


def test_a_pickled_model_loads_without_offload(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **HOST)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(model, tmp_path / "model.pt")
    expected = model(torch.ones(1, 3))
    code = """
import sys
sys.modules["offload"] = None  # an import fails
import torch
model = torch.load(sys.argv[1], weights_only=False)
print(model(torch.ones(1, 3)).tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert done.stdout.strip() == str(expected.tolist())


def test_averaged_models() -> None:
    """swa_utils: the average of a model that is wrapped before or after, fed after every lazy step."""
    results = []
    for wrapping in (None, "before", "after"):
        model: nn.Module = make_model()
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
        resident = {"optimizer": "device", "gradients": "device"}
        if wrapping != "after":
            model, optimizer = offload.wrap(model, optimizer, **(HOST if wrapping else resident))
        swa = AveragedModel(model)
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        if wrapping == "after":
            model, optimizer = offload.wrap(model, optimizer, **HOST)
        for tokens in batches(3):
            loss_of(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            swa.update_parameters(model)
            ema.update_parameters(model)
        update_bn(iter([]), swa)
        assert_plain(swa)
        assert_plain(ema)
        results.append([value.clone() for one in (swa, ema) for value in one.state_dict().values()])
    for others in results[1:]:
        assert all(same_bits(one, other) for one, other in zip(results[0], others, strict=True))


@pytest.mark.parametrize("pending", [False, True], ids=["current", "pending"])
def test_an_optimizer_is_copied_by_its_state_dict(pending: bool) -> None:
    model, optimizer = trained(pending=pending)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps, lambda it: torch.save(it, io.BytesIO())):
        with pytest.raises(offload.StateError, match=r"state_dict\(\)"):
            attempt(optimizer)
    copied = copy.deepcopy(model)
    copied, its = offload.wrap(copied, torch.optim.AdamW(copied.parameters(), lr=1e-2), **HOST)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    its.load_state_dict(torch.load(file, weights_only=True))
    for candidate, stepping in ((model, optimizer), (copied, its)):
        stepping.zero_grad()
        loss_of(candidate, next(batches(1))).backward()
        stepping.step()
    for one, other in zip(model.parameters(), copied.parameters(), strict=True):
        assert same_bits(one.detach(), other.detach())


def test_a_scheduler_saves_without_its_optimizer() -> None:
    _, optimizer = trained(pending=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    composed = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.ConstantLR(optimizer), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)],
        [2],
    )
    optimizer.step()
    for one in (scheduler, composed):
        one.step()
        state = pickle.loads(pickle.dumps(one.state_dict()))
        one.load_state_dict(state)
        assert "optimizer" not in state


def test_shared_memory_after_wrap() -> None:
    """share_memory() moves the weights: they are followed, the states stay, training keeps its bits."""
    results = []
    for share in (False, True):
        model, optimizer = trained(pending=True)
        if share:
            model.share_memory()
            assert all(parameter.is_shared() for parameter in model.parameters())
        for tokens in batches(2):
            optimizer.zero_grad()
            loss_of(model, tokens).backward()
            optimizer.step()
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(same_bits(one, other) for one, other in zip(*results, strict=True))


def test_state_dict_of_a_pending_model_goes_to_a_file() -> None:
    model, _ = trained(pending=True)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert all(same_bits(loaded[name], value) for name, value in model.state_dict().items())


def report_of(model: nn.Module, queue: Any) -> None:
    """Runs in a spawned process: trains the plain model it was given."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_of(model, next(batches(1))).backward()
    optimizer.step()
    queue.put((os.getpid(), model.head.weight.detach().numpy().tobytes()))


def test_a_spawned_process_gets_a_plain_model() -> None:
    model, _ = trained(pending=True)
    here = copy.deepcopy(model)
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=report_of, args=(pickle.loads(pickle.dumps(model)), queue))
    process.start()
    pid, there = queue.get()
    process.join(60)
    assert process.exitcode == 0 and pid != os.getpid()
    local = multiprocessing.SimpleQueue()
    report_of(here, local)
    assert local.get()[1] == there
