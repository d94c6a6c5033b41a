from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from sparsekern.kernels.contract import ConvShape

from sparsekern.topology import Grid, Topology, dense_block_norms, gather_blocks, to_dense
from tests.oracle import dense_weight, stored_blocks
from tests.oracle_conv2d import conv_blocks, conv_weight
from tests.topology.strategies import conv_grids, grids, ints, topologies

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


@settings(deadline=None, max_examples=100, derandomize=True)
@given(topologies())
def test_both_ways_agree_with_the_oracle(topology: Topology) -> None:
    grid = topology.grid
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(topology.slots, *grid.block, generator=generator, dtype=torch.float64)
    weight = torch.randn(grid.out_features, grid.in_features, generator=generator, dtype=torch.float64)

    dense, gathered = to_dense(topology, values), gather_blocks(topology, weight)

    assert torch.equal(dense, dense_weight(values, topology.row, topology.col, *weight.shape))
    assert torch.equal(gathered, stored_blocks(weight, topology.row, topology.col, grid.block))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(topologies())
def test_a_round_trip_changes_nothing(topology: Topology) -> None:
    weight = torch.randn(topology.grid.out_features, topology.grid.in_features)

    values = gather_blocks(topology, weight)
    dense = to_dense(topology, values)

    assert torch.equal(gather_blocks(topology, dense), values)
    assert int((dense != 0).sum()) == topology.elements()
    assert torch.equal(dense[dense != 0], weight[dense != 0])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(grids())
def test_the_norms_of_the_blocks_are_those_of_the_matrix(grid: Grid) -> None:
    weight = torch.randn(grid.out_features, grid.in_features, dtype=torch.float64)

    norms = dense_block_norms(grid, weight)

    assert norms.shape == (grid.rows, grid.cols)
    torch.testing.assert_close(norms.norm(), weight.norm())


@settings(deadline=None, max_examples=100, derandomize=True)
@given(topologies(of=conv_grids()))
def test_both_ways_agree_with_the_oracle_of_convolutions(topology: Topology) -> None:
    grid = topology.grid
    assert grid.kernel is not None
    shape = ConvShape(grid.tap_in * grid.groups, grid.out_features, grid.kernel, groups=grid.groups)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(topology.slots, *grid.block, generator=generator, dtype=torch.float64)
    weight = torch.randn(grid.weight_shape, generator=generator, dtype=torch.float64)

    dense, gathered = to_dense(topology, values), gather_blocks(topology, weight)

    assert dense.is_contiguous()
    assert torch.equal(dense, conv_weight(values, topology.row, topology.col, shape))
    assert torch.equal(gathered, conv_blocks(weight, topology.row, topology.col, grid.block, shape))
    assert int((to_dense(topology, gathered) != 0).sum()) == topology.elements()
    torch.testing.assert_close(dense_block_norms(grid, weight).norm(), weight.norm())


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
        with pytest.raises(ValueError, match=r"weight has shape \(.*\); the layer is \(3, 3\)"):
            call(torch.zeros(shape))
