"""Values of blocks: from and to a dense weight, and in blocks of another size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsekern.kernels.contract import ConvShape

from sparsekern.topology import (
    Grid,
    Topology,
    conv_grid,
    dense_block_norms,
    from_keys,
    gather_blocks,
    reblock,
    to_dense,
    with_capacity,
)
from tests.oracle import dense_weight, stored_blocks
from tests.oracle_conv2d import conv_blocks, conv_weight
from tests.topology.strategies import conv_grids, ints, topologies

NAN = float("nan")


def corner() -> Topology:
    """Blocks of 2 x 2 in a matrix of 3 x 3: the corner, a free slot, and the middle left."""
    return Topology(Grid(3, 3, (2, 2)), ints(1, -1, 0), ints(1, -1, 0))


def test_to_dense_by_hand() -> None:
    values = torch.tensor([[[1.0, NAN], [NAN, NAN]], [[NAN, NAN], [NAN, NAN]], [[2, 3], [4, 5]]])

    assert to_dense(corner(), values).tolist() == [[2, 3, 0], [4, 5, 0], [0, 0, 1]]


def test_gather_blocks_by_hand() -> None:
    weight = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])

    assert gather_blocks(corner(), weight).tolist() == [[[9, 0], [0, 0]], [[0, 0], [0, 0]], [[1, 2], [4, 5]]]


def test_block_norms_by_hand() -> None:
    """3 4 | 0, 0 0 | 2, 6 8 | 1 in blocks of 2 x 2."""
    weight = torch.tensor([[3.0, 4, 0], [0, 0, 2], [6, 8, 1]])

    assert dense_block_norms(Grid(3, 3, (2, 2)), weight).tolist() == [[5, 2], [10, 1]]


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.one_of(topologies(), topologies(of=conv_grids())))
def test_both_ways_agree_with_the_oracle(topology: Topology) -> None:
    grid, (row, col) = topology.grid, (topology.row, topology.col)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(topology.slots, *grid.block, generator=generator, dtype=torch.float64)
    weight = torch.randn(grid.weight_shape, generator=generator, dtype=torch.float64)

    dense, gathered = to_dense(topology, values), gather_blocks(topology, weight)
    norms = dense_block_norms(grid, weight)

    if grid.kernel is None:
        assert torch.equal(dense, dense_weight(values, row, col, *weight.shape))
        assert torch.equal(gathered, stored_blocks(weight, row, col, grid.block))
    else:
        shape = ConvShape(grid.tap_in * grid.groups, grid.out_features, grid.kernel, groups=grid.groups)
        assert dense.is_contiguous()
        assert torch.equal(dense, conv_weight(values, row, col, shape))
        assert torch.equal(gathered, conv_blocks(weight, row, col, grid.block, shape))
    assert norms.shape == (grid.rows, grid.cols)
    torch.testing.assert_close(norms.norm(), weight.norm())

    again = to_dense(topology, gathered)
    assert torch.equal(gather_blocks(topology, again), gathered), "a round trip changes nothing"
    assert int((again != 0).sum()) == topology.elements()
    assert torch.equal(again[again != 0], weight[again != 0])


def test_a_nan_is_gathered_only_by_its_own_block() -> None:
    weight = torch.ones(3, 3)
    weight[0, 0] = NAN

    values = gather_blocks(corner(), weight)

    assert values[2, 0, 0].isnan()
    assert int(values.isnan().sum()) == 1  # the free slot reads block (0, 0), and forgets it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    weight = torch.ones(3, 3, dtype=dtype)

    assert gather_blocks(corner(), weight).dtype == dtype
    assert to_dense(corner(), torch.ones(3, 2, 2, dtype=dtype)).dtype == dtype


def test_nothing_is_shared_and_no_graph_is_kept() -> None:
    topology = Topology(Grid(2, 2, (2, 2)), ints(0), ints(0))  # the one block is the whole matrix
    values = torch.ones(1, 2, 2, requires_grad=True)

    dense = to_dense(topology, values)
    gathered = gather_blocks(topology, dense)
    dense.zero_()

    assert not dense.requires_grad
    assert dense.is_contiguous()
    assert values.detach().flatten().tolist() == [1, 1, 1, 1]
    assert gathered.flatten().tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (4, 4), (9,)])
def test_a_weight_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    for call in (lambda w: gather_blocks(corner(), w), lambda w: dense_block_norms(corner().grid, w)):
        with pytest.raises(ValueError, match=r"weight has shape \(.*\); it must be that of the layer, \(3, 3\)"):
            call(torch.zeros(shape))


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
    monkeypatch.setattr("sparsekern.topology.blocks.CHUNK", 7)
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
    with pytest.raises(ValueError, match=r"grid is for a weight \(4, 6\), and the blocks are of \(4, 4\)"):
        reblock(topology, values, Grid(4, 6, (2, 2)))
