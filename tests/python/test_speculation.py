"""`speculate=`: updates that begin in backward leave the bits of training as they are, whatever comes in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from copy_schedule import CopySchedule
from offload import _copy_lanes
from training import HOST, RESIDENT, assert_same_bits, batches, loss_of, make_model, same_bits, train, wrapped_run

pytestmark = pytest.mark.usefixtures("device")

AHEAD = {**HOST, "speculate": "1MiB"}
# What a test may do in a step, by the moment: "backward" (after the last one), "step", "end".
Between = Callable[[str, int, nn.Module, Any], None]


def settle_ahead(optimizer: Any) -> None:
    """What was begun in backward has run: else the step may be ready sooner than it, and drops it then."""
    speculation = optimizer._engine.speculation
    if speculation is not None:
        speculation.latest[0].wait()


def counts(optimizer: Any) -> tuple[int, int]:
    optimizer.synchronize()
    stats = optimizer.stats().speculation
    return stats["kept"], stats["thrown_away"]


def loop(
    placement: dict[str, Any],
    between: Between = lambda *_: None,
    *,
    make: Callable[[nn.Module], torch.optim.Optimizer] = lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    dtype: torch.dtype = torch.float32,
    micro_batches: int = 1,
    clip: Callable[[int], float] = lambda _: 1e9,
    steps: int = 7,
    prepare: Callable[[nn.Module], None] = lambda _: None,
    **model_options: Any,
) -> tuple[list[Tensor], Any]:
    """Every weight and state after training; the same calls whatever the placement."""
    model = make_model(dtype, **model_options)
    prepare(model)
    model, optimizer = offload.wrap(model, make(model), **placement)
    data = batches(steps * micro_batches)
    for step in range(steps):
        for _ in range(micro_batches):
            (loss_of(model, next(data)) / micro_batches).backward()
        settle_ahead(optimizer)
        between("backward", step, model, optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip(step))
        between("step", step, model, optimizer)
        optimizer.step()
        between("end", step, model, optimizer)
        optimizer.zero_grad()
    return values(model, optimizer), optimizer


def values(model: nn.Module, optimizer: Any) -> list[Tensor]:
    weights = [value.detach().cpu().clone() for value in model.state_dict().values()]
    states = [
        torch.as_tensor(value).cpu().clone()
        for state in optimizer.state_dict()["state"].values()
        for value in state.values()
    ]
    return weights + states


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other) > 0
    for left, right in zip(one, other, strict=True):
        assert same_bits(left, right)


def compare(between: Between = lambda *_: None, placement: dict[str, Any] | None = None, **options: Any) -> Any:
    """Trains resident and with updates ahead; returns the optimizer of the second."""
    expected, _ = loop(RESIDENT | options.pop("formats", {}), between, **options)
    found, optimizer = loop(placement or AHEAD, between, **options)
    assert_equal(found, expected)
    return optimizer


# --- what is kept, what is thrown away ----------------------------------------------------------------------


def test_every_update_is_kept_where_nothing_clips() -> None:
    optimizer = compare()
    parameters = len(optimizer.param_groups[0]["params"])
    assert counts(optimizer) == (6 * parameters, 0)  # the first step only counts
    assert optimizer.stats().speculation["parameters"] == parameters


def test_a_step_that_clips_throws_away_and_the_next_one_waits() -> None:
    optimizer = compare(clip=lambda step: 1e-3 if step == 3 else 1e9)
    parameters = len(optimizer.param_groups[0]["params"])
    assert counts(optimizer) == (4 * parameters, parameters)  # steps 1, 2, 5, 6; 3 clips, 4 sits out


def test_constant_clipping_is_tried_ever_more_rarely() -> None:
    optimizer = compare(clip=lambda _: 1e-3, steps=9)
    parameters = len(optimizer.param_groups[0]["params"])
    assert counts(optimizer) == (0, 3 * parameters)  # in steps 1, 3 and 6


def test_updates_begin_in_backward() -> None:
    """The states change before the step, and change back for whoever looks at them."""
    seen = []

    def look(moment: str, step: int, model: nn.Module, optimizer: Any) -> None:
        if moment == "backward" and step == 2 and optimizer._engine.speculation is not None:
            state = optimizer._engine.states[id(model.head.weight)]
            ahead = state.moments["exp_avg"].value().clone()
            seen.append(not torch.equal(ahead, optimizer.state[model.head.weight]["exp_avg"]))

    compare(look)
    assert seen == [True]


FORMATS: dict[str, dict[str, Any]] = {
    "bf16 split": {"dtype": torch.bfloat16},
    "bf16 beside an fp32 master": {"dtype": torch.bfloat16, "formats": {"master": "fp32"}},
    "bf16 its own master": {"dtype": torch.bfloat16, "formats": {"master": "bf16"}},
    "fp16": {"dtype": torch.float16},
    "bf16 moments": {"formats": {"moments": "bf16"}},
    "int8 moments": {"formats": {"moments": "int8"}},
    "Lion": {"make": lambda m: offload.Lion(m.parameters(), lr=1e-3)},
    "Adagrad": {"make": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2)},
    "Adam": {"make": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, weight_decay=0.1)},
    "tied": {"tied": True},
}

if hasattr(Tensor, "grad_dtype"):
    FORMATS["wide gradients"] = {"dtype": torch.bfloat16, "formats": {"grad_dtype": "fp32"}}


@pytest.mark.parametrize("case", FORMATS)
def test_every_form_of_state(case: str) -> None:
    options = dict(FORMATS[case])
    optimizer = compare(
        placement=AHEAD | options.get("formats", {}), clip=lambda step: 1e-3 if step == 4 else 1e9, **options
    )
    kept, thrown_away = counts(optimizer)
    assert kept > 0 and thrown_away > 0


def test_frozen_weights_and_part_of_the_states() -> None:
    def freeze(model: nn.Module) -> None:
        model.blocks[0].requires_grad_(False)

    optimizer = compare(prepare=freeze)
    assert counts(optimizer)[0] > 0
    optimizer = compare(placement=AHEAD | {"optimizer": 0.5})
    assert counts(optimizer)[0] > 0


def test_the_last_of_several_micro_batches_is_ahead() -> None:
    optimizer = compare(micro_batches=3)
    parameters = len(optimizer.param_groups[0]["params"])
    assert counts(optimizer) == (6 * parameters, 0)


def test_gradients_that_leave_late_are_ahead_too() -> None:
    """This hook refers to a gradient until the next one comes."""
    latest: list[Any] = [None]

    def refer(parameter: Tensor) -> None:
        latest[0] = parameter.grad

    def hook(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(refer)

    optimizer = compare(prepare=hook)
    parameters = len(optimizer.param_groups[0]["params"])
    assert counts(optimizer) == (6 * (parameters - 1), 0)  # the last one has no later one to leave with


def test_gradients_that_leave_after_their_hooks_are_ahead_too() -> None:
    """As in older torch: the last one leaves at the end of backward."""
    latest: list[Any] = []

    def refer(parameter: Tensor) -> None:
        latest[:] = [parameter.grad]

    def hook(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(refer)

    def drop_from_now_on(moment: str, step: int, model: nn.Module, _: Any) -> None:
        if (moment, step) == ("end", 0):
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(lambda _: latest.clear())

    optimizer = compare(drop_from_now_on, prepare=hook)
    assert counts(optimizer) == (6 * len(optimizer.param_groups[0]["params"]), 0)


def test_little_room_goes_to_the_gradients_that_come_first() -> None:
    optimizer = compare(placement=AHEAD | {"speculate": 20_000})
    stats, plan = optimizer.stats(), optimizer.plan
    assert 0 < stats.speculation["parameters"] < len(optimizer.param_groups[0]["params"])
    assert stats.host_bytes["backups"] <= plan.host.backups == 20_000
    ahead = optimizer._engine.speculation._backups
    named = [name for name, p in make_model().named_parameters()]
    in_order = [id(p) in ahead for p in optimizer.param_groups[0]["params"]]
    assert in_order[named.index("norm.weight")] and not in_order[named.index("embedding.weight")]


# --- what may come between ----------------------------------------------------------------------------------


def edit(moment: str, step: int, model: nn.Module, optimizer: Any) -> None:
    if moment == "backward" and step in (2, 5):
        model.head.weight.grad.add_(1e-3)
        model.norm.bias.grad = torch.ones_like(model.norm.bias)
        model.norm.weight.grad = None


def change_the_rate(moment: str, step: int, model: nn.Module, optimizer: Any) -> None:
    if moment == "backward" and step in (2, 5):
        optimizer.param_groups[0]["lr"] *= 0.5


def schedule(moment: str, step: int, model: nn.Module, optimizer: Any) -> None:
    if moment == "end":
        for group in optimizer.param_groups:
            group["lr"] *= 0.9


def drop_gradients(moment: str, step: int, model: nn.Module, optimizer: Any) -> None:
    if moment == "backward" and step in (2, 5):
        (optimizer if step == 2 else model).zero_grad()
        loss_of(model, next(batches(1, seed=step))).backward()


def one_more_micro_batch(moment: str, step: int, model: nn.Module, optimizer: Any) -> None:
    if moment == "backward" and step in (2, 5):
        loss_of(model, next(batches(1, seed=step))).backward()


def save_and_load(moment: str, step: int, model: nn.Module, optimizer: Any) -> None:
    if moment == "backward" and step in (2, 5):
        saved = copy.deepcopy(optimizer.state_dict())
        if step == 5:
            optimizer.load_state_dict(saved)


def write_weights(moment: str, step: int, model: nn.Module, optimizer: Any) -> None:
    if moment == "backward" and step in (2, 5):
        with torch.no_grad():
            model.head.weight.mul_(0.5)
    if moment == "step" and step == 3:
        model.norm.weight.data = model.norm.weight.data.clone()


def move_to_another_group(moment: str, step: int, model: nn.Module, optimizer: Any) -> None:
    if moment == "backward" and step == 2:
        group = optimizer.param_groups[0]
        moved = group["params"].pop()
        optimizer.param_groups.append({**group, "params": [moved], "lr": 3e-3})


def skip_a_step(moment: str, step: int, model: nn.Module, optimizer: Any) -> None:
    if moment == "backward" and step == 2:
        optimizer.zero_grad()
        for parameter in model.blocks[0].parameters():
            parameter.requires_grad_(False)
        loss_of(model, next(batches(1, seed=step))).backward()


def evaluate(moment: str, step: int, model: nn.Module, optimizer: Any) -> None:
    if moment == "backward" and step in (2, 5):
        with torch.no_grad():
            loss_of(model, next(batches(1, seed=9)))
        with offload.full_params(model):
            assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize(
    "between",
    [
        edit, change_the_rate, schedule, drop_gradients, one_more_micro_batch, save_and_load, write_weights,
        move_to_another_group, skip_a_step, evaluate,
    ],
)  # fmt: skip
def test_what_comes_between_backward_and_step(between: Between) -> None:
    kept, thrown_away = counts(compare(between))
    assert kept > 0
    assert (thrown_away > 0) is (between is not schedule)


@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
def test_a_failed_backward_is_thrown_away(monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
    """What of it has left, that is: its few gradients wait for each other where they are small."""
    if not together:
        monkeypatch.setattr(_copy_lanes, "_SMALL_BYTES", 0)

    def fail(moment: str, step: int, model: nn.Module, optimizer: Any) -> None:
        if moment == "end" and step in (2, 4):
            optimizer.zero_grad()
            output = model.blocks[-1].register_full_backward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loss_of(model, next(batches(1, seed=step))).backward()
            output.remove()
            settle_ahead(optimizer)
            if step == 4:
                optimizer.zero_grad()
            else:
                model.zero_grad()

    optimizer = compare(fail)
    assert (counts(optimizer)[1] > 0) is not together


def test_hyperparameters_that_are_set_after_backward() -> None:
    """Nothing reads them in backward, as in torch."""

    def set_late(moment: str, step: int, model: nn.Module, optimizer: Any) -> None:
        group = optimizer.param_groups[0]
        if moment == "end" and step == 2:
            group["lr"] = None
        if moment == "end" and step == 4:
            del group["betas"]
        if moment == "backward":
            group |= {"lr": 1e-2, "betas": (0.9, 0.999)}

    optimizer = compare(set_late)
    parameters = len(optimizer.param_groups[0]["params"])
    assert counts(optimizer) == (4 * parameters, 0)  # steps 1, 2, 4 and 6


class CountedRate(Tensor):
    """A learning rate that counts how often it is read: on a card each time waits for it."""

    reads = 0

    def __float__(self) -> float:
        CountedRate.reads += 1
        return float(self.as_subclass(Tensor))


def test_a_rate_that_is_a_tensor_is_read_once_for_a_value() -> None:
    """It is written in place, replaced, and in step 5 written where no version shows it."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2, device="cpu").as_subclass(CountedRate))

    def change(moment: str, step: int, model: nn.Module, optimizer: Any) -> None:
        group = optimizer.param_groups[0]
        reads[moment, step] = CountedRate.reads
        CountedRate.reads = 0
        if moment != "end":
            return
        if step == 2:
            group["lr"].mul_(0.5)
        if step == 3:
            group["lr"] = torch.tensor(3e-3, device="cpu").as_subclass(CountedRate)
        if step == 4:
            group["lr"].data.mul_(0.5)

    reads: dict[tuple[str, int], int] = {}
    optimizer = compare(change, make=make, steps=8)
    parameters = len(optimizer.param_groups[0]["params"])
    assert parameters > 1
    assert [reads["backward", step] for step in range(1, 8)] == [1, 0, 1, 1, 0, 0, 1]
    assert all(reads["end", step] == 1 for step in range(8))
    assert counts(optimizer) == (5 * parameters, parameters)  # step 5 had the wrong one, and 6 sits out


