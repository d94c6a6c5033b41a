"""Sparse Doped of one layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsekern.transforms import SparseDoped, sparse_doped
from tests.transforms.layers import each_layer, each_sparsity, multiply_adds, spread


@each_layer
@each_sparsity
def test_the_sum_takes_the_flops_of_the_dense_layer(layer, x, sparsity):
    """To half a block: the rank is not a multiple of it. The low-rank path is dense."""
    doped = sparse_doped(layer, sparsity, block_size=16)
    assert isinstance(doped, SparseDoped) and type(doped.inner) is type(layer) is type(doped.outer)
    assert doped(x).shape == layer(x).shape
    tokens = layer(x).numel() // layer.weight.shape[0]
    assert abs(multiply_adds(doped, x) - multiply_adds(layer, x)) <= tokens * 128
    assert doped.sparse.sparsity == pytest.approx(sparsity, abs=0.1)


@each_layer
def test_the_same_as_dense_layers(layer, x):
    doped = sparse_doped(layer, 0.75, block_size=16)
    expected = doped.sparse.to_dense()(x) + doped.outer(doped.inner(x))
    torch.testing.assert_close(doped(x), expected, rtol=1e-4, atol=1e-5)
    if layer.bias is not None:
        assert torch.equal(doped.sparse.bias, layer.bias)


def test_the_output_varies_as_the_dense_layers():
    layer = nn.Linear(512, 256, bias=False)
    nn.init.kaiming_normal_(layer.weight)
    for sparsity in (0.5, 0.9):
        assert spread(sparse_doped(layer, sparsity, block_size=16), 512) == pytest.approx(spread(layer, 512), rel=0.06)
    paper = sparse_doped(layer, 0.75, block_size=16, init="paper")
    assert float(paper.sparse.values.detach().var()) == pytest.approx(2 / 256, rel=0.05)
    assert float(paper.outer.weight.detach().var()) == pytest.approx(2 / 256, rel=0.05)
    assert float(paper.inner.weight.detach().var()) == pytest.approx(2 / paper.inner.out_features, rel=0.05)


def test_frozen_layers_stay_frozen_and_the_generator_as_it_was():
    layer = nn.Linear(64, 64)
    layer.weight.requires_grad_(False)
    doped = sparse_doped(layer, 0.75, block_size=16)
    assert [name for name, p in doped.named_parameters() if p.requires_grad] == ["sparse.bias"]
    again = sparse_doped(layer, 0.75, block_size=16)
    assert all(torch.equal(a, b) for a, b in zip(doped.parameters(), again.parameters(), strict=True))


def test_no_sparsity_gives_a_copy():
    layer = nn.Conv2d(8, 8, 3)
    assert torch.equal(sparse_doped(layer, 0).weight, layer.weight)


def test_what_is_refused():
    with pytest.raises(ValueError, match="init is 'mup'"):
        sparse_doped(nn.Linear(8, 8), 0.5, init="mup")
    with pytest.raises(ValueError, match="one block in each takes 4096: use smaller blocks or another sparsity"):
        sparse_doped(nn.Linear(64, 64), 0.9, block_size=64)
