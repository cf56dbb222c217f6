"""`wrap(activations="host")`: the forward of the model sends what it saves, and training keeps its bits."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import offload
from activation_models import MODELS, llama
from copy_schedule import CopySchedule
from offload import _activations, _checkpoint_inputs
from test_exceptions import PACKAGE, QUIET_FILES, QUIET_FUNCTIONS
from test_memory import Allocations
from training import HOST, RESIDENT, same_bits

pytestmark = pytest.mark.usefixtures("device", "small_leave")

OFF = HOST | {"activations": "host"}
ON = RESIDENT | {"activations": "device"}


@pytest.fixture
def small_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_activations, "MIN_BYTES", 1)


class Training:
    """A model of the table under one placement, and what its steps gave."""

    def __init__(
        self, name: str, placement: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        torch.manual_seed(0)
        model, self.loss_of = MODELS[name]()
        self.model, self.optimizer = offload.wrap(
            model.to(dtype), torch.optim.AdamW(model.parameters(), lr=1e-2), **placement, **options
        )
        self.losses: list[float] = []

    def forward(self, seed: int) -> Tensor:
        return self.loss_of(self.model, seed)

    def steps(self, count: int, *, micro_batches: int = 1, clip: bool = False, autocast: bool = False) -> Training:
        for step in range(count):
            for index in range(micro_batches):
                with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=autocast):
                    loss = self.forward(micro_batches * step + index)
                loss.backward()
                self.losses.append(loss.item())
            if clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    @property
    def activations(self) -> Any:
        return self.optimizer._engine.activations


def hooks_are_active() -> bool:
    """Whether some hooks would be asked for what is saved now: then torch takes no others for it."""
    with torch.enable_grad():
        y = torch.ones((), requires_grad=True).exp()
    try:
        y.grad_fn._raw_saved_result.register_hooks(lambda tensor: tensor, lambda tensor: tensor)
    except RuntimeError:
        return True
    return False


def assert_same(one: Training, other: Training) -> None:
    assert one.losses == other.losses
    values = other.model.state_dict()
    for name, value in one.model.state_dict().items():
        assert same_bits(value, values[name]), name


def assert_nothing_left(training: Training) -> None:
    assert not hooks_are_active()
    activations = training.activations
    activations.settle()
    assert (activations._live_bytes, activations._device_bytes, activations._host_bytes) == (0, 0, 0)
    assert training.optimizer.stats().host_bytes["activations"] == 0


def assert_offloaded(training: Training) -> None:
    stats = training.optimizer.stats().activations
    assert stats["offloaded_bytes"] > 0.6 * stats["saved_bytes"] > 0 and stats["refused_bytes"] == 0


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("loop", [{"clip": True}, {"micro_batches": 3}], ids=["clip", "accumulate"])
@pytest.mark.parametrize("name", ["tiny", "checkpointed", "checkpointed reentrant", "tied", "frozen"])
def test_the_matrix_has_the_same_bits(name: str, loop: dict[str, Any], arithmetic: str) -> None:
    dtype = torch.bfloat16 if arithmetic == "bfloat16" else torch.float32
    runs = [
        Training(name, placement, dtype).steps(5, autocast=arithmetic == "autocast", **loop) for placement in (OFF, ON)
    ]
    assert_offloaded(runs[0])
    assert_same(*runs)
    assert_nothing_left(runs[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "encoder", "convolutional", "lstm", "experts"])
def test_models_have_the_same_bits(name: str) -> None:
    runs = [Training(name, placement).steps(3, micro_batches=2, clip=True) for placement in (OFF, ON)]
    assert_offloaded(runs[0])
    assert_same(*runs)
    assert_nothing_left(runs[0])


def test_activations_alone_leave() -> None:
    alone = Training("tiny", RESIDENT | {"activations": "host"}).steps(3)
    assert_offloaded(alone)
    assert_same(alone, Training("tiny", ON).steps(3))


# --- some of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["checkpointed", "checkpointed reentrant"])
def test_only_the_inputs_of_checkpoints_leave(name: str) -> None:
    training = Training(name, HOST | {"activations": "checkpoints"}).steps(3)
    block_input = 4 * 6 * 24 * 4
    assert training.optimizer.stats().activations["saved_bytes"] == 3 * block_input
    assert training.optimizer.stats().activations["offloaded_bytes"] == 2 * block_input, "the newest stays"
    assert_same(training, Training(name, ON).steps(3))


def test_a_torch_whose_checkpoints_are_not_recognised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check = _checkpoint_inputs.check_checkpoints_are_recognised
    check.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(_checkpoint_inputs.checkpoint, "__file__", "elsewhere.py")
        with pytest.raises(offload.StateError, match=r"activations='checkpoints': torch .* is not known here"):
            Training("checkpointed", HOST | {"activations": "checkpoints"})
    Training("checkpointed", HOST | {"activations": "checkpoints"})
    with torch.no_grad():
        check.cache_clear()
        check()


def test_without_checkpoints_nothing_of_them_leaves() -> None:
    training = Training("tiny", HOST | {"activations": "checkpoints"}).steps(1)
    assert training.optimizer.stats().activations["saved_bytes"] == 0


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_share_leaves(share: float) -> None:
    training = Training("tiny", HOST | {"activations": share}).steps(3)
    stats = training.optimizer.stats().activations
    largest = 4 * 6 * 48 * 4
    assert abs(stats["offloaded_bytes"] - share * stats["saved_bytes"]) <= largest
    assert_same(training, Training("tiny", ON).steps(3))


def test_no_more_than_a_budget_leaves() -> None:
    training = Training("tiny", HOST | {"activations": "16KiB"}).steps(3)
    stats = training.optimizer.stats()
    assert 8 << 10 < stats.activations["offloaded_bytes"] <= 16 << 10
    assert training.optimizer.plan.activation_host_bytes == 16 << 10
    assert stats.host_bytes["activations"] == 0
    assert_same(training, Training("tiny", ON).steps(3))


def test_nothing_leaves_by_itself() -> None:
    for value in ("auto", "device", 0.0):
        training = Training("tiny", HOST | {"activations": value}).steps(1)
        assert training.activations is None and training.optimizer.plan.activations == "device"
        assert training.optimizer.stats().activations == {}


@pytest.mark.parametrize("compiled", ["blocks", "model"])
def test_compiled_models(compiled: str) -> None:
    def run(placement: dict[str, Any]) -> list[float]:
        torch._dynamo.reset()
        training = Training("tiny", placement)
        if compiled == "blocks":
            for block in training.model.blocks:
                block.compile(backend="aot_eager")
            return training.steps(3).losses
        call = torch.compile(training.model, backend="aot_eager")
        losses = []
        for seed in range(3):
            loss = training.loss_of(call, seed)
            loss.backward()
            training.optimizer.step()
            training.optimizer.zero_grad()
            losses.append(loss.item())
        assert not hooks_are_active()
        return losses

    assert run(OFF) == run(ON)


# --- the forward's context ----------------------------------------------------------------------------------


class Fault(Exception):
    pass


@pytest.mark.parametrize("where", ["forward", "hook before forward"])
@pytest.mark.parametrize("kind", [Fault, MemoryError, KeyboardInterrupt])
def test_after_an_exception_the_next_forward_starts_clean(kind: type[BaseException], where: str) -> None:
    training = Training("tiny", OFF)

    def fail(*_: Any) -> None:
        raise kind

    module = training.model.blocks[1] if where == "forward" else training.model
    handle = module.register_forward_pre_hook(fail)
    for _ in range(2):
        with pytest.raises(kind):
            training.forward(0)
    handle.remove()
    if kind is not KeyboardInterrupt:
        assert not hooks_are_active()
    training.steps(2)
    assert_nothing_left(training)
    assert_same(training, Training("tiny", ON).steps(2))


def interrupted(training: Training) -> Training:
    """Ctrl-C has ended a forward of it."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = training.model.norm.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        training.forward(0)
    handle.remove()
    return training


