"""Layers that several families share: a convolution without bias, its width, and initial values of He et al. 2015."""

from __future__ import annotations

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
