import pytest
import torch
from torch import nn

from sparsekern.lab.models import vgg16, vgg16_small

D = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def convolutions(widths):
    return sum(9 * ins * outs + 2 * outs for ins, outs in zip((3, *widths), widths, strict=False))


def test_parameters():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in model(10).parameters()) for model in (vgg16, vgg16_small)]
    small = convolutions([c // 4 for c in D]) + (128 * 512 + 512) + (512 * 512 + 512) + (512 * 10 + 10)
    assert counts == [convolutions(D) + 512 * 10 + 10, small] == [14_724_042, 1_255_674]  # published: 14.7 M


@pytest.mark.parametrize("model", [vgg16, vgg16_small])
def test_the_convolutions_are_configuration_d(model):
    with torch.device("meta"):
        made = model(10)
    scale = 1 if model is vgg16 else 4
    convs = [m for m in made.modules() if isinstance(m, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [c // scale for c in D]
    assert made.features(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 512 // scale, 1, 1)
    linears = [m.out_features for m in made.modules() if isinstance(m, nn.Linear)]
    assert linears == ([10] if scale == 1 else [512, 512, 10])


def test_other_channels_widths_and_images():
    model = vgg16_small(5, in_channels=1, width_multiplier=0.5)
    assert model(torch.ones(2, 1, 64, 33)).shape == (2, 5)
    assert (model.features[0].out_channels, model.fc.in_features) == (8, 256)


def test_a_norm_and_a_relu_follow_every_convolution():
    kinds = [type(module) for module in vgg16_small(10).features]
    for at, kind in enumerate(kinds):
        if kind is nn.Conv2d:
            assert kinds[at + 1 : at + 3] == [nn.BatchNorm2d, nn.ReLU]
    assert kinds.count(nn.MaxPool2d) == 5
