"""Random draws of cells, and generators that depend on a seed and names alone."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekern.topology import (
    are_absent,
    distinct_absent,
    generator_for,
    row_weights,
    sample_absent,
    sample_absent_pairs,
    sample_distinct,
    sample_pairs,
)
from tests.memory import allocations


def first(*names: str | int) -> int:
    return int(torch.randint(2**62, (), generator=generator_for(*names)))  # type: ignore[arg-type]


def test_the_same_seed_and_names_give_the_same_numbers() -> None:
    assert torch.equal(
        torch.randn(5, generator=generator_for(7, "fc")), torch.randn(5, generator=generator_for(7, "fc"))
    )


def test_numbers_never_change_between_releases() -> None:
    """A topology is drawn from its seed on every rank, whatever version it runs.

    The bytes are the first 8 of ``printf "(0, 'fc1', 'topology')" | sha256sum``.
    """
    assert (
        generator_for(0, "fc1", "topology").initial_seed()
        == int.from_bytes(bytes.fromhex("20b8f734f44f510d"), "little") >> 1
    )
    assert generator_for(1).initial_seed() == int.from_bytes(bytes.fromhex("28cb03b06c288e88"), "little") >> 1


def test_seed_names_and_their_order_all_matter() -> None:
    numbers = [
        first(0, "a"),
        first(1, "a"),
        first(0, "b"),
        first(0, "a", "b"),
        first(0, "a/b"),
        first(0, "a', 'b"),
        first(0, "b", "a"),
        first(0, "a", 1),
        first(0),
    ]

    assert len(set(numbers)) == len(numbers)


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    state = torch.get_rng_state()
    number = first(0, "a")
    assert torch.equal(torch.get_rng_state(), state)

    torch.manual_seed(123)
    assert first(0, "a") == number
    torch.set_rng_state(state)


def test_the_generator_is_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        generator = generator_for(0, "a")

    assert generator.device == torch.device("cpu")


def test_a_seed_of_another_integer_type_is_the_same_seed() -> None:
    assert first(torch.tensor(7), "a") == first(7, "a") == first(True + 6, "a")  # type: ignore[arg-type]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_uniform(counts: list[int], draws: int, probability: float) -> None:
    """Raise AssertionError if a count is 5 standard deviations from its mean: one in 1.7 million, at a fixed seed."""
    mean, deviation = draws * probability, (draws * probability * (1 - probability)) ** 0.5
    assert all(abs(count - mean) <= 5 * deviation for count in counts), (min(counts), mean, max(counts))


# Distinct numbers. A population of at most 4 * count + 64 is shuffled, a larger one sampled with rejection.


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(0, 400), st.integers(0, 2**31), st.data())
def test_numbers_are_distinct_and_in_range(population: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, population))

    drawn = sample_distinct(population, count, seeded(seed))

    assert drawn.dtype == torch.int32
    assert len(drawn) == len(set(drawn.tolist())) == count
    assert set(drawn.tolist()) <= set(range(population))


@pytest.mark.parametrize("population", [0, 1, 5, 100])
def test_a_whole_population_is_a_permutation(population: int) -> None:
    assert sorted(sample_distinct(population, population, seeded()).tolist()) == list(range(population))


@pytest.mark.parametrize(("population", "count"), [(30, 4), (100, 9), (101, 9), (85, 5)])
def test_every_number_is_as_likely_as_any_other(population: int, count: int) -> None:
    """100 is the last population that is shuffled for 9, and 101 the first that is not."""
    generator, draws = seeded(), 4000
    seen = Counter(i for _ in range(draws) for i in sample_distinct(population, count, generator).tolist())

    assert_uniform([seen[i] for i in range(population)], draws, count / population)


@pytest.mark.parametrize(("population", "count"), [(20, 2), (73, 2)])
def test_every_position_is_as_likely_as_any_other(population: int, count: int) -> None:
    """The order is random too: the first number drawn is uniform, and so is the second."""
    generator, draws = seeded(), 6000
    drawn = torch.stack([sample_distinct(population, count, generator) for _ in range(draws)])

    for position in range(count):
        counts = drawn[:, position].bincount(minlength=population).tolist()
        assert_uniform(counts, draws, 1 / population)


def test_every_pair_is_as_likely_as_any_other() -> None:
    """With rejection, on a population made large enough for it: all pairs among the first 8 of 73."""
    generator, draws = seeded(), 20_000
    seen: Counter[tuple[int, ...]] = Counter()
    for _ in range(draws // 100):
        for row in torch.stack([sample_distinct(73, 2, generator) for _ in range(100)]).sort(1).values.tolist():
            seen[tuple(row)] += 1

    assert_uniform([seen[pair] for pair in combinations(range(8), 2)], draws, 2 / (73 * 72))


# Ascending: draws with replacement, of which the distinct ones are kept.


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(0, 2000), st.integers(0, 2**31), st.data())
def test_ascending_numbers_are_distinct_and_in_range(population: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, population))

    drawn = sample_absent(keys(), population, count, seeded(seed), ordered=True)

    assert drawn.dtype == torch.int32 and drawn.shape == (count,) and bool((drawn.diff() > 0).all())
    assert count == 0 or 0 <= int(drawn[0]) <= int(drawn[-1]) < population


@pytest.mark.parametrize(("population", "count"), [(30, 6), (30, 7), (200, 30), (200, 1), (200, 120)])
def test_every_ascending_number_and_pair_is_as_likely_as_any_other(population: int, count: int) -> None:
    """7 of 30 is shuffled, 6 is not."""
    generator, draws = seeded(), 6000
    drawn = torch.stack([sample_absent(keys(), population, count, generator, ordered=True) for _ in range(draws)])

    assert_uniform(drawn.flatten().bincount(minlength=population).tolist(), draws, count / population)
    seen = torch.zeros(draws, population).scatter_(1, drawn.long(), 1.0)[:, :: population // 10]
    together = (seen.T @ seen)[torch.ones(seen.shape[1], seen.shape[1]).triu(1).bool()].tolist()
    assert_uniform(together, draws, count * (count - 1) / (population * (population - 1)))


def test_an_ascending_draw_that_found_too_few_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number every time: the first draw holds one distinct one."""
    healthy, calls = torch.randint, []

    def randint(high: int, size: tuple[int], **options: Any) -> Tensor:
        calls.append(size)
        drawn = healthy(high, size, **options)
        return drawn.fill_(7) if len(calls) == 1 else drawn

    monkeypatch.setattr(torch, "randint", randint)
    drawn = sample_absent(keys(), 10_000, 100, seeded(), ordered=True)
    assert len(calls) >= 2 and drawn.unique().shape == (100,)


