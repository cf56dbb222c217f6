"""What a DeepSpeed config means: each run of the engine equals the same training written in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import offload
from deepspeed_training import ADAMW, STAGES, Trained, config_of, engine_run, plain_run
from offload import _activations
from training import TinyLM, batches, loss_of, make_model, same_bits

pytestmark = pytest.mark.usefixtures("device")

PRECISIONS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "fp32": ({}, torch.float32),
    "bf16": ({"bf16": {"enabled": True}}, torch.bfloat16),
}
LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"clip": 0.5},
    "accumulate": {"accumulation": 3},
    "clip and accumulate": {"clip": 0.3, "accumulation": 2},
}


def assert_same(run: Trained, expected: Trained) -> None:
    assert run.losses == expected.losses
    assert run.norms == expected.norms
    assert run.applied == expected.applied
    for name, weight in expected.weights.items():
        assert same_bits(run.weights[name], weight), name


@pytest.mark.cpu_only  # the oracle takes roots and norms as the CPU does
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS.keys())
@pytest.mark.parametrize("zero", STAGES.values(), ids=STAGES.keys())
def test_a_stage_equals_plain_torch(
    zero: dict[str, Any], precision: tuple[dict[str, Any], torch.dtype], loop: dict[str, Any]
) -> None:
    keys, dtype = precision
    config = config_of(
        zero=zero, accumulation=loop.get("accumulation", 1), **{**keys, "gradient_clipping": loop.get("clip", 0.0)}
    )
    expected = plain_run(dtype, **loop)
    assert_same(engine_run(config), expected)
    if "clip" in loop:
        assert max(norm for norm in expected.norms if norm is not None) > loop["clip"]


class _Operations(TorchDispatchMode):
    """The torch operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))


UNCHECKED = {"bf16": {"enabled": True, "check_grad_overflow": False}}


@pytest.mark.parametrize(
    "keys",
    [{}, {"gradient_clipping": 0.5}, {"gradient_clipping": 0.5, **UNCHECKED}],
    ids=["plain", "clipped", "clipped bf16"],
)
@pytest.mark.parametrize("zero", STAGES.values(), ids=STAGES.keys())
def test_a_step_that_is_not_checked_reads_nothing_back(zero: dict[str, Any], keys: dict[str, Any]) -> None:
    """It would wait for all of backward, which plain torch does not."""
    engine, *_ = offload.initialize(model=make_model(), config=config_of(zero=zero, **keys))
    for tokens in batches(2):
        loss = loss_of(engine, tokens)
        with _Operations() as operations:
            engine.backward(loss)
            engine.step()
        assert "aten._local_scalar_dense.default" not in operations.names
    assert engine.get_global_grad_norm() > 0


def test_a_norm_that_nobody_asks_for_is_not_taken() -> None:
    zero = {**STAGES["stage 2, optimizer on the host"], "compute_grad_norm": False}
    runs = []
    for stage in (STAGES["stage 2"], zero):
        model = make_model()
        engine, *_ = offload.initialize(model=model, config=config_of(zero=stage))
        with _Operations() as operations:
            for tokens in batches(2):
                engine.backward(loss_of(engine, tokens))
                engine.step()
        runs.append({name: weight.clone() for name, weight in engine.module.state_dict().items()})
    assert not {"aten._foreach_norm.Scalar", "aten.linalg_vector_norm.default"} & set(operations.names)
    assert engine.get_global_grad_norm() is None
    assert all(same_bits(runs[0][name], weight) for name, weight in runs[1].items())
    with pytest.raises(offload.InvalidArgument, match="gradient_clipping=0.5 needs the norm"):
        offload.initialize(model=make_model(), config=config_of(zero=zero, gradient_clipping=0.5))


