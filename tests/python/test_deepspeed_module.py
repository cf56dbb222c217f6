"""`import offload.deepspeed as deepspeed`: what the module has beside the engine."""

from __future__ import annotations

import importlib
import inspect
import itertools
import logging
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
import offload.deepspeed as deepspeed
from deepspeed_training import STAGES, config_of
from offload import _activations
from offload.deepspeed import _submodules
from offload.deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from offload.deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from offload.deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from training import TinyLM, batches, loss_of, make_model, same_bits

pytestmark = pytest.mark.usefixtures("device")

ON_HOST = STAGES["stage 3, all on the host"]


def test_the_module_is_the_door() -> None:
    assert deepspeed.initialize is offload.initialize
    assert deepspeed.add_config_arguments is offload.add_config_arguments
    engine, *_ = deepspeed.initialize(model=make_model(), config=config_of())
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    assert set(deepspeed.__all__) <= set(dir(deepspeed))
    assert all(getattr(deepspeed, name) is not None for name in deepspeed.__all__)
    assert tuple(int(part) for part in deepspeed.__version__.split(".")) >= (0, 19)


@pytest.mark.parametrize("name", ["PipelineModule", "init_inference", "moe"])
def test_what_is_not_here_names_what_to_use(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"offload\.deepspeed has no '{name}': \w+"):
        getattr(deepspeed, name)
    with pytest.raises(ImportError, match=rf"offload\.deepspeed has no '{name}': \w+"):
        exec(f"from offload.deepspeed import {name}")
    with pytest.raises(AttributeError, match="it has DeepSpeedEngine"):
        deepspeed.absent  # noqa: B018


def test_submodules_by_their_paths() -> None:
    from offload.deepspeed.runtime.engine import DeepSpeedEngine
    from offload.deepspeed.runtime.lr_schedules import WarmupLR
    from offload.deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
    from offload.deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs_all_live
    from offload.deepspeed.utils import RepeatingLoader, log_dist, logger

    assert DeepSpeedEngine is deepspeed.DeepSpeedEngine and WarmupLR is deepspeed.WarmupLR
    assert GatheredParameters is deepspeed.zero.GatheredParameters and ZeroParamStatus.NOT_AVAILABLE
    assert (
        estimate_zero3_model_states_mem_needs_all_live is deepspeed.zero.estimate_zero3_model_states_mem_needs_all_live
    )
    assert logger is deepspeed.logger is deepspeed.utils.logging.logger
    assert deepspeed.utils.log_dist is log_dist
    assert list(itertools.islice(RepeatingLoader([1, 2]), 5)) == [1, 2, 1, 2, 1]


def test_every_name_of_the_submodules_is_there() -> None:
    for path, homes in _submodules._HOMES.items():
        module = importlib.import_module(f"offload.deepspeed.{path}")
        assert all(getattr(module, name) is not None for name in homes)


@pytest.mark.parametrize(
    ("path", "name", "instead"),
    [
        ("utils.zero_to_fp32", "nonsense", "it has convert_zero_checkpoint_to_fp32_state_dict"),
        ("monitor.monitor", "MonitorMaster", "engine.monitor.write_events"),
        ("utils", "nonsense", "it has logger"),
        ("runtime.lr_schedules", "nonsense", "it has LRRangeTest"),
        ("runtime.utils", "get_global_norm", "get_global_grad_norm"),
        ("utils", "get_z3_leaf_modules", "found from the model"),
        ("moe.layer", "MoE", "the model's own"),
        ("profiling.flops_profiler", "FlopsProfiler", "flop_counter"),
        ("nonsense", "x", "it has checkpoint, runtime"),
        ("ops.lamb", "FusedLamb", "use AdamW"),
    ],
)
def test_what_is_not_in_a_submodule_names_what_to_use(path: str, name: str, instead: str) -> None:
    with pytest.raises((AttributeError, ImportError), match=re.escape(instead)):
        getattr(importlib.import_module(f"offload.deepspeed.{path}"), name)
    with pytest.raises(ImportError, match=re.escape(instead)):
        exec(f"from offload.deepspeed.{path} import {name}")


