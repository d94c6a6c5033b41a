"""Sparse Wide of one layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.transforms import sparse_wide
from tests.transforms.layers import each_layer, each_sparsity, multiply_adds, spread


@each_layer
@each_sparsity
def test_the_flops_are_those_of_the_dense_layer(layer, x, sparsity):
    wide = sparse_wide(layer, sparsity, block_size=16)
    assert isinstance(wide, (sk.SparseLinear, sk.SparseConv2d))
    wider = torch.zeros(*x.shape[:1], wide.grid.tap_in, *x.shape[2:])
    assert wide.topology.blocks() * 256 == layer.weight.numel()  # whole blocks: exact
    assert multiply_adds(wide, wider) == multiply_adds(layer, x)


@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
def test_one_side_may_stay(sides):
    layer = nn.Linear(64, 96)
    wide = sparse_wide(layer, 0.75, block_size=16, widen_in=sides[0], widen_out=sides[1])
    assert (wide.in_features, wide.out_features) == (64 * (1 + sides[0]), 96 * (1 + sides[1]))
    assert wide.topology.blocks() == 4 * 6


def test_no_sparsity_gives_a_copy():
    layer = nn.Linear(9, 5)
    same = sparse_wide(layer, 0)
    assert type(same) is nn.Linear and same is not layer and torch.equal(same.weight, layer.weight)


def test_outputs_vary_as_those_of_the_dense_layer():
    layer = nn.Linear(512, 512)
    nn.init.normal_(layer.weight, std=0.1)
    wide = sparse_wide(layer, 0.9, block_size=16, seed=1)
    assert spread(wide, 1616) == pytest.approx(spread(layer, 512), rel=0.05)
    paper = sparse_wide(layer, 0.9, block_size=16, seed=1, init="paper")
    assert spread(paper, 1616) == pytest.approx(2 * 1024 / 1616 * 256 / 1616, rel=0.05)  # 2 / fan_out of those stored


def test_the_bias_and_the_way_are_kept():
    layer = nn.Conv2d(32, 32, 3, stride=2, padding=1).double().eval()
    layer.weight.requires_grad_(False)
    wide = sparse_wide(layer, 0.75, block_size=16, widen_out=False)
    assert torch.equal(wide.bias, layer.bias) and wide.stride == (2, 2) and wide.values.dtype == torch.float64
    assert not wide.training and not wide.values.requires_grad


def test_the_seed_decides():
    first, again, other = (sparse_wide(nn.Linear(64, 64), 0.75, block_size=16, seed=s, name="a") for s in (0, 0, 1))
    assert torch.equal(first.row, again.row) and torch.equal(first.col, again.col)
    assert not torch.equal(first.values, other.values)


def test_what_is_refused():
    with pytest.raises(ValueError, match="init is 'mup'"):
        sparse_wide(nn.Linear(8, 8), 0.5, init="mup")
    with pytest.raises(TypeError, match="layer is a ReLU"):
        sparse_wide(nn.ReLU(), 0.5)
