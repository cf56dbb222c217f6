"""Ctrl-C anywhere: it comes at once or after a short stretch, and leaves a state that training goes on from.

Signals are raised at every line of the package that a training step runs, phase by phase, and the model, its
gradients and its states are compared bit for bit with a run that was never interrupted.
"""

from __future__ import annotations

import copy
import inspect
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload._interrupts import Uninterrupted
from offload._speculation import Speculation
from phases import PACKAGE, Trainer, each_line, equal
from training import HOST, RESIDENT, batches, loss_of, make_model, same_bits

# A line of the package in a phase of the step, and which of its executions.
Place = tuple[str, str, int]


def lines_of(trainer: Trainer, tokens: Tensor) -> list[Place]:
    """Where to interrupt: every line in every phase, the first time it runs there and one of the later ones."""
    counts: Counter[tuple[str, str]] = Counter()
    for phase, run in trainer.phases(tokens):
        with each_line(lambda line, phase=phase: counts.update([(phase, line)])):  # type: ignore[misc]
            run()
    trainer.begin_again()
    first = [(phase, line, 1) for phase, line in counts]
    later = [
        (phase, line, 2 + sum(map(ord, line)) % (count - 1)) for (phase, line), count in counts.items() if count > 1
    ]
    return first + later


def interrupted_step(trainer: Trainer, tokens: Tensor, place: Place) -> str | None:
    """Runs a step with Ctrl-C at `place`; returns the phase that raised, None when the line did not run this time."""
    phase_of_place, line_of_place, execution = place
    seen = 0

    def on_line(line: str) -> None:
        nonlocal seen
        if line == line_of_place:
            seen += 1
            if seen == execution:
                signal.raise_signal(signal.SIGINT)

    phase = None
    try:
        for phase, run in trainer.phases(tokens):
            if phase == phase_of_place:
                with each_line(on_line, line_of_place.rpartition(":")[0]):
                    run()
            else:
                run()
    except KeyboardInterrupt:
        return phase
    assert seen < execution, f"Ctrl-C at {place} was lost"
    return None


def legal_gradients(twin: Trainer, tokens: Tensor) -> list[list[Tensor | None]]:
    """What each gradient can be at some point of the step; leaves `twin` after its step."""
    moments = [twin.gradients()]
    for phase, run in twin.phases(tokens):
        run()
        if phase in ("backward", "clip", "zero_grad"):
            moments.append(twin.gradients())
    twin.begin_again()
    return [list(of_parameter) for of_parameter in zip(*moments, strict=True)]


# The last number: every so many lines. They differ little, and the first takes them all.
CASES: dict[str, tuple[dict[str, Any], torch.dtype, bool, int]] = {
    "fp32 on the host": (HOST, torch.float32, False, 1),
    "bf16 on the host": (HOST, torch.bfloat16, False, 7),
    "fp32 scaled, gradients on the device": ({"optimizer": "host", "gradients": "device"}, torch.float32, True, 7),
    "states on the device": ({"optimizer": "device", "gradients": "host"}, torch.float32, False, 7),
    "states in part on the device": ({"optimizer": 0.5, "gradients": "host"}, torch.float32, False, 7),
    "updates ahead of the step": ({**HOST, "speculate": "1MiB"}, torch.float32, False, 17),
    "streamed weights": ({**HOST, "params": "host"}, torch.float32, False, 11),
    # Of four units the cache holds two.
    "weights on disk": (
        {**HOST, "params": "disk", "disk_block": 4096, "host_budget": "40KiB"},
        torch.bfloat16,
        False,
        23,
    ),
}


@pytest.mark.usefixtures("disk_calls")
@pytest.mark.parametrize("case", CASES)
def test_ctrl_c_at_every_line_of_a_step(case: str, tmp_path: Path) -> None:
    placement, dtype, scaled, stride = CASES[case]
    if placement.get("params") == "disk":
        placement = placement | {"disk_path": tmp_path}
    trainer, twin = Trainer(placement, dtype, scaled), Trainer(RESIDENT, dtype, scaled)
    tokens = next(batches(1, vocabulary=11, size=2, length=3))
    trainer.step(tokens)
    places = lines_of(trainer, tokens)[::stride]
    for _ in range(2):
        twin.step(tokens)
    raised: Counter[str] = Counter()
    before = twin.values()
    for place in places:
        gradients = legal_gradients(twin, tokens)
        after = twin.values()
        phase = interrupted_step(trainer, tokens, place)
        for gradient, legal in zip(trainer.gradients(), gradients, strict=True):
            assert (
                any(
                    same_bits(gradient, value) if gradient is not None and value is not None else gradient is value
                    for value in legal
                )
                or phase == "clip"
            ), place
        now = trainer.values()
        done = equal(now, after)
        assert done or equal(now, before), f"a torn step after Ctrl-C at {place}"
        if phase is not None:
            raised[phase] += 1
            assert done or Trainer.PHASES.index(phase) <= Trainer.PHASES.index("step"), place
        trainer.begin_again()
        if not done:
            trainer.step(tokens)
            assert equal(trainer.values(), after), f"training did not go on after Ctrl-C at {place}"
        before = after
    hooked = {"backward"} if placement["gradients"] == "host" else set()
    assert set(raised) >= {"forward", "step", "state_dict"} | hooked, raised


