import importlib
import importlib.util

import pytest
import torch
from torch import nn

from sparsekern.lab.models import resnet18, resnet18_cifar, resnet50

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


@pytest.mark.parametrize("ours", [resnet18, resnet50])
def test_equal_weights_give_the_result_of_torchvision(torchvision_models, ours):
    torch.manual_seed(0)
    theirs = getattr(torchvision_models, ours.__name__)(num_classes=7).double().eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model = ours(7).double().eval()
    model.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 40, 48, dtype=torch.float64)
    torch.testing.assert_close(model(x), theirs(x))
