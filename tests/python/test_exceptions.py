"""Faults anywhere in a step: the error is the user's own or names what failed, and then training goes on or is refused.

Going on means bit for bit as if nothing had happened. Refused means a StateError that says what to do, from whatever
is called next: no value of a torn step can be read.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload import _copy_lanes
from phases import Trainer, equal
from training import HOST, RESIDENT, batches, loss_of, make_model

PACKAGE = str(Path(offload.__file__).parent)
DEVICE_STATES = {"optimizer": "device", "gradients": "host"}

# What cannot fail, and whose exceptions would have nobody to go to.
QUIET_FILES = ("_interrupts.py",)
QUIET_FUNCTIONS = ("__del__", "__repr__")


class Fault(Exception):
    pass


def run_with(trainer: Trainer, tokens: Tensor, on_call: Callable[[str, str], None]) -> str | None:
    """Runs a step, calling with (phase, function) as functions of the package are entered; the phase that raised."""
    running = None
    before = sys.gettrace()

    def enter(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        quiet = code.co_name in QUIET_FUNCTIONS or code.co_filename.endswith(QUIET_FILES)
        if code.co_filename.startswith(PACKAGE) and not quiet:
            on_call(str(running), f"{code.co_filename}:{code.co_firstlineno}: {code.co_name}")

    try:
        for phase, run in trainer.phases(tokens):
            running = phase
            sys.settrace(enter)
            try:
                run()
            finally:
                sys.settrace(before)
    except Fault:
        return running
    return None


def copy_of(twin: Trainer, placement: dict[str, str], dtype: torch.dtype) -> Trainer:
    trainer = Trainer(placement, dtype, scaled=False)
    trainer.model.load_state_dict(twin.model.state_dict())
    trainer.optimizer.load_state_dict(twin.optimizer.state_dict())
    return trainer


def assert_refused(trainer: Trainer, tokens: Tensor) -> None:
    for call in (
        lambda: trainer.model(tokens),
        trainer.optimizer.step,
        trainer.optimizer.state_dict,
        trainer.optimizer.synchronize,
        lambda: offload.full_params(trainer.model).__enter__(),
    ):
        trainer.model.head.weight.grad = torch.zeros(trainer.model.head.weight.shape)
        with pytest.raises(offload.StateError, match="checkpoint"):
            call()


@pytest.mark.parametrize("placement", [HOST, DEVICE_STATES], ids=["host", "states on the device"])
def test_an_exception_in_every_function(placement: dict[str, str]) -> None:
    dtype = torch.bfloat16
    tokens = next(batches(1, vocabulary=11, size=2, length=3))
    trainer, twin = Trainer(placement, dtype, scaled=False), Trainer(RESIDENT, dtype, scaled=False)
    twin.step(tokens)
    trainer.step(tokens)
    counts: Counter[tuple[str, str]] = Counter()
    run_with(trainer, tokens, lambda phase, function: counts.update([(phase, function)]))
    trainer.begin_again()
    twin.step(tokens)
    refused = []
    before = twin.values()
    for place, count in counts.items():
        left = (count + 1) // 2

        def fail(phase: str, function: str, place: tuple[str, str] = place) -> None:
            nonlocal left
            if (phase, function) == place:
                left -= 1
                if left == 0:
                    raise Fault

        twin.step(tokens)
        after = twin.values()
        run_with(trainer, tokens, fail)
        try:
            trainer.begin_again()
            now = trainer.values()
        except offload.StateError:
            refused.append(place)
            trainer = copy_of(twin, placement, dtype)
        else:
            done = equal(now, after)
            assert done or equal(now, before), place
            if not done:
                trainer.step(tokens)
                assert equal(trainer.values(), after), place
        before = after
    # Only where some parameters had the step and others not.
    assert {phase for phase, _ in refused} == {"step"} and len(refused) < len(counts) / 4, refused


@pytest.mark.parametrize("lane", ["to_host", "to_device"])
def test_every_copy_fails_once(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_copy_lanes, "_SMALL_BYTES", 0)  # a submission each
    dtype = torch.float32
    tokens = next(batches(1, vocabulary=11, size=2, length=3))
    twin = Trainer(RESIDENT, dtype, scaled=False)
    twin.step(tokens)
    trainer = copy_of(twin, HOST, dtype)
    kinds: Counter[str] = Counter()
    for nth in range(1, 200, 3):
        device = trainer.optimizer._engine.device
        before = twin.values()
        twin.step(tokens)
        device.fail_copy(lane, nth)
        try:
            trainer.step(tokens)
        except offload.DeviceError:
            with suppress(offload.OffloadError):
                trainer.begin_again()
        device.fail_copy(lane, 0)
        try:
            now = trainer.values()
        except offload.OffloadError as error:
            kinds["refused"] += 1
            assert "weight" in str(error) or "bias" in str(error)
            assert_refused(trainer, tokens[:, :-1])
            trainer = copy_of(twin, HOST, dtype)
            continue
        if equal(now, before):
            kinds["not done"] += 1
            trainer.step(tokens)
        else:
            kinds["done"] += 1
        assert equal(trainer.values(), twin.values()), nth
        if nth > 100 and kinds["done"] > 3:
            break
    assert kinds["refused"] and kinds["done"], kinds


def tensor_hook(model: nn.Module) -> Any:
    return model.blocks[0].up.weight.register_hook(raise_out_of_memory)


def post_accumulate_hook(model: nn.Module) -> Any:
    return model.blocks[1].down.bias.register_post_accumulate_grad_hook(raise_out_of_memory)


def forward_hook(model: nn.Module) -> Any:
    return model.blocks[1].register_forward_hook(raise_out_of_memory)


def backward_hook(model: nn.Module) -> Any:
    return model.blocks[0].norm.register_full_backward_hook(raise_out_of_memory)


def raise_out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("asked for by the test")


@pytest.mark.parametrize("register", [tensor_hook, post_accumulate_hook, forward_hook, backward_hook])
@pytest.mark.parametrize("closure", [False, True], ids=["loop", "closure"])
def test_a_hook_of_the_user_runs_out_of_memory(register: Callable[[nn.Module], Any], closure: bool) -> None:
    """The user's own error comes out, and after zero_grad() the smaller batch trains as if it had not happened."""
    results = []
    for faulty in (False, True):
        model = make_model()
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
        for tokens in batches(3):

            def run(model: nn.Module = model, optimizer: Any = optimizer, tokens: Tensor = tokens) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, tokens)
                loss.backward()
                return loss

            if faulty:
                handle = register(model)
                with pytest.raises(torch.OutOfMemoryError, match="asked for"):
                    optimizer.step(run) if closure else run()
                handle.remove()
            if closure:
                optimizer.step(run)
            else:
                run()
                optimizer.step()
        results.append(dict(model.state_dict()))
    assert equal(*results)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_gradient_that_no_step_read_is_forgotten(failing: int) -> None:
    """zero_grad() drops it: its error belongs to whoever reads it, not to the next one who uses the lane."""
    results = []
    for faulty in (False, True):
        model = make_model()
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
        for tokens in batches(2):
            if faulty:
                optimizer._engine.device.fail_copy("to_host", failing)
                loss_of(model, tokens).backward()
                optimizer.zero_grad()
            loss_of(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(dict(model.state_dict()))
    assert equal(*results)


def test_a_wrap_that_fails_changes_nothing() -> None:
    """The states of the second optimizer are not legal: neither model nor optimizers know that it was tried."""
    model = make_model()
    blocks, rest = list(model.blocks.parameters()), list(model.embedding.parameters())
    optimizers = [torch.optim.AdamW(parameters, lr=1e-2) for parameters in (blocks, rest)]
    loss_of(model, next(batches(1))).backward()
    for optimizer in optimizers:
        optimizer.step()
    good = optimizers[1].state[rest[0]]["exp_avg"]
    optimizers[1].state[rest[0]]["exp_avg"] = torch.zeros(3)
    with pytest.raises(offload.InvalidArgument, match="exp_avg has shape"):
        offload.wrap(model, optimizers, **HOST)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())  # type: ignore[attr-defined]
    assert [len(optimizer.state) for optimizer in optimizers] == [len(blocks), len(rest)]
    optimizers[1].state[rest[0]]["exp_avg"] = good
    for optimizer in optimizers:
        optimizer.step()
    model, wrapped = offload.wrap(model, optimizers, **HOST)
    for optimizer in wrapped:
        optimizer.step()
