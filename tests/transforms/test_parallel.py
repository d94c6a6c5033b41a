"""Sparse Parallel of one layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsekern.transforms import SparseParallel, sparse_parallel
from tests.transforms.layers import each_layer, each_sparsity, multiply_adds, spread


@each_layer
@each_sparsity
def test_the_flops_and_shapes_are_those_of_the_dense_layer(layer, x, sparsity):
    parallel = sparse_parallel(layer, sparsity, block_size=16)
    assert isinstance(parallel, SparseParallel) and parallel.count == {0.5: 2, 0.75: 4, 0.9: 10}[sparsity]
    assert parallel(x).shape == layer(x).shape
    assert multiply_adds(parallel, x) == multiply_adds(layer, x)


@each_layer
def test_a_loop_over_the_branches(layer, x):
    """Each branch a dense layer with the blocks of its own; batch norm by each channel's own statistics."""
    parallel = sparse_parallel(layer, 0.75, block_size=16)
    dense = parallel.branches.to_dense()
    total = torch.zeros_like(layer(x))
    for j, weight in enumerate(dense.weight.chunk(4)):
        branch = sparse_parallel(layer, 0)  # a dense layer of the sizes
        branch.load_state_dict(
            {"weight": weight} | ({} if dense.bias is None else {"bias": dense.bias.chunk(4)[j]}), strict=True
        )
        h = branch(x)
        if isinstance(layer, nn.Conv2d):
            h = nn.functional.batch_norm(h, None, None, parallel.norm.weight.chunk(4)[j], None, training=True)
        total = total + h.relu()
    torch.testing.assert_close(parallel(x), total, rtol=1e-4, atol=1e-5)


def test_without_a_nonlinearity_it_is_one_matrix():
    layer = nn.Linear(32, 48, bias=False)
    parallel = sparse_parallel(layer, 0.5, block_size=16, activation=nn.Identity)
    x = torch.randn(5, 32)
    merged = sum(parallel.branches.to_dense().weight.chunk(2))
    torch.testing.assert_close(parallel(x), x @ merged.T)
    assert not torch.allclose(sparse_parallel(layer, 0.5, block_size=16)(x), x @ merged.T)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
def test_the_sum_varies_as_the_dense_layer(activation):
    layer = nn.Linear(512, 256, bias=False)
    nn.init.kaiming_normal_(layer.weight)
    parallel = sparse_parallel(layer, 0.75, block_size=16, activation=activation)
    assert spread(parallel, 512) == pytest.approx(spread(layer, 512), rel=0.05)


def test_the_norm_of_a_convolution_gives_the_variance():
    layer = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight)
    x = torch.randn(8, 64, 16, 16)
    parallel = sparse_parallel(layer, 0.75, block_size=16)
    assert float(parallel(x).var((0, 2, 3)).mean()) == pytest.approx(2, rel=0.05)
    assert (sparse_parallel(layer, 0.75, block_size=16, init="paper").norm.weight == 1).all()


def test_no_sparsity_gives_a_copy_and_one_branch_is_none():
    layer = nn.Linear(9, 5)
    assert torch.equal(sparse_parallel(layer, 0).weight, layer.weight)
    with pytest.raises(ValueError, match="sparsity 0.2 makes one branch; Sparse Parallel needs two: 1/3 or more"):
        sparse_parallel(layer, 0.2)


def test_what_is_refused_and_shown():
    with pytest.raises(ValueError, match="init is 'mup'"):
        sparse_parallel(nn.Linear(8, 8), 0.5, init="mup")
    with pytest.raises(ValueError, match="groups = 4"):
        sparse_parallel(nn.Conv2d(8, 8, 3, groups=4), 0.5)
    assert "count=2" in repr(sparse_parallel(nn.Linear(32, 32), 0.5, block_size=16))
