import importlib
import importlib.util

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from sparsekern.lab.models import resnet18, resnet18_cifar, resnet20, resnet50, resnet56
from sparsekern.lab.models.resnet import CifarBlock

# published: 11.69 M, 11.17 M and 25.56 M
COUNTS = [(resnet18, 1000, 11_689_512), (resnet18_cifar, 10, 11_173_962), (resnet50, 1000, 25_557_032)]


@pytest.mark.parametrize(("model", "classes", "count"), COUNTS)
def test_parameters(model, classes, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in model(classes).parameters()) == count


def test_the_stem_is_all_that_the_forms_of_resnet18_differ_in():
    with torch.device("meta"):
        large, small = resnet18(10), resnet18_cifar(10)
    assert sum(p.numel() for p in large.parameters()) - sum(p.numel() for p in small.parameters()) == 64 * 3 * (49 - 9)
    with torch.device("meta"):
        images = torch.empty(1, 3, 64, 64)
    assert large.layer1(large.maxpool(large.conv1(images))).shape == (1, 64, 16, 16)
    assert small.layer1(small.maxpool(small.conv1(images))).shape == (1, 64, 64, 64)


def test_other_channels_and_widths():
    model = resnet50(5, in_channels=1, width_multiplier=0.125)
    assert model(torch.ones(2, 1, 33, 40)).shape == (2, 5)
    assert (model.conv1.out_channels, model.fc.in_features) == (8, 256)


@pytest.fixture(scope="module")
def torchvision_models():
    """Return the oracle. Its compiled operators do not load beside a torch of another build; the networks need none."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed; it is the oracle here")
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError:  # on registering the fake of an operator that is not there
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError as error:
        pytest.skip(f"torchvision cannot be imported: {error}")


@pytest.mark.parametrize(("name", "ours"), [("resnet18", resnet18), ("resnet50", resnet50)])
def test_equal_weights_give_the_result_of_torchvision(torchvision_models, name, ours):
    torch.manual_seed(0)
    theirs = getattr(torchvision_models, name)(num_classes=7).double().eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model = ours(7).double().eval()
    model.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 40, 48, dtype=torch.float64)
    torch.testing.assert_close(model(x), theirs(x))


# of a stage with c channels and n blocks: convolutions and norms; the paper's table 6 says 0.27 M and 0.85 M
def small_parameters(n, classes):
    stem = 27 * 16 + 2 * 16
    stages = sum((18 * c * c + 4 * c) * n for c in (16, 32, 64))
    narrower = sum(9 * c * c // 2 for c in (32, 64))  # the first convolution of a stage has half the inputs
    return stem + stages - narrower + 64 * classes + classes


@pytest.mark.parametrize(("model", "n", "count"), [(resnet20, 3, 269_722), (resnet56, 9, 853_018)])
def test_parameters_of_the_small_ones(model, n, count):
    assert sum(p.numel() for p in model(10).parameters()) == small_parameters(n, 10) == count


def test_shapes_of_the_small_ones():
    model = resnet20(7, in_channels=1, width_multiplier=0.5)
    assert model(torch.ones(2, 1, 12, 8)).shape == (2, 7)
    assert (model.conv1.out_channels, model.fc.in_features) == (8, 32)
    images = torch.ones(1, 3, 32, 32)
    model = resnet20(10)
    assert model.layer1(model.conv1(images)).shape == (1, 16, 32, 32)
    assert model.layer3(model.layer2(model.conv1(images))).shape == (1, 64, 8, 8)


@pytest.mark.parametrize(("ins", "outs", "stride"), [(4, 4, 1), (4, 8, 2), (3, 8, 2)])
def test_a_small_block_is_its_formula(ins, outs, stride):
    block = CifarBlock(ins, outs, stride).double().eval()
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