def test_what_the_engine_lacks_names_what_to_use() -> None:
    engine, *_ = deepspeed.initialize(model=make_model(), config=config_of())
    engine.allreduce_gradients()
    engine.empty_partition_cache()
    for name, instead in {"zero_sub_group_size": "engine.settings", "summary_events": "csv_monitor"}.items():
        with pytest.raises(AttributeError, match=rf"the engine has no '{name}': .*{instead}"):
            getattr(engine, name)
    engine.module.timers = 3  # the model's own
    assert engine.timers == 3 and engine.embedding is engine.module.embedding
    with pytest.raises(AttributeError, match="TinyLM"):
        engine.nonsense  # noqa: B018


def test_log_dist_is_for_rank_0(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "offload.deepspeed")
    for ranks in (None, [0], [-1], [1]):
        deepspeed.utils.log_dist(f"to {ranks}", ranks=ranks)
    assert [record.getMessage() for record in caplog.records] == ["to None", "to [0]", "to [-1]"]


def test_timers_add_up_until_they_are_reset(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from offload.deepspeed.utils.timer import SynchronizedWallClockTimer

    seconds = itertools.count(step=0.25)
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    timers = SynchronizedWallClockTimer()
    for _ in range(2):
        timers("forward").start()
        assert timers("forward").started_
        timers("forward").stop()
    assert timers("forward").mean() == 250.0 and timers("forward").elapsed(reset=False) == 500.0
    timers("forward").start()
    assert timers("forward").elapsed() == 750.0 and timers("forward").started_, "it goes on"
    timers("forward").stop()
    with pytest.raises(offload.StateError, match="'forward' is not running"):
        timers("forward").stop()
    caplog.set_level(logging.INFO, "offload.deepspeed")
    timers.log(["forward", "absent"], normalizer=2.0)
    assert caplog.messages == ["time (ms) | forward: 125.00"] and timers("forward").elapsed() == 0.0
    assert list(timers.get_timers()) == ["forward"]


def test_classes_of_theirs_may_be_named_to_torch(tmp_path: Path) -> None:
    """As scripts do before they load a file of theirs; the pickle says the name alone."""
    from offload.deepspeed.runtime.fp16.loss_scaler import LossScaler
    from offload.deepspeed.runtime.zero.config import ZeroStageEnum

    stage = type("ZeroStageEnum", (int,), {"__module__": "deepspeed.runtime.zero.config"})
    with pytest.MonkeyPatch.context() as patch:
        for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", "deepspeed.runtime.zero.config"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setattr(sys.modules["deepspeed.runtime.zero.config"], "ZeroStageEnum", stage, raising=False)
        torch.save({"zero_stage": stage(3)}, tmp_path / "states.pt")
    with torch.serialization.safe_globals([ZeroStageEnum, LossScaler]):
        assert torch.load(tmp_path / "states.pt", weights_only=True) == {"zero_stage": ZeroStageEnum.weights}
    assert ZeroStageEnum.max_stage is ZeroStageEnum.weights and ZeroStageEnum.gradients == 2


def test_leaf_modules_are_named_and_change_nothing() -> None:
    from offload.deepspeed.utils import set_z3_leaf_modules, unset_z3_leaf_modules

    model = make_model()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for given in (nn.Linear, "Linear", "torch.nn.modules.linear.Linear"):
        assert set_z3_leaf_modules(model, [nn.Conv2d, given]) == linear
    assert unset_z3_leaf_modules(model, [nn.Conv2d], raise_if_not_found=False) == []
    with pytest.raises(ValueError, match="no module of .*Conv2d"):
        set_z3_leaf_modules(model, [nn.Conv2d])


def test_states_are_named_by_their_enums() -> None:
    from offload.deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum

    engine, *_ = deepspeed.initialize(model=make_model(), config=config_of(zero=STAGES["stage 2"]))
    engine.offload_states(include=[OffloadStateTypeEnum.optim_states], device=OffloadDeviceEnum.cpu)
    assert engine.optimizer.plan.optimizer == "host"
    engine.reload_states()
    assert engine.optimizer.plan.optimizer == "device"
    with pytest.raises(offload.InvalidArgument, match="legal is 'cpu'"):
        engine.offload_states(device=OffloadDeviceEnum.nvme)


def test_see_memory_usage_tells_when_forced(caplog: pytest.LogCaptureFixture) -> None:
    from offload.deepspeed.runtime.utils import see_memory_usage

    caplog.set_level(logging.INFO, "offload.deepspeed")
    see_memory_usage("quiet")
    see_memory_usage("after the model", force=True)
    (text,) = [record.getMessage() for record in caplog.records]
    found = re.fullmatch(r"after the model\naccelerator: .* at most .*; host: (.+) GiB of (.+) GiB", text)
    assert found is not None and 0 < float(found[1]) < float(found[2])


# --- one process ----------------------------------------------------------------------------------------------


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not torch.distributed.is_initialized()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    deepspeed.init_distributed(dist_backend="nccl", auto_mpi_discovery=True)
    deepspeed.init_distributed()
    assert (torch.distributed.get_rank(), torch.distributed.get_world_size()) == (0, 1)
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["0", "0", "1"]
    torch.distributed.barrier()
    comm = deepspeed.comm
    assert comm.is_initialized() and comm.is_available()
    assert (comm.get_rank(), comm.get_local_rank(), comm.get_world_size()) == (0, 0, 1)
    tensor = torch.ones(3)
    comm.all_reduce(tensor, op=comm.ReduceOp.SUM, group=comm.new_group([0]))
    comm.reduce(tensor, 0)
    gathered = [torch.zeros(3)]
    comm.all_gather(gathered, tensor, group=comm.get_world_group())
    assert torch.equal(gathered[0], tensor)
    with pytest.raises(AttributeError, match="'send': torch.distributed has"):
        comm.send  # noqa: B018
    comm.broadcast(tensor, 0)
    comm.barrier()
    assert torch.equal(tensor, torch.ones(3))
    with pytest.raises(offload.InvalidArgument, match="the only rank is 0"):
        comm.broadcast(tensor, src=1)
    comm.destroy_process_group()
    assert not comm.is_initialized() and not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(offload.InvalidArgument, match="WORLD_SIZE=4"):
        deepspeed.init_distributed()


def test_collectives_of_one_process() -> None:
    comm = deepspeed.comm
    given = torch.arange(6.0)
    for call in (
        comm.all_gather_into_tensor,
        comm.reduce_scatter_tensor,
        comm.reduce_scatter_fn,
        comm.all_to_all_single,
    ):
        found = torch.zeros(1, 6)  # as ranks stacked
        assert call(found, given) is None
        assert torch.equal(found[0], given)
    for call in (comm.all_gather, comm.all_to_all):
        found = torch.zeros(6)
        handle = call([found], [given] if call is comm.all_to_all else given, async_op=True)
        assert handle.wait() and handle.is_completed() and torch.equal(found, given)
    found = torch.zeros(6)
    comm.gather(given, [found])
    assert torch.equal(found, given)
    comm.scatter(found, [2 * given])
    assert torch.equal(found, 2 * given)
    comm.reduce_scatter(found, [given])
    assert torch.equal(found, given)
    objects = [None]
    comm.all_gather_object(objects, {"epoch": 3})
    comm.broadcast_object_list(objects, src=0)
    assert objects == [{"epoch": 3}]
    assert comm.all_reduce(given, async_op=True).wait() and comm.monitored_barrier(timeout=3) is None
    assert (comm.get_global_rank(), comm.get_all_ranks_from_group()) == (0, [0])
    for call, more in ((comm.reduce, {"dst": 1}), (comm.gather, {"dst": 1}), (comm.scatter, {"src": 1})):
        with pytest.raises(offload.InvalidArgument, match="the only rank is 0"):
            call(given, **more)
    with pytest.raises(offload.InvalidArgument, match="has 12 elements and one process gives 6"):
        comm.all_gather_into_tensor(torch.zeros(12), given)


# --- zero -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"config_dict_or_path": config_of(fp16={"enabled": True})}, torch.float16),
        ({"config": config_of(bf16={"enabled": True}), "enabled": False}, torch.float32),
    ],
)
def test_init_builds_a_model_in_host_memory(given: dict[str, Any], dtype: torch.dtype) -> None:
    with deepspeed.zero.Init(remote_device="cpu", pin_memory=True, **given):
        layer = nn.Linear(4, 4)
    assert layer.weight.dtype == dtype
    if given.get("enabled", True):
        assert layer.weight.device.type == "cpu"
    assert torch.empty(0).dtype == torch.float32


