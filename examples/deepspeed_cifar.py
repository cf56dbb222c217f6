"""A script written for DeepSpeed, with one changed import: a small network on images in the shape of CIFAR-10.

    python examples/deepspeed_cifar.py --deepspeed --deepspeed_config examples/deepspeed_cifar.json

The file beside it is the config where none is given. The images are made here, ten classes of noisy patterns, so that
nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import offload.deepspeed as deepspeed


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CIFAR-like images")
    parser.add_argument("--epochs", default=2, type=int)
    parser.add_argument("--images", default=1024, type=int, help="number of training images")
    parser.add_argument("--local_rank", default=-1, type=int, help="set by DeepSpeed's launcher, where there is one")
    parser = deepspeed.add_config_arguments(parser)
    parser.set_defaults(deepspeed_config=str(Path(__file__).with_suffix(".json")))
    return parser.parse_args()


def make_images(count: int, seed: int) -> TensorDataset:
    """(3, 32, 32) images: the pattern of their class under noise."""
    patterns = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    images = patterns[labels] + 2 * torch.randn(count, 3, 32, 32, generator=generator)
    return TensorDataset(images, labels)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.classifier = nn.Sequential(
            nn.Linear(16 * 5 * 5, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


@torch.no_grad()
def accuracy(engine: deepspeed.DeepSpeedEngine, images: Tensor, labels: Tensor) -> float:
    engine.eval()
    predicted = engine(images.to(engine.device)).argmax(1)
    engine.train()
    return (predicted == labels.to(engine.device)).float().mean().item()


def main() -> None:
    args = get_args()
    deepspeed.init_distributed()
    torch.manual_seed(0)
    net = Net()
    engine, _, train_loader, _ = deepspeed.initialize(
        args=args, model=net, model_parameters=net.parameters(), training_data=make_images(args.images, seed=1)
    )
    criterion = nn.CrossEntropyLoss()
    for epoch in range(args.epochs):
        total = 0.0
        for images, labels in train_loader:
            outputs = engine(images.to(engine.device))
            loss = criterion(outputs, labels.to(engine.device))
            engine.backward(loss)
            engine.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(train_loader):.4f}")
    test_images, test_labels = make_images(500, seed=2).tensors
    print(f"accuracy {accuracy(engine, test_images, test_labels):.1%} after {engine.global_steps} steps")


if __name__ == "__main__":
    main()