def test_grad_scaler_with_an_overflow() -> None:
    def run(placement: dict[str, Any]) -> tuple[list[Tensor], Any]:
        model = make_model()
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        scaler = torch.amp.GradScaler(next(model.parameters()).device.type, init_scale=4.0, growth_interval=2)
        for step, tokens in enumerate(batches(8)):
            loss = loss_of(model, tokens) * (float("inf") if step == 4 else 1.0)
            scaler.scale(loss).backward()
            settle_ahead(optimizer)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return values(model, optimizer), optimizer

    expected, _ = run(RESIDENT)
    found, optimizer = run(AHEAD)
    assert_equal(found, expected)
    kept, thrown_away = counts(optimizer)
    assert kept == 0 < thrown_away  # a scale is no clipping: it is tried ever more rarely


def test_saves_while_updates_are_ahead(tmp_path: Path) -> None:
    def run(placement: dict[str, Any], directory: Path) -> tuple[list[Tensor], Any]:
        model = make_model()
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        for step, tokens in enumerate(batches(6)):
            loss_of(model, tokens).backward()
            settle_ahead(optimizer)
            if step == 3:
                save = offload.save_checkpoint(directory, model, optimizer, tag="a", async_save=True)
            optimizer.step()
            optimizer.zero_grad()
        save.wait()
        trained = values(model, optimizer)
        offload.load_checkpoint(directory, model, optimizer, tag="a")
        return trained + values(model, optimizer), optimizer

    expected, _ = run(RESIDENT, tmp_path / "resident")
    found, optimizer = run(AHEAD, tmp_path / "ahead")
    assert_equal(found, expected)
    assert counts(optimizer)[0] > 0


