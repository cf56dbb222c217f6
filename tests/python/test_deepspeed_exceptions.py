"""Errors anywhere in a call of the engine: what it has not done is as before, and training goes on with the same bits.

An update counts as soon as it is made: what fails after it (the schedule, a monitor) leaves it made, and counted once.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from deepspeed_training import STAGES, config_of
from offload.deepspeed import _engine, _monitor
from phases import each_line, equal
from training import batches, loss_of, make_model, same_bits

pytestmark = pytest.mark.usefixtures("device")

WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.05, "warmup_num_steps": 6}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 2, "hysteresis": 1}}
PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}, "fp16": FP16}
ON_HOST = STAGES["stage 3, all on the host"]
TOKENS = list(batches(8))
PACKAGE = str(Path(_engine.__file__).parent)


# Sums of Python's numbers right after an update, which cannot fail.
QUIET = ("_loss_scale.py:",)


class Fault(Exception):
    pass


def make_engine(seed: int = 0, zero: dict[str, Any] = ON_HOST, **keys: Any) -> Any:
    keys = {"scheduler": WARMUP, "gradient_clipping": 0.5, **keys}
    model = make_model(seed=seed, depth=2, width=8)
    return offload.initialize(model=model, config=config_of(zero=zero, accumulation=2, **keys))[0]


def train(engine: Any, first: int, last: int) -> None:
    """Micro-batches `first` to `last`; two are a step."""
    for tokens in TOKENS[first:last]:
        engine.backward(loss_of(engine, tokens))
        engine.step()


def values_of(engine: Any) -> dict[str, Tensor]:
    """Weights, masters, moments and gradients."""
    values = dict(engine.module.state_dict())
    for index, state in engine.optimizer.state_dict()["state"].items():
        values |= {f"{index} {name}": torch.as_tensor(value) for name, value in state.items()}
    values |= {f"grad {name}": p.grad.detach() for name, p in engine.module.named_parameters() if p.grad is not None}
    return {name: value.detach().clone().cpu() for name, value in values.items()}


def rest_of(engine: Any) -> dict[str, Any]:
    """All else that a run goes on from, and the hooks."""
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    return {
        "counters": (engine.micro_steps, engine.global_steps, engine.global_samples, engine.skipped_steps),
        "boundary": engine.is_gradient_accumulation_boundary(),
        "batch": engine.get_batch_info(),
        "loss scale": optimizer.loss_scaler.state_dict(),
        "scheduler": dict(engine.lr_scheduler.state_dict()),
        "groups": [{name: value for name, value in group.items() if name != "params"} for group in engine._groups()],
        "inside no_sync": engine._inside_no_sync,
        "module hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in engine.module.modules()],
        "hooks": [len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) for p in parameters],
    }


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def run_with(call: Callable[[], Any], on_call: Callable[[str], None]) -> None:
    """Calls with the name of each function of the package that is entered."""
    before = sys.gettrace()

    def enter(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        name = f"{Path(code.co_filename).name}:{frame.f_lineno}: {code.co_name}"
        # A generator expression is also entered when it is thrown away.
        if code.co_filename.startswith(PACKAGE) and not name.startswith(QUIET) and code.co_name != "<genexpr>":
            on_call(name)

    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(before)


def inside_no_sync(engine: Any) -> None:
    with engine.no_sync():
        engine.backward(loss_of(engine, TOKENS[2]))


# By name: after how many micro-batches, what comes before the call, and the call. The engine is between two steps after
# 2 micro-batches and in the middle of one after 3.
Call = Callable[[Any, Path], Any]
CALLS: dict[str, tuple[int, Call, Call]] = {
    "forward": (2, lambda e, _: None, lambda e, _: e(TOKENS[2][:, :-1])),
    "forward and backward": (2, lambda e, _: None, lambda e, _: e.backward(loss_of(e, TOKENS[2]))),
    "no_sync": (2, lambda e, _: None, lambda e, _: inside_no_sync(e)),
    "scale": (2, lambda e, _: None, lambda e, _: e.scale(loss_of(e, TOKENS[2])).backward()),
    "step inside": (2, lambda e, _: e.backward(loss_of(e, TOKENS[2])), lambda e, _: e.step()),
    "step": (3, lambda e, _: e.backward(loss_of(e, TOKENS[3])), lambda e, _: e.step()),
    "zero_grad": (3, lambda e, _: None, lambda e, _: e.zero_grad()),
    "optimizer.zero_grad": (3, lambda e, _: None, lambda e, _: e.optimizer.zero_grad()),
    "set_lr": (2, lambda e, _: None, lambda e, _: e.set_lr(0.125)),
    "set_train_batch_size": (2, lambda e, _: None, lambda e, _: e.set_train_batch_size(4)),
    "set_train_micro_batch_size": (2, lambda e, _: None, lambda e, _: e.set_train_micro_batch_size(2)),
    "set_gradient_accumulation_boundary": (
        2, lambda e, _: None, lambda e, _: e.set_gradient_accumulation_boundary(True)
    ),
    "save_checkpoint": (3, lambda e, _: None, lambda e, to: e.save_checkpoint(to, tag="saved")),
    "save_16bit_model": (3, lambda e, _: None, lambda e, to: e.save_16bit_model(to)),
    "load_checkpoint": (3, lambda e, to: saved_elsewhere(to), lambda e, to: e.load_checkpoint(to)),
    "load_module_state_dict": (
        3, lambda e, _: None, lambda e, _: e.load_module_state_dict(make_model(seed=9, depth=2, width=8).state_dict())
    ),
    "offload_states": (3, lambda e, _: None, lambda e, _: e.offload_states()),
    "reload_states": (3, lambda e, _: e.offload_states(), lambda e, _: e.reload_states()),
    "optimizer.load_state_dict": (
        3, lambda e, _: None, lambda e, _: e.optimizer.load_state_dict(e.optimizer.state_dict())
    ),
}  # fmt: skip

# What leaves a part of its gradients, as in plain torch, until they are dropped.
BACKWARDS = ("forward and backward", "no_sync", "scale")


def saved_elsewhere(folder: Path, **keys: Any) -> None:
    """A checkpoint of another run, as `latest`."""
    other = make_engine(seed=7, **keys)
    train(other, 0, 4)
    other.save_checkpoint(folder, tag="other")
    other.destroy()


def settle(engine: Any, is_done: bool) -> None:
    """What a script does about a call that raised: drops gradients, and steps the schedule where the error kept it."""
    engine.zero_grad()
    if is_done and engine.lr_scheduler.last_batch_iteration + 1 < engine.global_steps:
        engine.lr_scheduler.step()


@pytest.mark.parametrize(("name", "precision"), [(name, "fp32") for name in CALLS] + [("step", "fp16")])
def test_an_exception_in_every_function(name: str, precision: str, tmp_path: Path) -> None:
    count, prepare, call = CALLS[name]
    folders = (tmp_path / str(number) for number in range(1000))
    monitor = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path / "monitor"), "job_name": "run"}}

    def prepared() -> tuple[Any, Path]:
        engine, folder = make_engine(**PRECISIONS[precision], **monitor), next(folders)
        folder.mkdir()
        train(engine, 0, count)
        prepare(engine, folder)
        return engine, folder

    def look(engine: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return values_of(engine), rest_of(engine)

    def go_on(engine: Any) -> dict[str, Tensor]:
        engine.zero_grad()
        train(engine, 4, 8)
        engine.optimizer.synchronize()
        return values_of(engine)

    twin, folder = prepared()
    entered: list[str] = []
    before = look(twin)
    run_with(lambda: call(twin, folder), entered.append)
    after, files = look(twin), files_in(folder)
    final = go_on(twin)
    assert entered
    for nth in range(len(entered)):
        engine, folder = prepared()
        there, place = files_in(folder), f"{entered[nth]} ({nth} of {len(entered)})"
        error = KeyboardInterrupt if nth % 2 else Fault
        left = [nth + 1]

        def fail(_: str, left: list[int] = left, error: type[BaseException] = error) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise error

        with pytest.raises(error):
            run_with(lambda engine=engine, folder=folder: call(engine, folder), fail)  # type: ignore[misc]
        values, rest = look(engine)
        assert files_in(folder) in (there, files), place
        is_done = name == "step" and rest["counters"] != before[1]["counters"]
        if is_done or name in BACKWARDS:
            settle(engine, is_done)
            values, rest = look(engine)
        if not is_done and not (equal(values, after[0]) and rest == after[1]):
            assert equal(values, before[0]), place
            assert rest == before[1], place
            call(engine, folder)
            values, rest = look(engine)
        assert equal(values, after[0]), place
        assert rest == after[1], place
        assert equal(go_on(engine), final), place


# --- what fails inside --------------------------------------------------------------------------------------------


def out_of_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("asked for by the test")


Register = Callable[[Any], Any]
HOOKS: dict[str, Register] = {
    "forward": lambda e: e.module.blocks[1].register_forward_hook(out_of_memory),
    "module's backward": lambda e: e.module.blocks[0].norm.register_full_backward_hook(out_of_memory),
    "gradient": lambda e: e.module.blocks[0].up.weight.register_hook(out_of_memory),
}


@pytest.mark.parametrize("managed", [True, False], ids=["counted by the engine", "by the caller"])
@pytest.mark.parametrize("where", HOOKS)
def test_what_fails_in_a_micro_batch_is_done_again(where: str, managed: bool, tmp_path: Path) -> None:
    """Its samples count once, and its loss is once in what the monitors write."""
    results = []
    for faulty in (False, True):
        folder = tmp_path / str(faulty)
        monitor = {"enabled": True, "output_path": str(folder), "job_name": "run"}
        own = {} if managed else {"managed_gradient_accumulation": False}
        engine = make_engine(csv_monitor=monitor, **own)
        train(engine, 0, 2)
        if faulty:
            handle = HOOKS[where](engine)
            with pytest.raises(torch.OutOfMemoryError, match="asked for"):
                engine.backward(loss_of(engine, TOKENS[2]))
            handle.remove()
            engine.zero_grad()
        train(engine, 2, 8)
        engine.optimizer.synchronize()
        written = {path.name: path.read_text() for path in folder.rglob("*.csv")}
        results.append((values_of(engine), rest_of(engine), written))
        engine.destroy()
    (values, *rest), (other_values, *other_rest) = results
    assert equal(values, other_values) and rest == other_rest


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_update_that_fails_is_made_by_the_next_call(precision: str) -> None:
    engine, twin = (make_engine(**PRECISIONS[precision]) for _ in range(2))
    for one in (engine, twin):
        train(one, 0, 3)
        one.backward(loss_of(one, TOKENS[3]))
    before = values_of(engine), rest_of(engine)
    handle = engine.optimizer.register_step_pre_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()
    handle.remove()
    assert not engine.was_step_applied()
    assert equal(values_of(engine), before[0])
    assert rest_of(engine) == before[1]
    for one in (engine, twin):
        one.step()
        train(one, 4, 8)
    assert equal(values_of(engine), values_of(twin))
    assert rest_of(engine) == rest_of(twin)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ctrl_c_at_every_line_of_a_step(precision: str) -> None:
    """An update is counted, and followed by the loss scale, if and only if it was made; no schedule is interrupted."""
    engine, twin = (make_engine(**PRECISIONS[precision]) for _ in range(2))
    train(engine, 0, 2)
    train(twin, 0, 2)
    places: list[str] = []
    outcomes = set()

    def step_beside(on_line: Callable[[str], None]) -> BaseException | None:
        """A step of both, that of the engine under `on_line`; what it raised."""
        for one in (engine, twin):
            train(one, 2, 3)
            one.backward(loss_of(one, TOKENS[3]))
        before = engine.global_steps
        twin.step()
        try:
            with each_line(on_line):
                engine.step()
        except KeyboardInterrupt as error:
            is_done = engine.global_steps > before
            outcomes.add(is_done)
            if not is_done:
                engine.step()
            engine.zero_grad()
            if engine.lr_scheduler.last_batch_iteration < twin.lr_scheduler.last_batch_iteration:
                engine.lr_scheduler.step()
            return error
        return None

    def compare(place: str) -> None:
        assert equal(values_of(engine), values_of(twin)), place
        assert rest_of(engine) == rest_of(twin), place
        assert engine.was_step_applied() == twin.was_step_applied(), place

    step_beside(places.append)
    compare("none")
    for place in dict.fromkeys(places):
        if "_schedulers.py" in place:
            continue
        left = [place]

        def interrupt(line: str, left: list[str] = left) -> None:
            if line in left:
                left.remove(line)
                signal.raise_signal(signal.SIGINT)

        raised = step_beside(interrupt)
        assert raised is not None or left, place  # some lines run in some steps alone
        compare(place)
    assert outcomes == {False, True}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_update_counts_whatever_a_hook_behind_it_raises(precision: str) -> None:
    engine, twin = (make_engine(**PRECISIONS[precision]) for _ in range(2))
    for one in (engine, twin):
        train(one, 0, 3)
        one.backward(loss_of(one, TOKENS[3]))
    twin.step()
    handle = engine.optimizer.register_step_post_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()
    handle.remove()
    assert engine.was_step_applied()
    settle(engine, is_done=True)
    for one in (engine, twin):
        train(one, 4, 8)
    assert equal(values_of(engine), values_of(twin))
    assert rest_of(engine) == rest_of(twin)


def test_a_wrong_argument_of_the_schedule_leaves_a_step_that_is_made_and_counted() -> None:
    engine, twin = make_engine(), make_engine()
    for one in (engine, twin):
        train(one, 0, 1)
        one.backward(loss_of(one, TOKENS[1]))
    twin.step()
    with pytest.raises(TypeError, match="epoch"):
        engine.step(lr_kwargs={"epoch": 1})
    assert engine.was_step_applied()
    engine.lr_scheduler.step()
    assert rest_of(engine) == rest_of(twin)
    for one in (engine, twin):
        train(one, 2, 8)
    assert rest_of(engine) == rest_of(twin)
    assert equal(values_of(engine), values_of(twin))


def test_a_monitor_that_cannot_write_loses_its_own_scalars_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for faulty in (False, True):
        folder = tmp_path / str(faulty)
        engine = make_engine(csv_monitor={"enabled": True, "output_path": str(folder), "job_name": "run"})
        train(engine, 0, 1)
        engine.backward(loss_of(engine, TOKENS[1]))
        with monkeypatch.context() as patch:
            if faulty:
                patch.setattr(_monitor.CsvMonitor, "write_events", out_of_memory)
                with pytest.raises(torch.OutOfMemoryError):
                    engine.step()
            else:
                engine.step()
        train(engine, 2, 4)
        (file,) = folder.rglob("*train_loss.csv")
        written.append((file.read_text().splitlines()[-1], rest_of(engine), values_of(engine)))
    assert written[0][:2] == written[1][:2]
    assert equal(written[0][2], written[1][2])


@pytest.mark.parametrize("kept", ["the schedule", "the loss scale"])
def test_a_checkpoint_whose_last_part_does_not_fit_changes_nothing(
    kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_elsewhere(tmp_path, **FP16)
    engine = make_engine(**FP16)
    train(engine, 0, 3)
    before = values_of(engine), rest_of(engine)
    owner = engine.lr_scheduler if kept == "the schedule" else engine.optimizer.loss_scaler
    real = owner.load_state_dict
    calls: list[Any] = []

    def load_first(state: Any) -> None:
        """Half of it, and then what it is to refuse."""
        calls.append(state)
        real(state)
        if len(calls) == 1:
            raise Fault

    monkeypatch.setattr(owner, "load_state_dict", load_first)
    with pytest.raises(Fault):
        engine.load_checkpoint(tmp_path)
    assert equal(values_of(engine), before[0])
    assert rest_of(engine) == before[1]


def test_a_load_that_the_optimizer_refuses_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_elsewhere(tmp_path)
    engine = make_engine()
    train(engine, 0, 3)
    before = values_of(engine), rest_of(engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine.optimizer.optimizer, "load_state_dict", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            engine.load_checkpoint(tmp_path)
    assert equal(values_of(engine), before[0])
    assert rest_of(engine) == before[1]
    engine.load_checkpoint(tmp_path)
    assert engine.global_steps == 2


@pytest.mark.parametrize("name", ["model.bin", "old.bin"])
def test_a_model_that_cannot_be_written_leaves_the_old_file_and_no_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    (tmp_path / "old.bin").write_text("old")

    def half(state: Any, path: Path) -> None:
        path.write_text("half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="no space"):
            engine.save_16bit_model(tmp_path, name)
    assert files_in(tmp_path) == {"old.bin"} and (tmp_path / "old.bin").read_text() == "old"
    engine.save_16bit_model(tmp_path, name)
    assert files_in(tmp_path) == {"old.bin", name}


# --- the beginning, moves and the end -----------------------------------------------------------------------------


def made(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    schedule = {"type": "WarmupCosineLR", "params": {"total_num_steps": 20, "warmup_num_steps": 2}}
    config = config_of(zero=ON_HOST, scheduler=schedule, accumulation=2)
    return offload.initialize(model=model, optimizer=optimizer, config=config)[0]


def test_an_initialize_that_fails_anywhere_can_be_called_again() -> None:
    """A schedule that was made has written to the groups: the next one would take that for the optimizer's own."""

    def pair() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model(depth=1, width=8)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    made(*pair())  # names that are looked up once a process are known from here on
    entered: list[str] = []
    run_with(lambda: made(*pair()), entered.append)
    twin = made(*pair())
    fresh = rest_of(twin)
    train(twin, 0, 8)
    names = list(dict.fromkeys(entered))
    for name in names:
        model, optimizer = pair()
        group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}

        def fail(entering: str, name: str = name) -> None:
            if entering == name:
                raise Fault

        with pytest.raises(Fault):
            run_with(lambda model=model, optimizer=optimizer: made(model, optimizer), fail)  # type: ignore[misc]
        assert {key: value for key, value in optimizer.param_groups[0].items() if key != "params"} == group, name
        engine = made(model, optimizer)
        assert rest_of(engine) == fresh, name
        train(engine, 0, 8)
        assert equal(values_of(engine), values_of(twin)), name
        engine.destroy()


def interrupt_the_end_of(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while unwrap makes its changes: it is raised when all are made."""
    core = engine.optimizer.optimizer._engine
    real = core.close

    def close() -> None:
        real()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(core, "close", close)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ctrl_c_while_states_move_loses_none(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, Any] = {} if dtype == "fp32" else {"bf16": {"enabled": True}}
    engine = make_engine(zero=STAGES["stage 2"], **keys)
    train(engine, 0, 3)
    before = values_of(engine), rest_of(engine)
    interrupt_the_end_of(engine, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        engine.offload_states()
    assert equal(values_of(engine), before[0])
    assert rest_of(engine) == before[1]
    engine.offload_states()
    assert equal(values_of(engine), before[0])
    train(engine, 3, 8)


def test_ctrl_c_while_an_engine_ends_leaves_one_that_can_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    train(engine, 0, 2)
    weights = {name: value.clone() for name, value in engine.module.state_dict().items()}
    interrupt_the_end_of(engine, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        engine.destroy()
    engine.destroy()
    model = engine.module
    assert all(same_bits(weights[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks or hasattr(p, "ds_id") for p in model.parameters())
    offload.initialize(model=model, config=config_of(zero=ON_HOST))[0].destroy()
