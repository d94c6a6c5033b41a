import pytest
import torch
from torch.nn.functional import batch_norm, conv2d

from sparsekern.lab.models import wrn_28_4
from sparsekern.lab.models.resnet import PreActivationBlock


def parameters(classes):
    total = 27 * 16
    channels = 16
    for width in (64, 128, 256):
        for ins in (channels, width, width, width):
            total += 9 * ins * width + 9 * width * width + 2 * ins + 2 * width
        total += channels * width  # the shortcut of the first block
        channels = width
    return total + 2 * 256 + 256 * classes + classes


@pytest.mark.parametrize(("classes", "count"), [(10, 5_849_050), (100, 5_872_180)])  # the paper's table 4: 5.8 M, 5.9 M
def test_parameters(classes, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in wrn_28_4(classes).parameters()) == parameters(classes) == count


def test_shapes():
    model = wrn_28_4(5, in_channels=1, width_multiplier=0.25)
    assert model(torch.ones(2, 1, 8, 12)).shape == (2, 5)
    assert (model.conv1.out_channels, model.fc.in_features) == (4, 64)
    assert len(model.layer1) == len(model.layer3) == 4


@pytest.mark.parametrize(("ins", "outs", "stride"), [(4, 4, 1), (4, 8, 2), (4, 8, 1)])
def test_a_block_is_its_formula(ins, outs, stride):
    block = PreActivationBlock(ins, outs, stride).double()
    x = torch.randn(3, ins, 6, 4, dtype=torch.float64)
    a = batch_norm(x, None, None, training=True).clamp(min=0)
    y = batch_norm(conv2d(a, block.conv1.weight, stride=stride, padding=1), None, None, training=True).clamp(min=0)
    y = conv2d(y, block.conv2.weight, padding=1)
    same = (ins, stride) == (outs, 1)
    assert (block.shortcut is None) == same
    shortcut = x if same else conv2d(a, block.shortcut.weight, stride=stride)
    before = x.clone()
    torch.testing.assert_close(block(x), shortcut + y)
    assert torch.equal(x, before), "the shortcut needs the input as it was"