def test_ctrl_c_gives_backups_no_room_that_the_plan_does_not_have() -> None:
    """At every line that obtains one, the first time."""
    tokens = next(batches(1, vocabulary=11, size=2, length=3))
    source, begin = inspect.getsourcelines(Speculation._backup_of)
    interrupted = 0
    for line in range(begin, begin + len(source)):
        trainer = Trainer({**HOST, "speculate": "1MiB"}, torch.float32, False)
        trainer.step(tokens)
        speculation = trainer.optimizer._engine.speculation
        place = ("backward", f"{inspect.getsourcefile(Speculation)}:{line}", 1)
        interrupted += interrupted_step(trainer, tokens, place) is not None
        trainer.begin_again()
        trainer.step(tokens)
        taken = trainer.optimizer._engine.pool.stats()["tag_bytes"]["backups"]
        assert taken + speculation._room <= trainer.optimizer.plan.host.backups, line
    assert interrupted >= 5


@contextmanager
def ctrl_c_in(function: str) -> Iterator[None]:
    """Sends this thread a real SIGINT from another one when it is in `function`; KeyboardInterrupt must come."""
    main = threading.main_thread().ident
    assert main is not None
    over = threading.Event()

    def send() -> None:
        while sys._current_frames()[main].f_code.co_name != function:
            if over.wait(0.001):
                return
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=send)
    with pytest.raises(KeyboardInterrupt):
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


BLOCKING: dict[str, Callable[[nn.Module, Any, Tensor], Any]] = {
    "forward": lambda model, _, tokens: model(tokens),
    "read": lambda model, _, tokens: model.head.weight.clone(),
    "synchronize": lambda _, optimizer, tokens: optimizer.synchronize(),
    "state_dict": lambda model, _, tokens: model.state_dict(),
    "optimizer.state_dict": lambda _, optimizer, tokens: optimizer.state_dict(),
    "full_params": lambda model, _, tokens: offload.full_params(model).__enter__(),
    "unwrap": lambda model, optimizer, tokens: offload.unwrap(model, optimizer),
}


@pytest.mark.parametrize("call", BLOCKING)
def test_ctrl_c_while_blocked_on_an_update(call: str) -> None:
    """The wait ends, the update does not: it is there when it is asked for again."""
    tokens = next(batches(1))
    results = []
    for held in (False, True):
        model = make_model()
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
        device = optimizer._engine.device
        loss_of(model, tokens).backward()
        if held:
            device.hold("to_device")
            optimizer.step()
            with ctrl_c_in("_wait_for"):
                BLOCKING[call](model, optimizer, tokens[:, :-1])
            device.release("to_device")
        else:
            optimizer.step()
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.step()
        results.append({name: value.clone() for name, value in model.state_dict().items()})
    assert equal(*results)


def test_ctrl_c_while_backward_waits_for_a_held_lane() -> None:
    """The earlier micro-batch's sum cannot come back: Ctrl-C leaves backward, the sums stay as they were."""
    tokens = next(batches(1))
    model = make_model()
    twin = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **HOST)
    twin, twin_optimizer = offload.wrap(twin, torch.optim.AdamW(twin.parameters(), lr=1e-2), **RESIDENT)
    for candidate in (model, twin):
        loss_of(candidate, tokens).backward()
    loss = loss_of(model, tokens)
    device = optimizer._engine.device
    device.hold("to_device")
    with ctrl_c_in("wait_upload"):
        loss.backward()
    device.release("to_device")
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert same_bits(p.grad.clone(), q.grad) or same_bits(p.grad.clone(), 2 * q.grad)
    for candidate, its in ((model, optimizer), (twin, twin_optimizer)):
        its.zero_grad()
        loss_of(candidate, tokens).backward()
        its.step()
    assert equal(dict(model.state_dict()), dict(twin.state_dict()))


