"""Initial values depend on the inputs that an output really has."""

from __future__ import annotations

import torch

import sparsekern as sk
from sparsekern.nn import init
from sparsekern.nn.init import draw_bias, draw_values, fan_in
from sparsekern.topology import Grid, Topology, balanced, conv_grid, from_mask, generator_for, with_capacity

# 7 x 5 in blocks of 2 x 3: 4 x 2 blocks, the last column 2 wide, the last row 1 high.
GRID = Grid(7, 5, (2, 3))
#                     inputs of an output:   3 + 2    2        0        3
MASK = torch.tensor([[1, 1], [0, 1], [0, 0], [1, 0]], dtype=torch.bool)
TOPOLOGY = with_capacity(from_mask(GRID, MASK), 6)


def test_fan_in_by_hand():
    assert fan_in(TOPOLOGY).tolist() == [5, 2, 0, 3]


def test_values_are_bounded_by_the_actual_fan_in():
    values = draw_values(TOPOLOGY, fan_in(TOPOLOGY), torch.float32, generator_for(0))
    bounds = [5**-0.5, 5**-0.5, 2**-0.5, 3**-0.5]
    for slot, bound in enumerate(bounds):
        assert 0 < values[slot].abs().max() <= bound
    assert (values[1, :, 2] == 0).all() and (values[2, :, 2] == 0).all()  # phantom column
    assert (values[3, 1] == 0).all()  # phantom row
    assert (values[4:] == 0).all()  # free slots


def test_values_are_the_same_however_many_slots_are_looked_at_together(monkeypatch):
    whole = draw_values(TOPOLOGY, fan_in(TOPOLOGY), torch.float32, generator_for(0))
    monkeypatch.setattr(init, "CHUNK", 2)
    assert torch.equal(draw_values(TOPOLOGY, fan_in(TOPOLOGY), torch.float32, generator_for(0)), whole)
    assert fan_in(TOPOLOGY).tolist() == [5, 2, 0, 3]


def test_bias_is_bounded_by_the_actual_fan_in():
    many = (
        torch.stack([draw_bias(TOPOLOGY.grid, fan_in(TOPOLOGY), torch.float32, generator_for(s)) for s in range(200)])
        .abs()
        .amax(0)
    )
    bounds = torch.tensor([5, 5, 2, 2, 1, 1, 3]).rsqrt()
    assert (many <= bounds).all() and (many > 0.9 * bounds).all()


def test_outputs_keep_their_variance_at_any_sparsity():
    """With Var(w) = 1 / (3 fan_in) an output has a third of the variance of its inputs, as in nn.Linear."""
    x = torch.randn(4096, 512, generator=torch.Generator().manual_seed(0))
    for blocks in (256, 64, 26):
        topology = balanced(Grid(512, 512, (32, 32)), blocks, generator_for(0))
        from sparsekern.topology import to_dense

        y = x @ to_dense(topology, draw_values(topology, fan_in(topology), torch.float32, generator_for(1))).T
        # 512 outputs of 4096 tokens: the relative deviation of the variance is a few per cent
        assert 0.9 / 3 < y.var() < 1.1 / 3


def test_the_whole_grid_is_distributed_as_nn_linear():
    full = Topology(Grid(6, 64, (6, 64)), *torch.zeros(2, 1, dtype=torch.int32))
    values = draw_values(full, fan_in(full), torch.float64, generator_for(0))
    assert values.dtype == torch.float64
    assert values.abs().max() <= 1 / 8 and values.abs().max() > 0.95 / 8


def test_half_precision_is_the_rounded_float():
    low = draw_values(TOPOLOGY, fan_in(TOPOLOGY), torch.bfloat16, generator_for(0))
    assert torch.equal(low, draw_values(TOPOLOGY, fan_in(TOPOLOGY), torch.float32, generator_for(0)).bfloat16())


# A convolution of two groups of 3 x 4 channels and 2 taps in blocks of 2 x 3: 2 rows a group, 2 columns a tap.
#                 inputs of an output:       3 + 1           3               0               1
PLACES = [(0, 0), (0, 3), (1, 2), (3, 1)]
CONV = Topology(conv_grid(8, 6, (2, 1), (2, 3), 2), *torch.tensor(PLACES, dtype=torch.int32).T)


def test_the_fan_in_of_a_convolution_by_hand():
    assert fan_in(CONV).tolist() == [4, 3, 0, 1]
    values = draw_values(CONV, fan_in(CONV), torch.float32, generator_for(0))
    assert 0 < values[0].abs().max() <= 4**-0.5 and 0 < values[2].abs().max() <= 3**-0.5
    assert (values[1, :, 1:] == 0).all() and (values[2, 1:] == 0).all()  # phantom: of a tap, of a group


def test_the_bias_of_a_convolution_is_bounded_group_by_group():
    many = (
        torch.stack([draw_bias(CONV.grid, fan_in(CONV), torch.float32, generator_for(s)) for s in range(200)])
        .abs()
        .amax(0)
    )
    bounds = torch.tensor([4, 4, 3, 1, 1, 1]).rsqrt()
    assert (many <= bounds).all() and (many > 0.9 * bounds).all()


def test_a_full_convolution_is_distributed_as_nn_conv2d():
    layer = sk.SparseConv2d(16, 32, 3, sparsity=0, block_size=16, seed=0)
    torch.manual_seed(1)
    dense = torch.nn.Conv2d(16, 32, 3)
    bound = 144**-0.5
    for ours, theirs in ((layer.values, dense.weight), (layer.bias, dense.bias)):
        assert 0.9 * bound < ours.abs().max() <= bound and 0.9 * bound < theirs.abs().max() <= bound
