"""LoRA with PEFT over a base model whose frozen weights are on the host and come to the device a block at a time.

    python examples/lora_peft.py README.md docs/*.md --out adapter
    python examples/lora_peft.py notes/*.txt --model Qwen/Qwen3-4B --batch 8 --length 2048

Two lines differ from plain PyTorch: the import, and `wrap` where a plain script has `model.to(device)`.
Needs `peft`. What LoRA trains is small; what fills the device is the base model, so its weights are what leaves.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import offload

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("files", nargs="*", type=Path, default=[Path(__file__)], help="text, UTF-8 (default: this file)")
parser.add_argument("--model", help="a directory, or a name on the Hugging Face hub (default: small and random)")
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch", type=int, default=4, help="sequences a step")
parser.add_argument("--length", type=int, default=64, help="tokens a sequence")
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--out", type=Path, help="a directory for the adapter")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
text = "\n".join(path.read_text(encoding="utf-8") for path in args.files)
torch.manual_seed(0)
if args.model:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    tokens = torch.tensor(tokenizer(text)["input_ids"])
else:
    size = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    base = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=256, **size), dtype=torch.bfloat16)
    tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
if len(tokens) <= args.length:
    parser.error(f"the files have {len(tokens)} tokens, which is no more than --length {args.length}")

adapter = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(base, adapter)
model.print_trainable_parameters()
optim = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
model, optim = offload.wrap(model, optim, optimizer="host", gradients="host", params="host", device=device)
model.train()
for step in range(args.steps):
    begins = torch.randint(len(tokens) - args.length, (args.batch,)).tolist()
    batch = torch.stack([tokens[begin : begin + args.length] for begin in begins]).to(device)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optim.step()
    optim.zero_grad()
    if step % 5 == 0 or step == args.steps - 1:
        print(f"step {step}: loss {loss.item():.4f}")
if args.out:
    model.save_pretrained(args.out)
