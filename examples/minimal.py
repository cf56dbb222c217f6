"""The smallest offloaded training loop: optimizer states and gradients on the host."""

import torch

import offload

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(8))).bfloat16()
optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
model, optim = offload.wrap(model, optim, optimizer="host", gradients="host", device=device)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, T_max=50)

for step in range(50):
    for _ in range(2):  # two micro-batches a step
        x = torch.randn(32, 256, dtype=torch.bfloat16, device=device)
        loss = (model(x) - x).square().mean() / 2
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optim.step()
    schedule.step()
    optim.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {2 * loss.item():.4f}")

print(optim.plan.explain())
print(optim.stats())
