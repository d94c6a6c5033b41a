"""The small ResNets for CIFAR: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sparsekern.lab.models.layers import Multiplier, conv3x3, init_convolutions_, widened

STAGES = (16, 32, 64)
"""Channels of the three stages; the second and the third halve the image."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A of the paper).

    Where the image is halved the shortcut takes every second pixel and fills the new channels with zeros: half of them
    before the old ones, half behind.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(in_channels, channels, stride), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv3x3(channels, channels), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.stride, self.added = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N, channels, H / stride, W / stride)`` for ``(N, in_channels, H, W)``."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        x = x[:, :, :: self.stride, :: self.stride]
        before = self.added // 2
        return torch.relu(y + pad(x, (0, 0, 0, 0, before, self.added - before)))


class CifarResNet(nn.Module):
    """A ResNet of ``6 n + 2`` layers: a 3x3 convolution, three stages of n blocks, average pooling, a linear layer.

    Args:
        num_classes: outputs.
        in_channels: of the images, which are ``(N, in_channels, H, W)``, 32x32 in the paper.
        blocks: n, blocks a stage.
        width_multiplier: times the channels of all stages.
    """

    def __init__(
        self, num_classes: int, in_channels: int = 3, *, blocks: int, width_multiplier: Multiplier = 1.0
    ) -> None:
        super().__init__()
        stem, *_ = widths = [widened(channels, width_multiplier) for channels in STAGES]
        self.conv1, self.bn1, self.relu = conv3x3(in_channels, stem), nn.BatchNorm2d(stem), nn.ReLU(inplace=True)
        ins = (stem, *widths)
        self.layer1, self.layer2, self.layer3 = (
            _stage(ins[i], widths[i], blocks, stride=1 if i == 0 else 2) for i in range(3)
        )
        self.fc = nn.Linear(widths[2], num_classes)
        init_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def resnet20(num_classes: int, in_channels: int = 3, width_multiplier: Multiplier = 1.0) -> CifarResNet:
    """Return ResNet-20, 0.27 M parameters."""
    return CifarResNet(num_classes, in_channels, blocks=3, width_multiplier=width_multiplier)


def resnet56(num_classes: int, in_channels: int = 3, width_multiplier: Multiplier = 1.0) -> CifarResNet:
    """Return ResNet-56, 0.85 M parameters."""
    return CifarResNet(num_classes, in_channels, blocks=9, width_multiplier=width_multiplier)
