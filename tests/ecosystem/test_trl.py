"""TRL: supervised fine-tuning and preference optimisation with a frozen reference, generation in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from outcomes import OFFLOADED, Outcome, assert_offloaded_equals_resident, wrap
from words import TEXTS, word_tokenizer

import offload
from training import RESIDENT

pytestmark = pytest.mark.usefixtures("device")


def model_of(seed: int) -> Any:
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=13, pad_token_id=0, eos_token_id=1, **size)
    )


class Generates(transformers.TrainerCallback):
    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        was_training = model.training
        model.eval()
        with torch.no_grad():
            tokens = model.generate(torch.tensor([[3, 4]], device=model.device), max_new_tokens=4, do_sample=False)
        model.train(was_training)
        self.outcome.numbers += [float(token) for token in tokens[0]]


def train(
    kind: str,
    placement: dict[str, Any] | None,
    out: Path,
    device: torch.device,
    *,
    resume: bool = False,
    bf16: bool = False,
) -> Outcome:
    torch.set_default_device(None)  # the sampler of Trainer's loader works on the CPU
    outcome = Outcome()
    model = model_of(0)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = wrap(model, optimizer, {**placement, "device": device} if placement else None)
    outcome.optimizer = optimizer
    options: dict[str, Any] = {
        "output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_grad_norm": 0.3, "logging_steps": 1,
        "report_to": [], "disable_tqdm": True, "use_cpu": device.type == "cpu", "bf16": bf16, "max_length": 16,
    }  # fmt: skip
    shared: dict[str, Any] = {
        "processing_class": word_tokenizer(),
        "optimizers": (optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)),
        "callbacks": [Generates(outcome)],
    }
    trainer: Any
    if kind == "sft":
        data = Dataset.from_dict({"text": TEXTS})
        shared |= {"train_dataset": data, "eval_dataset": data.select(range(2))}
        trainer = trl.SFTTrainer(model, trl.SFTConfig(**options), **shared)
    else:
        data = Dataset.from_dict({"prompt": [text[:7] for text in TEXTS], "chosen": TEXTS, "rejected": TEXTS[::-1]})
        shared |= {"train_dataset": data, "eval_dataset": data.select(range(2))}
        reference = model_of(1)
        if placement and "params" in placement:
            reference, _ = offload.wrap(reference, None, params="host", device=device)
        trainer = trl.DPOTrainer(model, reference, trl.DPOConfig(**options), **shared)
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-2") if resume else None)
    keys = ("loss", "grad_norm", "eval_loss", "learning_rate")
    outcome.numbers += [entry[key] for entry in trainer.state.log_history for key in keys if key in entry]
    outcome.keep(model.state_dict())
    return outcome


@pytest.mark.parametrize("name", OFFLOADED)
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trainers(kind: str, name: str, tmp_path: Path, device: torch.device) -> None:
    resident = train(kind, RESIDENT, tmp_path / "resident", device)
    if name == "host":
        assert resident.numbers == pytest.approx(train(kind, None, tmp_path / "plain", device).numbers, rel=1e-3)
    assert_offloaded_equals_resident(train(kind, OFFLOADED[name], tmp_path / "offloaded", device), resident)
    again = train(kind, OFFLOADED[name], tmp_path / "offloaded", device, resume=True)
    assert_offloaded_equals_resident(Outcome(resident.numbers, again.tensors, again.optimizer), resident)


def test_bf16(tmp_path: Path, device: torch.device) -> None:
    resident = train("sft", RESIDENT, tmp_path / "resident", device, bf16=True)
    for name, placement in OFFLOADED.items():
        assert_offloaded_equals_resident(train("sft", placement, tmp_path / name, device, bf16=True), resident)
