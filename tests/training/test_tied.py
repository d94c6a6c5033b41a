"""Units: a block, or one block of every tap."""

from __future__ import annotations

import torch

import sparsekern as sk
from sparsekern.topology import Topology, conv_grid, one_tap
from sparsekern.training.followers import Move
from sparsekern.training.scores import block_norms
from sparsekern.training.tied import units


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def conv() -> sk.SparseConv2d:
    """Two rows, two columns of channels and two taps. Cells (1, 0): slots 4 and 0; (0, 1): slots 1 and 2; 3 is free."""
    topology = Topology(conv_grid(4, 4, (1, 2), (2, 2)), ints(1, 0, 0, -1, 1), ints(2, 1, 3, -1, 0))
    layer = sk.SparseConv2d(4, 4, (1, 2), topology=Topology(topology.grid, topology.row, topology.col), tie_taps=True)
    with torch.no_grad():
        layer.values.copy_(torch.tensor([3.0, 1, 0, 0, 4]).view(5, 1, 1) / 2)  # norms: twice an entry
    return layer


def test_units_of_tied_taps_by_hand():
    parts = units(conv())
    assert parts.topology.grid == one_tap(conv().grid)
    assert (parts.topology.row.tolist(), parts.topology.col.tolist()) == ([0, 1], [1, 0])
    assert parts.slots.tolist() == [[1, 2], [4, 0]]
    assert parts.norms(block_norms(conv())).tolist() == [1, 5]


def test_spread_moves_all_taps():
    move = units(conv()).spread(Move(torch.tensor([1]), ints(0), ints(0)))
    assert (move.slots.tolist(), move.row.tolist(), move.col.tolist()) == ([4, 0], [0, 0], [0, 2])
    layer = conv()
    layer.move_(*move)
    assert layer.row.tolist() == [0, 0, 0, -1, 0] and layer.col.tolist() == [2, 1, 3, -1, 0]


def test_elsewhere_a_unit_is_a_slot():
    layer = sk.SparseLinear(16, 16, block_size=4, seed=0)
    parts, norms, move = units(layer), block_norms(layer), Move(torch.tensor([1]), ints(0), ints(0))
    assert parts.topology.row is layer.row and parts.topology.col is layer.col
    assert parts.norms(norms) is norms and parts.spread(move) is move
