"""Models that `zero.Init` builds, and engines that only run forward: weights come and go, and never lie twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
import offload.deepspeed as deepspeed
from deepspeed_training import STAGES, config_of
from offload import _native, _residency
from training import TinyLM, batches, loss_of, make_model

pytestmark = pytest.mark.usefixtures("device")

ON_HOST = STAGES["stage 3, all on the host"]
BF16 = {"bf16": {"enabled": True}}
NO_OPTIMIZER = {key: value for key, value in config_of(zero=ON_HOST).items() if key != "optimizer"}


def layers() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)), nn.Linear(256, 1))


def built_in_init(config: dict[str, Any], _: Path) -> nn.Module:
    with deepspeed.zero.Init(config_dict_or_path=config):
        return layers()


def loaded_in_init(config: dict[str, Any], folder: Path) -> nn.Module:
    """As `from_pretrained` does it: built, then overwritten."""
    torch.save(layers().bfloat16().state_dict(), folder / "weights.pt")
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = layers()
        model.load_state_dict(torch.load(folder / "weights.pt"))
    return model


def assigned_to_meta(config: dict[str, Any], folder: Path) -> nn.Module:
    torch.save(layers().bfloat16().state_dict(), folder / "weights.pt")
    with deepspeed.zero.Init(config_dict_or_path=config), torch.device("meta"):
        model = layers()
    model.load_state_dict(torch.load(folder / "weights.pt"), assign=True)
    return model


@pytest.mark.cpu_only
@pytest.mark.parametrize("with_optimizer", [True, False], ids=["trained", "run forward only"])
@pytest.mark.parametrize("build", [built_in_init, loaded_in_init, assigned_to_meta])
def test_weights_never_lie_twice_on_the_host(
    build: Callable[[dict[str, Any], Path], nn.Module],
    with_optimizer: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The model's own storages, watched by torch's weak references, and what the pool has mapped."""
    monkeypatch.setattr(_residency, "_RUN_BYTES", 1)
    config = NO_OPTIMIZER | BF16
    model = build(config, tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model[:-1].requires_grad_(False)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    storages = [p.untyped_storage()._weak_ref() for p in model.parameters()]
    weights, unit = sum(sizes), sum(sizes[:2])
    seen = []
    reserve = _native.HostPool.reserve

    def watched(pool: _native.HostPool, nbytes: int) -> None:
        reserve(pool, nbytes)
        there = [n for n, s in zip(sizes, storages, strict=True) if not torch.UntypedStorage._expired(s)]
        seen.append(sum(there) + pool.stats()["mapped_bytes"])

    monkeypatch.setattr(_native.HostPool, "reserve", watched)
    optimizer = torch.optim.AdamW(model[-1].parameters()) if with_optimizer else None
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    assert engine.optimizer is None or with_optimizer
    assert len(seen) >= 9 and max(seen) <= weights + unit + 4096 * (len(seen) + 4)
    assert all(torch.UntypedStorage._expired(storage) for storage in storages)
    for storage in storages:
        torch.UntypedStorage._free_weak_ref(storage)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"remote_device": "nvme"}, "remote_device='nvme'.*go to disk in initialize.*; use 'cpu'"),
        ({"remote_device": "elsewhere"}, "remote_device='elsewhere'.*no such place"),
        ({"param_swapper": object()}, "param_swapper.*go to disk"),
        ({"dtype": torch.float64}, r"dtype=torch\.float64.*legal are torch\.float32"),
        ({"config": {}, "config_dict_or_path": {}}, "both given"),
        ({"config_dict_or_path": config_of(bf16={"enabled": "perhaps"})}, "bf16.enabled='perhaps'"),
        (
            {"config_dict_or_path": config_of(zero={"stage": 3, "offload_param": {"device": "nvme"}})},
            "offload_param.device='nvme'",
        ),
        ({"module": nn.Linear(2, 2, device="meta")}, "weight is on the meta device.*assign=True"),
    ],
)
def test_init_refuses_with_words(given: dict[str, Any], message: str) -> None:
    with pytest.raises(offload.InvalidArgument, match=message):
        deepspeed.zero.Init(**given)
    with pytest.raises(TypeError, match="remote_devise"):
        deepspeed.zero.Init(remote_devise="cpu")  # type: ignore[call-arg]


