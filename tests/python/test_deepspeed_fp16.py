"""fp16: the loss scale step by step, skipped steps, and training that equals plain torch over fp32 masters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import offload
from deepspeed_training import STAGES, config_of, engine_run, plain_run
from offload.deepspeed._loss_scale import DynamicLossScale, StaticLossScale, make_loss_scale
from offload.deepspeed._settings import Autocast, BatchSizes, LossScale, Placement, Precision, Settings
from training import batches, loss_of, make_model, same_bits

pytestmark = pytest.mark.usefixtures("device")

GOOD, BAD = False, True


def scales(settings: LossScale, steps: list[bool], *, under_zero: bool = True) -> list[float]:
    scale = DynamicLossScale(settings, under_zero=under_zero)
    seen = []
    for overflow in steps:
        scale.update(overflow)
        seen.append(scale.scale)
    return seen


# Worked out by hand from the published rules.
@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [
        # A window of two: the first good step does not count, the third doubles.
        (LossScale(None, 4, 2, 1), [GOOD] * 5, [16, 16, 32, 32, 64]),
        # Without hysteresis each overflow halves, and the window starts again.
        (LossScale(None, 4, 2, 1), [BAD, GOOD, GOOD, GOOD, BAD, BAD, GOOD], [8, 8, 8, 16, 8, 4, 4]),
        # A hysteresis of two: the first overflow is let pass, those after it are not.
        (LossScale(None, 4, 100, 2), [BAD, BAD, BAD, GOOD, BAD], [16, 8, 4, 4, 2]),
        # A doubling gives the hysteresis back.
        (LossScale(None, 4, 2, 2), [BAD, GOOD, GOOD, GOOD, BAD, BAD], [16, 16, 16, 32, 32, 16]),
        # So does any good step when it is consecutive.
        (LossScale(None, 4, 100, 2, True), [BAD, GOOD, BAD, GOOD, BAD, BAD], [16, 16, 16, 16, 16, 8]),
        # The minimum holds.
        (LossScale(None, 2, 100, 1, False, 3), [BAD], [3]),
    ],
)
def test_the_dynamic_scale(settings: LossScale, steps: list[bool], expected: list[float]) -> None:
    assert scales(settings, steps) == expected


def test_without_zero_overflows_halve_at_once() -> None:
    settings = LossScale(None, 4, 2, 2, False, 4)
    assert scales(settings, [BAD, BAD, BAD], under_zero=False) == [8, 4, 4]


def test_an_overflow_at_the_minimum_is_an_error_under_zero() -> None:
    scale = DynamicLossScale(LossScale(None, 1, 100, 1, False, 1), under_zero=True)
    scale.update(BAD)
    with pytest.raises(offload.StateError, match="minimum of 1"):
        scale.update(BAD)


def test_a_saved_scale_goes_on() -> None:
    settings = LossScale(None, 4, 3, 2)
    whole, first = (DynamicLossScale(settings, under_zero=True) for _ in range(2))
    steps = [GOOD, BAD, GOOD, GOOD, GOOD, BAD, BAD, GOOD]
    for overflow in steps[:4]:
        first.update(overflow)
    second = DynamicLossScale(settings, under_zero=True)
    second.load_state_dict(first.state_dict())
    for overflow in steps[4:]:
        second.update(overflow)
    for overflow in steps:
        whole.update(overflow)
    assert second.state_dict() == whole.state_dict()


def test_what_makes_which_scale() -> None:
    batch = BatchSizes(1, 1, 1)
    assert make_loss_scale(Settings(batch)).scale == 1.0
    static = make_loss_scale(Settings(batch, Precision("fp16", LossScale(128.0))))
    static.update(BAD)
    assert isinstance(static, StaticLossScale) and static.scale == 128.0
    for stage, expected in ((0, 2.0**15), (1, 2.0**16)):  # under ZeRO the hysteresis lets the first one pass
        scale = make_loss_scale(Settings(batch, Precision("fp16", LossScale()), placement=Placement(stage)))
        scale.update(BAD)
        assert scale.scale == expected


def test_fp16_autocast_scales_as_torchs_grad_scaler() -> None:
    autocast = Precision("fp32", LossScale(), autocast=Autocast("fp16"))
    scale = make_loss_scale(Settings(BatchSizes(1, 1, 1), autocast))
    weight = nn.Parameter(torch.zeros(1))
    scaler = torch.amp.GradScaler(weight.device.type)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    bad = {3, 4}
    for step in range(2100):
        scaler.scale(weight.sum()).backward()
        if step in bad:
            weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scale.update(step in bad)
        if step % 100 < 5:
            assert scale.scale == scaler.get_scale(), step
    assert scale.scale == scaler.get_scale() == 2.0**15  # halved twice, and doubled after 2000 good steps


@pytest.mark.cpu_only
def test_fp16_autocast_skips_what_overflows() -> None:
    keys = {"torch_autocast": {"enabled": True, "dtype": "fp16"}, "gradient_clipping": 0.5}
    engine, optimizer, *_ = offload.initialize(model=make_model(), config=config_of(**keys))
    applied = []
    for number, tokens in enumerate(batches(4)):
        loss = loss_of(engine, tokens)
        engine.backward(loss * float("inf") if number == 1 else loss)
        engine.step()
        applied.append(engine.was_step_applied())
    assert applied == [True, False, True, True] and optimizer.loss_scale == 2.0**15
    assert torch.isfinite(engine.module.norm.weight).all()


def fp16(**keys: Any) -> dict[str, Any]:
    return {"fp16": {"enabled": True, **keys}, "gradient_clipping": 0.5}


@pytest.mark.cpu_only  # the oracle takes roots and norms as the CPU does
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("zero", STAGES.values(), ids=STAGES.keys())
def test_a_dynamic_scale_that_overflows(zero: dict[str, Any], accumulation: int) -> None:
    keys = fp16(initial_scale_power=20, loss_scale_window=3, hysteresis=1)
    settings = LossScale(None, 20, 3, 1)
    scale = DynamicLossScale(settings, under_zero=zero.get("stage", 0) > 0)
    expected = plain_run(torch.float16, steps=8, accumulation=accumulation, clip=0.5, scale=scale)
    run = engine_run(config_of(zero=zero, accumulation=accumulation, **keys), steps=8)
    assert expected.applied.count(False) >= 2 and expected.applied.count(True) >= 4
    assert (run.applied, run.scales, run.losses) == (expected.applied, expected.scales, expected.losses)
    assert run.norms == expected.norms
    for name, weight in expected.weights.items():
        assert same_bits(run.weights[name], weight), name


@pytest.mark.cpu_only
def test_a_static_scale() -> None:
    expected = plain_run(torch.float16, clip=0.5, scale=StaticLossScale(256.0))
    run = engine_run(config_of(zero={"stage": 2}, **fp16(loss_scale=256.0)))
    assert run.losses == expected.losses and run.scales == [256.0] * 4
    assert all(same_bits(run.weights[name], weight) for name, weight in expected.weights.items())


def test_a_skipped_step_changes_nothing_but_the_scale() -> None:
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 5}}
    config = config_of(zero={"stage": 1}, scheduler=warmup, **fp16(initial_scale_power=32, hysteresis=1))
    engine, optimizer, _, scheduler = offload.initialize(model=make_model(), config=config)
    before = {name: weight.clone() for name, weight in engine.module.state_dict().items()}
    rate, iteration = engine.get_lr(), scheduler.last_batch_iteration
    engine.backward(loss_of(engine, next(batches(1))))
    engine.step()
    assert optimizer.overflow and engine.skipped_steps == engine.global_steps == 1
    assert not engine.was_step_applied()
    assert optimizer.cur_scale == optimizer.loss_scale == engine.optimizer.cur_scale == 2.0**31
    assert engine.get_lr() == rate and scheduler.last_batch_iteration == iteration
    assert all(p.grad is None for p in engine.module.parameters())
    for name, weight in engine.module.state_dict().items():
        assert same_bits(weight, before[name]), name


def test_a_bf16_step_with_nan_is_skipped() -> None:
    engine, optimizer, *_ = offload.initialize(model=make_model(), config=config_of(bf16={"enabled": True}))
    before = engine.module.norm.weight.detach().clone()
    engine.backward(loss_of(engine, next(batches(1))) * float("nan"))
    engine.step()
    assert optimizer.overflow and engine.skipped_steps == 1
    assert same_bits(engine.module.norm.weight.detach(), before)


def test_auto_cast_casts_inputs() -> None:
    model = torch.nn.Linear(4, 4)
    config = config_of(fp16={"enabled": True, "auto_cast": True})
    engine, *_ = offload.initialize(model=model, config=config)
    assert engine(torch.ones(2, 4)).dtype == torch.float16
