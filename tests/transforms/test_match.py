"""Blocks for a number of multiply-adds: by hand, and the promise of half a block."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekern.topology import Grid, conv_grid
from sparsekern.transforms.match import match_blocks


def test_by_hand():
    """100 and 50 blocks of 16 x 16 at 2 tokens and 1: a block costs 512 and 256, all together 64 000."""
    grids = [Grid(160, 160, (16, 16)), Grid(80, 160, (16, 16))]
    assert match_blocks(grids, [2, 1], 64_000) == [100, 50]
    assert match_blocks(grids, [2, 1], 32_000) == [50, 25]
    assert match_blocks(grids, [2, 1], 32_256) == [50, 26]  # one more of the smaller ones
    assert match_blocks(grids, [2, 1], 32_512) == [51, 25]


def test_er_gives_small_layers_more():
    """In proportion to 20 + 20 and 10 + 40, as `allocate` counts: 36 and 44 of 80 blocks at equal cost."""
    grids = [Grid(20, 20, (1, 1)), Grid(10, 40, (1, 1))]
    assert match_blocks(grids, [1, 1], 80, "er") == [36, 44]


def test_a_full_layer_leaves_its_work_to_the_others():
    """At equal shares of rows and columns the first, 4 x 4, would get more than it holds."""
    grids = [Grid(4, 4, (1, 1)), Grid(64, 64, (1, 1))]
    assert match_blocks(grids, [1, 1], 1016, "er") == [16, 1000]


layers = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 9]), st.integers(1, 1000)),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(layers, st.floats(0, 1), st.sampled_from(["uniform", "er", "erk"]))
def test_the_sum_is_right_to_half_a_block(sizes, part, distribution):
    grids = [conv_grid(16 * c, 16 * r, (1, t), (16, 16)) for r, c, t, _ in sizes]
    tokens = [count for *_, count in sizes]
    costs = [256 * count for count in tokens]
    full = sum(grid.cells * cost for grid, cost in zip(grids, costs, strict=True))
    asked = sum(costs) + int(part * (full - sum(costs)))
    blocks = match_blocks(grids, tokens, asked, distribution)
    assert all(1 <= n <= grid.cells for n, grid in zip(blocks, grids, strict=True))
    got = sum(n * cost for n, cost in zip(blocks, costs, strict=True))
    assert abs(got - asked) <= max(costs) / 2


def test_too_little_and_too_much():
    grids = [Grid(32, 32, (16, 16)), Grid(32, 32, (16, 16))]
    with pytest.raises(ValueError, match=r"511 multiply-adds are left for 2 sparse layer\(s\), and one block in each"):
        match_blocks(grids, [1, 1], 511)
    with pytest.raises(
        ValueError,
        match=r"2177 multiply-adds are to be spent in 2 .* that take 2048 when full: choose a higher sparsity, or",
    ):
        match_blocks(grids, [1, 1], 2177)
    with pytest.raises(ValueError, match="distribution is 'ERK'; it must be one of uniform, er, er-matrix, erk"):
        match_blocks(grids, [1, 1], 1024, "ERK")