def test_the_same_seed_gives_the_same_numbers() -> None:
    for population in (50, 10**6):
        first, second = (sample_distinct(population, 10, seeded(3)).tolist() for _ in range(2))
        assert first == second


def test_a_huge_population_costs_memory_for_the_count_alone() -> None:
    """A thousand of two thousand million: a permutation would be 17 GB."""
    assert allocations(lambda: sample_distinct(2**31 - 1, 1000, seeded())).peak < 200_000


# Absent cells.


def keys(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_absent_cells_by_hand() -> None:
    """Of 8 cells 0, 3, 4 and 7 are taken."""
    drawn = sample_absent(keys(0, 3, 4, 7), 8, 4, seeded())

    assert sorted(drawn.tolist()) == [1, 2, 5, 6]
    assert drawn.dtype == torch.int32


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.integers(1, 300), st.data())
def test_all_absent_cells_are_the_complement(cells: int, data: st.DataObject) -> None:
    present = sorted(data.draw(st.sets(st.integers(0, cells - 1))))
    absent = set(range(cells)) - set(present)

    assert set(sample_absent(keys(*present), cells, len(absent), seeded()).tolist()) == absent


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(1, 300), st.data())
def test_some_absent_cells_are_distinct_and_absent(cells: int, data: st.DataObject) -> None:
    present = data.draw(st.sets(st.integers(0, cells - 1)))
    count = data.draw(st.integers(0, cells - len(present)))

    drawn = sample_absent(keys(*sorted(present)), cells, count, seeded()).tolist()

    assert len(drawn) == len(set(drawn)) == count
    assert not set(drawn) & present


@pytest.mark.parametrize(("cells", "count"), [(20, 2), (90, 2)])
def test_every_absent_cell_is_as_likely_as_any_other(cells: int, count: int) -> None:
    """Drawn by a shuffle (20 cells) and by rejection (90 cells)."""
    present = [0, 1, 5, 9, 10, 11, 19]
    generator, draws = seeded(), 4000
    seen = Counter(i for _ in range(draws) for i in sample_absent(keys(*present), cells, count, generator).tolist())

    absent = [cell for cell in range(cells) if cell not in present]
    assert set(seen) <= set(absent)
    assert_uniform([seen[cell] for cell in absent], draws, count / len(absent))


