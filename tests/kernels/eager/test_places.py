"""Lists of places in plain PyTorch, against Python's sets and sorts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sparsekern.kernels.contract import PADDING, Index
from sparsekern.kernels.eager import places
from torch import Tensor

from tests.kernels.calls import ints


def index_of(slots: int, rows: int, cols: int) -> Index:
    sizes = (rows + 1, slots + PADDING, slots + PADDING, cols + 1, slots + PADDING, slots + PADDING)
    return Index(*(torch.zeros(n, dtype=torch.int32) for n in sizes))


def drawn(seed: int, count: int, bound: int) -> Tensor:
    return torch.randint(bound, (count,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def test_orders_by_hand() -> None:
    """Slots 0 and 3 are free; slot 1 is at (2, 1), slot 2 at (0, 1), slot 4 at (2, 0)."""
    index = index_of(5, 3, 2)
    places.orders_(index, ints(-1, 2, 0, -1, 2), ints(-1, 1, 1, -1, 0), by_slot=False, ascending=False)
    lists = [t.tolist() for t in index]
    assert lists[0] == [0, 1, 1, 3] and lists[3] == [0, 1, 3]
    assert lists[1] == [1, 0, 1, 0, 0] + [0] * PADDING and lists[2] == [2, 4, 1, 0, 3] + [0] * PADDING
    assert lists[4] == [2, 0, 2, 0, 0] + [0] * PADDING and lists[5] == [4, 2, 1, 0, 3] + [0] * PADDING


@pytest.mark.parametrize(
    ("row", "col", "legal"),
    [
        ((0, 2, -1, -1), (1, 1, -1, -1), True),
        ((0, 2, 0), (1, 1, 1), False),
        ((0, 3), (1, 1), False),
        ((0, 2), (1, 2), False),
        ((0, -1), (1, 1), False),
        ((0, 1), (1, -1), False),
        ((0, -2), (1, -2), False),
        ((), (), True),
    ],
)
def test_legal_places(row: tuple[int, ...], col: tuple[int, ...], legal: bool) -> None:
    assert places.are_legal(ints(*row), ints(*col), 3, 2) is legal


@pytest.mark.parametrize(("count", "bound"), [(0, 5), (1, 1), (50, 60), (300, 5000)])
def test_distinct_absent_keys(count: int, bound: int) -> None:
    keys, present = drawn(1, count, bound), drawn(2, bound // 3, bound).unique()
    found = places.distinct(keys, present, bound)
    assert found.dtype == torch.int32
    assert found.tolist() == sorted(set(keys.tolist()) - set(present.tolist()))


def test_left_out() -> None:
    assert places.leave_out_(ints(5, 6, 7, 8), torch.tensor([0, 2])).tolist() == [6, 8]
    assert places.leave_out_(ints(5, 6), torch.tensor([], dtype=torch.int64)).tolist() == [5, 6]


def test_lowest_and_highest_by_hand() -> None:
    scores = torch.tensor([3.0, 1, torch.inf, 1, 2])
    assert places.lowest(scores, 3).tolist() == [1, 3, 4] and places.lowest(scores, 1).tolist() == [1]
    assert places.lowest(scores, 9).tolist() == [0, 1, 3, 4] and places.lowest(scores[:0], 2).tolist() == []
    scores = torch.tensor([3.0, 1, -torch.inf, 3, 0])
    assert places.highest(scores, 1).tolist() == [0] and places.highest(scores, 9).tolist() == [0, 1, 3, 4]
    assert places.highest(scores, 0).tolist() == places.highest(scores[2:3], 1).tolist() == []


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda scores: scores,
    "ties": lambda scores: (scores * 10).floor(),
    "near ties": lambda scores: 1 + scores * 1e-6,  # of one upper half
    "mostly infinite": lambda scores: scores.masked_fill(scores < 0.9, torch.inf),
    "tiny": lambda scores: scores * torch.finfo(scores.dtype).tiny,
    "zero": torch.zeros_like,
    "all in a column that is not looked at": lambda scores: scores.index_add(
        0, torch.arange(1, len(scores), 17), torch.ones_like(scores[1::17])
    ),
}


def many_scores(kind: str, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return KINDS[kind](torch.rand(count, dtype=dtype, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("many", "count"), [(3000, 1), (3000, 700), (3000, 2999), (3000, 3000), (40_000, 50)])
def test_lowest_and_highest_of_many(kind: str, many: int, count: int, dtype: torch.dtype) -> None:
    """Of so many that a sample bounds the best, too."""
    scores = many_scores(kind, many, dtype)
    for select in (places.lowest, places.highest):
        if select is places.highest:  # of scores that are not negative, but where there is none
            scores = scores.where(scores.isfinite(), -torch.inf)
        best = scores.argsort(stable=True, descending=select is places.highest)
        expected = best[scores[best].isfinite()][:count].sort().values
        assert torch.equal(select(scores, count), expected)


def test_find() -> None:
    assert places.find(ints(2, 5, 9), ints(9, 1, 2, -3, 11, 5), 12).tolist() == [2, -1, 0, -1, -1, 1]
    assert places.find(ints(), ints(4), 12).tolist() == [-1]


def test_first_occurrences_by_hand() -> None:
    keys = ints(3, 1, 3, 7, 1, 0)
    assert places.first_occurrences(keys, ints(), 8).tolist() == [True, True, False, True, False, True]
    assert places.first_occurrences(keys, ints(0, 3), 8).tolist() == [False, True, False, True, False, False]
    assert places.first_occurrences(ints(), ints(1), 8).tolist() == []


def test_places_of_keys() -> None:
    row, col = places.places_of(ints(7, -1, 0, 11), 4)
    assert row.tolist() == [1, -1, 0, 2] and col.tolist() == [3, -1, 0, 3]


def test_search_finds_the_first_edge_above() -> None:
    edges = torch.tensor([0.0, 1.0, 1.0, 4.0], dtype=torch.float64)
    queries = torch.tensor([0.0, 0.5, 1.0, 3.9], dtype=torch.float64)
    assert places.search(edges, queries).tolist() == [1, 1, 3, 3]
