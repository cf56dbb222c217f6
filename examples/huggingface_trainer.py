"""Hugging Face Trainer with a wrapped model and optimizer: accumulation, clipping, checkpoints and logs stay its own.

    python examples/huggingface_trainer.py --out runs/tuned
    python examples/huggingface_trainer.py notes/*.txt --steps 200 --out runs/tuned

Two lines differ from a script without offload: the import and `wrap`, which takes the model to the device as Trainer
would. Needs `accelerate`, as Trainer does.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import offload

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("files", nargs="*", type=Path, default=[Path(__file__)], help="text, UTF-8 (default: this file)")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--length", type=int, default=64, help="tokens a sequence")
parser.add_argument("--lr", type=float, default=3e-3)
parser.add_argument("--out", type=Path, help="for checkpoints (default: a directory that is removed)")
args = parser.parse_args()


class Windows(Dataset):
    """Every stretch of so many bytes of a text, its bytes as tokens."""

    def __init__(self, text: str, length: int) -> None:
        self.tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
        self.length = length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.tokens[index * self.length : (index + 1) * self.length]
        return {"input_ids": window, "labels": window}


device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
size = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=256, **size))
optim = torch.optim.AdamW(model.parameters(), lr=args.lr)
model, optim = offload.wrap(model, optim, optimizer="host", gradients="host", params="host", device=device)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, T_max=args.steps)
with tempfile.TemporaryDirectory() as scratch:
    settings = TrainingArguments(
        output_dir=str(args.out or scratch),
        max_steps=args.steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        logging_steps=2,
        save_steps=args.steps,
        report_to=[],
        disable_tqdm=True,
    )
    data = Windows("\n".join(path.read_text(encoding="utf-8") for path in args.files), args.length)
    if len(data) == 0:
        parser.error(f"the files have {len(data.tokens)} bytes, which is less than --length {args.length}")
    trainer = Trainer(model=model, args=settings, train_dataset=data, optimizers=(optim, schedule))
    trainer.train()
for entry in trainer.state.log_history:
    if "grad_norm" in entry:
        print(f"step {entry['step']}: loss {entry['loss']:.4f}, gradient norm {entry['grad_norm']:.4f}")
