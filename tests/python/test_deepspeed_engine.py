"""The engine that `offload.initialize` returns: what scripts written for DeepSpeed call."""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from deepspeed_training import STAGES, config_of
from training import batches, loss_of, make_model, same_bits

pytestmark = pytest.mark.usefixtures("device")


def make_engine(model: nn.Module | None = None, **keys: Any) -> Any:
    engine, *_ = offload.initialize(model=model or make_model(), config=config_of(**keys))
    return engine


def train_step(engine: Any, count: int = 1, seed: int = 1) -> None:
    for tokens in batches(count, seed=seed):
        engine.backward(loss_of(engine, tokens))
        engine.step()


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in engine.module.state_dict().items()}


# --- initialize -----------------------------------------------------------------------------------------------


def test_the_door_is_loaded_on_first_use() -> None:
    code = "import sys, offload; assert not [n for n in sys.modules if n.startswith('offload.deepspeed')]; " \
           "import offload.deepspeed; assert 'torch' not in sys.modules; offload.initialize"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_config_by_path_and_by_command_line(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config_of(accumulation=2)))
    parser = offload.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", str(path)])
    assert args.deepspeed
    for given in (
        {"config": str(path)},
        {"config": path},
        {"args": args},
        {"config_params": config_of(accumulation=2)},
    ):
        engine, *_ = offload.initialize(model=make_model(), **given)
        assert engine.get_batch_info() == (8, 4, 2)
    with pytest.raises(offload.InvalidArgument, match=r"config and args\.deepspeed_config are both given"):
        offload.initialize(args=args, model=make_model(), config=config_of())
    with pytest.raises(offload.InvalidArgument, match="no config"):
        offload.initialize(args=argparse.Namespace(), model=make_model())


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(offload.InvalidArgument, match="WORLD_SIZE=2"):
        offload.initialize(model=make_model(), config=config_of())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": None}, "model is a NoneType"),
        ({"optimizer": 3}, "optimizer is a int"),
        ({"mesh_param": (2, 4)}, r"mesh_param=\(2, 4\)"),
        ({"optimizer": lambda parameters: None}, "optimizer is a function"),
        ({"config": config_of(optimizer={"type": "SGD", "params": {"lr": -1.0}})}, "learning rate"),
    ],
)
def test_bad_arguments_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(offload.InvalidArgument, match=message):
        offload.initialize(**{"model": make_model(), "config": config_of(), **given})


def test_a_mpu_that_splits_the_model_is_refused() -> None:
    class Mpu:
        def __init__(self, size: int) -> None:
            self.size = size

        def get_model_parallel_world_size(self) -> int:
            return self.size

    offload.initialize(model=make_model(), config=config_of(), mpu=Mpu(1))
    with pytest.raises(offload.InvalidArgument, match="mpu"):
        offload.initialize(model=make_model(), config=config_of(), mpu=Mpu(2))


