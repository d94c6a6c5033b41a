"""The perceptron, and what several families share: convolutions without bias, widths, and their initial values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

Multiplier = float | Callable[[int], int]
"""How wide a network is: times the published channels, or a function from those to the channels wanted."""


def widened(channels: int, width_multiplier: Multiplier) -> int:
    """Return the channels of a layer in a network that is so many times as wide, to the nearest, 1 or more."""
    if callable(width_multiplier):
        return width_multiplier(channels)
    return max(1, round(channels * width_multiplier))


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution with padding 1 and no bias: a norm follows or precedes it."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Return a pointwise convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def init_convolutions_(model: nn.Module) -> None:
    """Draw all convolutions anew: normal, with variance ``2 / (kernel * out_channels)``.

    Source: He et al., "Delving Deep into Rectifiers", ICCV 2015, section 2.2, backward propagation case.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def mlp(num_classes: int, in_channels: int, image_size: tuple[int, int], width: int) -> nn.Sequential:
    """Return ``pixels -> width -> width -> width -> num_classes`` with ReLU between, for images ``(N, C, H, W)``."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            input=nn.Linear(in_channels * image_size[0] * image_size[1], width),
            relu0=nn.ReLU(),
            hidden1=nn.Linear(width, width),
            relu1=nn.ReLU(),
            hidden2=nn.Linear(width, width),
            relu2=nn.ReLU(),
            output=nn.Linear(width, num_classes),
        )
    )
