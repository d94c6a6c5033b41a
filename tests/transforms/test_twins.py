"""Layers of other sizes and their initial values: variances measured, by hand, and of the moments of activations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.nn.converters import grid_of
from sparsekern.transforms.twins import (
    check,
    dense_twin,
    draw_,
    draw_bias_,
    draw_dense_,
    features,
    moments,
    norm_of,
    output_variance,
    sparse_twins,
    variance_before,
    wanted_variance,
)


def test_a_pool_that_is_none():
    with pytest.raises(ValueError, match="pool is 0.5; it must be 1 or more"):
        check(nn.Linear(4, 4), 0.5, 0.5, "paper")


def test_twins_keep_the_kind_and_the_way():
    conv = nn.Conv2d(32, 48, (3, 5), (2, 1), padding=(1, 2), padding_mode="circular", dtype=torch.float64)
    assert features(conv) == (32, 48) and features(nn.Linear(2, 3)) == (2, 3)
    twin = dense_twin(conv, 64, 80, bias=False, device="meta")
    assert (twin.weight.shape, twin.stride, twin.bias) == ((80, 64, 3, 5), (2, 1), None)
    one = dense_twin(conv, 64, 80, pointwise=True, bias=True)
    assert (one.weight.shape, one.stride, one.padding, one.padding_mode) == ((80, 64, 1, 1), (1, 1), (0, 0), "zeros")
    conv.weight.requires_grad_(False)
    grid = grid_of(twin, 16, conv.weight.device)
    (sparse,) = sparse_twins(conv, {"": twin}, 7 * grid.numel / grid.cells, 16, 3, "a")
    assert (sparse.topology.blocks(), sparse.grid, sparse.values.dtype) == (7, grid, torch.float64)
    assert sparse.padding_mode == "circular" and not sparse.values.requires_grad and sparse.values.device.type == "cpu"


def test_default_blocks_are_those_of_the_layers():
    twin = dense_twin(nn.Linear(64, 64), 96, 96, bias=True, device="meta")
    assert grid_of(twin, None, "cpu").block == (32, 32)
    conv = nn.Conv2d(16, 64, 3)
    assert grid_of(conv, None).block == (32, 16)


def test_convolutions_have_a_norm():
    assert type(norm_of(nn.Linear(4, 4), 7)) is nn.Identity
    norm = norm_of(nn.Conv2d(4, 4, 1, dtype=torch.float64), 7)
    assert type(norm) is nn.BatchNorm2d and (norm.num_features, norm.weight.dtype) == (7, torch.float64)


def test_the_variance_of_an_output():
    layer = nn.Linear(8, 4)
    nn.init.constant_(layer.weight, 0.5)
    assert output_variance(layer) == 8 * 0.25
    conv = nn.Conv2d(2, 3, (3, 1))
    nn.init.constant_(conv.weight, 2.0)
    assert output_variance(conv) == 6 * 4


def test_moments_of_a_relu():
    """E relu(z)^2 = v / 2 and var = v (1 - 1 / pi) / 2."""
    for variance in (0.3, 1.0, 4.0):
        square, spread = moments(nn.ReLU(), variance)
        assert square == pytest.approx(variance / 2, rel=1e-5)
        assert spread == pytest.approx(variance * (1 - 1 / math.pi) / 2, rel=1e-5)
    assert moments(nn.Identity(), 2.0) == pytest.approx((2.0, 2.0), rel=1e-6)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.Identity(), nn.Tanh()])
def test_the_variance_before_an_activation(activation):
    assert moments(activation, variance_before(activation, 0.2))[1] == pytest.approx(0.2, rel=1e-9)


def test_each_output_has_the_variance_whatever_it_stores():
    """A block row of many blocks and one of few: weights differ, outputs do not."""
    layer = sk.SparseLinear(800, 600, block_size=8, sparsity=0.8, init="random", seed=1)
    draw_(layer, 3.0)
    weight = layer.dense_weight().double()
    by_row = weight.square().sum(1)
    assert by_row.mean() == pytest.approx(3.0, rel=0.02)
    stored = (weight != 0).sum(1)
    few, many = by_row[stored < stored.median()], by_row[stored > stored.median()]
    assert few.mean() == pytest.approx(3.0, rel=0.05) and many.mean() == pytest.approx(3.0, rel=0.05)
    before = layer.values.clone()
    draw_(layer, 3.0)
    assert torch.equal(layer.values, before)  # from the seed and the name
    draw_(layer, 0.0)
    assert not layer.values.any()


def test_phantoms_stay_zero():
    layer = sk.SparseLinear(13, 11, block_size=8, sparsity=0)
    for draw in (lambda one: draw_(one, 1.0), lambda one: draw_(one, None)):
        draw(layer)
        stored = layer.values.count_nonzero()
        assert stored == 13 * 11 and torch.equal(layer.to_dense().weight != 0, torch.ones(11, 13, dtype=torch.bool))


def test_the_paper_draws_for_the_full_shape():
    conv = sk.SparseConv2d(128, 256, 3, sparsity=0.75, block_size=16)
    draw_(conv, None)
    assert float(conv.values.detach().var()) == pytest.approx(2 / (256 * 9), rel=0.02)
    inner = nn.Conv2d(64, 48, 3)
    draw_dense_(inner, None, 0, "inner")
    assert float(inner.weight.detach().var()) == pytest.approx(2 / (48 * 9), rel=0.03)
    draw_dense_(inner, 5.0, 0, "inner")
    assert output_variance(inner) == pytest.approx(5.0, rel=0.03)


def test_biases():
    dense = nn.Linear(64, 32)
    same, more = sk.SparseLinear(64, 32, sparsity=0.5, block_size=8), sk.SparseLinear(64, 4096, block_size=8)
    draw_bias_(same, dense)
    assert torch.equal(same.bias, dense.bias)
    draw_bias_(more, dense)
    drawn, wanted = (float(bias.detach().square().mean()) for bias in (more.bias, dense.bias))
    assert drawn == pytest.approx(wanted, rel=0.05)
    without = sk.SparseLinear(64, 32, bias=False, block_size=8)
    draw_bias_(without, dense)
    assert without.bias is None


def test_an_activation_with_parameters_stays_as_it_is():
    """E prelu(z)^2 = v (1 + a^2) / 2."""
    activation = nn.PReLU(init=0.5)
    assert moments(activation, 2.0)[0] == pytest.approx(1.25, rel=1e-5)
    assert activation.weight.dtype == torch.float32


def test_a_default_device_does_not_change_the_draw():
    layer, dense = sk.SparseLinear(16, 32, block_size=8, seed=0), nn.Linear(16, 16)
    drawn = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            draw_(layer, None)
            draw_bias_(layer, dense)
        drawn.append((layer.values.clone(), layer.bias.clone()))
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])


def test_what_a_replacement_is_to_vary_by():
    layer = nn.Linear(8, 4)
    assert wanted_variance(layer, "variance") == output_variance(layer) and wanted_variance(layer, "paper") is None
