"""A script written for DeepSpeed, with one changed import: a small language model, everything offloaded, resumable.

    python examples/deepspeed_language_model.py --checkpoint_dir /tmp/lm
    python examples/deepspeed_language_model.py --checkpoint_dir /tmp/lm        # goes on

The text is made here: a random walk over a small vocabulary, whose next token can be learned.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import offload.deepspeed as deepspeed

VOCABULARY = 64
CONFIG = Path(__file__).with_suffix(".json")


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        normed = self.attention_norm(x)
        x = x + self.attention(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4, length: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of predicting each next token of (batch, length + 1) tokens."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1], device=tokens.device))
        for block in self.blocks:
            x = deepspeed.checkpointing.checkpoint(block, x)
        logits = self.head(self.norm(x))
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def batches(size: int, start: int, length: int = 32) -> Iterator[Tensor]:
    """Walks that go up or down by one, and mostly keep their direction."""
    number = start
    while True:
        generator = torch.Generator().manual_seed(number)
        turns = torch.rand(size, length + 1, generator=generator) < 0.1
        steps = 1 - 2 * (turns.cumsum(1) % 2)
        yield (torch.randint(VOCABULARY, (size, 1), generator=generator) + steps.cumsum(1)) % VOCABULARY
        number += 1


def main() -> None:
    parser = argparse.ArgumentParser(description="A small language model")
    parser.add_argument("--checkpoint_dir", type=Path, default=None)
    parser.add_argument("--num_iterations", type=int, default=40, help="optimizer steps of this run")
    parser.add_argument("--local_rank", type=int, default=-1)
    args = parser.parse_args()

    deepspeed.init_distributed()
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=str(CONFIG)):
        model = LanguageModel()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=str(CONFIG))
    if args.checkpoint_dir is not None:
        path, client_state = engine.load_checkpoint(args.checkpoint_dir)
        print(f"resumed from {path}, loss {client_state['loss']:.4f}" if path else "a new run")

    data = batches(engine.train_micro_batch_size_per_gpu(), start=engine.micro_steps)
    last_step = engine.global_steps + args.num_iterations
    while engine.global_steps < last_step:
        loss = engine(next(data).to(engine.device))
        engine.backward(loss)
        engine.step()
        if engine.was_step_applied() and engine.global_steps % 10 == 0:
            norm = engine.get_global_grad_norm()
            print(f"step {engine.global_steps}: loss {loss.item():.4f}  lr {engine.get_lr()[0]:.2e}  norm {norm:.3f}")
    if args.checkpoint_dir is not None:
        engine.save_checkpoint(args.checkpoint_dir, client_state={"loss": loss.item()})
        engine.save_16bit_model(args.checkpoint_dir)


if __name__ == "__main__":
    main()
