"""FLOPs under both conventions: by hand, against PyTorch's counter, and the published budgets."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sparsekern as sk
from sparsekern.analysis import profile
from sparsekern.lab.models import resnet18, resnet18_cifar, simplevit_tiny
from sparsekern.topology import Grid, Topology, conv_grid


def test_the_budget_of_the_paper_for_cifar():
    """Hard-coded in the authors' scripts for ResNet-18 on CIFAR-100."""
    found = profile(resnet18_cifar(100), torch.empty(1, 3, 32, 32))
    assert found.paper_flops == 1_115_226_800
    assert found.multiply_adds == 555_417_600 + 51_200  # convolutions, linear layer


def test_the_budget_of_the_paper_for_imagenet():
    """Their network ends with a pooling module, which ours does by hand: 512 means of 7 x 7 pixels."""
    model = nn.Sequential(resnet18(1000), nn.Unflatten(1, (1, 1000)))
    found = profile(model, torch.empty(1, 3, 224, 224))
    pool = profile(nn.AdaptiveAvgPool2d(1), torch.empty(1, 512, 7, 7))
    assert found.paper_flops + pool.paper_flops == 3_647_128_359


@pytest.mark.parametrize("affine", [True, False])
def test_the_paper_by_hand(affine):
    """A convolution with bias, a norm, two poolings, a linear layer, for one image of 2 x 4 x 4."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3, affine=affine),
        nn.MaxPool2d(2),
        nn.AvgPool2d((1, 2)),
        nn.Flatten(),
        nn.LayerNorm(6, elementwise_affine=affine),
        nn.Linear(6, 5),
    )
    found = profile(model, torch.empty(1, 2, 4, 4))
    conv = 16 * (2 * 54 - 1) + 16 * 3
    per_element = 7 if affine else 5
    batch_norm, layer_norm = per_element * 48 - 3, per_element * 6 - 1
    pools = 12 * 3 + 6 * 2
    linear = 5 * 11 + 5
    assert found.paper_flops == conv + batch_norm + pools + layer_norm + linear
    assert found.multiply_adds == 16 * 54 + 30 and found.flops == 2 * found.multiply_adds
    assert {name: (row.tokens, row.elements) for name, row in found.layers.items()} == {"0": (16, 54), "6": (1, 30)}


def test_stored_blocks_count_and_no_phantoms():
    """5 x 7 in blocks of 2 x 4: 8 + 3 elements, and a free slot."""
    places = torch.tensor([[0, 2], [0, 1]], dtype=torch.int32)
    layer = sk.SparseLinear(7, 5, topology=Topology(Grid(5, 7, (2, 4)), *places), capacity=3)
    found = profile(nn.Sequential(layer), torch.empty(3, 7))
    assert found.multiply_adds == 33 == found.layers["0"].multiply_adds
    assert found.paper_flops == 3 * (2 * 11 - 5) + 3 * 5
    conv = sk.SparseConv2d(
        10, 6, (1, 2), groups=2, topology=Topology(conv_grid(10, 6, (1, 2), (2, 4), 2), *places.flip(1)), bias=False
    )
    stored = conv.topology.elements()
    found = profile(nn.Sequential(conv), torch.empty(2, 10, 3, 4))
    assert found.multiply_adds == 2 * 9 * stored and found.paper_flops == 2 * 9 * (2 * stored - 1)


def test_attention_is_counted_and_the_model_is_left_alone():
    model = simplevit_tiny(10)
    sk.sparsify_(model, 0.75, 32, ignore=["embed", "head"])
    before = {name: (t.clone(), t.data_ptr()) for name, t in model.state_dict().items()}
    x = torch.randn(2, 3, 32, 32)
    found = profile(model, x)
    assert model.training and all(not m._forward_hooks for m in model.modules())
    assert all(torch.equal(t, before[name][0]) for name, t in model.state_dict().items())
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    attention = 2 * 4 * 2 * 6 * 64 * 64 * 64  # images, layers, products, heads, tokens, tokens, features of a head
    assert found.flops == counter.get_total_flops()
    assert found.multiply_adds == sum(row.multiply_adds for row in found.layers.values()) + attention


def test_a_layer_that_runs_twice_counts_twice():
    layer = nn.Linear(4, 4)
    found = profile(nn.Sequential(layer, nn.ReLU(), layer), torch.empty(5, 4))
    assert found.multiply_adds == 2 * 5 * 16 and found.layers["0"].tokens == 10
