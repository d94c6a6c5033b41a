"""Residual networks: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1 and section 4.2.

Modules have torchvision's names, so that its checkpoints load. As there, the bottleneck has its stride in the 3x3
convolution (the paper: in the first 1x1 one), and shortcuts that change shape are pointwise convolutions (option B). In
the small networks for CIFAR they have no parameters (option A).

Wide networks, and their blocks: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, arXiv 1605.07146.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn.functional import pad

from sparsekern.lab.models.layers import Multiplier, conv1x1, conv3x3, init_convolutions_, widened
from sparsekern.nn import norm_relu

STAGES = (64, 128, 256, 512)
"""Channels of the stages of the networks for ImageNet; each but the first halves the image."""

SMALL_STAGES = (16, 32, 64)
"""The same for 32x32 images, also of a wide network at widening factor 1, whose stem has those of the first."""


class Projection(nn.Sequential):
    """A pointwise convolution and a norm (option B of the paper)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(conv1x1(in_channels, channels, stride), nn.BatchNorm2d(channels))


class Padding(nn.Module):
    """Every second pixel, and new channels of zeros, half of them before the old ones, half behind (option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N, channels, H / stride, W / stride)`` for ``(N, in_channels, H, W)``."""
        before = self.added // 2
        return pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added - before))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1
    shortcut: type[Projection] | type[Padding] = Projection

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(in_channels, channels, stride), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv3x3(channels, channels), nn.BatchNorm2d(channels)
        same = stride == 1 and in_channels == channels
        self.downsample = None if same else self.shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N, channels, H / stride, W / stride)`` for ``(N, in_channels, H, W)``."""
        y = self.conv2(norm_relu(self.bn1, self.conv1(x)))
        return norm_relu(self.bn2, y, residual=x if self.downsample is None else self.downsample(x))


class CifarBlock(BasicBlock):
    """A basic block whose shortcut has no parameters."""

    shortcut = Padding


class Bottleneck(nn.Module):
    """A pointwise, a 3x3 and a pointwise convolution to four times the channels, and a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1, self.bn1 = conv1x1(in_channels, channels), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv3x3(channels, channels, stride), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = conv1x1(channels, out_channels), nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.downsample = None if same else Projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N, 4 * channels, H / stride, W / stride)`` for ``(N, in_channels, H, W)``."""
        y = norm_relu(self.bn1, self.conv1(x))
        y = self.conv3(norm_relu(self.bn2, self.conv2(y)))
        return norm_relu(self.bn3, y, residual=x if self.downsample is None else self.downsample(x))


class ResNet(nn.Module):
    """A stem, stages of blocks, average pooling, a linear layer.

    Args:
        num_classes: outputs.
        in_channels: of the images ``(N, in_channels, H, W)``.
        block: kind of the blocks.
        blocks: how many each stage has.
        stages: channels of each stage; the stem has those of the first.
        small_images: a stem of one 3x3 convolution of stride 1 and no pooling, for 32x32 images, in place of a 7x7
            convolution of stride 2 and max pooling.
        width_multiplier: times the channels of the stem and of all stages.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        width_multiplier: Multiplier = 1.0,
        *,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, ...],
        stages: tuple[int, ...] = STAGES,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        channels, *_ = widths = [widened(stage, width_multiplier) for stage in stages]
        self.conv1 = (
            conv3x3(in_channels, channels)
            if small_images
            else nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(channels)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        self.layers = [f"layer{i + 1}" for i in range(len(stages))]
        for i, width in enumerate(widths):
            made: list[nn.Module] = [block(channels, width, stride=1 if i == 0 else 2)]
            channels = block.expansion * width
            made += [block(channels, width, stride=1) for _ in range(blocks[i] - 1)]
            self.add_module(self.layers[i], nn.Sequential(*made))
        self.fc = nn.Linear(channels, num_classes)
        init_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)``."""
        x = self.maxpool(norm_relu(self.bn1, self.conv1(x)))
        for name in self.layers:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


resnet18 = partial(ResNet, block=BasicBlock, blocks=(2, 2, 2, 2))
"""ResNet-18 for images as large as those of ImageNet: 11.69 M parameters for 1000 classes."""

resnet50 = partial(ResNet, block=Bottleneck, blocks=(3, 4, 6, 3))
"""ResNet-50 for images as large as those of ImageNet: 25.56 M parameters for 1000 classes."""

resnet18_cifar = partial(resnet18, small_images=True)
"""ResNet-18 for 32x32 images: 11.17 M parameters for 10 classes."""

resnet34_cifar = partial(ResNet, block=BasicBlock, blocks=(3, 4, 6, 3), small_images=True)
"""ResNet-34 for 32x32 images: 21.28 M parameters for 10 classes."""

_small = partial(ResNet, block=CifarBlock, stages=SMALL_STAGES, small_images=True)

resnet20, resnet56 = partial(_small, blocks=(3, 3, 3)), partial(_small, blocks=(9, 9, 9))
"""The networks of ``6 n + 2`` layers of section 4.2 for 32x32 images: 0.27 M and 0.85 M parameters."""


resnet32_double = partial(ResNet, block=BasicBlock, blocks=(5, 5, 5), stages=(32, 64, 128), small_images=True)
"""The ResNet-32 of the VR-PGE paper's code: twice the channels, and shortcuts with parameters."""


class PreActivationBlock(nn.Module):
    """Norm and ReLU before each of two 3x3 convolutions, and a shortcut.

    Where the shape changes, the shortcut is a pointwise convolution of the normalised input, as in the authors' code.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_channels), conv3x3(in_channels, channels, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), conv3x3(channels, channels)
        same = stride == 1 and in_channels == channels
        self.shortcut = None if same else conv1x1(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N, channels, H / stride, W / stride)`` for ``(N, in_channels, H, W)``."""
        y = norm_relu(self.bn1, x)
        shortcut = x if self.shortcut is None else self.shortcut(y)
        out: Tensor = shortcut + self.conv2(norm_relu(self.bn2, self.conv1(y)))
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
        self, num_classes: int, in_channels: int = 3, width_multiplier: Multiplier = 1.0, *, blocks: int, widen: int
    ) -> None:
        super().__init__()
        channels = widened(SMALL_STAGES[0], width_multiplier)
        self.conv1 = conv3x3(in_channels, channels)
        stages = []
        for i, stage in enumerate(SMALL_STAGES):
            width = widened(widen * stage, width_multiplier)
            first = PreActivationBlock(channels, width, stride=1 if i == 0 else 2)
            stages.append(nn.Sequential(first, *(PreActivationBlock(width, width, 1) for _ in range(blocks - 1))))
            channels = width
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        init_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)``."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        logits: Tensor = self.fc(norm_relu(self.bn, x).mean((2, 3)))
        return logits


wrn_22_2 = partial(WideResNet, blocks=3, widen=2)
"""WRN-22-2: 1.08 M parameters for 10 classes."""

wrn_28_4 = partial(WideResNet, blocks=4, widen=4)
"""WRN-28-4: 5.85 M parameters for 10 classes, 5.87 M for 100."""