def test_init_takes_a_model_that_is_there() -> None:
    model = nn.Linear(4, 4)
    deepspeed.zero.Init(module=model, dtype=torch.float16)
    assert model.weight.dtype == torch.float16 and model.weight.device.type == "cpu"
    with pytest.raises(offload.InvalidArgument, match="remote_device='nvme'"):
        deepspeed.zero.Init(remote_device="nvme")


def test_a_model_of_init_goes_to_the_host_pool_and_not_to_the_device(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    def moved(*_: Any) -> Any:
        raise AssertionError("the whole model was moved")

    def run(built: nn.Module) -> list[Any]:
        engine, *_ = deepspeed.initialize(model=built, config=config_of(zero=ON_HOST))
        losses = []
        for tokens in batches(3):
            losses.append(loss_of(engine, tokens))
            engine.backward(losses[-1])
            engine.step()
        assert {p.device for p in built.parameters()} == {device}
        return [loss.item() for loss in losses]

    expected = run(make_model())
    with deepspeed.zero.Init():
        model = TinyLM()
    model.load_state_dict(make_model().state_dict())
    monkeypatch.setattr(nn.Module, "to", moved)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert run(model) == expected


@pytest.mark.parametrize("choose", ["parameter", "list", "module"])
def test_gathered_parameters_are_read_and_written(choose: str) -> None:
    engine, *_ = deepspeed.initialize(model=make_model(), config=config_of(zero=ON_HOST))
    engine.backward(loss_of(engine, next(batches(1))))
    engine.step()
    block = engine.module.blocks[1].norm
    with pytest.raises(offload.StateError, match="on the host"):
        block.weight.sum()
    chosen = {"parameter": block.weight, "list": [block.weight], "module": block}[choose]
    with deepspeed.zero.GatheredParameters(chosen, modifier_rank=0):
        value = block.weight.detach().clone()
        block.weight.data.fill_(3.0)
    assert not torch.equal(value, torch.full_like(value, 3.0))
    assert torch.equal(engine.module.state_dict()["blocks.1.norm.weight"], torch.full_like(value, 3.0, device="cpu"))
    engine.backward(loss_of(engine, next(batches(1))))
    engine.step()  # goes on from what was written
    weight = engine.module.state_dict()["blocks.1.norm.weight"]
    assert 0 < (weight - 3.0).abs().max() < 0.1


def test_gathered_parameters_of_a_plain_model() -> None:
    model = make_model()
    with deepspeed.zero.GatheredParameters(model.parameters(), modifier_rank=None):
        assert model.norm.weight.sum() == 24
    with deepspeed.zero.GatheredParameters([], enabled=False):
        pass


def test_estimates_are_those_of_the_plan(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "offload.deepspeed")
    model = make_model(torch.bfloat16, width=64, vocabulary=1000)
    _, optimizer = offload.wrap(
        model, torch.optim.AdamW(model.parameters()), optimizer="host", gradients="host", params="host"
    )
    estimate = offload.estimate(
        make_model(width=64, vocabulary=1000), dtype=torch.bfloat16, optimizer="host", gradients="host", params="host"
    )
    assert (estimate.device, estimate.host) == (optimizer.plan.device, optimizer.plan.host)

    zero = deepspeed.zero
    zero.estimate_zero2_model_states_mem_needs_all_live(make_model(), num_gpus_per_node=1)
    zero.estimate_zero3_model_states_mem_needs_all_live(make_model())
    zero.estimate_zero2_model_states_mem_needs_all_cold(2**30)
    zero.estimate_zero3_model_states_mem_needs_all_cold(2**30, largest_layer_params=2**26)
    cold = [record.getMessage() for record in caplog.records if "1073M parameters" in record.getMessage()]
    # bf16: 2 bytes of weights on the device; on the host working copy, split master, gradient 2 each, moments 8.
    assert "    14.00GB |    2.00GB | offload_optimizer=cpu" in cold[0]
    assert "     0.00GB |   16.00GB | offload_optimizer=none" in cold[0]
    # Three layers of 2**26 weights are on the device at a time: the one in use, and two ahead.
    assert "    14.00GB |    0.38GB | offload_param=cpu , offload_optimizer=cpu" in cold[1]
    with pytest.raises(offload.InvalidArgument, match="8 GPUs"):
        zero.estimate_zero2_model_states_mem_needs_all_cold(10**9, num_gpus_per_node=8)


def test_an_estimate_needs_no_memory() -> None:
    with torch.device("meta"):
        model = nn.Linear(2**20, 2**20, bias=False)
    plan = offload.estimate(model, optimizer="host")
    assert plan.device.weights == 4 * 2**40 and plan.host.moments == 8 * 2**40


# --- ops ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "lr"),
    [
        (DeepSpeedCPUAdam, torch.optim.AdamW, 1e-3),
        (FusedAdam, torch.optim.AdamW, 1e-3),
        (lambda p: DeepSpeedCPUAdam(p, adamw_mode=False), torch.optim.Adam, 1e-3),
        (lambda p: FusedAdam(p, adam_w_mode=False), torch.optim.Adam, 1e-3),
        (DeepSpeedCPUAdagrad, torch.optim.Adagrad, 1e-2),
        (DeepSpeedCPULion, offload.Lion, 1e-3),
        (FusedLion, offload.Lion, 1e-3),
    ],
)
def test_optimizers_by_their_names(make: Any, kind: type, lr: float) -> None:
    model = make_model()
    optimizer = make(model.parameters())
    assert type(optimizer) is kind
    assert optimizer.defaults["lr"] == lr and optimizer.defaults["weight_decay"] == 0.0
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={"train_batch_size": 4})
    engine.backward(loss_of(engine, next(batches(1))))
    engine.step()


