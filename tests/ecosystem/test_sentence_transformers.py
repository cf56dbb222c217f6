"""sentence-transformers: its trainer, whose loss holds the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from outcomes import OFFLOADED, Outcome, assert_offloaded_equals_resident, wrap
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer
from words import TEXTS, word_tokenizer

from training import RESIDENT

pytestmark = pytest.mark.usefixtures("device")


def saved_encoder(out: Path) -> Path:
    """A model with random weights where sentence-transformers can load it from."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def train(
    placement: dict[str, Any] | None, out: Path, encoder: Path, device: torch.device, *, resume: bool = False
) -> Outcome:
    torch.set_default_device(None)  # the sampler of Trainer's loader works on the CPU
    torch.manual_seed(0)
    parts = Transformer(str(encoder)), Pooling(32)
    model = SentenceTransformer(modules=list(parts), device=str(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = wrap(model, optimizer, placement)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(out), max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=2,
        eval_strategy="steps", eval_steps=2, max_grad_norm=0.3, logging_steps=1, report_to=[], disable_tqdm=True,
        use_cpu=device.type == "cpu",
    )  # fmt: skip
    data = Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[1:] + TEXTS[:1]})
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        loss=MultipleNegativesRankingLoss(model),
        optimizers=(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)),
    )
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-2") if resume else None)
    logged = [entry.get(key) for entry in trainer.state.log_history for key in ("loss", "grad_norm", "eval_loss")]
    outcome = Outcome([value for value in logged if value is not None], optimizer=optimizer)
    with torch.no_grad():
        outcome.tensors["embeddings"] = model.encode(TEXTS[:3], convert_to_tensor=True).clone()
    outcome.keep(model.state_dict())
    return outcome


@pytest.mark.parametrize("name", OFFLOADED)
def test_trainer(name: str, tmp_path: Path, device: torch.device) -> None:
    encoder = saved_encoder(tmp_path / "encoder")
    resident = train(RESIDENT, tmp_path / "resident", encoder, device)
    assert_offloaded_equals_resident(train(OFFLOADED[name], tmp_path / "offloaded", encoder, device), resident)
    again = train(OFFLOADED[name], tmp_path / "offloaded", encoder, device, resume=True)
    assert_offloaded_equals_resident(again, resident)
