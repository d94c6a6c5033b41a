import pytest
import torch
from torch import nn

from sparsekern.lab.models.layers import conv1x1, conv3x3, init_convolutions_, widened


@pytest.mark.parametrize(
    ("channels", "multiplier", "expected"), [(64, 1.0, 64), (64, 1.41, 90), (16, 0.25, 4), (16, 0.01, 1)]
)
def test_widened_to_the_nearest(channels, multiplier, expected):
    assert widened(channels, multiplier) == expected


def test_shapes():
    x = torch.ones(2, 3, 8, 6)
    assert conv3x3(3, 5)(x).shape == (2, 5, 8, 6)
    assert conv3x3(3, 5, stride=2)(x).shape == conv1x1(3, 5, stride=2)(x).shape == (2, 5, 4, 3)
    assert conv3x3(3, 5).bias is None and conv1x1(3, 5).bias is None


def test_the_variance_of_he_et_al():
    model = nn.Sequential(conv3x3(8, 256), nn.Linear(4, 4))
    before = model[1].weight.clone()
    torch.manual_seed(0)
    init_convolutions_(model)
    # 18432 values: the relative error of the variance is about sqrt(2 / 18432) = 1 %
    assert model[0].weight.var().item() == pytest.approx(2 / (9 * 256), rel=0.05)
    assert torch.equal(model[1].weight, before), "linear layers stay PyTorch's"
