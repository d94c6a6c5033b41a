from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekern.topology import Grid, Topology, balanced, by_norm, check_count, conv_grid, from_mask, random
from tests.topology.strategies import places


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SIDES = [1, 16]
"""Of blocks of both kinds that :func:`balanced` draws: small ones by moves, large ones by swaps."""


def cells(rows: int, cols: int, side: int = 1) -> Grid:
    return Grid(rows * side, cols * side, (side, side))


def degrees(topology: Topology) -> tuple[list[int], list[int]]:
    """Return the blocks of each block row, and of each block column."""
    grid = topology.grid
    return (
        topology.row.bincount(minlength=grid.rows).tolist(),
        topology.col.bincount(minlength=grid.cols).tolist(),
    )


# Random.


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_random_has_exactly_the_number_of_blocks(rows: int, cols: int, data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, rows * cols))

    topology = random(cells(rows, cols), blocks, seeded())

    topology.validate()
    assert topology.slots == topology.blocks() == blocks


def test_random_slots_are_in_the_order_of_their_cells() -> None:
    """Neighbours in memory are neighbours in a row."""
    keys = random(cells(50, 50), 100, seeded()).keys().tolist()

    assert keys == sorted(keys)


def test_random_reaches_every_cell_equally_often() -> None:
    """Within 5 standard deviations of a binomial; the seed is fixed."""
    generator, draws, probability = seeded(), 3000, 5 / 24
    seen = Counter(p for _ in range(draws) for p in places(random(cells(4, 6), 5, generator)))

    mean, deviation = draws * probability, (draws * probability * (1 - probability)) ** 0.5
    assert len(seen) == 24
    assert all(abs(count - mean) < 5 * deviation for count in seen.values())


@pytest.mark.parametrize("draw", [random, balanced])
def test_the_same_seed_draws_the_same_blocks(draw) -> None:
    first, second, other = (places(draw(cells(20, 30), 60, seeded(seed))) for seed in (1, 1, 2))

    assert first == second
    assert first != other


@pytest.mark.parametrize("draw", [random, balanced])
@pytest.mark.parametrize("blocks", [0, 7, -1])
def test_a_number_of_blocks_that_does_not_fit_is_refused(draw, blocks: int) -> None:
    grid = Grid(4, 12, (2, 4))

    with pytest.raises(ValueError, match=rf"{blocks} blocks were asked for in a grid of 2 x 3 .* it must be 1 to 6"):
        draw(grid, blocks, seeded())


def test_check_count_takes_one_to_all() -> None:
    check_count(cells(2, 3), 1)
    check_count(cells(2, 3), 6)


# Balanced.


def assert_balanced(grid: Grid, blocks: int, seed: int = 0) -> None:
    topology = balanced(grid, blocks, seeded(seed))
    rows, cols = degrees(topology)

    topology.validate()
    assert topology.slots == topology.blocks() == blocks
    assert max(rows) - min(rows) <= 1, (grid, blocks, rows)
    assert max(cols) - min(cols) <= 1, (grid, blocks, cols)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 99), st.sampled_from(SIDES), st.data())
def test_balanced_degrees_differ_by_at_most_one(
    rows: int, cols: int, seed: int, side: int, data: st.DataObject
) -> None:
    assert_balanced(cells(rows, cols, side), data.draw(st.integers(1, rows * cols)), seed)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 7), (7, 1), (2, 2), (3, 5), (6, 4), (5, 5)])
def test_balanced_for_every_number_of_blocks(rows: int, cols: int, side: int) -> None:
    for blocks in range(1, rows * cols + 1):
        assert_balanced(cells(rows, cols, side), blocks)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("blocks", [1, 63, 64, 65, 410, 2048, 2049, 3600, 4095, 4096])
def test_balanced_on_a_large_grid(blocks: int, side: int) -> None:
    assert_balanced(cells(64, 64, side), blocks)


@pytest.mark.parametrize("blocks", [9_000, 70_000, 100_000])
def test_balanced_where_rows_and_columns_are_many_and_few(blocks: int) -> None:
    assert_balanced(cells(9_000, 13), blocks)
    assert_balanced(cells(13, 9_000), blocks)


