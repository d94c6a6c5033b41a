"""Scores of stored blocks, on hand-worked grids."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.topology import (
    Grid,
    Topology,
    balanced,
    conv_grid,
    generator_for,
    one_tap,
    part_of,
    units,
    with_capacity,
)
from sparsekern.training.scores import ascending, block_norms, descending, lowest, protect_last
from tests.kernels.calls import ints


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_block_norms(dtype):
    layer = sk.SparseLinear(4, 4, block_size=2, blocks=2, capacity=3, dtype=dtype)
    with torch.no_grad():
        layer.values.copy_(torch.tensor([[[3, 0], [0, 4]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]]))
    assert block_norms(layer).tolist() == [5, 2, torch.inf]
    assert block_norms(layer).dtype == torch.float32


def test_half_precision_norms_do_not_overflow():
    layer = sk.SparseLinear(2, 2, block_size=2, blocks=1, dtype=torch.float16)
    with torch.no_grad():
        layer.values.fill_(60000)
    assert block_norms(layer).item() == 120000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_order_of_scores(dtype):
    scores = torch.tensor([3.0, 0, torch.inf, 1e-40, 3, -torch.inf, 2, 0], dtype=dtype)
    assert ascending(scores).tolist() == [5, 1, 7, 3, 6, 0, 4, 2]
    assert descending(scores).tolist() == [2, 0, 4, 6, 3, 1, 7, 5]
    assert scores[0] == 3, "not changed"
    several = torch.rand(50, 2, dtype=dtype, generator=generator_for(0))[:, 0]
    assert torch.equal(ascending(several), several.argsort(stable=True))
    assert torch.equal(descending(several), several.argsort(stable=True, descending=True))


@pytest.mark.parametrize(
    ("blocks", "fraction", "part"), [(100, 0.29, 29), (100, 0.299, 29), (7, 1.0, 7), (7, 0.0, 0), (0, 0.5, 0)]
)
def test_part_of(blocks, fraction, part):
    assert part_of(blocks, fraction) == part


def test_protect_last_by_hand():
    #          columns:  0    1    2
    #   row 0           [5]  [1]   .
    #   row 1            .   [2]   .        <- its only block
    #   row 2           [3]   .   [4]       <- 4 is the only block of column 2
    row, col = ints(0, 0, 1, 2, 2, -1), ints(0, 1, 1, 0, 2, -1)
    scores = torch.tensor([5.0, 1, 2, 3, 4, torch.inf])
    topology = Topology(Grid(3, 3, (1, 1)), row, col)
    # strongest of row 0: 5, row 1: 2, row 2: 4; of column 0: 5, column 1: 2, column 2: 4
    inf = torch.inf
    assert protect_last(topology, scores).tolist() == [inf, 1, inf, 3, inf, inf]
    assert scores.tolist() == [5, 1, 2, 3, 4, inf], "not changed"


def test_no_block_row_or_column_is_ever_emptied():
    topology = with_capacity(balanced(Grid(16, 24, (2, 2)), 14, generator_for(0)), 17)
    for seed in range(50):
        scores = torch.rand(17, generator=generator_for(seed))
        scores[14:] = torch.inf
        if seed % 5 == 0:
            scores[:14] = 1.0  # all equal
        dropped = lowest(protect_last(topology, scores), 14)
        kept = torch.ones(17, dtype=torch.bool)
        kept[14:] = False
        kept[dropped] = False
        assert set(topology.row[kept].tolist()) == set(topology.row[:14].tolist())
        assert set(topology.col[kept].tolist()) == set(topology.col[:14].tolist())


def conv() -> sk.SparseConv2d:
    """Two rows, two columns of channels and two taps. Cells (1, 0): slots 4 and 0; (0, 1): slots 1 and 2; 3 is free."""
    topology = Topology(conv_grid(4, 4, (1, 2), (2, 2)), ints(1, 0, 0, -1, 1), ints(2, 1, 3, -1, 0))
    layer = sk.SparseConv2d(4, 4, (1, 2), topology=Topology(topology.grid, topology.row, topology.col), tie_taps=True)
    with torch.no_grad():
        layer.values.copy_(torch.tensor([3.0, 1, 0, 0, 4]).view(5, 1, 1) / 2)  # norms: twice an entry
    return layer


def test_units_of_tied_taps_by_hand():
    layer = conv()
    parts = units(layer.topology, layer.tie_taps)
    assert parts.topology.grid == one_tap(conv().grid)
    assert (parts.topology.row.tolist(), parts.topology.col.tolist()) == ([0, 1], [1, 0])
    assert parts.slots.tolist() == [[1, 2], [4, 0]]
    assert parts.norms(block_norms(conv())).tolist() == [1, 5]


def test_a_unit_that_is_replaced_moves_in_all_taps():
    layer = conv()
    move = units(layer.topology, layer.tie_taps).replaced(torch.tensor([1]), ints(0))
    assert (move.slots.tolist(), move.row.tolist(), move.col.tolist()) == ([4, 0], [0, 0], [0, 2])
    layer.move_(*move)
    assert layer.row.tolist() == [0, 0, 0, -1, 0] and layer.col.tolist() == [2, 1, 3, -1, 0]


def test_elsewhere_a_unit_is_a_slot():
    layer = sk.SparseLinear(16, 16, block_size=4, seed=0)
    parts, norms, slots = units(layer.topology, False), block_norms(layer), torch.tensor([1, 2])
    assert parts.topology.row is layer.row and parts.topology.col is layer.col
    assert parts.norms(norms) is norms
    move = parts.replaced(slots, ints(6))
    assert move.slots is slots and (move.row.tolist(), move.col.tolist()) == ([1, -1], [2, -1])


@pytest.mark.parametrize("kind", [sk.SET, sk.RigL, sk.GSE, sk.Static, sk.VRPGE])
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, "a (3), b (2)"),
        ({"drop_fraction": 0.34}, "b (2)"),
        ({"drop_fraction": 0.5}, ""),
        ({"drop_fraction": 0.0}, ""),
        ({"drop_fraction": lambda step: 0.1}, ""),
    ],
)
def test_layers_of_so_few_blocks_that_none_moves_are_named(kind, options, names, caplog):
    blocks = {"a": 3, "b": 2, "c": 4, "full": 16, "frozen": 2}
    model = nn.ModuleDict(
        {name: sk.SparseLinear(16, 16, block_size=4, blocks=n, capacity=n, seed=0) for name, n in blocks.items()}
    )
    model["frozen"].values.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    more = {"sparsity": 0.9} if kind is sk.VRPGE else {}
    kind(model, optimizer, **({} if kind is sk.Static else options), **more)
    expected = names if kind in (sk.SET, sk.RigL, sk.GSE) else ""
    assert caplog.text.count("and they never move: ") == bool(expected)
    assert f"and they never move: {expected}. Take" in caplog.text or not expected


def test_tied_taps_are_few_units_and_a_competition_has_no_few(caplog):
    layer = sk.SparseConv2d(8, 8, 3, block_size=4, blocks=27, tie_taps=True, seed=0)
    sk.SET(layer, torch.optim.SGD(layer.parameters()))
    assert "they never move:  (3)" in caplog.text
    caplog.clear()
    few = sk.SparseLinear(16, 16, block_size=4, blocks=3, seed=0)
    sk.GSE(few, torch.optim.SGD(few.parameters()), scope="global")
    assert "never move" not in caplog.text
