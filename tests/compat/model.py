"""The model of the script."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LENGTH", "VOCABULARY", "Model"]

VOCABULARY, LENGTH, WIDTH = 29, 12, 24


class Model(nn.Module):
    """Tokens to the loss of the next ones: an embedding that is also the head, norms, biases, and an fp32 buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40), nn.GELU(), nn.Linear(40, WIDTH)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("positions", torch.linspace(0, 1.37, LENGTH)[:, None] * torch.arange(WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens[:, :-1])
        x = x + torch.sin(self.positions).to(x.dtype)
        for block in self.blocks:
            x = x + block(x)
        logits = self.head(self.norm(x))
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
