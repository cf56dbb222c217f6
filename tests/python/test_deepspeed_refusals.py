"""DeepSpeed configs that are refused, warned of, or served otherwise, and what is said then."""

from __future__ import annotations

from typing import Any

import pytest

from deepspeed_cases import BATCH, adam, quiet, refusal, schedule, zero
from offload.deepspeed._config import load

FP32_SUMS = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (zero(wow=1), "zero_optimization.wow: unknown key"),
        (zero(cpu_offload_params=True), "did you mean 'cpu_offload_param'?"),
        (zero(offload_optimiser={}), "did you mean 'offload_optimizer'?"),
        (zero(stage=4), "zero_optimization.stage=4: must be 0, 1, 2 or 3"),
        (zero(reduce_bucket_size=-1), "zero_optimization.reduce_bucket_size=-1: must be a whole number, 0 or more"),
        (zero(reduce_bucket_size=530841.6), "reduce_bucket_size=530841.6: must be a whole number"),
        (zero(overlap_comm="perhaps"), "zero_optimization.overlap_comm='perhaps': must be true or false or null"),
        (zero(offload_optimizer={"device": "CPU"}), "device='CPU': must be 'none', 'cpu' or 'nvme'"),
        (zero(offload_optimizer={"device": "cpu", "ratio": 1.5}), "ratio=1.5: must be a number from 0 to 1"),
        (
            {**zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), "optimizer": {"type": "SGD"}},
            "zero_optimization.offload_optimizer.ratio=0.5: SGD steps over all of its parameters in one place: write 0",
        ),
        (
            {**zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), **adam(amsgrad=True)},
            "offload_optimizer.ratio=0.5: AdamW with amsgrad steps over all",
        ),
        (
            {**zero(offload_optimizer={"device": "nvme", "nvme_path": "drive"}), "optimizer": {"type": "SGD"}},
            "zero_optimization.offload_optimizer.device='nvme': SGD steps over tensors in memory: write 'cpu'",
        ),
        (
            {**zero(offload_param={"device": "nvme", "nvme_path": "drive"}), **adam(amsgrad=True)},
            "zero_optimization.offload_param.device='nvme': AdamW with amsgrad steps over tensors in memory",
        ),
        (
            {**zero(offload_param={"device": "cpu"}), "optimizer": {"type": "SGD"}},
            "zero_optimization.offload_param.device='cpu': SGD steps over all weights at once",
        ),
        ({**BATCH, "optimizer": {"type": "LBFGS"}}, "optimizer.type='LBFGS': not available"),
        ({**BATCH, "optimizer": {"type": "RAdam", "params": {"betas": 0.9}}}, "betas=0.9: must be two numbers"),
        ({**BATCH, "optimizer": {"type": "SGD", "params": {"momentum": -1}}}, "params of SGD: Invalid momentum value"),
        (adam(torch_adam=True, fused=True, foreach=True), "params of AdamW: `fused` and `foreach` cannot be"),
        ({**BATCH, "scheduler": {"type": "StepLR"}}, "scheduler.params of StepLR: "),
        (schedule("WarmupLR", warmup_num_steps=-1), "params.warmup_num_steps=-1: must be a whole number, 0 or more"),
        (schedule("WarmupLR", warmup_min_lr=-0.5), "params.warmup_min_lr=-0.5: must be a number or a list of numbers"),
        (schedule("WarmupLR", warmup_max_lr=[1.0, -1.0]), "params.warmup_max_lr=[1.0, -1.0]: must be a number or a"),
        (schedule("WarmupLR", warmup_max_lr=["fast"]), "params.warmup_max_lr=['fast']: must be a number or a list of"),
        (schedule("WarmupLR", warmup_min_lr=[]), "warmup_min_lr has 0 values: write one number, or a list"),
        (schedule("WarmupLR", last_batch_iteration=-2), "last_batch_iteration=-2: must be a whole number, -1 or more"),
        (
            schedule("WarmupLR", warmup_min_lr=[0.1], warmup_max_lr=[1, 2]),
            "scheduler.params: warmup_min_lr has 1 values, warmup_max_lr has 2 values: write one number, or a list",
        ),
        (schedule("WarmupCosineLR", total_num_steps=9, cos_min_ratio=-0.1), "cos_min_ratio=-0.1: must be a number, 0"),
        (schedule("OneCycle", cycle_min_lr=-1, cycle_max_lr=1), "cycle_min_lr=-1: must be a number or a list"),
        (
            schedule("OneCycle", cycle_min_lr=0, cycle_max_lr=1, cycle_max_mom=1),
            "cycle_max_mom=1: must be a number or a list of numbers, 0 or more and less than 1",
        ),
        (schedule("LRRangeTest", lr_range_test_min_lr=-1), "lr_range_test_min_lr=-1: must be a number or a list of"),
        ({**BATCH, "data_types": {"keep_in_fp32_modules": "norm"}}, "keep_in_fp32_modules='norm': must be 'auto' or"),
        ({**BATCH, "data_types": {"keep_in_fp32_modules": [3]}}, "keep_in_fp32_modules=[3]: must be 'auto' or a list"),
        (
            {**BATCH, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp16"}},
            "data_types.grad_accum_dtype='fp16': bf16 gradients add up in bf16 or in fp32",
        ),
        (zero(offload_optimizer={"device": "cpu", "buffer_size": 10}), "it belongs to `offload_param`"),
        (zero(offload_optimizer={"device": "nvme"}), "offload_optimizer.device='nvme': needs nvme_path, a directory"),
        (zero(offload_param={"device": "nvme"}), "offload_param.device='nvme': needs nvme_path, a directory"),
        (zero(offload_optimizer="cpu"), "zero_optimization.offload_optimizer='cpu': must be an object or null"),
        (zero(cpu_offload=True, offload_optimizer={}), "zero_optimization.cpu_offload: the old spelling of"),
        (zero(prefetch_bucket_size=1, stage3_prefetch_bucket_size=1), "prefetch_bucket_size: the same key as"),
        (zero(legacy_stage1=True), "zero_optimization.legacy_stage1=True: not available"),
        ({**BATCH, "fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled and bf16.enabled"),
        ({**BATCH, "fp16": {"loss_scale": True}}, "fp16.loss_scale=True: must be a number"),
        ({**BATCH, "fp16": {"enabled": True, "loss_scale_window": 0}}, "fp16.loss_scale_window=0: must be more than 0"),
        ({**BATCH, "fp16": {"opt_level": "O1"}}, "fp16.opt_level='O1': not available"),
        ({**BATCH, "bf16": {"check_overflow": True}}, "Write `check_grad_overflow`"),
        ({**BATCH, "amp": {"enabled": True}}, "amp.enabled=True: not available. Write `bf16`"),
        ({**BATCH, "gradient_clipping": "auto"}, "gradient_clipping='auto': nothing filled it in (Hugging Face's"),
        ({"train_batch_size": "auto"}, "train_batch_size='auto'"),
        ({"train_batch_size": "auto"}, "write a value, or pass auto={'train_batch_size': ...}"),
        (
            {"train_batch_size": 128, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 16},
            "a step of 4 processes, and there is one: write gradient_accumulation_steps: 64 for the same step, or "
            "train_batch_size: 32",
        ),
        (
            {"train_batch_size": 9, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
            "train_batch_size must be train_micro_batch_size_per_gpu times gradient_accumulation_steps",
        ),
        (adam(lr="auto"), "optimizer.params.lr='auto'"),
        (adam(max_grad_norm=1.0), "optimizer.params.max_grad_norm=1.0: not available. Write `gradient_clipping`"),
        (adam(learning_rate=1.0), "optimizer.params.learning_rate: unknown key"),
        (adam(betas=[0.9]), "optimizer.params.betas=[0.9]: must be two numbers"),
        (adam(betas=[0.9, 1.0]), "optimizer.params.betas=[0.9, 1.0]"),
        (adam(bias_correction=False), "optimizer.params.bias_correction"),
        ({**BATCH, "optimizer": {"type": "sgd"}}, "optimizer.type='sgd': no class of torch.optim"),
        ({**BATCH, "optimizer": {"type": "AdmaW"}}, "did you mean 'AdamW'?"),
        ({**BATCH, "optimizer": {"type": "DeepSpeedCPUAdam"}}, "did you mean 'Adam'?"),
        ({**BATCH, "optimizer": {"type": "adamw_torch_fused"}}, "did you mean 'AdamW'?"),
        ({**BATCH, "optimizer": {"type": "SGD", "params": {"momentun": 1}}}, "did you mean 'momentum'?"),
        *[
            ({**BATCH, "optimizer": {"type": name}}, f"optimizer.type={name!r}: not available")
            for name in ("Lamb", "Muon", "OneBitAdam", "OneBitLamb", "ZeroOneAdam", "MuAdam", "MuAdamW", "MuSGD")
        ],
        ({**BATCH, "scheduler": {"type": "WarmUpLR"}}, "did you mean 'WarmupLR'?"),
        ({**BATCH, "scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 1}}}, "mean 'warmup_num_steps'"),
        ({**BATCH, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": -1}}}, "warmup_num_steps=-1"),
        ({**BATCH, "curriculum_learning": {"enabled": True}}, "curriculum_learning={...}: not available"),
        ({**BATCH, "sparse_attention": {"mode": "fixed"}}, "sparse_attention={...}: not available"),
        ({**BATCH, "elasticity": {"enabled": True}}, "elasticity.enabled=True: not available"),
        ({**BATCH, "sequence_parallel_size": 2}, "sequence_parallel_size=2: not available"),
        ({**BATCH, "checkpoint": {"writer": {"decoupled": "maybe"}}}, "checkpoint.writer.decoupled='maybe': must be"),
        ({**BATCH, "data_types": {"param_dtype": "fp16"}}, "fp16 and bf16 make the parameters fp32"),
    ],
)  # fmt: skip
def test_refusals_name_path_value_and_rule(config: dict[str, Any], message: str) -> None:
    assert message in refusal(config)


@pytest.mark.parametrize(
    "config",
    [
        {**BATCH, **FP32_SUMS, "gradient_accumulation_steps": 2},
        {**BATCH, "gradient_accumulation_steps": 2, "data_types": {"grad_accum_dtype": "fp32"}},
        {**BATCH, **FP32_SUMS, "gradient_accumulation_steps": 2, "data_types": {"grad_accum_dtype": "bf16"}},
    ],
)
def test_sums_of_gradients_that_are_as_asked_for(config: dict[str, Any]) -> None:
    quiet(config)


@pytest.mark.parametrize(
    "params",
    [
        {"type": "OneCycleLR", "params": {"max_lr": [0.1, 0.2], "total_steps": 9}},  # one for each group
        {"type": "StepLR", "params": {"step_size": 2, "last_epoch": 3}},
    ],
)
def test_what_torchs_classes_take_of_some_parameters_is_not_refused(params: dict[str, Any]) -> None:
    quiet({**BATCH, "scheduler": params})


def test_every_error_comes_at_once() -> None:
    message = refusal({"fp16": {"enabled": 3}, "zero_optimization": {"stage": 9}})
    assert "has 3 errors" in message
    assert all(part in message for part in ("no batch size", "fp16.enabled=3", "zero_optimization.stage=9"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**BATCH, "zero_optimisation": {}}, "did you mean 'zero_optimization'?"),
        ({**BATCH, "offload_optimizer": {}}, "did you mean 'zero_optimization.offload_optimizer'?"),
        ({**BATCH, "max_grad_norm": 0.5}, "did you mean 'gradient_clipping'?"),
        ({**BATCH, "aio": {"block_sise": 1}}, "aio.block_sise: unknown key, which has no effect"),
        (
            {**BATCH, "qqq": 1},
            "qqq: unknown key, which has no effect, and DeepSpeed says nothing about it: leave it out",
        ),
        ({**BATCH, "optimizer": {"typ": "Adam"}}, "optimizer.typ: unknown key"),
        ({**BATCH, "optimizer": {"params": {"lr": 1}}}, "optimizer.params without optimizer.type"),
        ({**BATCH, "communication_data_type": "int8"}, "communication_data_type='int8': must be 'fp16', 'bf16' or"),
        ({**BATCH, "vocabulary_size": "big"}, "vocabulary_size='big': must be a whole number or null"),
        (
            {**BATCH, "bf16": {}, "bfloat16": {"enabled": True}},
            "bfloat16: the old spelling of bf16, which is given too",
        ),
        ({**BATCH, "bf16": {"enabled": "auto"}}, "bf16.enabled='auto': nothing filled it in"),
        (
            {**BATCH, "scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cosine"}}},
            "warmup_type='cosine': must be 'log' or 'linear'",
        ),
        (zero(stage=2, offload_param={"device": "cpu"}), "offload_param.device='cpu': read at stage 3 only"),
    ],
)
def test_what_deepspeed_lets_pass_is_a_warning_and_strictly_an_error(config: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning) as record:
        settings = load(config)
    (warning,) = (one for one in record if one.category is not ResourceWarning)  # of what is collected meanwhile
    assert message in str(warning.message) and warning.filename == __file__
    assert settings.placement.params == "device"
    assert settings.precision.dtype == ("bf16" if "data_types" in config else "fp32")
    assert message in refusal(config, strict=True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (zero(cpu_offload=True), zero(offload_optimizer={"device": "cpu"})),
        (zero(cpu_offload=False), zero()),
        (zero(cpu_offload_param="true"), zero(offload_param={"device": "cpu"})),
        (zero(stage3_gather_fp16_weights_on_model_save=True), zero(gather_16bit_weights_on_model_save=True)),
        ({**BATCH, "bfloat16": {"enabled": True}}, {**BATCH, "bf16": {"enabled": True}}),
        ({**BATCH, "zero_optimization": True}, {**BATCH, "zero_optimization": {"stage": 1}}),
        ({**BATCH, "zero_optimization": False}, BATCH),
    ],
)
def test_old_spellings_mean_the_new_with_one_warning(old: dict[str, Any], new: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="old spelling") as record:
        settings = load(old, strict=True)
    assert len([one for one in record if one.category is not ResourceWarning]) == 1
    expected = load(new)
    assert settings.placement == expected.placement and settings.precision == expected.precision


def test_notices_say_what_is_done_instead() -> None:
    settings = quiet(
        zero(
            zenflow={"update_interval": 4},
            overlap_comm=True,
            offload_optimizer={"device": "cpu", "super_offload": True},
        )
    )
    text = "\n".join(settings.notices)
    assert "zero_optimization.zenflow={...}" in text and "offload_optimizer.super_offload=True" in text
    assert "no effect here" in text and "zero_optimization.overlap_comm" in text
    assert settings.batch.accumulation == 1
    assert quiet({**BATCH, "gradient_clipping": 1.0, "wandb": {"enabled": False}}).notices == ()
