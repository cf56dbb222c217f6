"""The training whose checkpoints are compared: `python checkpoint_script.py FOLDER` runs it under DeepSpeed.

Each of `CASES` leaves in `FOLDER/<name>` a checkpoint after `STEPS` steps, in `losses.json` the losses after it, and
from stage 1 on in `fp32.pt` what DeepSpeed makes of it without a model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CASES", "STEPS", "config_of", "make_model", "train"]

STEPS = 4
CASES = [(stage, dtype) for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]


class Tagger(nn.Module):
    """With what checkpoints have to keep apart: tied, frozen, and two groups of weights, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.up, self.norm, self.down = nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 6)
        self.frozen = nn.Linear(10, 10).requires_grad_(False)
        self.register_buffer("scale", torch.ones(10))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        inner = self.frozen(self.norm(self.up(self.embedding(tokens))))
        return nn.functional.cross_entropy(self.head(self.down(inner)).float(), tokens)


def make_model(seed: int) -> tuple[nn.Module, list[dict[str, Any]]]:
    torch.manual_seed(seed)
    model = Tagger()
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim == 1]
    return model, [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def config_of(stage: int, dtype: str) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:  # groups in several parts
        zero |= {"stage3_param_persistence_threshold": 20, "sub_group_size": 100}
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 10}},
    }


def train(engine: Any, seed: int) -> list[float]:
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(STEPS):
        loss = engine(torch.randint(0, 11, (4,), generator=generator))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def main(folder: Path) -> None:
    import deepspeed
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for stage, dtype in CASES:
        model, groups = make_model(seed=0)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config_of(stage, dtype))
        place = folder / f"{stage}-{dtype}"
        train(engine, seed=1)
        engine.save_checkpoint(str(place), client_state={"epoch": 3})
        if stage > 0:
            torch.save(dict(get_fp32_state_dict_from_zero_checkpoint(str(place))), place / "fp32.pt")
        (place / "losses.json").write_text(json.dumps(train(engine, seed=2)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
