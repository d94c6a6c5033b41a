from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparsekern.topology import DISTRIBUTIONS, Grid, allocate, blocks_at, conv_grid
from sparsekern.topology.draw import fill, round_to_sum, share


def cells(rows: int, cols: int) -> Grid:
    return Grid(rows, cols, (1, 1))


# By hand.


def test_uniform_by_hand() -> None:
    """A quarter of 16, 32 and 4 cells."""
    assert allocate([cells(4, 4), cells(4, 8), cells(2, 2)], 0.75) == [4, 8, 1]


def test_er_by_hand() -> None:
    """400 + 400 cells at 0.9: 80 blocks in proportion to 20 + 20 and 10 + 40."""
    assert allocate([cells(20, 20), cells(10, 40)], 0.9, "er") == [36, 44]  # 35.6 and 44.4


def test_er_gives_the_surplus_of_a_saturated_layer_to_the_others() -> None:
    """1 + 36 + 64 = 101 cells at half: 51 blocks to shares 2 : 12 : 16.

    51 * 2 / 30 = 3.4 is more than the one cell of the first layer; the other 50 are shared 12 : 16 = 21.4 : 28.6.
    """
    assert allocate([cells(1, 1), cells(6, 6), cells(8, 8)], 0.5, "er") == [1, 21, 29]


def test_er_fills_two_layers_one_after_the_other() -> None:
    """4 + 16 + 1024 cells at 0.9: 104 blocks to shares 4 : 8 : 64.

    104 * 4 / 76 = 5.5 overfills the first; then 100 * 8 / 72 = 11.1 fits the second.
    At 0.75 it is 261: both overflow (13.7 of 4, 27.5 of 16), and the last takes the rest.
    """
    grids = [cells(2, 2), cells(4, 4), cells(32, 32)]

    assert allocate(grids, 0.9, "er") == [4, 11, 89]
    assert allocate(grids, 0.75, "er") == [4, 16, 241]


def test_every_layer_keeps_a_block() -> None:
    """1 % of 10 000 + 1 + 1 cells are 100: both small layers have one, which is all they hold."""
    assert allocate([cells(100, 100), cells(1, 1), cells(1, 1)], 0.99) == [98, 1, 1]
    assert allocate([cells(100, 100), cells(2, 2)], 0.9998) == [1, 1]


def test_no_sparsity_fills_everything() -> None:
    grids = [cells(3, 5), cells(1, 1), cells(7, 2)]
    for distribution in DISTRIBUTIONS:
        assert allocate(grids, 0.0, distribution) == [15, 1, 14]


def test_erk_is_er_for_linear_layers() -> None:
    grids = [cells(20, 20), cells(10, 40), cells(3, 3)]

    assert allocate(grids, 0.9, "erk") == allocate(grids, 0.9, "er")


def test_er_of_the_unfolded_matrix_by_hand() -> None:
    """Matrices of 8 x 36 and 8 x 8 elements at 0.75: 88 of 352 in proportion to 8 + 36 and 8 + 8.

    ``er`` counts the first one's nine taps of 4 channels: 9 * (8 + 4) = 108 to 16.
    """
    grids = [conv_grid(4, 8, (3, 3), (1, 1), 1), cells(8, 8)]

    assert allocate(grids, 0.75, "er-matrix") == [65, 23]  # 64.53 and 23.47: the larger remainder first
    assert allocate(grids, 0.75, "er") == [77, 11]  # 76.6 and 11.4
    assert share(conv_grid(4, 8, (3, 3), (2, 4), 2), "er-matrix") == 4 + 9


def test_the_matrix_of_a_linear_layer_is_the_layer() -> None:
    grids = [cells(20, 20), cells(10, 40), cells(3, 3)]

    assert allocate(grids, 0.9, "er-matrix") == allocate(grids, 0.9, "er")


def test_uniform_is_the_default() -> None:
    grids = [cells(20, 20), cells(10, 40), cells(3, 3)]

    assert allocate(grids, 0.9) == allocate(grids, 0.9, "uniform")


# Properties.