def test_the_signatures_of_the_optimizers() -> None:
    def names(kind: Any) -> list[str]:
        return list(inspect.signature(kind).parameters)

    adam = ["lr", "bias_correction", "betas", "eps"]
    assert names(DeepSpeedCPUAdam) == [
        "model_params", *adam, "weight_decay", "amsgrad", "adamw_mode", "fp32_optimizer_states",
    ]  # fmt: skip
    assert names(FusedAdam) == ["params", *adam, "adam_w_mode", "weight_decay", "amsgrad", "set_grad_none"]
    assert names(DeepSpeedCPULion) == ["model_params", "lr", "betas", "weight_decay", "fp32_optimizer_states"]
    assert names(FusedLion) == ["params", "lr", "betas", "weight_decay", "set_grad_none"]
    parameters = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(offload.InvalidArgument, match="fp32_optimizer_states"):
        DeepSpeedCPULion(parameters, fp32_optimizer_states=False)
    for bad in ({"bias_correction": False}, {"fp32_optimizer_states": False}):
        with pytest.raises(offload.InvalidArgument, match=next(iter(bad))):
            DeepSpeedCPUAdam(parameters, **bad)
    with pytest.raises(offload.InvalidArgument, match="amsgrad"):
        DeepSpeedCPUAdagrad(parameters, amsgrad=True)