@pytest.mark.cpu_only
@pytest.mark.parametrize(("seed", "progress"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9)])
def test_no_race_with_updates_ahead(seed: int, progress: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(torch.bfloat16)
    expected = wrapped_run(model, RESIDENT, micro_batches=2, clip=0.88)  # the second step clips
    schedule = CopySchedule(monkeypatch, seed=seed, progress=progress)
    found = wrapped_run(model, AHEAD, micro_batches=2, clip=0.88)
    schedule.finish()
    assert_same_bits(found, expected)
    kept, thrown_away = counts(found.optimizer)
    assert kept > 0 and thrown_away > 0


# --- where it does nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("placement", "make", "why"),
    [
        (AHEAD | {"gradients": "device"}, torch.optim.AdamW, "gradients stay on the device"),
        (AHEAD | {"params": "host"}, torch.optim.AdamW, "weights are on the host"),
        (AHEAD | {"optimizer": "device"}, torch.optim.AdamW, "states are not in host memory"),
        (AHEAD, torch.optim.SGD, "has no native update"),
    ],
)
def test_it_says_why_it_does_nothing(placement: dict[str, Any], make: Any, why: str) -> None:
    model = make_model()
    model, optimizer = offload.wrap(model, make(model.parameters(), lr=1e-2), **placement)
    train(model, optimizer, steps=2)
    stats = optimizer.stats()
    assert stats.speculation.get("kept", 0) == 0 and stats.host_bytes["backups"] == 0
    assert any(why in text for text in stats.fallbacks), stats.fallbacks
    assert optimizer.plan.host.backups == 0


