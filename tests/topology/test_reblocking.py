"""Re-blocking against the dense weight: every element where it was, no block without a stored element."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekern.topology import Grid, Topology, conv_grid, from_keys, reblock, to_dense
from sparsekern.topology.topology import with_capacity


def drawn(grid, seed, fraction=0.4, free=2):
    generator = torch.Generator().manual_seed(seed)
    count = max(1, int(fraction * grid.cells))
    topology = with_capacity(from_keys(grid, torch.randperm(grid.cells, generator=generator)[:count]), count + free)
    values = torch.randn(topology.slots, *grid.block, generator=generator) + 3
    real = topology.real()
    return topology, values if real is None else values * real


def stored(topology):
    """Return which elements are stored, as a dense weight of ones."""
    ones = torch.ones(topology.slots, *topology.grid.block)
    return to_dense(topology, ones)


@st.composite
def pairs(draw):
    block = st.tuples(st.integers(1, 5), st.integers(1, 5))
    groups = draw(st.sampled_from([1, 2, 3]))
    channels, out, kernel = draw(st.integers(1, 7)), groups * draw(st.integers(1, 6)), draw(st.integers(1, 2))
    if draw(st.booleans()):
        return Grid(out, channels, draw(block)), Grid(out, channels, draw(block))
    other = draw(st.sampled_from([groups, 1]))
    first = conv_grid(channels * groups, out, (kernel, 2), draw(block), groups)
    return first, Grid(first.out_features, first.in_features, draw(block), first.kernel, other)


@settings(max_examples=60, deadline=None)
@given(pairs(), st.integers(0, 99))
def test_every_element_stays_and_every_block_is_needed(grids, seed):
    topology, values = drawn(grids[0], seed)
    new, moved = reblock(topology, values, grids[1])
    new.validate()
    assert torch.equal(to_dense(new, moved), to_dense(topology, values))
    real = new.real()
    assert real is None or not moved[~real.expand_as(moved)].any(), "phantom elements are zero"
    per_block = torch.zeros(new.slots)
    shown = to_dense(new, torch.arange(1.0, new.slots + 1)[:, None, None].expand_as(moved))
    for slot in range(new.slots):
        per_block[slot] = stored(topology)[shown == slot + 1].sum()
    assert (per_block > 0).all() and new.blocks() == new.slots


def test_there_and_back_is_the_same(monkeypatch):
    monkeypatch.setattr("sparsekern.topology.reblocking.CHUNK", 7)
    grid = Grid(12, 8, (4, 4))
    topology, values = drawn(grid, 0, free=0)
    fine, small = reblock(topology, values, Grid(12, 8, (2, 1)))
    assert fine.slots == 8 * topology.slots
    again, back = reblock(fine, small, grid)
    order = topology.keys().argsort()
    assert torch.equal(again.keys(), topology.keys()[order]) and torch.equal(back, values[order])


def test_no_block_at_all():
    grid = Grid(4, 4, (2, 2))
    free = torch.full((3,), -1, dtype=torch.int32)
    new, values = reblock(Topology(grid, free, free.clone()), torch.zeros(3, 2, 2), Grid(4, 4, (4, 4)))
    assert new.slots == 0 and values.shape == (0, 4, 4)


def test_another_matrix_is_refused():
    topology, values = drawn(Grid(4, 4, (2, 2)), 0)
    with pytest.raises(ValueError, match=r"of a weight \(4, 4\), the layer is \(4, 6\)"):
        reblock(topology, values, Grid(4, 6, (2, 2)))