def test_after_ctrl_c_and_unwrap_no_hook_is_left() -> None:
    training = interrupted(Training("tiny", OFF))
    offload.unwrap(training.model, training.optimizer)
    assert not hooks_are_active()


def test_after_ctrl_c_another_wrapped_model_leaves_no_hook_of_the_first() -> None:
    """Somebody makes model and optimizer anew instead of going on: what the old ones had would stay for ever."""
    interrupted(Training("tiny", OFF))
    gc.collect()
    other = Training("tiny", OFF).steps(1)
    assert not hooks_are_active()
    assert_same(other, Training("tiny", ON).steps(1))


def test_a_model_goes_on_around_one_that_was_interrupted() -> None:
    inner, outer = Training("tiny", OFF), Training("tiny", OFF)
    outer.model.norm.register_forward_pre_hook(lambda *_: (interrupted(inner), None)[1])
    outer.steps(1)
    assert not hooks_are_active()


def test_after_ctrl_c_hooks_of_the_user_are_not_taken_for_ours() -> None:
    training = interrupted(Training("tiny", OFF))
    seen: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: seen.append(tensor.detach()) or tensor.detach(), lambda tensor: tensor):
        training.forward(0).backward()
        count = len(seen)
        assert hooks_are_active() and len(seen) == count + 1
    training.optimizer.zero_grad()
    training.steps(1)
    assert not hooks_are_active()