grid_lists = st.lists(st.builds(cells, st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=8)
sparsities = st.floats(0, 0.999)


def enough(grids: list[Grid], sparsity: float) -> None:
    assume(blocks_at(sparsity, sum(g.cells for g in grids)) >= len(grids))


@settings(deadline=None, max_examples=200, derandomize=True)
@given(grid_lists, sparsities, st.sampled_from(DISTRIBUTIONS))
def test_the_sum_is_exact_and_every_layer_holds_its_blocks(
    grids: list[Grid], sparsity: float, distribution: str
) -> None:
    enough(grids, sparsity)

    blocks = allocate(grids, sparsity, distribution)

    assert all(type(n) is int for n in blocks)
    assert sum(blocks) == blocks_at(sparsity, sum(g.cells for g in grids))
    assert all(1 <= n <= grid.cells for n, grid in zip(blocks, grids, strict=True))


@settings(deadline=None, max_examples=200, derandomize=True)
@given(grid_lists, sparsities, st.sampled_from(DISTRIBUTIONS))
def test_a_larger_share_does_not_get_fewer_blocks(grids: list[Grid], sparsity: float, distribution: str) -> None:
    """Unless the layer is full. Equal shares may differ by one, which has to go somewhere."""
    enough(grids, sparsity)
    blocks = allocate(grids, sparsity, distribution)
    share = [grid.cells if distribution == "uniform" else grid.rows + grid.cols for grid in grids]

    for i, grid in enumerate(grids):
        for j in range(len(grids)):
            if share[i] > share[j]:
                assert blocks[i] >= blocks[j] or blocks[i] == grid.cells
            elif share[i] == share[j]:
                assert blocks[i] >= blocks[j] - 1 or blocks[i] == grid.cells


@settings(deadline=None, max_examples=100, derandomize=True)
@given(grid_lists, sparsities)
def test_uniform_densities_are_those_asked_for(grids: list[Grid], sparsity: float) -> None:
    """To less than one block, where no layer is kept from losing its last one."""
    enough(grids, sparsity)
    assume(all((1 - sparsity) * g.cells >= 1 for g in grids))

    for n, grid in zip(allocate(grids, sparsity), grids, strict=True):
        # the total is rounded by up to half a block, of which a layer has its part
        assert abs(n - (1 - sparsity) * grid.cells) < 1.5


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.data())
def test_fill_is_a_clipped_proportion(data: st.DataObject) -> None:
    """One scale fits all: every amount is the scale times the share, clipped to its bounds."""
    layers = data.draw(st.lists(st.tuples(st.integers(1, 99), st.integers(1, 500)), min_size=1, max_size=7))
    shares, high = [float(s) for s, _ in layers], [float(h) for _, h in layers]
    total = float(data.draw(st.integers(len(layers), int(sum(high)))))

    amounts = fill(shares, [1.0] * len(layers), high, total)

    assert sum(amounts) == pytest.approx(total)  # floats: the rounding to integers is exact, see above
    scales = [a / s for a, s, h in zip(amounts, shares, high, strict=True) if 1 < a < h]
    if scales:
        assert max(scales) == pytest.approx(min(scales))
        for amount, share, most in zip(amounts, shares, high, strict=True):
            assert amount == pytest.approx(min(max(share * scales[0], 1), most))


# Rounding.


def test_round_to_sum_by_largest_remainders() -> None:
    assert round_to_sum([1.2, 2.7, 3.1], 7) == [1, 3, 3]
    assert round_to_sum([1.5, 1.5, 1.0], 4) == [2, 1, 1]  # of equal ones the first
    assert round_to_sum([2.0, 3.0], 5) == [2, 3]
    assert round_to_sum([2.9999999999, 1.0000000001], 4) == [3, 1]  # what floats make of 3 and 1
    assert round_to_sum([], 0) == []


@pytest.mark.parametrize(
    ("sparsity", "cells", "blocks"),
    [(0.5, 1, 1), (0.5, 3, 2), (0.5, 5, 3), (0.75, 10, 3), (0.9, 24, 2), (0.9, 26, 3), (0.0, 7, 7), (0.99, 7, 0)],
)
def test_blocks_at(sparsity: float, cells: int, blocks: int) -> None:
    """Halves are rounded up: 10 cells at three quarters are 2.5 blocks."""
    assert blocks_at(sparsity, cells) == blocks


@pytest.mark.parametrize(("number", "sparsity"), [(25, "0.9"), (5, "0.9"), (15, "0.9"), (50, "0.95"), (2500, "0.999")])
def test_halves_of_decimal_sparsities_are_rounded_up(number: int, sparsity: str) -> None:
    """25 cells at 0.9 are 2.5 blocks. In floats, 1 - 0.9 is a little less than 0.1: that must not decide."""
    exact = (1 - Fraction(sparsity)) * number

    assert exact.denominator == 2
    assert allocate([cells(number, 1)], float(sparsity)) == [exact + Fraction(1, 2)]


# Convolutions.


def test_the_shares_of_a_convolution_by_hand() -> None:
    """64 -> 128 channels, kernel 3 x 5, blocks of 32 x 16: 4 rows, 4 columns in each of 15 taps."""
    grid = conv_grid(64, 128, (3, 5), (32, 16))

    assert share(grid, "uniform") == 4 * 4 * 15
    assert share(grid, "er") == (4 + 4) * 15
    assert share(grid, "erk") == 4 + 4 + 8 / math.sqrt(512)


def test_erk_of_unstructured_layers_is_that_of_the_paper() -> None:
    """Density in proportion to (in + out + kh + kw) / (in * out * kh * kw), with no layer full."""
    grids = [conv_grid(16, 32, (3, 3), (1, 1)), conv_grid(32, 64, (3, 3), (1, 1)), conv_grid(64, 64, (1, 1), (1, 1))]

    found = allocate(grids, 0.98, "erk")

    shares = [16 + 32 + 6, 32 + 64 + 6, 64 + 64 + 2]
    exact = [sum(found) * s / sum(shares) for s in shares]
    assert all(abs(a - b) <= 1 for a, b in zip(found, exact, strict=True))


def test_groups_count_by_their_own_channels() -> None:
    grid = conv_grid(64, 128, (3, 3), (16, 16), groups=4)

    assert (share(grid, "uniform"), share(grid, "er")) == (8 * 9, (8 + 1) * 9)
