"""What the functions of `deepspeed.utils` show of a training: `python access_script.py LIBRARY FOLDER`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["CASES", "run_under"]

CASES: dict[str, tuple[int, str]] = {
    f"stage {stage}, {precision}": (stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16", "fp16")
}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}


def run_under(library: str, folder: Path) -> dict[str, Any]:
    """By case what `run` shows."""
    alone = ALONE if library == "deepspeed" else {}
    subprocess.run(
        [sys.executable, __file__, library, str(folder)],
        check=True,
        env={**os.environ, **alone, "DS_ACCELERATOR": "cpu"},
    )
    shown: dict[str, Any] = torch.load(folder / f"{library}.pt", weights_only=True)
    return shown


def run(deepspeed: Any, stage: int, precision: str) -> dict[str, Any]:
    """What is got of a trained and of a frozen parameter, at each point; three values are set in between."""
    utils = deepspeed.utils
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[1].bias.requires_grad_(False)
    shape = model[0].weight.shape  # at stage 3 the engine takes it away
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {
            "stage": stage, "stage3_param_persistence_threshold": 0, "memory_efficient_linear": False,
        },
    }  # fmt: skip
    if precision != "fp32":
        config[precision] = {"enabled": True, **({"loss_scale": 64.0} if precision == "fp16" else {})}
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    parameter, frozen = engine.module[0].weight, engine.module[1].bias
    values = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
    shown: dict[str, Any] = {"first frozen": utils.safe_get_full_fp32_param(frozen)}

    def show(when: str, *, states: bool = True) -> None:
        shown[f"{when} weight"] = utils.safe_get_full_fp32_param(parameter)
        if states:
            shown[f"{when} exp_avg"] = utils.safe_get_full_optimizer_state(parameter, "exp_avg")
            shown[f"{when} exp_avg_sq"] = utils.safe_get_full_optimizer_state(parameter, "exp_avg_sq")

    def backward() -> None:
        engine.backward(engine(torch.ones(2, 4, dtype=dtype)).float().pow(2).sum())

    backward()
    show("first", states=False)  # DeepSpeed makes them with the first step
    shown["first gradient"] = utils.safe_get_full_grad(parameter)
    if stage == 3:  # DeepSpeed has the others there alone
        # DeepSpeed gives views of what it trains.
        shown["first local gradient"] = utils.safe_get_local_grad(parameter).clone()
        shown["first local weight"] = utils.safe_get_local_fp32_param(parameter).clone()
    engine.step()
    show("stepped")
    backward()
    utils.safe_set_full_fp32_param(parameter, values[0])
    utils.safe_set_full_optimizer_state(parameter, values[1], "exp_avg")
    utils.safe_set_full_grad(parameter, values[1] * 64)
    shown["set gradient"] = utils.safe_get_full_grad(parameter)
    show("set")
    engine.step()
    show("stepped again")
    backward()
    shown["last gradient"] = utils.safe_get_full_grad(parameter)
    return {what: None if value is None else value.detach().clone() for what, value in shown.items()}


def main(library: str, folder: Path) -> None:
    torch.set_num_threads(1)
    deepspeed: Any
    if library == "deepspeed":
        import deepspeed
        from deepspeed.comm import torch as torch_backend

        # As in script.py: what it refuses on most CPUs, and what it would compile for nothing.
        deepspeed.get_accelerator().is_fp16_supported = lambda: True
        torch_backend.build_shm_op = lambda: None
    else:
        import offload.deepspeed as deepspeed
    shown = {name: run(deepspeed, stage, precision) for name, (stage, precision) in CASES.items()}
    torch.save(shown, folder / f"{library}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
