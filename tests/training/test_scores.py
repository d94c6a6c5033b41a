"""Scores of stored blocks, on hand-worked grids."""

from __future__ import annotations

import pytest
import torch

import sparsekern as sk
from sparsekern.topology import Grid, Topology, balanced, generator_for, with_capacity
from sparsekern.training.scores import block_norms, lowest, protect_last


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


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


def test_lowest():
    scores = torch.tensor([3.0, 1, torch.inf, 1, 2])
    assert lowest(scores, 3).tolist() == [1, 3, 4]
    assert lowest(scores, 9).tolist() == [1, 3, 4, 0]
    assert lowest(scores, 0).tolist() == []


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