@pytest.mark.parametrize("side", SIDES)
def test_balanced_leaves_no_row_and_no_column_empty(side: int) -> None:
    """64 blocks for 64 rows; at random a third of the rows would be empty."""
    rows, cols = degrees(balanced(cells(64, 32, side), 64, seeded()))

    assert set(rows) == {1}
    assert set(cols) == {2}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("blocks", [410, 4096 - 410])
def test_balanced_is_well_mixed(blocks: int, side: int) -> None:
    """Of the pattern it starts from (rows that repeat every few ones), nothing is left.

    Two random rows of 6 of 64 columns are the same once in 75 million; 0.55 of the pairs share no column, give or take
    0.011, the deviation over 2016 pairs. In the cyclic pattern 0.83 share none, and some share all.
    """
    topology = balanced(cells(64, 64, side), blocks, seeded())
    mask = torch.zeros(64, 64)
    mask[topology.row.long(), topology.col.long()] = 1
    mask = mask if blocks < 2048 else 1 - mask
    rows = [tuple(row.nonzero().flatten().tolist()) for row in mask]
    shared = [len({*a} & {*b}) for a, b in combinations(rows, 2)]

    assert len(set(rows)) == 64
    assert max(shared) <= 4
    assert abs(shared.count(0) / len(shared) - 0.55) < 5 * 0.011


@pytest.mark.parametrize("side", SIDES)
def test_balanced_reaches_every_cell_equally_often(side: int) -> None:
    """Within 5 standard deviations of a binomial; the seed is fixed."""
    generator, draws, probability = seeded(), 500, 12 / 48
    seen = Counter(p for _ in range(draws) for p in places(balanced(cells(6, 8, side), 12, generator)))

    mean, deviation = draws * probability, (draws * probability * (1 - probability)) ** 0.5
    assert len(seen) == 48
    assert all(abs(count - mean) < 5 * deviation for count in seen.values())


def test_balanced_rows_share_what_random_rows_of_their_lengths_share() -> None:
    """Rows of 100 of 1000 columns share 10 on average, with a variance of 8.1, whether they are near or far.

    That is the hypergeometric one, 100 * 0.1 * 0.9 * 900 / 999. The deviation of a mean over 499 pairs is 0.13, of
    that over all 124750 pairs nothing: as columns are of one length, the pairs that share one are counted exactly.
    """
    topology = balanced(cells(500, 1000), 50_000, seeded())
    mask = torch.zeros(500, 1000)
    mask[topology.row.long(), topology.col.long()] = 1
    shared = mask @ mask.T
    pairs = shared[torch.ones(500, 500, dtype=torch.bool).triu(1)]
    near = shared.diagonal(1)

    assert pairs.mean().item() == pytest.approx(1000 * (50 * 49 / 2) / (500 * 499 / 2))
    assert pairs.var().item() == pytest.approx(8.1, rel=0.03)  # of 124750 pairs, each row in 499: 0.4 % and a little
    assert abs(near.mean().item() - 9.82) < 5 * 0.13
    assert near.var().item() == pytest.approx(8.1, rel=5 * (2 / 499) ** 0.5)


def test_each_of_the_balanced_topologies_is_drawn() -> None:
    """Two blocks in each row and column of 4 x 4: 90 topologies; permutations of rows and columns make two kinds of
    them, of 18 and 72. Of either kind all are equally likely: within 5 standard deviations of a binomial.
    """
    generator, draws = seeded(), 1000
    seen = Counter(tuple(balanced(cells(4, 4), 8, generator).keys().tolist()) for _ in range(draws))
    twins = {
        keys: count
        for keys, count in seen.items()
        if len({tuple(k % 4 for k in keys[i : i + 2]) for i in (0, 2, 4, 6)}) == 2
    }
    others = {keys: count for keys, count in seen.items() if keys not in twins}

    assert (len(twins), len(others)) == (18, 72)
    for kind in (twins, others):
        mean = sum(kind.values()) / len(kind)
        assert all(abs(count - mean) < 5 * mean**0.5 for count in kind.values())
    assert 0.1 < sum(twins.values()) / draws < 0.3  # 0.2 if all were equally likely


