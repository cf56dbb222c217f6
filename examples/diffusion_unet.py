"""A diffusion model: a small UNet learns the noise in images, under bf16 autocast, its states on the host.

    python examples/diffusion_unet.py
    python examples/diffusion_unet.py --channels 256 --size 64 --batch 32 --steps 10000

Two lines differ from plain PyTorch: the import, and `wrap` where a plain script has `model.to(device)`.
Skip connections, group norms and a network that is no list of equal blocks: nothing of that needs care.
"""

import argparse
import math

import torch
from torch import Tensor, nn

import offload


class Residual(nn.Module):
    """Two convolutions that are told how much noise there is."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.noise = nn.Linear(embedding, outputs)
        self.second = nn.Sequential(nn.GroupNorm(8, outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        return self.skip(x) + self.second(self.first(x) + self.noise(embedded)[:, :, None, None])


class UNet(nn.Module):
    """(batch, 1, size, size) noisy images and (batch,) noise levels in 0 to 1, to the noise in them."""

    def __init__(self, channels: int, levels: int = 3) -> None:
        super().__init__()
        self.frequencies = 16
        embedding = 4 * channels
        self.embed = nn.Sequential(
            nn.Linear(2 * self.frequencies, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        widths = [channels * 2**level for level in range(levels)]
        self.entry = nn.Conv2d(1, channels, 3, padding=1)
        self.down = nn.ModuleList(Residual(a, b, embedding) for a, b in zip([channels, *widths], widths, strict=False))
        self.middle = Residual(widths[-1], widths[-1], embedding)
        self.up = nn.ModuleList(
            Residual(a + b, b, embedding) for a, b in zip([widths[-1], *widths[:0:-1]], widths[::-1], strict=True)
        )
        self.exit = nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        angles = level[:, None] * torch.exp(torch.linspace(0, math.log(1000), self.frequencies, device=x.device))
        embedded = self.embed(torch.cat([angles.sin(), angles.cos()], dim=1))
        x = self.entry(x)
        kept = []
        for block in self.down:
            x = block(x, embedded)
            kept.append(x)
            x = nn.functional.avg_pool2d(x, 2)
        x = self.middle(x, embedded)
        for block in self.up:
            x = nn.functional.interpolate(x, scale_factor=2)
            x = block(torch.cat([x, kept.pop()], dim=1), embedded)
        return self.exit(x)


def draw(count: int, size: int) -> Tensor:
    """Images of one soft disc each, values about -1 to 1."""
    axis = torch.arange(size) / size
    center, radius = 0.3 + 0.4 * torch.rand(2, count, 1, 1), 0.1 + 0.2 * torch.rand(count, 1, 1)
    distance = ((axis[None, None, :] - center[0]) ** 2 + (axis[None, :, None] - center[1]) ** 2).sqrt()
    return torch.tanh((radius - distance) * 10)[:, None]


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--size", type=int, default=16, help="of an image, in pixels a side; a multiple of 8")
parser.add_argument("--channels", type=int, default=16, help="of the first level; a multiple of 8")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--lr", type=float, default=2e-3)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = UNet(args.channels)
optim = torch.optim.AdamW(model.parameters(), lr=args.lr)
model, optim = offload.wrap(model, optim, optimizer="host", gradients="host", params="host", device=device)
for step in range(args.steps):
    images, level = draw(args.batch, args.size).to(device), torch.rand(args.batch).to(device)
    noise = torch.randn_like(images)
    share = level[:, None, None, None]
    noisy = (1 - share).sqrt() * images + share.sqrt() * noise
    with torch.autocast(device, torch.bfloat16):
        loss = nn.functional.mse_loss(model(noisy, level).float(), noise)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optim.step()
    optim.zero_grad()
    if step % 10 == 0 or step == args.steps - 1:
        print(f"step {step}: loss {loss.item():.4f}")
