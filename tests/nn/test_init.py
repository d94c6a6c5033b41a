"""Initial values depend on the inputs that an output really has."""

from __future__ import annotations

import torch

from sparsekern.nn.init import draw_bias, draw_values, fan_in
from sparsekern.topology import Grid, Topology, balanced, from_mask, generator_for, with_capacity

# 7 x 5 in blocks of 2 x 3: 4 x 2 blocks, the last column 2 wide, the last row 1 high.
GRID = Grid(7, 5, (2, 3))
#                     inputs of an output:   3 + 2    2        0        3
MASK = torch.tensor([[1, 1], [0, 1], [0, 0], [1, 0]], dtype=torch.bool)
TOPOLOGY = with_capacity(from_mask(GRID, MASK), 6)


def test_fan_in_by_hand():
    assert fan_in(TOPOLOGY).tolist() == [5, 2, 0, 3]


def test_values_are_bounded_by_the_actual_fan_in():
    values = draw_values(TOPOLOGY, torch.float32, generator_for(0))
    bounds = [5**-0.5, 5**-0.5, 2**-0.5, 3**-0.5]
    for slot, bound in enumerate(bounds):
        assert 0 < values[slot].abs().max() <= bound
    assert (values[1, :, 2] == 0).all() and (values[2, :, 2] == 0).all()  # phantom column
    assert (values[3, 1] == 0).all()  # phantom row
    assert (values[4:] == 0).all()  # free slots


def test_bias_is_bounded_by_the_actual_fan_in():
    many = torch.stack([draw_bias(TOPOLOGY, torch.float32, generator_for(s)) for s in range(200)]).abs().amax(0)
    bounds = torch.tensor([5, 5, 2, 2, 1, 1, 3]).rsqrt()
    assert (many <= bounds).all() and (many > 0.9 * bounds).all()


def test_outputs_keep_their_variance_at_any_sparsity():
    """With Var(w) = 1 / (3 fan_in) an output has a third of the variance of its inputs, as in nn.Linear."""
    x = torch.randn(4096, 512, generator=torch.Generator().manual_seed(0))
    for blocks in (256, 64, 26):
        topology = balanced(Grid(512, 512, (32, 32)), blocks, generator_for(0))
        from sparsekern.topology import to_dense

        y = x @ to_dense(topology, draw_values(topology, torch.float32, generator_for(1))).T
        # 512 outputs of 4096 tokens: the relative deviation of the variance is a few per cent
        assert 0.9 / 3 < y.var() < 1.1 / 3


def test_the_whole_grid_is_distributed_as_nn_linear():
    full = Topology(Grid(6, 64, (6, 64)), *torch.zeros(2, 1, dtype=torch.int32))
    values = draw_values(full, torch.float64, generator_for(0))
    assert values.dtype == torch.float64
    assert values.abs().max() <= 1 / 8 and values.abs().max() > 0.95 / 8


def test_half_precision_is_the_rounded_float():
    low = draw_values(TOPOLOGY, torch.bfloat16, generator_for(0))
    assert torch.equal(low, draw_values(TOPOLOGY, torch.float32, generator_for(0)).bfloat16())
