"""A sparse ResNet: 3x3 convolutions of which one block of channels in five is stored, trained by GSE.

python examples/resnet.py --epochs 5
"""

from __future__ import annotations

import argparse

import torch
from digits import digits
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekern as sk


class Residual(nn.Module):
    """Two convolutions added to their input."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ins, outs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outs, outs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outs), nn.BatchNorm2d(outs)
        self.shortcut = nn.Conv2d(ins, outs, 1, stride, bias=False) if ins != outs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet(width: int) -> nn.Sequential:
    """Return a ResNet of three stages for images of one channel."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),  # a stem of one channel: sparsify_ leaves it dense
        Residual(width, width, 1),
        Residual(width, 2 * width, 2),
        Residual(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def main(epochs: int = 5, width: int = 32) -> float:
    """Train and print; return the accuracy on the test images."""
    (x, y), (test_x, test_y) = digits()
    torch.manual_seed(0)
    model = resnet(width).to(memory_format=torch.channels_last)
    sk.sparsify_(model, sparsity=0.8, block_size=16, distribution="erk", ignore="6")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = epochs * (len(x) // 50)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sparse = sk.GSE(model, optimizer, update_every=10, stop=0.6 * steps)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(50):
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            sparse.step()
    model.eval()
    with torch.no_grad():
        correct = (model(test_x).argmax(1) == test_y).float().mean().item()
    print(sk.summary(model, test_x[:50], measure=False))
    print(f"{correct:.2%} correct")
    return correct


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    main(**vars(parser.parse_args()))
