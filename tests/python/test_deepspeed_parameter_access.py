"""`deepspeed.utils.safe_get_full_...` and their like, and parameters as scripts for ZeRO-3 look at them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

import offload
import offload.deepspeed as deepspeed
from deepspeed_training import STAGES, config_of
from offload.deepspeed import utils
from training import batches, loss_of, make_model

pytestmark = pytest.mark.usefixtures("device")

ON_HOST = STAGES["stage 3, all on the host"]
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 64.0}},
}


def engine_of(stage: str, precision: str = "fp32", **keys: Any) -> Any:
    model = make_model()
    model.norm.requires_grad_(False)
    config = config_of(zero=STAGES[stage], **PRECISIONS[precision], **keys)
    return deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]


def backward(engine: Any, seed: int = 1) -> None:
    engine.backward(loss_of(engine, next(batches(1, seed=seed))))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", ["stage 0", "stage 2", "stage 2, optimizer on the host", "stage 3, all on the host"])
def test_what_is_got(stage: str, precision: str, device: torch.device) -> None:
    engine = engine_of(stage, precision)
    parameter, frozen = engine.module.blocks[1].up.weight, engine.module.norm.weight
    before = utils.safe_get_full_fp32_param(parameter)
    assert torch.equal(before.to(parameter.dtype).cpu(), engine.module_state_dict()["blocks.1.up.weight"].cpu())
    assert not utils.safe_get_full_optimizer_state(parameter, "exp_avg").any()
    assert utils.safe_get_full_grad(parameter) is None
    backward(engine)
    gradient = utils.safe_get_full_grad(parameter)
    assert torch.equal(gradient.cpu(), parameter.grad.float().cpu()) and gradient.any(), "times the loss scale"
    assert torch.equal(utils.safe_get_local_grad(parameter), gradient.flatten())
    engine.step()
    assert utils.safe_get_full_grad(parameter) is None
    after = utils.safe_get_full_fp32_param(parameter)
    state = engine.optimizer.state[parameter]
    assert torch.equal(after.cpu(), state.get("master", engine.module_state_dict()["blocks.1.up.weight"]).cpu())
    moment = utils.safe_get_full_optimizer_state(parameter, "exp_avg")
    assert torch.equal(moment.cpu(), state["exp_avg"].cpu()) and moment.any()
    for value in (before, gradient, after, moment):
        assert (value.dtype, value.device, value.shape) == (torch.float32, device, parameter.shape)
    assert torch.equal(utils.safe_get_local_fp32_param(parameter), after.flatten())
    assert torch.equal(utils.safe_get_local_optimizer_state(parameter, "exp_avg"), moment.flatten())
    with pytest.raises(offload.InvalidArgument, match="has no 'step': it has exp_avg, exp_avg_sq"):
        utils.safe_get_full_optimizer_state(parameter, "step")
    for got in (utils.safe_get_full_fp32_param(frozen), utils.safe_get_full_optimizer_state(frozen, "exp_avg")):
        assert got is None


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_set_trains_the_same_everywhere(precision: str) -> None:
    def run(stage: str, local: bool) -> dict[str, Tensor]:
        engine = engine_of(stage, precision)
        parameter = engine.module.blocks[1].up.weight
        size = parameter.numel() if local else parameter.shape
        generator = torch.Generator("cpu").manual_seed(7)
        values = [torch.rand(size, generator=generator, device="cpu").to(parameter.device) for _ in range(4)]
        kind = "local" if local else "full"
        getattr(utils, f"safe_set_{kind}_fp32_param")(parameter, values[0])
        getattr(utils, f"safe_set_{kind}_optimizer_state")(parameter, values[1], "exp_avg")
        getattr(utils, f"safe_set_{kind}_optimizer_state")(parameter, values[2], "exp_avg_sq")
        assert torch.equal(utils.safe_get_full_fp32_param(parameter), values[0].view(parameter.shape))
        backward(engine)
        getattr(utils, f"safe_set_{kind}_grad")(parameter, values[3])
        utils.safe_update_full_grad_vectorized(engine.module.parameters(), lambda gradient, _: gradient * 0.5)
        engine.step()
        backward(engine, seed=2)
        engine.step()
        return {name: value.cpu().clone() for name, value in engine.module_state_dict().items()}

    expected = run("stage 0", local=False)
    assert not torch.equal(expected["blocks.1.up.weight"], make_model().blocks[1].up.weight.cpu())
    for stage in ("stage 2, optimizer on the host", "stage 3, all on the host"):
        for local in (False, True):
            found = run(stage, local)
            assert all(torch.equal(found[name], value) for name, value in expected.items()), stage


def test_parameters_that_no_engine_trains() -> None:
    plain = make_model()
    weight = plain.head.weight.detach().clone()
    assert utils.safe_get_full_fp32_param(plain.head.weight) is None
    assert utils.safe_get_full_optimizer_state(plain.head.weight, "exp_avg") is None
    utils.safe_set_full_fp32_param(plain.head.weight, torch.zeros_like(weight))
    assert torch.equal(plain.head.weight, weight)
    with pytest.raises(offload.StateError, match=r"between engine\.backward\(\) and engine\.step\(\)"):
        utils.safe_set_full_grad(plain.head.weight, weight)
    engine = engine_of("stage 2")
    backward(engine)
    with pytest.raises(offload.InvalidArgument, match=r"has shape \(40, 24\), the value \(24,\)"):
        utils.safe_set_full_grad(engine.module.head.weight, torch.zeros(24))
    engine.destroy()
    assert utils.safe_get_full_fp32_param(engine.module.head.weight) is None


def test_a_class_that_is_not_native_and_a_parameter_that_is_left_out() -> None:
    model = make_model()
    trained = [p for p in model.parameters() if p is not model.norm.weight]
    config = config_of(zero=STAGES["stage 3, all on the host"], optimizer={"type": "SGD", "params": {"lr": 0.1}})
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    value = torch.full((40, 24), 0.5)
    with pytest.raises(offload.InvalidArgument, match="'momentum_buffer': its class makes what it keeps in the first"):
        utils.safe_get_full_optimizer_state(model.head.weight, "momentum_buffer")
    utils.safe_set_full_fp32_param(model.head.weight, value)
    assert torch.equal(utils.safe_get_full_fp32_param(model.head.weight), value)
    assert utils.safe_get_full_fp32_param(model.norm.weight) is None
    backward(engine)
    gradient = utils.safe_get_full_grad(model.head.weight)
    engine.step()
    assert torch.equal(utils.safe_get_full_fp32_param(model.head.weight), value.add(gradient, alpha=-0.1))


def test_a_script_for_zero_3_reads_weights_that_are_away() -> None:
    """The function that scripts carry to save adapters: by `ds_id` it knows what it has to gather."""

    def read(parameter: Tensor) -> Tensor:
        if not hasattr(parameter, "ds_id"):
            return parameter.detach().cpu().clone()
        gather = contextlib.nullcontext()
        if parameter.ds_status == deepspeed.zero.ZeroParamStatus.NOT_AVAILABLE:
            gather = deepspeed.zero.GatheredParameters([parameter])
        with gather:
            return parameter.data.detach().cpu().clone()

    for stage, comes_and_goes in (("stage 2, optimizer on the host", False), ("stage 3, all on the host", True)):
        engine = engine_of(stage)
        backward(engine)
        engine.step()
        named = dict(engine.module.named_parameters())
        assert all(hasattr(p, "ds_id") == comes_and_goes for p in named.values())
        weights = engine.module_state_dict()
        assert all(torch.equal(read(parameter), weights[name].cpu()) for name, parameter in named.items())
        if comes_and_goes:
            assert len({p.ds_id for p in named.values()}) == len(named)
            assert all(p.ds_shape == p.shape and p.ds_numel == p.numel() for p in named.values())
        engine.destroy()
        assert not any(name.startswith("ds_") for p in named.values() for name in vars(p))
