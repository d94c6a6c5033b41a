import pytest
import torch
from torch import nn

from sparsekern.lab.models import mlp
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


def test_an_mlp_has_three_hidden_layers():
    model = mlp(3, 2, (4, 5), width=16)
    parameters = (40 * 16 + 16) + 2 * (16 * 16 + 16) + (16 * 3 + 3)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [name for name, _ in model.named_children()][::2] == ["flatten", "relu0", "relu1", "relu2"]
    assert model(torch.ones(7, 2, 4, 5)).shape == (7, 3)


def test_an_mlp_is_three_times_a_linear_layer_and_relu():
    model = mlp(3, 1, (4, 4), width=8).double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    y = x.reshape(2, 16)
    for name in ("input", "hidden1", "hidden2"):
        layer = model.get_submodule(name)
        y = (y @ layer.weight.T + layer.bias).clamp(min=0)
    output = model.get_submodule("output")
    torch.testing.assert_close(model(x), y @ output.weight.T + output.bias)
