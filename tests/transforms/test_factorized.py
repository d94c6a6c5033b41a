"""Sparse Factorized of one layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsekern.transforms import SparseFactorized, sparse_factorized
from tests.transforms.layers import each_layer, each_sparsity, multiply_adds, spread


@each_layer
@each_sparsity
def test_the_flops_and_shapes_are_those_of_the_dense_layer(layer, x, sparsity):
    factorized = sparse_factorized(layer, sparsity, block_size=16)
    assert isinstance(factorized, SparseFactorized)
    assert factorized(x).shape == layer(x).shape
    assert multiply_adds(factorized, x) == multiply_adds(layer, x)
    inner, outer = (factorized.inner.sparsity, factorized.outer.sparsity)
    assert inner == pytest.approx(sparsity, abs=0.06) and outer == pytest.approx(sparsity, abs=0.06)


@each_layer
def test_two_dense_layers_of_the_same_weights(layer, x):
    factorized = sparse_factorized(layer, 0.75, block_size=16, activation=nn.GELU)
    h = factorized.inner.to_dense()(x)
    if isinstance(layer, nn.Conv2d):
        h = nn.functional.batch_norm(h, None, None, training=True)
    expected = factorized.outer.to_dense()(nn.functional.gelu(h))
    torch.testing.assert_close(factorized(x), expected, rtol=1e-4, atol=1e-5)
    if layer.bias is not None:
        assert torch.equal(factorized.outer.bias, layer.bias) and factorized.inner.bias is None


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Identity, nn.GELU])
def test_the_output_varies_as_the_dense_layers(activation):
    """In mean square: behind a ReLU the mean of an output over inputs is not zero."""
    layer = nn.Linear(512, 256, bias=False)
    nn.init.kaiming_normal_(layer.weight)
    factorized = sparse_factorized(layer, 0.75, block_size=16, activation=activation)
    x = torch.randn(2000, 512)
    with torch.no_grad():
        assert float(factorized(x).square().mean()) == pytest.approx(spread(layer, 512), rel=0.06)


def test_the_paper_draws_for_the_outputs_of_each_factor():
    factorized = sparse_factorized(nn.Linear(512, 256), 0.75, block_size=16, init="paper")
    between = factorized.inner.out_features
    assert float(factorized.inner.values.detach().var()) == pytest.approx(2 / between, rel=0.05)
    assert float(factorized.outer.values.detach().var()) == pytest.approx(2 / 256, rel=0.05)


def test_no_sparsity_gives_a_copy():
    layer = nn.Conv2d(8, 8, 3)
    assert torch.equal(sparse_factorized(layer, 0).weight, layer.weight)
    nn.init.zeros_(layer.weight)
    factorized = sparse_factorized(layer, 0.5, block_size=8)
    assert not factorized(torch.randn(2, 8, 4, 4)).sub(layer.bias.view(-1, 1, 1)).any()


def test_what_is_refused():
    with pytest.raises(ValueError, match="init is 'mup'"):
        sparse_factorized(nn.Linear(8, 8), 0.5, init="mup")
    with pytest.raises(ValueError, match="sparsity is 1"):
        sparse_factorized(nn.Linear(8, 8), 1.0)
