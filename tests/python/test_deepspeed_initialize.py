"""`initialize` that refuses: what the model is afterwards. And its own arguments, which DeepSpeed's has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from deepspeed_training import STAGES, config_of
from training import batches, loss_of, make_model, same_bits

pytestmark = pytest.mark.usefixtures("device")

BF16 = {"bf16": {"enabled": True}, "zero": STAGES["stage 2, optimizer on the host"]}


def broken(*args: Any) -> Any:
    raise ZeroDivisionError


def step(engine: Any) -> None:
    engine.backward(loss_of(engine, next(batches(1))))
    engine.step()


@pytest.mark.parametrize(
    ("config", "given", "error"),
    [
        (config_of(**BF16, optimizer={"type": "SGD", "params": {"lr": "fast"}}), {}, offload.InvalidArgument),
        (config_of(**BF16), {"optimizer": 3}, offload.InvalidArgument),
        (config_of(**BF16), {"optimizer": broken}, ZeroDivisionError),
        (config_of(**BF16), {"training_data": 3}, TypeError),
        (config_of(**BF16, zero_optimisation={}), {"strict": True}, offload.InvalidArgument),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(
    config: dict[str, Any], given: dict[str, Any], error: type[Exception]
) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error):
        offload.initialize(model=model, config=config, **given)
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    step(offload.initialize(model=model, config=config_of())[0])


@pytest.mark.parametrize(
    ("given", "more"),
    [({"lr_scheduler": broken}, {}), ({}, {"csv_monitor": {"enabled": True, "output_path": "/dev/null/here"}})],
)
def test_a_late_refusal_leaves_a_plain_model(given: dict[str, Any], more: dict[str, Any]) -> None:
    model = make_model()
    with pytest.raises((ZeroDivisionError, OSError)):
        offload.initialize(model=model, config=config_of(**BF16, **more), **given)
    assert model.norm.weight.dtype == torch.bfloat16
    step(offload.initialize(model=model, config=config_of(**BF16))[0])


def test_a_model_has_one_engine() -> None:
    model = make_model()
    engine, *_ = offload.initialize(model=model, config=config_of())
    with pytest.raises(offload.StateError, match=r"has an engine already: call its destroy\(\)"):
        offload.initialize(model=model, config=config_of(bf16={"enabled": True}))
    assert model.norm.weight.dtype == torch.float32
    engine.destroy()
    step(offload.initialize(model=model, config=config_of())[0])


def test_auto_is_filled_by_path() -> None:
    config = config_of(optimizer={"type": "AdamW", "params": {"lr": "auto"}}, gradient_clipping="auto")
    with pytest.raises(offload.InvalidArgument, match="gradient_clipping='auto': nothing filled it in"):
        offload.initialize(model=make_model(), config=config)
    auto = {"optimizer.params.lr": 0.25, "gradient_clipping": 0.5}
    engine, *_ = offload.initialize(model=make_model(), config=config, auto=auto)
    assert engine.get_lr() == [0.25] and engine.gradient_clipping() == 0.5


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1), "SGD"),
        (lambda parameters: torch.optim.AdamW(parameters, amsgrad=True), "AdamW with amsgrad"),
    ],
)
def test_a_share_of_the_states_needs_an_optimizer_that_can_have_it(make: Any, name: str) -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}
    config = {key: value for key, value in config_of(zero=zero, bf16={"enabled": True}).items() if key != "optimizer"}
    model = make_model()
    rule = rf"zero_optimization\.offload_optimizer\.ratio=0\.5: {name} steps over all .* write 0 or 1, or take Adam"
    with pytest.raises(offload.InvalidArgument, match=rule):
        offload.initialize(model=model, optimizer=make(model.parameters()), config=config)
    assert model.norm.weight.dtype == torch.float32, "refused before the cast"
    for ratio in (0, 1):
        zero["offload_optimizer"]["ratio"] = ratio  # type: ignore[index]
        engine, *_ = offload.initialize(model=model, optimizer=make(model.parameters()), config=config)
        step(engine)
        engine.destroy()


def test_the_options_of_wrap_that_a_config_means(tmp_path: Path) -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": False, "ratio": 0.5}}
    config = {"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}}
    options = offload.deepspeed.wrap_options(config)
    assert options == {
        "optimizer": 0.5, "gradients": "host", "params": "device", "activations": "device", "pin": False,
        "disk_path": None, "grad_dtype": "fp32",
    }  # fmt: skip
    model = make_model()
    if not hasattr(torch.Tensor, "grad_dtype"):  # as in torch 2.6
        with pytest.raises(offload.InvalidArgument, match="has no Tensor.grad_dtype"):
            offload.wrap(model, torch.optim.AdamW(model.parameters()), **options)
        del options["grad_dtype"]
    _, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), **options)
    assert optimizer.plan.gradients == "host" and optimizer.plan.params == "device"

    config["zero_optimization"] = {"stage": 3, "offload_param": {"device": "auto", "nvme_path": str(tmp_path)}}
    with pytest.raises(offload.InvalidArgument, match=r"offload_param\.device is 'auto': write a place, or pass auto="):
        offload.deepspeed.wrap_options(config)
    options = offload.deepspeed.wrap_options(config, auto={"zero_optimization.offload_param.device": "nvme"})
    assert (options["params"], options["disk_path"]) == ("disk", (str(tmp_path),))
    with pytest.raises(offload.InvalidArgument, match="elasticity"):
        offload.deepspeed.wrap_options(config | {"elasticity": {"enabled": True}})


def test_what_the_options_of_wrap_leave_to_the_trainer_is_named(recwarn: pytest.WarningsRecorder) -> None:
    """Sizes of eight processes and a schedule that is not known do not matter to who brings others."""
    auto = {"train_batch_size": "auto", "gradient_clipping": "auto", "optimizer": {"params": {"lr": "auto"}}}
    zero = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert offload.deepspeed.wrap_options(zero | auto) == (options := offload.deepspeed.wrap_options(zero))
    assert options["gradients"] == "host" and not recwarn.list
    sizes = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    schedule = {"scheduler": {"type": "cosine"}, "bf16": {"enabled": True}}
    with pytest.warns(
        UserWarning, match=r"nothing else: train_batch_size=64, .*, gradient_clipping=0.1, scheduler, bf16"
    ):
        assert offload.deepspeed.wrap_options(zero | sizes | schedule | {"gradient_clipping": 0.1}) == options