def test_no_signal_is_lost_and_every_handler_is_put_back() -> None:
    class Stop(Exception):
        pass

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stop

    before = signal.signal(signal.SIGTERM, stop)
    try:
        for number, error in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stop)):
            reached = []
            with pytest.raises(error), Uninterrupted():
                with Uninterrupted():
                    signal.raise_signal(number)
                    reached.append("inner")
                reached.append("outer")
            assert reached == ["inner", "outer"]
            assert signal.getsignal(signal.SIGTERM) is stop
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(Stop) as raised, Uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("first")
        assert isinstance(raised.value.__context__, ValueError)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_every_handler_runs_whatever_the_one_before_it_raises() -> None:
    """A scheduler's SIGTERM, or a request for a checkpoint, that comes with Ctrl-C."""
    heard: list[int] = []
    others = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda caught, _: heard.append(caught)) for number in others}
    try:
        with pytest.raises(KeyboardInterrupt), Uninterrupted():
            for number in (signal.SIGINT, *others):
                signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert heard == list(others)


def test_another_thread_leaves_the_handlers_alone() -> None:
    seen: list[Any] = []

    def look() -> None:
        with Uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


@pytest.mark.parametrize("file", ["_residency.py", "_weight_window.py", "_weight_copies.py"])
def test_ctrl_c_inside_full_params(file: str) -> None:
    """At every line of these: nobody reads a weight that is away, the context has ended, and training goes on."""
    tokens = next(batches(1, vocabulary=11, size=2, length=3))
    trainer, twin = (Trainer({**place, **HOST}, torch.bfloat16, scaled=False) for place in ({"params": "host"}, {}))
    path = f"{PACKAGE}/{file}"

    def look(one: Trainer) -> None:
        with offload.full_params(one.model), torch.no_grad():
            for parameter in one.model.parameters():
                parameter.add_(0)

    counts: Counter[str] = Counter()
    for one in (trainer, twin):
        one.step(tokens)
        with each_line(lambda line: counts.update([line]), path) if one is trainer else nullcontext():
            look(one)
        one.step(tokens)
    interrupted = 0
    for line, count in counts.items():
        seen, nth = 0, 1 + sum(map(ord, line)) % count

        def on_line(here: str, line: str = line, nth: int = nth) -> None:
            nonlocal seen
            if here == line:
                seen += 1
                if seen == nth:
                    signal.raise_signal(signal.SIGINT)

        with suppress(KeyboardInterrupt), each_line(on_line, path):
            look(trainer)
        interrupted += seen >= nth  # some lines run only while a copy is on its way
        torch.set_grad_enabled(True)  # torch's own: its `no_grad` may not have come to its end
        look(twin)
        for mine, other in zip(trainer.model.parameters(), twin.model.parameters(), strict=True):
            with suppress(offload.StateError):  # it is away, or here still
                assert same_bits(mine.clone(), other.clone()), line
        trainer.step(tokens)
        twin.step(tokens)
        assert equal(trainer.values(), twin.values()), line
    assert interrupted


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("params", ["device", "host"])
def test_ctrl_c_at_the_end_of_wrap_undoes_it(
    kind: type[torch.optim.Optimizer], params: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has the optimizer that it would have returned, without which nothing could unwrap the model."""
    options = {"lr": 1e-2, **({"momentum": 0.9} if kind is torch.optim.SGD else {})}
    trained: list[list[Tensor]] = []
    for interrupted in (True, False):
        model = make_model(torch.bfloat16)
        optimizer = kind(model.parameters(), **options)
        loss_of(model, next(batches(1))).backward()
        optimizer.step()
        optimizer.zero_grad()
        if interrupted:
            before = [copy.deepcopy(state) for state in optimizer.state.values()]
            take_over = offload.OffloadOptimizer.take_over

            def interrupt(one: offload.OffloadOptimizer, take_over: Callable[[Any], None] = take_over) -> None:
                take_over(one)
                signal.raise_signal(signal.SIGINT)

            with monkeypatch.context() as patch:
                patch.setattr(offload.OffloadOptimizer, "take_over", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    offload.wrap(model, optimizer, params=params, **HOST)
            for state, known in zip(optimizer.state.values(), before, strict=True):
                assert state.keys() == known.keys()
                assert all(torch.equal(state[key], known[key]) for key in known if isinstance(known[key], Tensor))
            assert all(type(p) is nn.Parameter and not p._post_accumulate_grad_hooks for p in model.parameters())
            assert not any(module._forward_pre_hooks for module in model.modules())
        model, wrapped = offload.wrap(model, optimizer, params=params, **HOST)
        loss_of(model, next(batches(1, seed=2))).backward()
        wrapped.step()
        trained.append([value.clone() for value in model.state_dict().values()])
    assert all(same_bits(one, other) for one, other in zip(*trained, strict=True))