def test_init_takes_every_argument_of_theirs() -> None:
    """And a config in which the Trainer has still to fill in what Init does not read."""
    config = config_of(**BF16, optimizer={"type": "AdamW", "params": {"lr": "auto"}}) | {"gradient_clipping": "auto"}
    with deepspeed.zero.Init(
        data_parallel_group=None,
        mem_efficient_linear=False,
        remote_device="cpu",
        pin_memory=True,
        config_dict_or_path=config,
        enabled=True,
        mpu=None,
        zero_param_parallel_group=None,
        zero_quantized_weights=True,
        zero_quantized_nontrainable_weights=False,
        sequence_data_parallel_group=None,
        tensor_overrides=None,
    ):
        layer = nn.Linear(2, 2)
    assert layer.weight.dtype == torch.bfloat16
    with deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.float16):
        assert nn.Linear(2, 2).weight.dtype == torch.float16
    with deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.float32):
        assert nn.Linear(2, 2).weight.dtype == torch.float32


@pytest.mark.parametrize("zero", [STAGES["stage 2"], ON_HOST], ids=["resident", "streamed"])
def test_a_model_without_values_is_refused(zero: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = TinyLM()
    with pytest.raises(offload.InvalidArgument, match="is on the meta device and has no values"):
        deepspeed.initialize(model=model, config=config_of(zero=zero))


# --- engines without an optimizer -----------------------------------------------------------------------------


def outputs_of(engine: nn.Module) -> list[Tensor]:
    engine.eval()
    with torch.no_grad():
        return [loss_of(engine, tokens).cpu() for tokens in batches(3)]


def test_an_engine_without_an_optimizer_streams_the_weights(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, tmp_path: Path
) -> None:
    expected = outputs_of(make_model().to(device))
    model = make_model().to("cpu")
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def moved(*_: Any) -> Any:
        raise AssertionError("the whole model was moved")

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "to", moved)
        engine, optimizer, _, scheduler = deepspeed.initialize(model=model, config=NO_OPTIMIZER)
    assert optimizer is None and scheduler is None
    assert {p.device for p in model.parameters()} == {device}
    assert all(torch.equal(one, other) for one, other in zip(outputs_of(engine), expected, strict=True))
    with pytest.raises(offload.StateError, match="on the host"):
        model.embedding.weight.sum()
    with deepspeed.zero.GatheredParameters(model.embedding.weight):
        assert torch.equal(model.embedding.weight.cpu(), weights["embedding.weight"])
    engine.save_checkpoint(tmp_path, tag="one")
    with pytest.raises(offload.StateError, match=r"backward\(\) needs an optimizer"):
        engine.backward(loss_of(engine, next(batches(1))))
    engine.destroy()
    assert all(torch.equal(value.cpu(), weights[name]) for name, value in model.state_dict().items())
    other, *_ = deepspeed.initialize(model=make_model(seed=7), config=NO_OPTIMIZER)
    other.load_checkpoint(tmp_path)
    assert all(torch.equal(value.cpu(), weights[name]) for name, value in other.module.state_dict().items())


def test_without_offloaded_weights_it_is_the_plain_model(device: torch.device) -> None:
    model = make_model().to("cpu")
    config = {**NO_OPTIMIZER, "zero_optimization": STAGES["stage 2"]}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    assert {p.device for p in model.parameters()} == {device} and not model._forward_pre_hooks
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(engine), outputs_of(make_model().to(device)), strict=True))
    engine.destroy()


def test_wrap_without_an_optimizer(device: torch.device) -> None:
    model = make_model()
    expected = outputs_of(make_model())
    wrapped, none = offload.wrap(model, None, params="host")
    assert wrapped is model and none is None
    assert all(torch.equal(one, other) for one, other in zip(outputs_of(model), expected, strict=True))
    other = make_model()
    other, _ = offload.wrap(other, torch.optim.SGD(other.parameters()), params="device")
    with pytest.raises(offload.InvalidArgument, match="given no optimizer"):
        offload.unwrap(other, None)
    plain, none = offload.unwrap(model, None)
    assert plain is model and none is None and not model._forward_pre_hooks
    assert all(torch.equal(one, other) for one, other in zip(outputs_of(model), expected, strict=True))