def test_groups_of_parameters() -> None:
    model = make_model()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 1e-3},
    ]
    engine, optimizer, *_ = offload.initialize(model=model, model_parameters=groups, config=config_of())
    assert engine.get_lr() == [1e-2, 1e-3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_frozen_parameters_are_left_out() -> None:
    model = make_model()
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad_(False)
    engine = make_engine(model)
    before = weights_of(engine)
    train_step(engine, 2)
    for name, weight in weights_of(engine).items():
        assert same_bits(weight, before[name]) == name.startswith("blocks.0."), name


def test_without_an_optimizer_the_engine_runs_forward() -> None:
    model = make_model()
    expected = model(next(batches(1)))
    engine, optimizer, loader, scheduler = offload.initialize(model=model, config={"train_batch_size": 4})
    assert optimizer is None and loader is None and scheduler is None
    assert torch.equal(engine(next(batches(1))), expected)
    with pytest.raises(offload.StateError, match="needs an optimizer"):
        engine.backward(expected.sum())


@pytest.mark.cpu_only  # samplers draw on the CPU, whatever the default device
def test_a_loader_gives_micro_batches_in_a_fixed_order() -> None:
    data = [torch.tensor([float(number)]) for number in range(10)]

    def loader_of(**keys: Any) -> Any:
        _, _, loader, _ = offload.initialize(
            model=make_model(), config=config_of(**keys), training_data=data, collate_fn=torch.stack
        )
        return loader

    loader = loader_of()
    seen = [batch.flatten().tolist() for batch in loader]
    assert [len(batch) for batch in seen] == [4, 4, 2] and len(loader) == 3
    order = [number for batch in seen for number in batch]
    assert sorted(order) == list(range(10)) and order != list(range(10))
    assert [batch.flatten().tolist() for batch in loader] == seen  # the next epoch
    assert next(loader).flatten().tolist() == seen[0]
    assert [len(batch) for batch in loader_of(dataloader_drop_last=True)] == [4, 4]


# --- forward, backward, step ----------------------------------------------------------------------------------


def test_counters_and_boundaries() -> None:
    engine = make_engine(accumulation=3)
    boundaries = []
    for number, tokens in enumerate(batches(7), start=1):
        engine.backward(loss_of(engine, tokens))
        boundaries.append(engine.is_gradient_accumulation_boundary())
        engine.step()
        assert engine.micro_steps == number
        assert engine.was_step_applied() == boundaries[-1]
    assert boundaries == [False, False, True, False, False, True, False]
    assert (engine.global_steps, engine.global_samples, engine.skipped_steps) == (2, 24, 0)


def test_backward_divides_by_the_accumulation_and_returns_the_quotient() -> None:
    engine = make_engine(accumulation=2)
    tokens = next(batches(1))
    loss = loss_of(engine, tokens)
    assert torch.equal(engine.backward(loss, retain_graph=True), loss / 2)
    once = engine.module.norm.weight.grad.clone()
    engine.zero_grad()
    assert engine.module.norm.weight.grad is None
    assert torch.equal(engine.backward(loss, scale_wrt_gas=False), loss)
    assert torch.allclose(engine.module.norm.weight.grad, 2 * once)


@pytest.mark.parametrize("loss", [torch.ones(2), 1.0, None])
def test_backward_wants_one_number(loss: Any) -> None:
    with pytest.raises(offload.InvalidArgument, match="a tensor of one element"):
        make_engine().backward(loss)


def test_learning_rates_are_read_and_set() -> None:
    engine = make_engine()
    assert engine.get_lr() == [1e-2] and engine.get_mom() == [(0.9, 0.999)]
    engine.set_lr(0.0)
    before = weights_of(engine)
    train_step(engine)
    assert all(same_bits(weight, before[name]) for name, weight in weights_of(engine).items())


def test_a_scheduler_over_the_returned_optimizer() -> None:
    engine, optimizer, *_ = offload.initialize(model=make_model(), config=config_of())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it sees no step before the scheduler's
        for expected in (5e-3, 0.0):
            train_step(engine)
            scheduler.step()
            assert engine.get_lr() == [pytest.approx(expected)]
    before = weights_of(engine)
    train_step(engine)
    assert all(same_bits(weight, before[name]) for name, weight in weights_of(engine).items())


def test_the_returned_optimizer_is_the_wrapped_one_with_a_loss_scale() -> None:
    engine, optimizer, *_ = offload.initialize(model=make_model(), config=config_of(zero=STAGES["stage 1"]))
    train_step(engine)
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    weight = engine.module.norm.weight
    assert set(optimizer.state[weight]) >= {"exp_avg", "exp_avg_sq", "step"}
    saved = copy.deepcopy(optimizer.state_dict())
    train_step(engine)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[weight]["exp_avg"], saved["state"][_index_of(optimizer, weight)]["exp_avg"])
    assert optimizer.loss_scale == 1.0 and not optimizer.overflow and optimizer.stats().transfers is not None
    with pytest.raises(offload.InvalidArgument, match="closure"):
        optimizer.step(lambda: None)


def _index_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> int:
    return [id(p) for p in optimizer.param_groups[0]["params"]].index(id(parameter))


def test_batch_sizes_change_while_training() -> None:
    engine = make_engine(accumulation=2)
    engine.set_train_batch_size(12)
    assert engine.gradient_accumulation_steps() == 3 and engine.train_micro_batch_size_per_gpu() == 4
    engine.set_train_micro_batch_size(2)
    assert engine.train_batch_size() == 6
    with pytest.raises(offload.InvalidArgument, match="not a multiple"):
        engine.set_train_batch_size(5)


def test_no_sync_accumulates_and_refuses_a_step() -> None:
    engine = make_engine()
    with engine.no_sync():
        engine.backward(loss_of(engine, next(batches(1))))
        with pytest.raises(offload.StateError, match="inside no_sync"):
            engine.step()
        with pytest.raises(offload.StateError, match="entered already"), engine.no_sync():
            pass
    engine.step()
    assert engine.global_steps == 1


