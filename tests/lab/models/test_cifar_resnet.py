import pytest
import torch
from torch.nn.functional import conv2d

from sparsekern.lab.models import resnet20, resnet56
from sparsekern.lab.models.cifar_resnet import BasicBlock


# of a stage with c channels and n blocks: convolutions and norms; the paper's table 6 says 0.27 M and 0.85 M
def parameters(n, classes):
    stem = 27 * 16 + 2 * 16
    stages = sum((18 * c * c + 4 * c) * n for c in (16, 32, 64))
    narrower = sum(9 * c * c // 2 for c in (32, 64))  # the first convolution of a stage has half the inputs
    return stem + stages - narrower + 64 * classes + classes


@pytest.mark.parametrize(("model", "n", "count"), [(resnet20, 3, 269_722), (resnet56, 9, 853_018)])
def test_parameters(model, n, count):
    assert sum(p.numel() for p in model(10).parameters()) == parameters(n, 10) == count


def test_shapes():
    model = resnet20(7, in_channels=1, width_multiplier=0.5)
    assert model(torch.ones(2, 1, 12, 8)).shape == (2, 7)
    assert (model.conv1.out_channels, model.fc.in_features) == (8, 32)
    images = torch.ones(1, 3, 32, 32)
    model = resnet20(10)
    assert model.layer1(model.conv1(images)).shape == (1, 16, 32, 32)
    assert model.layer3(model.layer2(model.conv1(images))).shape == (1, 64, 8, 8)


@pytest.mark.parametrize(("ins", "outs", "stride"), [(4, 4, 1), (4, 8, 2), (3, 8, 2)])
def test_a_block_is_its_formula(ins, outs, stride):
    block = BasicBlock(ins, outs, stride).double().eval()
    x = torch.randn(2, ins, 6, 4, dtype=torch.float64)
    for norm in (block.bn1, block.bn2):
        norm.weight.data.uniform_(0.5, 2)
        norm.bias.data.normal_()

    def norm(y, bn):  # in eval mode: mean 0 and variance 1 until it has seen a batch
        return y / (1 + bn.eps) ** 0.5 * bn.weight[:, None, None] + bn.bias[:, None, None]

    y = norm(conv2d(x, block.conv1.weight, stride=stride, padding=1), block.bn1).clamp(min=0)
    y = norm(conv2d(y, block.conv2.weight, padding=1), block.bn2)
    before = (outs - ins) // 2
    for channel in range(ins):  # option A: the shortcut has no parameters
        y[:, before + channel] += x[:, channel, ::stride, ::stride]
    torch.testing.assert_close(block(x), y.clamp(min=0))