def test_a_model_that_calls_itself(device: torch.device) -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor, depth: int = 3) -> Tensor:
            if depth:
                x = self(x.sin(), depth - 1)
                assert hooks_are_active()
            return self.layer(x).sin()

    losses = []
    for placement in (OFF, ON):
        torch.manual_seed(0)
        model = Recursive()
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **placement)
        for _ in range(2):
            hooked = placement is OFF
            with nullcontext() if hooked else saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
                loss = model(torch.ones(4, 8)).sum()
            assert not hooks_are_active()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:2] == losses[2:]


def test_no_grad_and_eval_save_nothing() -> None:
    training = Training("tiny", OFF)
    with torch.no_grad():
        training.forward(0)
    with torch.inference_mode():
        training.forward(0)
    assert training.optimizer.stats().activations["saved_bytes"] == 0 and not hooks_are_active()


def test_a_copy_of_the_model_is_a_plain_model() -> None:
    training = Training("tiny", OFF).steps(1)
    twin = copy.deepcopy(training.model)
    before = training.optimizer.stats().activations
    training.loss_of(twin, 0).backward()
    assert training.optimizer.stats().activations == before


def test_backward_after_unwrap_and_after_the_model_is_gone() -> None:
    expected = Training("tiny", ON)
    expected.forward(0).backward()
    gradient = expected.model.head.weight.grad
    training = Training("tiny", OFF)
    loss = training.forward(0)
    model, _ = offload.unwrap(training.model, training.optimizer)
    loss.backward()
    assert same_bits(model.head.weight.grad, gradient)
    training = Training("tiny", OFF)
    loss, weight = training.forward(0), training.model.head.weight
    del training
    gc.collect()
    loss.backward()
    assert same_bits(torch.as_tensor(weight.grad) * 1, gradient)


def test_unwrap_leaves_no_hook() -> None:
    training = Training("tiny", OFF).steps(1)
    model, _ = offload.unwrap(training.model, training.optimizer)
    assert not model._forward_pre_hooks and not model._forward_hooks and not model._forward_hooks_always_called


def functions_entered(training: Training) -> Callable[[int], int]:
    """A forward and backward that raise as the n-th function of the package is entered, and return how many were."""
    before = sys.gettrace()

    def run(nth: int) -> int:
        count = 0

        def enter(frame: FrameType, event: str, _: Any) -> None:
            nonlocal count
            code = frame.f_code
            quiet = code.co_name in QUIET_FUNCTIONS or code.co_filename.endswith(QUIET_FILES)
            if code.co_filename.startswith(PACKAGE) and not quiet:
                count += 1
                if count == nth:
                    raise Fault

        sys.settrace(enter)
        try:
            training.forward(0).backward()
        finally:
            sys.settrace(before)
        return count

    return run