def test_the_norm_of_gradients_of_several_dtypes() -> None:
    """One at a time, so that no more than one of them is on the device."""
    model = make_model()
    model.blocks.bfloat16()
    engine, *_ = offload.initialize(model=nn.ModuleDict({"a": model.head, "b": model.blocks[0].up}), config=config_of())
    x = torch.ones(2, engine.module["a"].in_features, device=engine.device)
    (engine.module["a"](x).sum() + engine.module["b"](x.bfloat16()).float().sum()).backward()
    gradients = [parameter.grad.float() for parameter in engine.module.parameters()]
    engine.step()
    expected = torch.stack([gradient.double().norm() for gradient in gradients]).norm().item()
    assert engine.get_global_grad_norm() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_what_the_config_places_on_the_host_is_there(name: str) -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, name: {"device": "cpu"}}
    engine, optimizer, *_ = offload.initialize(model=make_model(), config=config_of(zero=zero))
    for tokens in batches(2):
        engine.backward(loss_of(engine, tokens))
        engine.step()
    stats = optimizer.stats()
    assert stats.host_bytes["moments"] > 0 and "moments" not in stats.device_bytes
    if name == "offload_param":
        assert stats.peak_weight_bytes < sum(p.numel() * 4 for p in engine.module.parameters())


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
def test_the_ratio_of_states_that_leave(precision: dict[str, Any]) -> None:
    weights = []
    for ratio, tier in [(1.0, "host"), (0.5, "mixed"), (0.0, "device")]:
        zero = {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": ratio}}
        config = config_of(zero=zero, gradient_clipping=0.5, **precision)
        engine, optimizer, *_ = offload.initialize(model=make_model(), config=config)
        for tokens in batches(4):
            engine.backward(loss_of(engine, tokens))
            engine.step()
        plan, stats = optimizer.plan, optimizer.stats()
        assert plan.optimizer == tier
        assert stats.device_bytes.get("moments", 0) == plan.device.moments
        share = plan.host.moments / (plan.host.moments + plan.device.moments)
        assert ratio <= share < ratio + 0.1
        weights.append([p.detach().clone() for p in engine.module.parameters()])
    for others in weights[1:]:
        assert all(same_bits(one, other) for one, other in zip(weights[0], others, strict=True))


@pytest.mark.usefixtures("disk_calls")
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS.keys())
@pytest.mark.parametrize("params", ["cpu", "nvme"])
def test_states_and_weights_on_nvme(params: str, precision: tuple[dict[str, Any], torch.dtype], tmp_path: Path) -> None:
    weights = []
    for target in ({"device": "cpu"}, {"device": "nvme", "nvme_path": str(tmp_path / "made" / "for it")}):
        on_disk = target["device"] == "nvme"
        weights_at = target if on_disk and params == "nvme" else {"device": "cpu"}
        zero = {"stage": 3, "offload_optimizer": target, "offload_param": weights_at}
        aio = {"block_size": 4096, "queue_depth": 4, "single_submit": True, "overlap_events": False}
        config = config_of(zero=zero, aio=aio, gradient_clipping=0.5, **precision[0])
        engine, *_ = offload.initialize(model=make_model(), config=config)
        train_engine(engine, 2)
        engine.save_checkpoint(str(tmp_path / target["device"]))
        train_engine(engine, 2)
        engine.load_checkpoint(str(tmp_path / target["device"]))
        engine.offload_states()
        train_engine(engine, 1)
        engine.reload_states()
        train_engine(engine, 1)
        plan, stats = engine.optimizer.plan, engine.optimizer.stats()
        assert (plan.optimizer == "disk") == bool(stats.disk) == on_disk
        assert (plan.params == "disk") == ("weights_read_bytes" in stats.disk) == (on_disk and params == "nvme")
        if stats.disk:
            assert stats.host_bytes["moments"] == 0 and stats.disk["written_bytes"] > 0
        weights.append({name: value.clone() for name, value in engine.module.state_dict().items()})
        engine.destroy()
    assert list((tmp_path / "made" / "for it").iterdir()) == []
    assert all(same_bits(weights[1][name], weight) for name, weight in weights[0].items())


def train_engine(engine: Any, steps: int) -> None:
    for tokens in batches(steps):
        engine.backward(loss_of(engine, tokens))
        engine.step()


@pytest.mark.cpu_only
def test_a_clients_optimizer_and_scheduler() -> None:
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    class Halved:
        def __init__(self, masters: list[Tensor]) -> None:
            self.inner = sgd(masters)
            self.schedule = schedule(self.inner)

        def step(self) -> None:
            self.inner.step()
            self.schedule.step()

    expected = plain_run(make=Halved)
    config = {"train_batch_size": 4, "gradient_clipping": 0.0}
    for_callables = engine_run(config, optimizer=sgd, lr_scheduler=schedule)
    assert_same(for_callables, expected)
    assert for_callables.rates == [0.25, 0.125, 0.0625, 0.03125]
    model = make_model()
    optimizer = sgd(model.parameters())
    assert_same(engine_run(config, model=model, optimizer=optimizer, lr_scheduler=schedule(optimizer)), expected)


