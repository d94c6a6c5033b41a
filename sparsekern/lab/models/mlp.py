"""The multi-layer perceptron of the bundled digits."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


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
