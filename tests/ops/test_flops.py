"""FLOPs count stored elements inside the matrix, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sparsekern import ops
from sparsekern.topology import Grid, Topology, build_index, with_capacity

# 5 x 7 in blocks of 2 x 4: 3 x 2 blocks. Stored: the whole block (0, 0), 2 x 3 of (0, 1), 1 x 3 of (2, 1).
GRID = Grid(5, 7, (2, 4))
TOPOLOGY = with_capacity(
    Topology(GRID, torch.tensor([0, 2, 0], dtype=torch.int32), torch.tensor([1, 1, 0], dtype=torch.int32)), 5
)
ELEMENTS = 6 + 3 + 8


def test_stored_elements():
    assert ops.stored_elements(build_index(TOPOLOGY), GRID.block, 5, 7) == ELEMENTS
    ones = Topology(Grid(5, 7, (1, 1)), TOPOLOGY.row, TOPOLOGY.col)
    assert ops.stored_elements(build_index(ones), (1, 1), 5, 7) == 3


def test_the_counter_sees_a_training_step():
    x = torch.ones(10, 7, requires_grad=True)
    values = torch.ones(5, 2, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ops.linear(x, values, None, build_index(TOPOLOGY), GRID).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * ELEMENTS


def test_scores():
    dy, x = torch.ones(10, 5), torch.ones(10, 7)
    row = torch.zeros(3, dtype=torch.int32)
    for score, flops in (
        (lambda: ops.all_block_norms(dy, x, 2, 4, "auto"), 2 * 10 * 5 * 7),
        (lambda: ops.block_norms(dy, x, row, row, 2, 4, "auto"), 2 * 10 * 3 * 8),
        (lambda: ops.sketch(dy, x, torch.ones(4, 5), torch.ones(4, 7), 2, 4, "auto"), 2 * 10 * 4 * (5 + 7 + 6)),
    ):
        with FlopCounterMode(display=False) as counter:
            score()
        assert counter.get_total_flops() == flops


@pytest.mark.parametrize("block", [(2, 4), (1, 1)])
def test_without_data_every_slot_counts(block):
    index = build_index(Topology(Grid(5, 7, block), TOPOLOGY.row, TOPOLOGY.col))
    with FakeTensorMode() as mode:
        fake = type(index)(*(mode.from_tensor(t) for t in index))
    assert ops.stored_elements(fake, block, 5, 7) == 5 * block[0] * block[1]