def test_the_engine_stands_for_its_module() -> None:
    model = make_model()
    engine = make_engine(model)
    assert engine.module is model and isinstance(engine, nn.Module)
    assert engine.blocks is model.blocks and engine.embedding.num_embeddings == 40
    assert engine.eval().training is False and model.training is False
    assert engine.train().training and model.training
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        engine.absent  # noqa: B018
    assert (engine.local_rank, engine.global_rank, engine.world_size) == (0, 0, 1)


def test_what_the_config_said() -> None:
    engine = make_engine(zero=STAGES["stage 3, all on the host"], bf16={"enabled": True}, steps_per_print=7)
    assert engine.zero_optimization() and engine.zero_optimization_stage() == 3
    assert engine.zero_optimization_partition_gradients() and engine.zero_optimization_partition_weights()
    assert engine.zero_offload_optimizer() and engine.zero_offload_param()
    assert engine.bfloat16_enabled() and not engine.fp16_enabled() and not engine.dynamic_loss_scale()
    assert engine.optimizer_name() == "adamw" and engine.scheduler_name() is None
    assert engine.gradient_clipping() == 0.0 and engine.steps_per_print() == 7


def test_compile_compiles_the_module() -> None:
    engine = make_engine()
    seen = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    engine.compile(backend=backend)
    train_step(engine)
    assert seen and engine.global_steps == 1


# --- where things are -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
def test_states_go_to_the_host_and_come_back_without_changing_a_bit(keys: dict[str, Any]) -> None:
    runs = []
    for moves in (False, True):
        warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.05, "warmup_num_steps": 6}}
        engine = make_engine(scheduler=warmup, **keys)
        train_step(engine, 2)
        if moves:
            engine.offload_states()
            assert engine.optimizer.plan.optimizer == engine.optimizer.plan.params == "host"
            assert engine.optimizer.stats().host_bytes["moments"] > 0
        train_step(engine, 2, seed=5)
        if moves:
            engine.reload_states()
            assert engine.optimizer.plan.optimizer == engine.optimizer.plan.params == "device"
        train_step(engine, 2, seed=6)
        runs.append((weights_of(engine), engine.get_lr()))
    assert runs[0][1] == runs[1][1]
    assert all(same_bits(runs[1][0][name], weight) for name, weight in runs[0][0].items())


