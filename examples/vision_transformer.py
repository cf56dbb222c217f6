"""A vision transformer that learns to tell shapes apart, with half of its activations on the host too.

    python examples/vision_transformer.py
    python examples/vision_transformer.py --width 1024 --depth 24 --size 224 --patch 16 --batch 64 --steps 1000

Two lines differ from plain PyTorch: the import, and `wrap` where a plain script has `model.to(device)`.
The images are drawn here: discs, squares, crosses and rings under noise.
"""

import argparse

import torch
from torch import Tensor, nn

import offload

SHAPES = ("disc", "square", "cross", "ring")


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.mlp_norm(x))


class VisionTransformer(nn.Module):
    """(batch, 1, size, size) images to (batch, classes) logits."""

    def __init__(self, size: int, patch: int, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, max(1, width // 32)) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(SHAPES))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean(1)))


def draw(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Images with one shape each, somewhere and in some size, and their classes."""
    labels = torch.randint(len(SHAPES), (count,))
    axis = torch.arange(size) / size
    center, radius = 0.3 + 0.4 * torch.rand(2, count, 1, 1), 0.15 + 0.15 * torch.rand(count, 1, 1)
    x, y = (axis[None, None, :] - center[0]).abs() / radius, (axis[None, :, None] - center[1]).abs() / radius
    far, near, distance = torch.maximum(x, y), torch.minimum(x, y), (x**2 + y**2).sqrt()
    drawn = torch.stack([distance < 1, far < 1, (far < 1) & (near < 0.3), (distance < 1) & (distance > 0.6)], dim=1)
    images = drawn[torch.arange(count), labels].float() + 0.2 * torch.randn(count, size, size)
    return images[:, None], labels


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--size", type=int, default=32, help="of an image, in pixels a side")
parser.add_argument("--patch", type=int, default=8, help="pixels a side; a divisor of --size")
parser.add_argument("--width", type=int, default=64, help="of a token; a multiple of 32")
parser.add_argument("--depth", type=int, default=3, help="transformer blocks")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--lr", type=float, default=2e-3)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = VisionTransformer(args.size, args.patch, args.width, args.depth)
optim = torch.optim.AdamW(model.parameters(), lr=args.lr)
model, optim = offload.wrap(model, optim, optimizer="host", gradients="host", activations=0.5, device=device)
for step in range(args.steps):
    images, labels = (value.to(device) for value in draw(args.batch, args.size))
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optim.step()
    optim.zero_grad()
    if step % 20 == 0 or step == args.steps - 1:
        print(f"step {step}: loss {loss.item():.4f}")
model.eval()
with torch.no_grad():
    images, labels = (value.to(device) for value in draw(256, args.size))
    print(f"accuracy {(model(images).argmax(1) == labels).float().mean().item():.1%}, one in {len(SHAPES)} by chance")
