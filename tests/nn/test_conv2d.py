"""SparseConv2d is a drop-in nn.Conv2d."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.nn.conv import four_sides, sides
from sparsekern.topology import balanced, check_tied, conv_grid, generator_for, tie


def layer(**options) -> sk.SparseConv2d:
    settings = {"in_channels": 6, "out_channels": 12, "block_size": (4, 2), "sparsity": 0.5, "seed": 0}
    return sk.SparseConv2d(**{**settings, "dtype": torch.float64, **options})


def test_the_docstring_says_what_is_sparse():
    assert inspect.getdoc(sk.SparseConv2d).startswith("Convolution with a block-sparse weight")


def test_from_dense_with_tied_taps_keeps_the_strongest_channels():
    dense = nn.Conv2d(4, 4, 3)
    module = sk.SparseConv2d.from_dense(dense, sparsity=0.5, block_size=2, tie_taps=True)
    norms = dense.weight.detach().view(2, 2, 2, 2, 9).square().sum((1, 3, 4))
    kept = norms >= norms.flatten().topk(2).values[-1]
    mask = kept.view(2, 1, 2, 1).expand(2, 2, 2, 2).reshape(4, 4, 1, 1)
    assert torch.equal(module.dense_weight(), dense.weight * mask)
    with pytest.raises(ValueError, match="blocks is 10; .* a multiple of the 9 taps"):
        sk.SparseConv2d.from_dense(dense, blocks=10, block_size=2, tie_taps=True)


def test_from_dense_at_given_places():
    dense = nn.Conv2d(4, 4, 3)
    topology = balanced(conv_grid(4, 4, (3, 3), (2, 2)), 5, generator_for(0))
    module = sk.SparseConv2d.from_dense(dense, topology=topology, capacity=7)
    assert module.topology.blocks() == 5 and module.values.shape[0] == 7
    kept = module.dense_weight() != 0
    assert torch.equal(module.dense_weight()[kept], dense.weight[kept])


def test_default_block_size_is_no_wider_than_the_channels():
    def block(in_channels, out_channels, device="cpu", groups=1, block_size=None):
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": (3, 3), "groups": groups}
        return sk.SparseConv2d.grid_for(sizes, block_size, device).block

    assert block(64, 128) == (32, 32) and block(64, 128, "cuda") == (64, 64)
    assert block(3, 16) == (16, 16) and block(24, 64) == (32, 32) and block(16, 64) == (32, 16)
    assert block(32, 64, "cuda") == (64, 32) and block(128, 64, groups=4) == (16, 32)
    assert block(64, 64, None, block_size=(8, 4)) == (8, 4)


def test_sides():
    assert sides("stride", 2, 2) == (2, 2) and sides("stride", [1, 3], 2) == (1, 3) and sides("stride", 2, 1) == (2,)
    with pytest.raises(TypeError, match="stride is True"):
        sides("stride", True, 2)


def test_same_puts_the_odd_row_below_and_the_odd_column_right():
    assert four_sides("same", (2, 4), (1, 1), (1, 1)) == (0, 1, 1, 2)
    assert four_sides("same", (3, 2), (1, 1), (2, 3)) == (2, 2, 1, 2)
    assert four_sides((1, 2), (3, 3), (2, 2), (1, 1)) == (1, 1, 2, 2)


def test_tied_taps_are_drawn_and_moved_together():
    module = layer(kernel_size=3, tie_taps=True, capacity=54)
    check_tied(module.topology)
    assert module.topology.blocks() == 45  # 9 cells of channels at half, halves up: 5 of them in each tap
    before = module.row.clone(), module.col.clone()
    slots = module.topology.used().nonzero().flatten()[:1]
    with pytest.raises(ValueError, match="is stored in 8 of 9 taps; .*: move the blocks of all taps together"):
        module.move_(slots, torch.tensor([-1]), torch.tensor([-1]))
    assert torch.equal(module.row, before[0]) and torch.equal(module.col, before[1])


def test_tied_taps_refuse_what_is_not_tied():
    module = layer(kernel_size=3, tie_taps=True, blocks=45)
    loose = layer(kernel_size=3, blocks=45, seed=1).state_dict()
    with pytest.raises(RuntimeError, match="the checkpoint's topology does not fit: the block at row"):
        module.load_state_dict(loose)
    module.row.copy_(loose["row"])
    module.col.copy_(loose["col"])
    with pytest.raises(ValueError, match="taps; with tie_taps=True it must be all or none"):
        module.refresh_()
    topology = tie(balanced(conv_grid(6, 12, (1, 1), (4, 2)), 5, generator_for(3)), module.grid)
    module.load_state_dict(layer(kernel_size=3, topology=topology).state_dict())
    assert torch.equal(module.row, topology.row)


def test_compile_a_model_with_pointwise_and_padded_convolutions():
    torch._dynamo.reset()
    model = nn.Sequential(
        sk.SparseConv2d(8, 16, 3, padding="same", padding_mode="circular", block_size=4, sparsity=0.5),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        sk.SparseConv2d(16, 8, 1, block_size=4, sparsity=0.5),
    )
    x = torch.randn(2, 8, 6, 6)
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, model(x))
    y.sum().backward()
