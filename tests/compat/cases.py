"""The trainings that run under both libraries, and how closely they must agree: README.md explains the tolerances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["CASES", "Tolerance"]


@dataclass(frozen=True)
class Tolerance:
    """loss, norm: relative; weight: absolute. same_weights: the share of weights that are equal to the bit."""

    loss: float
    norm: float
    weight: float
    same_weights: float


EXACT = Tolerance(loss=0.0, norm=1e-6, weight=0.0, same_weights=1.0)
FP32 = Tolerance(loss=1e-6, norm=1e-6, weight=5e-6, same_weights=0.0)
HALF = Tolerance(loss=3e-3, norm=3e-3, weight=2**-6, same_weights=0.8)
AUTOCAST = Tolerance(loss=1e-3, norm=1e-3, weight=2**-7, same_weights=0.0)

ADAMW = {"type": "AdamW", "params": {"lr": 5e-3, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.02}}
TORCH_ADAMW = {"type": "AdamW", "params": {**ADAMW["params"], "torch_adam": True}}
L2_ADAM = {"type": "Adam", "params": {**ADAMW["params"], "adam_w_mode": False}}
STANDING = {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}}  # nothing moves: every step has its own scale
BF16 = {"bf16": {"enabled": True}}
CLIP = {"gradient_clipping": 0.5}
ACCUMULATE = {"gradient_accumulation_steps": 3}


def zero(stage: int, *, offload: bool = False) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": stage}
    if offload:
        section["offload_optimizer"] = {"device": "cpu"}
    if stage == 3:
        if offload:
            section["offload_param"] = {"device": "cpu"}
        section["memory_efficient_linear"] = False  # it rounds the product before the bias is added: README.md
    return {"zero_optimization": section}


def offloaded(stage: int) -> dict[str, Any]:
    return zero(stage, offload=True)


def fp16(**more: Any) -> dict[str, Any]:
    return {"fp16": {"enabled": True, "initial_scale_power": 20, **more}}


def schedule(name: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": name, "params": params}}


def case(name: str, tolerance: Tolerance, *parts: dict[str, Any], steps: int = 8, **more: Any) -> dict[str, Any]:
    """client: the class, arguments and decay of an optimizer and a schedule that the script makes itself."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**6,
        "optimizer": ADAMW,
    }
    for part in parts:
        config |= part
    if "client" in more:
        del config["optimizer"]
    return {"name": name, "tolerance": tolerance, "seed": len(name), "steps": steps, "config": config, **more}


def client(name: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": name, "params": params, "gamma": 0.9}


UNTESTED = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}

CASES = [
    # Stages and placements.
    case("stage 0", FP32, {"optimizer": TORCH_ADAMW}, save=True),
    case("stage 0, clipping, accumulation", FP32, {"optimizer": TORCH_ADAMW}, CLIP, ACCUMULATE),
    case("stage 1", FP32, {"optimizer": TORCH_ADAMW}, zero(1), save=True),
    case("stage 1, offloaded", FP32, offloaded(1)),
    case("stage 2, offloaded", FP32, offloaded(2)),
    case("stage 3, offloaded", FP32, offloaded(3), save=True),
    case("stage 3, offloaded, clipping, accumulation", FP32, offloaded(3), CLIP, ACCUMULATE),
    case("what a config need not say", FP32, {"gradient_clipping": 1.0}, offloaded(2)),
    # bf16.
    case("bf16 stage 2", HALF, {"optimizer": TORCH_ADAMW}, BF16, zero(2), save=True),
    case("bf16 stage 3, clipping", HALF, {"optimizer": TORCH_ADAMW}, BF16, zero(3), CLIP),
    case("bf16 stage 1, offloaded, accumulation", HALF, BF16, offloaded(1), ACCUMULATE),
    case("bf16 stage 2, offloaded, clipping", HALF, BF16, offloaded(2), CLIP),
    case("bf16 stage 3, offloaded, clipping, accumulation", HALF, BF16, offloaded(3), CLIP, ACCUMULATE, save=True),
    case(
        "bf16 autocast",
        AUTOCAST,
        {"optimizer": TORCH_ADAMW},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    ),
    # fp16: the first steps overflow.
    case("fp16 stage 2, offloaded", HALF, fp16(), offloaded(2), steps=14),
    case("fp16 stage 3, offloaded, clipping", HALF, fp16(hysteresis=1), offloaded(3), CLIP, steps=14),
    case("fp16 static", HALF, fp16(loss_scale=512), offloaded(2)),
    case("fp16 static, overflows", EXACT, fp16(loss_scale=2.0**24), {"optimizer": TORCH_ADAMW}, zero(1)),
    case("fp16 window", EXACT, fp16(loss_scale_window=2), {"optimizer": STANDING}, zero(2), steps=25),
    case(
        "fp16 window, consecutive hysteresis",
        EXACT,
        fp16(loss_scale_window=3, hysteresis=3, consecutive_hysteresis=True),
        {"optimizer": STANDING},
        zero(1),
        steps=25,
    ),
    # Schedules and optimizers.
    case("WarmupLR", FP32, offloaded(2), schedule("WarmupLR", warmup_max_lr=0.01, warmup_num_steps=4)),
    case("WarmupDecayLR", FP32, offloaded(2), schedule("WarmupDecayLR", warmup_num_steps=3, total_num_steps=7)),
    case("WarmupCosineLR", FP32, offloaded(2), schedule("WarmupCosineLR", warmup_num_steps=3, total_num_steps=7)),
    case(
        "OneCycle",
        FP32,
        offloaded(2),
        schedule("OneCycle", cycle_min_lr=1e-3, cycle_max_lr=1e-2, cycle_first_step_size=3, decay_lr_rate=0.1),
    ),
    case(
        "LRRangeTest",
        FP32,
        offloaded(2),
        schedule("LRRangeTest", lr_range_test_min_lr=1e-3, lr_range_test_step_size=2, lr_range_test_step_rate=1.0),
    ),
    case("a schedule waits for steps that overflow", HALF, fp16(), offloaded(2), schedule("WarmupLR"), steps=10),
    case("Adam with L2", FP32, {"optimizer": L2_ADAM}, offloaded(2)),
    case("Adagrad", FP32, {"optimizer": {"type": "Adagrad", "params": {"lr": 0.05}}}),
    case("client's", FP32, client=client("AdamW", lr=3e-3)),
    case("client's, offloaded", FP32, offloaded(2), UNTESTED, client=client("AdamW", lr=3e-3)),
    case("client's SGD", EXACT, zero(2), UNTESTED, client=client("SGD", lr=0.03, momentum=0.9)),
    case("bf16 client's SGD", HALF, BF16, zero(2), UNTESTED, client=client("SGD", lr=0.03, momentum=0.9)),
]
