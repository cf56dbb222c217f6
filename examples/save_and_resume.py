"""Saves an offloaded run in the formats of plain PyTorch, goes on from it, and checks that the bits agree."""

import tempfile
from pathlib import Path

import torch

import offload

device = "cuda" if torch.cuda.is_available() else "cpu"


def build() -> tuple[torch.nn.Module, offload.OffloadOptimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64))
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return offload.wrap(model, optim, optimizer="host", gradients="host", device=device)


def train(model: torch.nn.Module, optim: offload.OffloadOptimizer, steps: range) -> float:
    for step in steps:
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step)).to(device)
        loss = (model(x) - x).square().mean()
        loss.backward()
        optim.step()
        optim.zero_grad()
    return loss.item()


model, optim = build()
train(model, optim, range(10))
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "checkpoint.pt"
    # Written beside and renamed: a run that is killed while it saves keeps the checkpoint before.
    unfinished = path.with_suffix(".unfinished")
    torch.save({"model": model.state_dict(), "optim": optim.state_dict()}, unfinished)
    unfinished.replace(path)
    straight = train(model, optim, range(10, 20))

    checkpoint = torch.load(path, weights_only=True, mmap=True)
    model, optim = build()
    model.load_state_dict(checkpoint["model"])
    optim.load_state_dict(checkpoint["optim"])
    resumed = train(model, optim, range(10, 20))

print(f"loss without a break {straight!r}, resumed {resumed!r}")
assert straight == resumed