def test_the_native_library_draws_what_pytorch_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn() -> list[Topology]:
        grids = cells(200, 300), Grid(200, 300, (2, 1))
        return [
            draw(grid, blocks, seeded()) for draw in (balanced, random) for grid in grids for blocks in (900, 20_000)
        ]

    native = drawn()
    monkeypatch.setenv("SPARSEKERN_CPU", "off")
    for one, other in zip(native, drawn(), strict=True):
        assert torch.equal(one.row, other.row) and torch.equal(one.col, other.col)


def test_large_blocks_are_where_they_were_when_results_were_recorded() -> None:
    """A training is only repeated on the topology that it had."""
    topology = balanced(cells(8, 12, 16), 11, seeded())

    assert topology.keys().tolist() == [0, 2, 17, 30, 47, 56, 58, 69, 79, 85, 88]


# From a mask.


def test_from_mask_by_hand() -> None:
    mask = torch.tensor([[0, 1, 0], [1, 0, 1]])

    topology = from_mask(Grid(4, 12, (2, 4)), mask)

    assert places(topology) == [(0, 1), (1, 0), (1, 2)]
    assert topology.row.dtype == torch.int32


# By norm.


def test_by_norm_by_hand() -> None:
    """The norms in blocks of 1 x 1, and the order in which they are taken: ties go to the first in row-major order.

    1  -9   3   0          .  1st  .    .
    5   5  -5   2          2nd 3rd 4th  .
    0   0   0   8   ->     .   .   .   2nd ...
    """
    weight = torch.tensor([[1.0, -9, 3, 0], [5, 5, -5, 2], [0, 0, 0, 8], [5, 0, 0, 0]])
    by_size = [(0, 1), (2, 3), (1, 0), (1, 1), (1, 2), (3, 0), (0, 2), (1, 3), (0, 0)]

    for blocks in range(1, 10):
        assert places(by_norm(cells(4, 4), weight, blocks)) == sorted(by_size[:blocks])


def test_by_norm_takes_the_norm_of_a_block_and_not_its_largest_element() -> None:
    """Norms: sqrt(4 * 4) = 4 against sqrt(9) = 3; the edge block has norm 3.5 in its only column."""
    weight = torch.tensor([[2.0, 2, 3, 0, 3.5], [2, 2, 0, 0, 0]])

    assert places(by_norm(Grid(2, 5, (2, 2)), weight, 1)) == [(0, 0)]
    assert places(by_norm(Grid(2, 5, (2, 2)), weight, 2)) == [(0, 0), (0, 2)]


def test_by_norm_of_a_weight_of_zeros_takes_the_first() -> None:
    assert places(by_norm(cells(3, 3), torch.zeros(3, 3), 4)) == [(0, 0), (0, 1), (0, 2), (1, 0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_by_norm_of_a_half_precision_weight_is_not_decided_by_rounding(dtype: torch.dtype) -> None:
    """Norms sqrt(16**2 + 0.25**2) = 16.002 and 16: one number in bfloat16 and float16, and no tie."""
    weight = torch.tensor([[16, 0, 16, 0.25]], dtype=dtype)

    assert places(by_norm(Grid(1, 4, (1, 2)), weight, 1)) == [(0, 1)]


def test_by_norm_of_tied_taps_by_hand() -> None:
    """Two channels in, two taps: 3 and 4 together are stronger than 4.5 alone, but 4.5 is the strongest block."""
    grid = conv_grid(2, 1, (1, 2), (1, 1))
    weight = torch.tensor([[[[3.0, 4.0]], [[4.5, 0.0]]]])

    assert by_norm(grid, weight, 2).col.tolist() == [1, 2]  # column = tap * 2 + channel
    assert by_norm(grid, weight, 2, tie_taps=True).col.tolist() == [0, 2]
    with pytest.raises(ValueError, match="blocks is 3; with tie_taps=True it must be a multiple of the 2 taps"):
        by_norm(grid, weight, 3, tie_taps=True)