@pytest.mark.cpu_only
@pytest.mark.parametrize("form", ["exact", "int8"])
def test_an_exception_anywhere_in_our_code_leaves_nothing(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without attention: torch keeps its node, and with it the graph, for a while after an unpack hook raised.

    Copies end when somebody waits for them: how far they have come decides which functions are entered.
    """
    schedule = CopySchedule(monkeypatch, seed=0, progress=0.0)
    off = RESIDENT | {"activations": "host", "activation_format": form}
    training = Training("tiny", off)
    run = functions_entered(training)
    run(0)  # enters more: what is seen first is looked at once
    total = run(0)
    assert total > 300
    for nth in range(1, total, 61):
        with pytest.raises(Fault):
            run(nth)
        training.optimizer.zero_grad()
        with torch.no_grad():
            training.forward(0)  # leaves what the hook that raised did not
        gc.collect(1)  # tracebacks
        assert_nothing_left(training)
    assert_same(training.steps(2), Training("tiny", ON if form == "exact" else off).steps(2))
    schedule.finish()


# --- races, faults, memory ----------------------------------------------------------------------------------


@pytest.mark.cpu_only
def test_forward_waits_for_no_copy() -> None:
    training, expected = Training("tiny", OFF).steps(1), Training("tiny", ON).steps(1)
    native = training.optimizer._engine.device
    native.hold("to_host")
    loss = training.forward(1)
    assert native.pending_count("to_host") > 0
    native.release("to_host")
    loss.backward()
    expected.forward(1).backward()
    for one, other in zip(training.model.parameters(), expected.model.parameters(), strict=True):
        assert same_bits(one.grad * 1, other.grad)


@pytest.mark.cpu_only
@pytest.mark.parametrize("form", ["exact", "fp8"])
@pytest.mark.parametrize("lane", ["to_host", "to_device"])
def test_a_failed_copy_is_told_in_backward_and_training_goes_on(lane: Any, form: str) -> None:
    off = RESIDENT | {"activations": "host", "activation_format": form}
    training = Training("tiny", off).steps(1)
    training.optimizer._engine.device.fail_copy(lane, 2)
    with pytest.raises(offload.DeviceError, match="a saved activation of shape"):
        training.forward(1).backward()
    training.optimizer.zero_grad()
    assert_nothing_left(training)
    assert_same(training.steps(2), Training("tiny", ON if form == "exact" else off).steps(1).steps(2))


def test_over_the_host_budget_activations_stay_and_stats_say_so() -> None:
    needed = Training("tiny", OFF).optimizer.plan.host.total
    training = Training("tiny", OFF, host_budget=needed + (32 << 10)).steps(3)
    stats = training.optimizer.stats()
    assert 0 < stats.activations["offloaded_bytes"] <= 24 << 10 and stats.activations["refused_bytes"] > 0
    assert any("activations stayed on the device: host_budget is full" in text for text in stats.fallbacks)
    assert_same(training, Training("tiny", ON).steps(3))


def test_no_page_is_obtained_after_the_first_steps() -> None:
    training = Training("llama", OFF).steps(2)
    mapped = training.optimizer.stats().pool["mapped_bytes"]
    assert training.steps(3).optimizer.stats().pool["mapped_bytes"] == mapped


@pytest.mark.cpu_only
def test_the_activation_peak_of_sixteen_layers_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's allocator hands out in forward and backward, above what was there before."""
    monkeypatch.setattr(_activations, "IN_FLIGHT_BYTES", 0)

    def run(placement: dict[str, str]) -> tuple[int, list[float]]:
        torch.manual_seed(0)
        model, _ = llama(layers=16)
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **placement)
        tokens = torch.arange(8 * 128).view(8, 128) % 64
        losses, peak = [], 0
        for _ in range(2):
            with Allocations() as allocations:
                loss = model(input_ids=tokens, labels=tokens).loss
                loss.backward()
            losses.append(loss.item())
            peak = allocations.peak
            del loss
            optimizer.step()
            optimizer.zero_grad()
        return peak, losses

    off, on = run(OFF), run(ON)
    assert off[1] == on[1]
    assert off[0] <= 0.55 * on[0], off[0] / on[0]
