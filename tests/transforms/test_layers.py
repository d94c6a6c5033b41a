"""The four transforms of one layer: FLOPs and outputs of the dense layer, variances, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.analysis import profile
from sparsekern.transforms import (
    SparseDoped,
    SparseFactorized,
    SparseParallel,
    sparse_doped,
    sparse_factorized,
    sparse_parallel,
    sparse_wide,
)
from sparsekern.transforms.layers import ReluSum, sum_of_branches

LINEAR = (nn.Linear(96, 160), torch.randn(7, 96, generator=torch.Generator().manual_seed(0)))
CONV = (
    nn.Conv2d(64, 96, 3, stride=2, padding=1, bias=False),
    torch.randn(3, 64, 8, 8, generator=torch.Generator().manual_seed(0)),
)

each_layer = pytest.mark.parametrize(("layer", "x"), [LINEAR, CONV], ids=["linear", "conv"])
each_sparsity = pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])


def multiply_adds(module: nn.Module, x: torch.Tensor) -> int:
    return profile(nn.Sequential(module), x).multiply_adds


def spread(module: nn.Module, inputs: int) -> float:
    """Return the mean variance of the outputs for independent normal inputs, over weights that are fixed."""
    x = torch.randn(4000, inputs, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return float(module(x).var(0).mean())


@each_layer
@each_sparsity
def test_the_flops_are_those_of_the_dense_layer_wide(layer, x, sparsity):
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


def test_the_output_varies_as_the_dense_layers_doped():
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


@each_layer
@each_sparsity
def test_the_flops_and_shapes_are_those_of_the_dense_layer_factorized(layer, x, sparsity):
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
def test_the_output_varies_as_the_dense_layers_factorized(activation):
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


def test_a_layer_of_zeros_factorized_stays_zero():
    layer = nn.Conv2d(8, 8, 3)
    nn.init.zeros_(layer.weight)
    factorized = sparse_factorized(layer, 0.5, block_size=8)
    assert not factorized(torch.randn(2, 8, 4, 4)).sub(layer.bias.view(-1, 1, 1)).any()


@each_layer
@each_sparsity
def test_the_flops_and_shapes_are_those_of_the_dense_layer_parallel(layer, x, sparsity):
    parallel = sparse_parallel(layer, sparsity, block_size=16)
    assert isinstance(parallel, SparseParallel) and parallel.count == {0.5: 2, 0.75: 4, 0.9: 10}[sparsity]
    assert parallel(x).shape == layer(x).shape
    assert multiply_adds(parallel, x) == multiply_adds(layer, x)


@each_layer
def test_parallel_is_a_loop_over_the_branches(layer, x):
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
    assert "count=2" in repr(sparse_parallel(nn.Linear(32, 32), 0.5, block_size=16))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.Identity()])
@pytest.mark.parametrize(("shape", "dim"), [((4, 15), -1), ((2, 15, 3, 5), -3), ((15,), -1), ((0, 15), -1)])
def test_the_sum_is_a_loop_over_the_branches(activation, shape, dim):
    h = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = sum_of_branches(activation, h, 3, dim)
    loop = sum(activation(part) for part in h.chunk(3, dim))
    torch.testing.assert_close(y, loop)
    dy = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(one, h, dy)[0] for one in (y, loop)))


def test_gradients_of_gradients():
    h = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: ReluSum.apply(h, 2, -1), h)
    assert torch.autograd.gradgradcheck(lambda h: ReluSum.apply(h, 2, -1), h)


def test_one_byte_a_number_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ReluSum.apply(torch.randn(8, 12, requires_grad=True), 4, -1)
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.bool, 96)]


def test_channels_stay_last():
    h = torch.randn(2, 6, 4, 4, requires_grad=True).contiguous(memory_format=torch.channels_last)
    y = ReluSum.apply(h, 2, -3)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dh,) = torch.autograd.grad(y, h, torch.ones_like(y))
    assert dh.is_contiguous(memory_format=torch.channels_last)


def test_it_compiles_whole():
    h = torch.randn(4, 6, requires_grad=True)
    compiled = torch.compile(lambda h: sum_of_branches(nn.ReLU(), h, 2, -1), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h), h.relu().chunk(2, -1)[0] + h.relu().chunk(2, -1)[1])


@pytest.mark.parametrize("transform", [sparse_wide, sparse_parallel, sparse_factorized, sparse_doped])
def test_no_sparsity_gives_a_copy_and_an_unknown_init_is_refused(transform):
    for layer in (nn.Linear(9, 5), nn.Conv2d(8, 8, 3)):
        same = transform(layer, 0)
        assert type(same) is type(layer) and same is not layer and torch.equal(same.weight, layer.weight)
    with pytest.raises(ValueError, match="init is 'mup'; it must be one of variance, paper"):
        transform(nn.Linear(8, 8), 0.5, init="mup")
