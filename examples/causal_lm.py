"""Fine-tunes a Hugging Face language model on text files, its optimizer, gradients and weights on the host.

    python examples/causal_lm.py README.md docs/*.md
    python examples/causal_lm.py notes/*.txt --model Qwen/Qwen3-4B --batch 8 --length 2048 --out tuned

Two lines differ from plain PyTorch: the import, and `wrap` where a plain script has `model.to(device)`.
Without --model it trains a small Llama from random weights on the bytes of the files, and downloads nothing.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import offload

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("files", nargs="*", type=Path, default=[Path(__file__)], help="text, UTF-8 (default: this file)")
parser.add_argument("--model", help="a directory, or a name on the Hugging Face hub (default: small and random)")
parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch", type=int, default=4, help="sequences a step")
parser.add_argument("--length", type=int, default=64, help="tokens a sequence")
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--out", type=Path, help="a directory for the trained model")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = getattr(torch, args.dtype)
text = "\n".join(path.read_text(encoding="utf-8") for path in args.files)
torch.manual_seed(0)
if args.model:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    tokens = torch.tensor(tokenizer(text)["input_ids"])
else:
    size = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=256, **size), dtype=dtype)
    tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
if len(tokens) <= args.length:
    parser.error(f"the files have {len(tokens)} tokens, which is no more than --length {args.length}")

optim = torch.optim.AdamW(model.parameters(), lr=args.lr)
model, optim = offload.wrap(model, optim, optimizer="host", gradients="host", params="host", device=device)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, T_max=args.steps)
model.train()
start = time.perf_counter()
for step in range(args.steps):
    begins = torch.randint(len(tokens) - args.length, (args.batch,)).tolist()
    batch = torch.stack([tokens[begin : begin + args.length] for begin in begins]).to(device)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optim.step()
    schedule.step()
    optim.zero_grad()
    if step % 5 == 0 or step == args.steps - 1:
        print(f"step {step}: loss {loss.item():.4f}")
seconds = time.perf_counter() - start
print(f"{args.steps * args.batch * args.length / seconds:,.0f} tokens/s")
if args.out:
    model.save_pretrained(args.out)