def test_none_of_a_full_grid() -> None:
    assert sample_absent(keys(0, 1, 2), 3, 0, seeded()).tolist() == []


@pytest.mark.parametrize("present", [[], [0, 1]])
def test_more_than_there_are_is_refused(present: list[int]) -> None:
    empty = 6 - len(present)

    with pytest.raises(ValueError, match=rf"count is {empty + 1}, but only {empty} of 6 cells are empty"):
        sample_absent(keys(*present), 6, empty + 1, seeded())


@pytest.mark.parametrize("count", [-1, 5])
def test_a_count_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"count is {count}, for distinct integers of 4; it must be 0 to 4"):
        sample_distinct(4, count, generator_for(0))


def test_ordered_draws_are_absent_ascending_and_equally_likely():
    present, draws = torch.tensor([0, 3, 4, 17]), 3000
    generator, counts = torch.Generator().manual_seed(1), torch.zeros(100)
    for _ in range(draws):
        keys = sample_absent(present, 100, 10, generator, ordered=True)
        assert keys.shape == (10,) and bool((keys.diff() > 0).all())
        counts[keys] += 1
    assert not counts[present].any()
    counts[present] = draws * 10 / 96
    assert_uniform(counts.tolist(), draws, 10 / 96)


ROWS, COLS = torch.tensor([1.0, 0.0, 3.0, 2.0]), torch.tensor([5.0, 1.0, 0.0, 2.0, 2.0])
JOINT = ROWS[:, None] * COLS / (ROWS.sum() * COLS.sum())
PRESENT = torch.tensor([0, 13, 18])  # (0, 0), (2, 3), (3, 3)


def chi_square_quantile(freedom: int) -> float:
    """Return about the 1 - 1e-6 quantile (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.753 * (2 / (9 * freedom)) ** 0.5) ** 3


def excess(keys: Tensor, weights: Tensor) -> float:
    """Return the chi-square statistic of drawn keys over its quantile; above 1 they have another distribution."""
    counts, weights = torch.bincount(keys, minlength=20), weights.flatten()
    expected = len(keys) * (weights / weights.sum())[weights > 0]
    statistic = float(((counts[weights > 0] - expected) ** 2 / expected).sum())
    return statistic / chi_square_quantile(expected.numel() - 1) + float(counts[weights == 0].sum())


def test_the_joint_distribution_has_rank_one():
    assert excess(sample_pairs(ROWS, COLS, 60_000, generator_for(0)), JOINT) < 1


def test_groups_of_rows_may_weigh_columns_apart():
    """Rows 0 and 1 see columns as COLS says, 2 and 3 another way; a group that weighs nothing is never drawn."""
    other = torch.tensor([0.0, 0.0, 4.0, 1.0, 3.0])
    for cols in (torch.stack([COLS, other]), torch.stack([COLS, torch.zeros(5)])):
        joint = ROWS[:, None] * cols.repeat_interleave(2, 0)
        assert excess(sample_pairs(ROWS, cols, 60_000, generator_for(0)), joint) < 1
        torch.testing.assert_close(row_weights(ROWS, cols), joint.sum(1).double())
    assert torch.equal(row_weights(ROWS, COLS), ROWS.double() * 10)


def test_a_draw_that_is_rounded_up_stays_in_its_group(monkeypatch):
    """The highest uniform number below 1: low + u * (high - low) is high itself."""
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.full((count,), 1 - 2**-53, dtype=torch.float64))
    cols = torch.tensor([[3.0, 0.0], [1e-3, 0.0], [5.0, 0.0]])
    assert sample_pairs(torch.tensor([0.0, 1, 0]), cols, 1, generator_for(0)).tolist() == [2]


def test_the_test_notices_another_distribution():
    keys = sample_pairs(ROWS, COLS + 0.1, 200_000, generator_for(0))
    assert excess(keys[JOINT.flatten()[keys] > 0], JOINT) > 1


def test_one_absent_cell_has_the_joint_distribution_outside_the_present_ones():
    weights = JOINT.flatten().clone()
    weights[PRESENT] = 0
    generator = generator_for(1)
    assert (
        excess(torch.cat([sample_absent_pairs(PRESENT, ROWS, COLS, 1, generator) for _ in range(20_000)]), weights) < 1
    )


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
    monkeypatch.setattr("sparsekern.topology.sampling.CHUNK", 1000)
    counts = torch.bincount(sample_pairs(ROWS, COLS, 2500, generator_for(0)), minlength=20)
    assert int(counts.sum()) == 2500 and not counts.view(4, 5)[JOINT == 0].any()
