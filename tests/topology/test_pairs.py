"""Draws from a rank-one distribution of cells, by chi-square."""

from __future__ import annotations

import pytest
import torch

from sparsekern.topology import (
    are_absent,
    distinct_absent,
    generator_for,
    pairs,
    row_weights,
    sample_absent_pairs,
    sample_pairs,
)

ROWS, COLS = torch.tensor([1.0, 0.0, 3.0, 2.0]), torch.tensor([5.0, 1.0, 0.0, 2.0, 2.0])
JOINT = ROWS[:, None] * COLS / (ROWS.sum() * COLS.sum())
PRESENT = torch.tensor([0, 13, 18])  # (0, 0), (2, 3), (3, 3)


def chi_square_quantile(freedom: int) -> float:
    """Return about the 1 - 1e-6 quantile (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.753 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_the_joint_distribution_has_rank_one():
    draws = 60_000
    counts = torch.bincount(sample_pairs(ROWS, COLS, draws, generator_for(0)), minlength=20).view(4, 5)
    assert not counts[JOINT == 0].any()
    expected = draws * JOINT[JOINT > 0]
    statistic = float(((counts[JOINT > 0] - expected) ** 2 / expected).sum())
    assert statistic < chi_square_quantile(expected.numel() - 1)


def test_groups_of_rows_may_weigh_columns_apart():
    """Rows 0 and 1 see columns as COLS says, 2 and 3 another way; a group that weighs nothing is never drawn."""
    draws = 60_000
    other = torch.tensor([0.0, 0.0, 4.0, 1.0, 3.0])
    for cols in (torch.stack([COLS, other]), torch.stack([COLS, torch.zeros(5)])):
        joint = ROWS[:, None] * cols.repeat_interleave(2, 0)
        joint /= joint.sum()
        counts = torch.bincount(sample_pairs(ROWS, cols, draws, generator_for(0)), minlength=20).view(4, 5)
        assert not counts[joint == 0].any()
        expected = draws * joint[joint > 0]
        statistic = float(((counts[joint > 0] - expected) ** 2 / expected).sum())
        assert statistic < chi_square_quantile(expected.numel() - 1)
        torch.testing.assert_close(
            row_weights(ROWS, cols), (ROWS[:, None] * cols.repeat_interleave(2, 0)).sum(1).double()
        )
    assert torch.equal(row_weights(ROWS, COLS), ROWS.double() * 10)


def test_a_draw_that_is_rounded_up_stays_in_its_group(monkeypatch):
    """The highest uniform number below 1: low + u * (high - low) is high itself."""
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.full((count,), 1 - 2**-53, dtype=torch.float64))
    cols = torch.tensor([[3.0, 0.0], [1e-3, 0.0], [5.0, 0.0]])
    assert sample_pairs(torch.tensor([0.0, 1, 0]), cols, 1, generator_for(0)).tolist() == [2]


def test_the_test_notices_another_distribution():
    draws = 200_000
    counts = torch.bincount(sample_pairs(ROWS, COLS + 0.1, draws, generator_for(0)), minlength=20).view(4, 5)
    expected = draws * JOINT[JOINT > 0]
    statistic = float(((counts[JOINT > 0] - expected) ** 2 / expected).sum())
    assert statistic > chi_square_quantile(expected.numel() - 1)


def test_one_absent_cell_has_the_joint_distribution_outside_the_present_ones():
    weights = JOINT.flatten().clone()
    weights[PRESENT] = 0
    draws = 20_000
    generator = generator_for(1)
    keys = torch.cat([sample_absent_pairs(PRESENT, ROWS, COLS, 1, generator) for _ in range(draws)])
    counts = torch.bincount(keys, minlength=20)
    assert not counts[weights == 0].any()
    expected = draws * weights[weights > 0] / weights.sum()
    statistic = float(((counts[weights > 0] - expected) ** 2 / expected).sum())
    assert statistic < chi_square_quantile(expected.numel() - 1)


def test_several_are_drawn_one_after_the_other_without_replacement():
    """Inclusion in two draws: p + sum over the first of q(first) p / (1 - q(first))."""
    weights = JOINT.flatten().clone()
    weights[PRESENT] = 0
    p = weights / weights.sum()
    second = torch.stack([sum(p[f] * p[c] / (1 - p[f]) for f in range(20) if f != c) for c in range(20)])
    draws = 20_000
    generator = generator_for(2)
    keys = torch.stack([sample_absent_pairs(PRESENT, ROWS, COLS, 2, generator) for _ in range(draws)])
    assert (keys[:, 0] != keys[:, 1]).all()
    rate, inclusion = torch.bincount(keys.flatten(), minlength=20) / draws, p + second
    assert ((rate - inclusion).abs() <= 5 * (inclusion * (1 - inclusion) / draws).sqrt()).all()


def test_as_many_as_the_weights_leave_within_reach():
    keys = sample_absent_pairs(PRESENT, ROWS, COLS, 17, generator_for(3))
    weights = JOINT.flatten().clone()
    weights[PRESENT] = 0
    assert sorted(keys.tolist()) == weights.nonzero().squeeze(1).tolist()  # 9 of 17
    assert sample_absent_pairs(PRESENT, ROWS, COLS, 0, generator_for(3)).shape == (0,)


def test_memory_does_not_grow_with_the_grid():
    """2**30 cells."""
    side = 2**15
    keys = sample_absent_pairs(torch.tensor([5]), torch.ones(side), torch.ones(side), 1000, generator_for(4))
    assert keys.unique().shape == (1000,) and int(keys.max()) < side**2


@pytest.mark.parametrize("present", [[], [3], [0, 2, 9]])
def test_keys_that_are_absent(present):
    keys, there = torch.tensor([9, 3, 4, 0, 3], dtype=torch.int32), torch.tensor(present, dtype=torch.int32)
    expected = [k not in present for k in keys.tolist()]
    assert are_absent(keys.long(), there, 10).tolist() == expected
    assert distinct_absent(keys, there, 10).tolist() == sorted({k for k in keys.tolist() if k not in present})


def test_draws_in_chunks_are_as_many_as_asked_for(monkeypatch):
    monkeypatch.setattr(pairs, "CHUNK", 1000)
    counts = torch.bincount(sample_pairs(ROWS, COLS, 2500, generator_for(0)), minlength=20)
    assert int(counts.sum()) == 2500 and not counts.view(4, 5)[JOINT == 0].any()