# --- checkpointing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_cpu", [None, True])
def test_checkpointing_computes_again_with_the_same_bits(in_cpu: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_activations, "MIN_BYTES", 1)
    checkpointing = deepspeed.checkpointing
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    x = torch.randn(4, 8, requires_grad=True)

    def gradients(through: Any) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        x.grad = None
        through(model, x).square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    expected = gradients(lambda function, *args: function(*args))
    checkpointing.configure(None, deepspeed_config=None, partition_activations=False, checkpoint_in_cpu=in_cpu)
    assert checkpointing.is_configured()
    try:
        for one, other in zip(gradients(checkpointing.checkpoint), expected, strict=True):
            assert same_bits(one, other)
    finally:
        checkpointing.configure()
    checkpointing.reset()


def test_checkpointing_passes_arguments_on_by_name() -> None:
    weight, more = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    calls = []

    def scaled(x: torch.Tensor, *, use_reentrant: torch.Tensor, debug: float) -> torch.Tensor:  # torch has both names
        calls.append(debug)
        return (x * use_reentrant).tanh() * debug

    scaled(weight, use_reentrant=more, debug=2.0).sum().backward()
    expected = [tensor.grad for tensor in (weight, more)]
    weight.grad = more.grad = None
    deepspeed.checkpointing.checkpoint(scaled, weight, use_reentrant=more, debug=2.0).sum().backward()
    assert all(torch.equal(tensor.grad, wanted) for tensor, wanted in zip((weight, more), expected, strict=True))
    assert calls == [2.0] * 3, "once more in backward"


def test_checkpointing_is_configured_by_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointing = deepspeed.checkpointing
    monkeypatch.setattr(checkpointing, "_state", checkpointing._State())
    deepspeed.initialize(model=make_model(), config=config_of())
    assert not checkpointing.is_configured()
    config = config_of(activation_checkpointing={"cpu_checkpointing": True})
    deepspeed.initialize(model=make_model(), config=config)
    # The engine's model sends its inputs away itself.
    assert checkpointing.is_configured() and checkpointing._state.region is None
    checkpointing.configure(None, deepspeed_config=config)
    assert checkpointing._state.region is not None