def test_a_clients_optimizer_follows_the_model_to_bf16() -> None:
    runs = []
    for is_clients in (False, True):
        model = make_model()
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0) if is_clients else None
        runs.append(engine_run(config_of(bf16={"enabled": True}, zero={"stage": 2}), model=model, optimizer=adamw))
    assert_same(runs[1], runs[0])


@pytest.mark.cpu_only
def test_a_scheduler_of_the_config() -> None:
    warmup = {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-2, "warmup_num_steps": 4, "warmup_type": "linear"}
    run = engine_run(config_of(scheduler={"type": "WarmupLR", "params": warmup}), steps=5)
    rates = run.rates
    assert rates[-1] == 1e-2 and rates == sorted(rates) and len(set(rates)) > 2
    # The first update uses what the scheduler set when it was made.
    assert_same(run, plain_run(steps=5, rate=lambda update: ([0.0, *rates])[update]))


@pytest.mark.cpu_only
@pytest.mark.parametrize("accumulation", [1, 2])
def test_autocast(accumulation: int) -> None:
    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    config = config_of(
        accumulation=accumulation, torch_autocast={"enabled": True, "dtype": "bfloat16"}, zero={"stage": 1}
    )
    assert_same(engine_run(config), plain_run(accumulation=accumulation, loss_of=loss))


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_caller_may_own_the_boundary(micro_batches: int) -> None:
    """Set boundaries, and an engine that does not count, both give the run of a config that says so."""
    runs = []
    for how in ("config", "boundaries", "unmanaged"):
        model = make_model()
        keys = {"managed_gradient_accumulation": False} if how == "unmanaged" else {}
        config = config_of(accumulation=micro_batches if how == "config" else 1, **keys)
        engine, optimizer, *_ = offload.initialize(model=model, config=config)
        data = batches(2 * micro_batches)
        for _ in range(2):
            for number in range(micro_batches):
                loss = loss_of(engine, next(data))
                if how != "config":
                    loss = loss / micro_batches
                if how == "boundaries":
                    engine.set_gradient_accumulation_boundary(number == micro_batches - 1)
                engine.backward(loss)
                if how != "unmanaged" or number == micro_batches - 1:
                    engine.step()
        optimizer.synchronize()
        assert engine.global_steps == 2
        runs.append({name: weight.clone() for name, weight in engine.module.state_dict().items()})
    for run in runs[1:]:
        assert all(same_bits(run[name], weight) for name, weight in runs[0].items())


class Checkpointed(TinyLM):
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


def test_cpu_checkpointing_works_from_the_config_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_activations, "MIN_BYTES", 1)  # the model is small
    weights = []
    for keys in ({}, {"activation_checkpointing": {"cpu_checkpointing": True}}):
        model = make_model()
        model.__class__ = Checkpointed
        engine, optimizer, *_ = offload.initialize(model=model, config=config_of(**keys))
        for tokens in batches(2):
            engine.backward(loss_of(engine, tokens))
            engine.step()
        activations = optimizer.stats().activations
        assert bool(activations) == bool(keys)
        if keys:
            assert activations["offloaded_bytes"] > 0
        weights.append({name: weight.clone() for name, weight in engine.module.state_dict().items()})
    assert all(same_bits(weights[1][name], weight) for name, weight in weights[0].items())


@pytest.mark.cpu_only  # SGD runs as torch's own class, whose bits are those of the tier
@pytest.mark.parametrize(
    ("kind", "params"), [("Lion", {"lr": 1e-3}), ("Adagrad", {"lr": 1e-2}), ("SGD", {"lr": 0.1, "momentum": 0.9})]
)
def test_other_optimizers_by_name(kind: str, params: dict[str, Any]) -> None:
    runs = [
        engine_run(config_of(zero=STAGES[stage], optimizer={"type": kind, "params": params}))
        for stage in ("stage 0", "stage 3, all on the host")
    ]
    assert_same(runs[1], runs[0])
    assert runs[0].losses[-1] != runs[0].losses[0]


@pytest.mark.cpu_only
def test_adam_is_adamw_unless_told_otherwise() -> None:
    decay = {"lr": 1e-2, "weight_decay": 0.1}
    runs = {
        name: engine_run(config_of(optimizer={"type": kind, "params": {**decay, **mode}}))
        for name, kind, mode in (
            ("AdamW", "AdamW", {}),
            ("Adam", "Adam", {}),
            ("L2", "Adam", {"adam_w_mode": False}),
        )
    }
    assert_same(runs["Adam"], runs["AdamW"])
    assert runs["L2"].losses != runs["AdamW"].losses
    assert ADAMW["params"]["lr"] == 1e-2
