"""VGG-16 for 32x32 images: Simonyan and Zisserman, ICLR 2015, configuration D, with batch norm."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from sparsekern.lab.models.layers import Multiplier, conv3x3, init_convolutions_, widened
from sparsekern.nn import norm_relu

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions; each stage ends with max pooling, which halves the image."""


class Features(nn.Sequential):
    """A sequence in which each batch norm and the ReLU behind it are one operation."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the last module."""
        modules = list(self)
        for module, then in zip(modules, [*modules[1:], None], strict=True):
            if isinstance(then, nn.ReLU):
                x = norm_relu(module, x)
            elif not isinstance(module, nn.ReLU):
                x = module(x)
        return x


class VGG(nn.Module):
    """Thirteen 3x3 convolutions, each with batch norm and ReLU, five poolings, and linear layers.

    Args:
        num_classes: outputs.
        in_channels: of the images ``(N, in_channels, H, W)``, H and W 32 or more.
        base: channels of the first stage; the others have 2, 4 and 8 times as many.
        hidden: features of the linear layers between the convolutions and the last one.
        width_multiplier: times the channels and the hidden features.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        width_multiplier: Multiplier = 1.0,
        *,
        base: int = 64,
        hidden: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        features: list[nn.Module] = []
        channels = in_channels
        for stage in STAGES:
            for unit in stage:
                width = widened(unit * base // STAGES[0][0], width_multiplier)
                features += [conv3x3(channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            features.append(nn.MaxPool2d(2))
        self.features = Features(*features)
        widths = [channels, *(widened(features, width_multiplier) for features in hidden)]
        classifier: list[nn.Module] = []
        for ins, outs in pairwise(widths):
            classifier += [nn.Linear(ins, outs), nn.ReLU(inplace=True)]
        self.classifier = nn.Sequential(*classifier)
        self.fc = nn.Linear(widths[-1], num_classes)
        init_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)``."""
        logits: Tensor = self.fc(self.classifier(self.features(x).mean((2, 3))))
        return logits


vgg16 = VGG
"""VGG-16 with one linear layer, as is usual for CIFAR: 14.72 M parameters for 10 classes."""

vgg16_small = partial(VGG, base=16, hidden=(512, 512))
"""The VGG-16 of the GSE paper (Heddes et al., arXiv 2401.06898): a quarter of the channels, then 128 -> 512 -> 512 ->
classes. Batch norm is ours where the paper does not say."""
