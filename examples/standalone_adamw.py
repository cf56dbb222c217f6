"""The SIMD optimizer alone: a drop-in for torch.optim.AdamW over parameters in host memory."""

import torch

import offload

torch.manual_seed(0)
model = torch.nn.Linear(512, 512)
optim = offload.AdamW(model.parameters(), lr=1e-3)
for _ in range(20):
    x = torch.randn(64, 512)
    loss = (model(x) - x).square().mean()
    loss.backward()
    optim.step()
    optim.zero_grad()
print(f"loss {loss.item():.4f}")

# Its states are torch's: they load into torch.optim.AdamW and back.
stock = torch.optim.AdamW(model.parameters(), lr=1e-3)
stock.load_state_dict(optim.state_dict())
