"""FLOPs count stored elements inside the matrix, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from sparsekern.kernels.contract import ConvShape
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sparsekern import ops
from sparsekern.ops import scores
from sparsekern.topology import Grid, Topology, build_index, conv_grid, random, with_capacity
from tests.memory import allocations

# 5 x 7 in blocks of 2 x 4: 3 x 2 blocks. Stored: the whole block (0, 0), 2 x 3 of (0, 1), 1 x 3 of (2, 1).
GRID = Grid(5, 7, (2, 4))
TOPOLOGY = with_capacity(
    Topology(GRID, torch.tensor([0, 2, 0], dtype=torch.int32), torch.tensor([1, 1, 0], dtype=torch.int32)), 5
)
ELEMENTS = 6 + 3 + 8


def test_stored_elements():
    assert ops.stored_elements(build_index(TOPOLOGY), GRID) == ELEMENTS
    ones = Topology(Grid(5, 7, (1, 1)), TOPOLOGY.row, TOPOLOGY.col)
    assert ops.stored_elements(build_index(ones), ones.grid) == 3


@pytest.mark.parametrize(
    "shape", [(23, 17, None, 1), (24, 17, None, 1), (23, 16, None, 1), (10, 6, (2, 3), 2)], ids=str
)
@pytest.mark.parametrize("block", [(1, 1), (2, 2), (4, 3), (32, 32)], ids=str)
def test_stored_elements_are_those_of_the_topology(shape, block):
    out, into, kernel, groups = shape
    grid = Grid(out, into * groups, block) if kernel is None else conv_grid(into, out, kernel, block, groups)
    for blocks in {1, max(1, grid.cells // 3), grid.cells}:
        topology = with_capacity(random(grid, blocks, torch.Generator().manual_seed(0)), blocks + 2)
        inside = torch.zeros(grid.rows, block[0], grid.cols, block[1])
        inside[topology.row[:blocks].long(), :, topology.col[:blocks].long(), :] = 1
        parts = inside.view(grid.groups, -1, grid.taps, grid.tap_cols * block[1])
        expected = int(parts[:, : grid.group_out, :, : grid.tap_in].sum())
        assert ops.stored_elements(build_index(topology), grid) == topology.elements() == expected


@pytest.mark.parametrize("block", [(1, 1), (2, 2), (16, 16)], ids=str)
def test_counting_makes_nothing_that_has_an_entry_an_element(block):
    """Of a layer of 1M elements, 52k of them stored."""
    grid = Grid(1024, 1024, block)
    topology = random(grid, grid.cells // 20, torch.Generator().manual_seed(0))
    index = build_index(topology)
    assert allocations(lambda: ops.stored_elements(index, grid)).peak < 2**12
    assert allocations(topology.elements).peak <= topology.slots + 2**12
    ragged = Grid(1023, 1022, block) if block != (1, 1) else grid
    assert allocations(lambda: ops.stored_elements(index, ragged)).peak < 2**17


@pytest.mark.parametrize("block", [(2, 4), (1, 1)])
def test_without_data_every_slot_counts(block):
    index = build_index(Topology(Grid(5, 7, block), TOPOLOGY.row, TOPOLOGY.col))
    with FakeTensorMode() as mode:
        fake = type(index)(*(mode.from_tensor(t) for t in index))
    assert ops.stored_elements(fake, Grid(5, 7, block)) == 5 * block[0] * block[1]


# Two groups of 3 x 5 channels, kernel 1 x 2, blocks of 2 x 4: 4 x 4 of them. Stored: 2 x 4 of (0, 2), 1 x 1 of (3, 1).
CONV = ConvShape(10, 6, (1, 2), stride=(2, 1), groups=2)
CONV_GRID = conv_grid(10, 6, (1, 2), (2, 4), 2)
CONV_TOPOLOGY = Topology(CONV_GRID, torch.tensor([0, 3], dtype=torch.int32), torch.tensor([2, 1], dtype=torch.int32))
CONV_ELEMENTS, PIXELS = 8 + 1, 2 * 2 * 6


def flops(run: Callable[..., object], *args: object) -> int:
    with FlopCounterMode(display=False) as counter:
        run(*args)
    return counter.get_total_flops()


def test_the_counter_sees_a_training_step():
    x, values = torch.ones(10, 7, requires_grad=True), torch.ones(5, 2, 4, requires_grad=True)
    y = partial(ops.linear, x, values, None, build_index(TOPOLOGY), GRID)
    assert flops(lambda: y().sum().backward()) == 3 * 2 * 10 * ELEMENTS
    x, values = torch.ones(2, 10, 4, 7, requires_grad=True), torch.ones(2, 2, 4, requires_grad=True)
    y = partial(ops.conv2d, x, values, None, build_index(CONV_TOPOLOGY), CONV_GRID, CONV)
    assert flops(lambda: y().sum().backward()) == 3 * 2 * PIXELS * CONV_ELEMENTS


def test_a_full_convolution_counts_as_torchs():
    x, weight = torch.ones(2, 10, 4, 7), torch.ones(6, 5, 1, 2)
    full = Topology(CONV_GRID, torch.arange(16, dtype=torch.int32) // 4, torch.arange(16, dtype=torch.int32) % 4)
    theirs = flops(lambda: torch.nn.functional.conv2d(x, weight, None, (2, 1), groups=2))
    assert theirs > 0
    assert flops(lambda: ops.conv2d(x, torch.ones(16, 2, 4), None, build_index(full), CONV_GRID, CONV)) == theirs


def test_scores():
    row = torch.zeros(3, dtype=torch.int32)
    for dy, x, shape, tokens, (out, into), cells in (
        (torch.ones(10, 5), torch.ones(10, 7), None, 10, (5, 7), 6),
        (torch.ones(2, 6, 2, 6), torch.ones(2, 10, 4, 7), CONV, PIXELS, (6, 10), 16),
    ):
        groups = 1 if shape is None else shape.groups
        pairs = torch.ones(4, out), torch.ones(4, into)
        assert flops(scores.all_block_norms, dy, x, 2, 4, "auto", shape) == 2 * tokens * out * into
        assert flops(scores.block_norms, dy, x, row, row, 2, 4, "auto", shape) == 2 * tokens * 3 * 8
        sketch = 2 * tokens * 4 * (out + groups * into + cells)
        assert flops(scores.sketch, dy, x, *pairs, 2, 4, "auto", shape) == sketch


def test_fused_attention_on_a_cpu_is_counted_as_plain_products_are():
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        forward = counter.get_total_flops()
        y.sum().backward()
    product = 2 * 2 * 3 * 16 * 16 * 8
    assert forward == 2 * product
    assert counter.get_total_flops() == (2 + 5) * product  # the scores are computed again
