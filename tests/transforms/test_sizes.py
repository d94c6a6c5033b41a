"""The sizes of the paper's table 1, rounded to blocks, and blocks for a number of multiply-adds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekern.topology import Grid, conv_grid
from sparsekern.transforms.twins import (
    Width,
    doped_rank,
    factorized_features,
    match_blocks,
    parallel_branches,
    wide_width,
)


@pytest.mark.parametrize(
    ("sparsity", "block", "widths"),
    [(0.9, 32, (2432, 9728)), (0.9, 64, (2432, 9728)), (0.5, 64, (1088, 4352)), (0.5, 128, (1024, 4352))],
)
def test_widths_by_hand(sparsity, block, widths):
    """768 and 3072 features; at 0.5 1086.1 is nearest to 1088, and to 8 x 128 = 1024."""
    width = wide_width(sparsity, block)
    assert (width(768), width(3072)) == widths


def test_a_width_never_shrinks_and_small_blocks_make_multiples_of_8():
    assert wide_width(0.1, 32)(100) == 128  # 105.4 is nearest to 96
    assert wide_width(0.5, 1).multiple == 8 and wide_width(0.5, 1)(100) == 144  # 141.4
    assert wide_width(0.5, (16, 12)).multiple == 48
    assert [Width()(n) for n in (1, 7, 100)] == [1, 7, 100]


def test_branches():
    assert [parallel_branches(s) for s in (0.0, 0.3, 0.5, 0.6, 0.75, 0.9)] == [1, 1, 2, 3, 4, 10]


def test_factors_by_hand():
    """Square: D / (2 (1 - s)). 3 x 3 convolution of c channels: 0.9 c / (1 - s). Rounded up."""
    assert [factorized_features(512, 512, s, 16) for s in (0.5, 0.75, 0.9)] == [512, 1024, 2560]
    assert factorized_features(9 * 64, 64, 0.5, 1) == 116  # 115.2
    assert factorized_features(9 * 64, 64, 0.5, 16) == 128


def test_ranks_by_hand():
    """Square: s D / 2. 3 x 3 convolution: 0.9 s c, rounded down to a multiple of 8."""
    assert [doped_rank(512, 512, s) for s in (0.5, 0.75, 0.9)] == [128, 192, 224]  # 230.4
    assert doped_rank(9 * 64, 64, 0.9) == 48  # 51.8
    assert doped_rank(8, 8, 0.9) == 3 and doped_rank(8, 8, 0.1) == 1


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
