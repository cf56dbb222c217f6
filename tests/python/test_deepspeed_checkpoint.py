"""The engine's checkpoints: training that goes on with the same bits, under whatever placement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from deepspeed_training import STAGES, config_of
from training import batches, loss_of, make_model, same_bits

pytestmark = pytest.mark.usefixtures("device")

WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.05, "warmup_num_steps": 6}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 3, "hysteresis": 1}}
STEPS = 4


def make_engine(seed: int = 0, **keys: Any) -> Any:
    engine, *_ = offload.initialize(model=make_model(seed=seed), config=config_of(scheduler=WARMUP, **keys))
    return engine


def train(engine: Any, *, seed: int) -> None:
    for tokens in batches(STEPS, seed=seed):
        engine.backward(loss_of(engine, tokens))
        engine.step()


def state_of(engine: Any) -> tuple[Any, ...]:
    counters = (engine.micro_steps, engine.global_steps, engine.global_samples, engine.skipped_steps)
    return (*counters, engine.get_lr(), engine.optimizer.cur_scale, engine.lr_scheduler.state_dict())


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    return {name: weight.to("cpu", copy=True) for name, weight in engine.module.state_dict().items()}


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(same_bits(one[name], weight) for name, weight in other.items())


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("resume_under", ["stage 0", "stage 3, all on the host"])
def test_a_resumed_run_goes_on_with_the_same_bits(precision: dict[str, Any], resume_under: str, tmp_path: Path) -> None:
    engine = make_engine(zero=STAGES["stage 2, optimizer on the host"], **precision)
    train(engine, seed=1)
    assert engine.save_checkpoint(tmp_path, client_state={"epoch": 3, "note": "half way"})
    saved = state_of(engine)
    # Without ZeRO the scale follows another rule: such a run is resumed under a stage that has the same.
    zero = STAGES["stage 1"] if precision is FP16 and resume_under == "stage 0" else STAGES[resume_under]
    other = make_engine(seed=7, zero=zero, **precision)
    path, client_state = other.load_checkpoint(tmp_path)
    assert path == str(tmp_path / "global_step4") and client_state == {"epoch": 3, "note": "half way"}
    assert state_of(other) == saved
    for one in (engine, other):
        train(one, seed=2)
    assert state_of(other) == state_of(engine) and engine.global_steps == 2 * STEPS
    assert_same_weights(weights_of(other), weights_of(engine))


def test_tags_and_latest(tmp_path: Path) -> None:
    engine = make_engine()
    before = weights_of(engine)
    engine.save_checkpoint(tmp_path, tag="first")
    train(engine, seed=1)
    engine.save_checkpoint(tmp_path, tag="second", save_latest=False)
    after = weights_of(engine)
    other = make_engine(seed=7)
    assert other.load_checkpoint(tmp_path)[0] == str(tmp_path / "first")
    assert_same_weights(weights_of(other), before)
    assert other.load_checkpoint(tmp_path, tag="second")[0] == str(tmp_path / "second")
    assert_same_weights(weights_of(other), after)
    with pytest.raises(offload.StorageError, match="third"):
        other.load_checkpoint(tmp_path, tag="third")


def test_a_first_run_finds_nothing_to_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert make_engine().load_checkpoint(tmp_path) == (None, None)
    assert "has no file 'latest'" in caplog.text


def test_parts_of_a_checkpoint(tmp_path: Path) -> None:
    engine = make_engine()
    train(engine, seed=1)
    engine.save_checkpoint(tmp_path)
    other = make_engine(seed=7)
    fresh = state_of(other)
    other.load_checkpoint(tmp_path, load_module_only=True)
    assert state_of(other) == fresh and not other.optimizer.state
    assert_same_weights(weights_of(other), weights_of(engine))
    other = make_engine(seed=7)
    iteration = other.lr_scheduler.last_batch_iteration
    other.load_checkpoint(tmp_path, load_optimizer_states=False, load_lr_scheduler_states=False)
    assert other.global_steps == STEPS and not other.optimizer.state
    assert other.lr_scheduler.last_batch_iteration == iteration


def test_a_static_scale_says_nothing_of_a_dynamic_one(tmp_path: Path) -> None:
    engine = make_engine(fp16={"enabled": True, "loss_scale": 64})
    train(engine, seed=1)
    engine.save_checkpoint(tmp_path)
    other = make_engine(**FP16)
    other.load_checkpoint(tmp_path)
    assert other.optimizer.cur_scale == 2.0**20 and other.global_steps == STEPS


def test_an_asynchronous_save_has_the_bits_of_its_call(tmp_path: Path) -> None:
    engine = make_engine(
        zero=STAGES["stage 2, optimizer on the host"], checkpoint={"writer": {"type": "fast", "decoupled": True}}
    )
    train(engine, seed=1)
    expected = weights_of(engine)
    other = make_engine(seed=7)
    engine.save_checkpoint(tmp_path)
    assert other.load_checkpoint(tmp_path)[0] is not None  # waits for the save, also for the file that names it
    assert_same_weights(weights_of(other), expected)
    engine.save_checkpoint(tmp_path, tag="again")
    train(engine, seed=2)
    other.load_checkpoint(tmp_path)
    assert_same_weights(weights_of(other), expected)


def test_the_engines_key_is_not_for_clients(tmp_path: Path) -> None:
    with pytest.raises(offload.InvalidArgument, match="deepspeed_engine"):
        make_engine().save_checkpoint(tmp_path, client_state={"deepspeed_engine": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_16bit_model_is_a_file_that_torch_reads(tmp_path: Path) -> None:
    engine = make_engine(zero=STAGES["stage 3, all on the host"], bf16={"enabled": True})
    engine.module.embedding.weight.requires_grad_(False)
    train(engine, seed=1)
    assert engine.save_16bit_model(tmp_path / "out")
    state = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert {weight.dtype for weight in state.values()} == {torch.bfloat16}
    assert_same_weights({name: weight.cpu() for name, weight in state.items()}, weights_of(engine))
    engine.save_16bit_model(tmp_path / "out", "small.bin", exclude_frozen_parameters=True)
    small = torch.load(tmp_path / "out" / "small.bin", weights_only=True)
    assert state.keys() - small.keys() == {"embedding.weight"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["pytorch_model.bin", "small.bin"]


def test_weights_by_name_with_and_without_frozen_ones(tmp_path: Path) -> None:
    engine = make_engine(zero=STAGES["stage 3, all on the host"])
    engine.module.norm.requires_grad_(False)
    train(engine, seed=1)
    weights = weights_of(engine)
    for frozen_out in (engine.module_state_dict, engine._zero3_consolidated_16bit_state_dict):
        assert weights.keys() - frozen_out(exclude_frozen_parameters=True).keys() == {"norm.weight", "norm.bias"}
    for given in (weights, {"module": weights}):
        other = make_engine(seed=7)
        other.load_module_state_dict(given)
        assert_same_weights(weights_of(other), weights)
    with pytest.raises(offload.InvalidArgument, match="load_module_strict=False"):
        other.load_checkpoint(tmp_path, custom_load_fn=lambda src, dst: None)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("stage", ["stage 0", "stage 3, all on the host"])
def test_frozen_weights_are_left_out_and_left_alone(stage: str, asynchronous: bool, tmp_path: Path) -> None:
    """As of a base model under adapters: the run goes on, over the frozen weights that the model has."""
    writer = {"checkpoint": {"writer": {"type": "fast", "decoupled": asynchronous}}}

    def engine_of(seed: int) -> Any:
        model = make_model(seed=seed)
        model.blocks.requires_grad_(False)
        engine, *_ = offload.initialize(model=model, config=config_of(zero=STAGES[stage], **writer))
        return engine

    engine, other = engine_of(0), engine_of(7)
    own = weights_of(other)
    train(engine, seed=1)
    engine.save_checkpoint(tmp_path, exclude_frozen_parameters=True)
    expected = weights_of(engine)
    frozen = {name for name in own if name.startswith("blocks.")}
    assert other.load_checkpoint(tmp_path)[0] is not None
    described = offload.describe_checkpoint(tmp_path)
    assert described["excluded"] == sorted(frozen) and described["weights"] == len(own) - len(frozen)
    assert_same_weights(weights_of(other), {name: (own if name in frozen else expected)[name] for name in own})
    base = {name: expected[name] for name in frozen}
    other.module.load_state_dict(base, strict=False)
    for one in (engine, other):
        train(one, seed=2)
    assert_same_weights(weights_of(other), weights_of(engine))


def test_what_is_missing_beside_the_frozen_weights_is_refused(tmp_path: Path) -> None:
    engine = make_engine()
    engine.module.blocks.requires_grad_(False)
    engine.save_checkpoint(tmp_path, exclude_frozen_parameters=True)
    other = make_engine(seed=7)
    other.module.more = torch.nn.Linear(2, 2)
    before = weights_of(other)
    with pytest.raises(offload.InvalidArgument, match=r"it has no more\.bias, more\.weight; strict=False"):
        other.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert_same_weights(weights_of(other), before)