def test_several_optimizers_are_left_alone() -> None:
    model = make_model()
    groups = [model.blocks.parameters(), [*model.embedding.parameters(), *model.norm.parameters()]]
    model, optimizers = offload.wrap(model, [torch.optim.AdamW(group) for group in groups], **AHEAD)
    assert any("several optimizers" in text for text in optimizers[0].stats().fallbacks)


def test_the_room_counts_against_the_host_budget() -> None:
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **AHEAD)
    needed = optimizer.plan.host.total
    assert optimizer.plan.host.backups > 0
    model, plain = offload.unwrap(model, optimizer)
    with pytest.raises(offload.OutOfHostMemory, match="backups"):
        offload.wrap(model, plain, **AHEAD, params="device", host_budget=needed - 1)
    for value in (-1, "much", True):
        with pytest.raises(offload.InvalidArgument, match="speculate"):
            offload.Config(speculate=value)


def test_unwrap_gives_the_states_of_the_last_step() -> None:
    def run(placement: dict[str, Any]) -> list[Tensor]:
        model = make_model()
        model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **placement)
        train(model, optimizer, steps=3)
        loss_of(model, next(batches(1))).backward()
        settle_ahead(optimizer)
        model, plain = offload.unwrap(model, optimizer)
        return values(model, plain)

    assert_equal(run(AHEAD), run(RESIDENT))


@pytest.mark.cpu_only
def test_a_gradient_that_does_not_arrive_touches_no_state() -> None:
    model = make_model()
    model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **AHEAD)
    train(model, optimizer, steps=3, clip=None)
    before = values(model, optimizer)
    optimizer._engine.device.fail_copy("to_host", 2)
    loss_of(model, next(batches(1))).backward()
    settle_ahead(optimizer)
    assert_equal(values(model, optimizer), before)
    optimizer.step()
    with pytest.raises(offload.OffloadError, match="gradient did not arrive"):
        optimizer.synchronize()
