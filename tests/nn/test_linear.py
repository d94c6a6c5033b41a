"""SparseLinear is a drop-in nn.Linear."""

from __future__ import annotations

import torch
from torch import nn

import sparsekern as sk
from sparsekern.nn.linear import default_block_size
from sparsekern.topology import by_norm


def test_from_dense_at_given_places():
    dense = nn.Linear(12, 8)
    topology = by_norm(sk.topology.Grid(8, 12, (4, 4)), -dense.weight.detach(), 2)
    layer = sk.SparseLinear.from_dense(dense, topology=topology, capacity=4)
    assert layer.topology.blocks() == 2 and layer.values.shape[0] == 4


def test_sparsity_is_rounded_to_whole_blocks_and_counts_real_elements():
    layer = sk.SparseLinear(10, 10, sparsity=0.75, block_size=8, seed=0)
    assert layer.topology.blocks() == 1
    rows, cols = (8 if int(t[0]) == 0 else 2 for t in (layer.row, layer.col))
    assert layer.sparsity == 1 - rows * cols / 100


def test_default_block_size():
    assert default_block_size(None) == default_block_size("cpu") == 32
    assert default_block_size("cuda") == default_block_size(torch.device("cuda", 1)) == 64
    assert sk.SparseLinear(64, 64, sparsity=0.5).block_size == (32, 32)


def test_compile_a_model_with_fresh_inputs_of_three_dimensions():
    torch._dynamo.reset()
    model = nn.Sequential(
        nn.Linear(16, 32), nn.GELU(), sk.SparseLinear(32, 32, block_size=8, sparsity=0.5), nn.LayerNorm(32)
    )
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    layer = sk.SparseLinear(45, 70, sparsity=0.7, block_size=(16, 8))
    x = torch.randn(5, 45, requires_grad=True)
    layer(x).square().sum().backward()
    expected, layer.values.grad = layer.values.grad, None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(layer.values.grad, expected)


def test_two_forwards_before_one_backward():
    layer = sk.SparseLinear(45, 70, sparsity=0.7, block_size=(16, 8))
    (layer(torch.randn(5, 45)) + layer(torch.randn(5, 45))).sum().backward()
    assert layer.values.grad is not None
