"""Wide residual networks: Zagoruyko and Komodakis, BMVC 2016, arXiv 1605.07146."""

from __future__ import annotations

from torch import Tensor, nn

from sparsekern.lab.models.layers import Multiplier, conv1x1, conv3x3, init_convolutions_, widened

STEM, STAGES = 16, (16, 32, 64)
"""Channels at widening factor 1; the stem is not widened by it."""


class PreActivationBlock(nn.Module):
    """Norm and ReLU before each of two 3x3 convolutions, and a shortcut.

    Where the shape changes, the shortcut is a pointwise convolution of the normalised input, as in the authors' code.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_channels), conv3x3(in_channels, channels, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), conv3x3(channels, channels)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and in_channels == channels
        self.shortcut = None if same else conv1x1(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N, channels, H / stride, W / stride)`` for ``(N, in_channels, H, W)``."""
        y = self.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        out: Tensor = shortcut + self.conv2(self.relu(self.bn2(self.conv1(y))))
        return out


class WideResNet(nn.Module):
    """A network of ``6 n + 4`` convolutional layers: a 3x3 convolution, three stages of n blocks, a linear layer.

    Args:
        num_classes: outputs.
        in_channels: of the images ``(N, in_channels, H, W)``, 32x32 in the paper.
        blocks: n, blocks a stage.
        widen: k, the widening factor of the paper.
        width_multiplier: times the channels of stem and stages.
    """

    def __init__(
        self, num_classes: int, in_channels: int = 3, *, blocks: int, widen: int, width_multiplier: Multiplier = 1.0
    ) -> None:
        super().__init__()
        channels = widened(STEM, width_multiplier)
        self.conv1 = conv3x3(in_channels, channels)
        stages = []
        for i, stage in enumerate(STAGES):
            width = widened(widen * stage, width_multiplier)
            first = PreActivationBlock(channels, width, stride=1 if i == 0 else 2)
            stages.append(nn.Sequential(first, *(PreActivationBlock(width, width, 1) for _ in range(blocks - 1))))
            channels = width
        self.layer1, self.layer2, self.layer3 = stages
        self.bn, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.fc = nn.Linear(channels, num_classes)
        init_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)``."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        logits: Tensor = self.fc(self.relu(self.bn(x)).mean((2, 3)))
        return logits


def wrn_28_4(num_classes: int, in_channels: int = 3, width_multiplier: Multiplier = 1.0) -> WideResNet:
    """Return WRN-28-4, 5.85 M parameters for 10 classes, 5.87 M for 100."""
    return WideResNet(num_classes, in_channels, blocks=4, widen=4, width_multiplier=width_multiplier)