def test_a_share_of_the_states_comes_back_as_it_was() -> None:
    engine = make_engine(zero={"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}})
    kept = engine.optimizer.plan.kept_states
    assert kept
    engine.offload_states()
    assert engine.optimizer.plan.optimizer == "host"
    engine.reload_states()
    assert engine.optimizer.plan.kept_states == kept
    wrapped = engine.optimizer.optimizer
    engine.reload_states()
    assert engine.optimizer.optimizer is wrapped, "it was there already"


def fail_once(patched: pytest.MonkeyPatch, target: Any, name: str) -> None:
    plain = getattr(target, name)

    def failing(*args: Any, **options: Any) -> Any:
        patched.setattr(target, name, plain)
        raise offload.OutOfHostMemory("the test wants none")

    patched.setattr(target, name, failing)


@pytest.mark.parametrize("keys", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("failing", [(offload, "wrap"), (offload.OffloadOptimizer, "load_state_dict")])
def test_a_move_that_fails_changes_nothing(
    failing: tuple[Any, str], keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for fails in (False, True):
        engine = make_engine(**keys)
        train_step(engine, 2)
        for move, place in (("offload_states", "device"), ("reload_states", "host")):
            if fails:
                fail_once(monkeypatch, *failing)
                with pytest.raises(offload.OutOfHostMemory, match="the test wants none"):
                    getattr(engine, move)()
                assert engine.optimizer.plan.optimizer == engine.optimizer.plan.params == place
            train_step(engine, 2, seed=5)
            getattr(engine, move)()
            train_step(engine, 2, seed=6)
        runs.append(weights_of(engine))
    assert all(same_bits(runs[1][name], weight) for name, weight in runs[0].items())


def test_states_go_to_no_other_place() -> None:
    with pytest.raises(offload.InvalidArgument, match="legal is 'cpu'"):
        make_engine().offload_states(device="nvme")


def test_destroy_that_failed_can_be_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(zero=STAGES["stage 3, all on the host"])
    train_step(engine)
    fail_once(monkeypatch, offload, "unwrap")
    with pytest.raises(offload.OutOfHostMemory):
        engine.destroy()
    train_step(engine)
    engine.destroy()
    offload.wrap(engine.module, torch.optim.SGD(engine.module.parameters(), lr=0.1))


def test_destroy_leaves_a_plain_model() -> None:
    engine = make_engine(zero=STAGES["stage 3, all on the host"])
    train_step(engine)
    expected = weights_of(engine)
    engine.destroy()
    engine.destroy()
    assert all(same_bits(p.detach(), expected[name]) for name, p in engine.module.named_parameters())
    with pytest.raises(offload.StateError, match="destroy"):
        engine.step()


def test_a_dropped_engine_frees_its_model() -> None:
    engine = make_engine(zero=STAGES["stage 3, all on the host"])
    train_step(engine)
    module = weakref.ref(engine.module)
    del engine
    gc.collect()
    assert module() is None


# --- what it tells --------------------------------------------------------------------------------------------


def test_progress_and_breakdowns_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "offload.deepspeed")
    engine = make_engine(steps_per_print=2, wall_clock_breakdown=True, memory_breakdown=True)
    train_step(engine, 4)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(",")[0] for line in lines if line.startswith("step=")] == ["step=2", "step=4"]
    breakdown = [line for line in lines if line.startswith("step 1:")]
    assert len(breakdown) == 1 and all(part in breakdown[0] for part in ("forward", "backward", "step"))
    memory = [line for line in lines if line.startswith("memory after step 1:")]
    assert len(memory) == 1 and "moments" in memory[0]


def test_the_state_and_what_differs_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "offload.deepspeed")
    config = {"train_batch_size": 4, "dump_state": True, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
    offload.initialize(model=make_model(), config=config)
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("gradient_clipping is not in the config") for line in lines)
    assert any(line.startswith("Settings(batch=BatchSizes(train=4") for line in lines)
    assert any("optimizer on the device" in line for line in lines)


def test_the_csv_monitor_writes_a_file_a_scalar(tmp_path: Path) -> None:
    monitor = {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}
    engine = make_engine(accumulation=2, csv_monitor=monitor, fp16={"enabled": True, "loss_scale": 8.0})
    losses = []
    for tokens in batches(4):
        loss = loss_of(engine, tokens)
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    rows = (tmp_path / "run" / "Train_Samples_train_loss.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "8", "16"]
    assert [float(row.split(",")[1]) for row in rows[1:]] == pytest.approx(
        [sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-6
    )
    for name, value in (("lr", 1e-2), ("loss_scale", 8.0)):
        rows = (tmp_path / "run" / f"Train_Samples_{name}.csv").read_text().splitlines()
        assert [float(row.split(",")[1]) for row in rows[1:]] == [value, value]
    assert engine.monitor.enabled  # scripts write through it too
    engine.monitor.write_events([("Eval/accuracy", torch.tensor(0.5), engine.global_samples)])
    assert (tmp_path / "run" / "Eval_accuracy.csv").read_text().split() == ["step,accuracy", "16,0.5"]


def test_the_tensorboard_monitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where the package is absent
    with pytest.raises(offload.InvalidArgument, match="pip install tensorboard"):
        make_engine(tensorboard=monitor)
    written = []

    class Writer:
        def __init__(self, log_dir: str) -> None:
            assert log_dir == str(tmp_path / "run")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, step))

        def flush(self) -> None:
            pass

    module = type(sys)("tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    engine = make_engine(tensorboard=monitor)
    train_step(engine)
    assert written == [("Train/Samples/train_loss", 4), ("Train/Samples/lr", 4)]
    own = engine.monitor.tb_monitor
    own.summary_writer.add_scalar("Eval/accuracy", 0.5, 4)  # as scripts do
    assert written[-1] == ("Eval/accuracy", 4)
    assert (own.output_path, own.job_name, own.log_dir) == (str(tmp_path), "run", str(tmp_path / "run"))
    assert own.enabled and engine.monitor.csv_monitor is engine.monitor.wandb_monitor is None


def test_the_flops_profiler_counts_one_forward(tmp_path: Path) -> None:
    path = tmp_path / "flops.txt"
    model = nn.Sequential(nn.Linear(8, 16, bias=False))
    profiler = {"enabled": True, "profile_step": 2, "output_file": str(path)}
    engine = make_engine(model, flops_profiler=profiler)
    for step in range(3):
        assert path.exists() == (step == 2)
        engine.backward(engine(torch.ones(4, 8)).sum())
        engine.step()
    assert path.read_text().startswith(f"forward at step 2: {2 * 4 * 8 * 16:,} FLOPs, 128 parameters")
