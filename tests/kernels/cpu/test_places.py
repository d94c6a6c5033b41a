"""The native library's lists of places: the same numbers as in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels.cpu import library, places
from sparsekern.kernels.eager import places as eager
from torch import Tensor

from tests.kernels.calls import ints
from tests.kernels.eager.test_places import KINDS, drawn, index_of, many_scores

needs_library = pytest.mark.skipif(library._open()[0] is None, reason=f"the native library {library._open()[1]}")
pytestmark = needs_library

SIZES = [(1, 1, 1, 0), (3, 2, 5, 1), (40, 30, 600, 0), (7, 500, 900, 40), (2000, 3, 2500, 7), (2**15, 2**15, 3000, 5)]
"""Block rows, block columns, blocks and free slots."""


def some_places(rows: int, cols: int, blocks: int, free: int, *, ascending: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(blocks)
    keys = torch.randint(rows * cols, (2 * blocks,), generator=generator).unique()
    keys = keys[torch.randperm(keys.shape[0], generator=generator)[:blocks]]
    keys = torch.cat([keys.sort().values if ascending else keys, torch.full((free,), -1)])
    order = torch.arange(keys.shape[0]) if ascending else torch.randperm(keys.shape[0], generator=generator)
    return eager.places_of(keys[order].int(), cols)


@pytest.mark.parametrize("by_slot", [True, False])
@pytest.mark.parametrize("ascending", [True, False])
@pytest.mark.parametrize(("rows", "cols", "blocks", "free"), SIZES)
def test_orders(rows: int, cols: int, blocks: int, free: int, ascending: bool, by_slot: bool) -> None:
    row, col = some_places(rows, cols, blocks, free, ascending=ascending)
    mine, theirs = (index_of(row.shape[0], rows, cols) for _ in range(2))
    places.orders_(mine, row, col, by_slot=by_slot, ascending=ascending)
    eager.orders_(theirs, row, col, by_slot=by_slot, ascending=ascending)
    for name, a, b in zip(mine._fields, mine, theirs, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("by_slot", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "cols", "blocks", "free"), SIZES)
def test_masks(rows: int, cols: int, blocks: int, free: int, share: float, by_slot: bool) -> None:
    row, col = some_places(rows, cols, blocks, free)
    slots = row.shape[0]
    index, mine, theirs = (index_of(slots, rows, cols) for _ in range(3))
    places.orders_(index, row, col, by_slot=by_slot, ascending=False)
    keep = torch.rand(2, slots, generator=torch.Generator().manual_seed(slots)).t()[:, 0] < share
    places.masked_(mine, index, keep, by_slot=by_slot)
    eager.masked_(theirs, index, keep, by_slot=by_slot)
    for name, a, b in zip(mine._fields, mine, theirs, strict=True):
        assert torch.equal(a, b), name


def test_masks_of_an_illegal_index_are_refused() -> None:
    row, col = some_places(4, 5, 9, 1)
    for part, at, wrong in (("row_ptr", 4, 11), ("row_ptr", 2, -1), ("col_slot", 3, 10), ("row_slot", 0, -1)):
        index, into = index_of(10, 4, 5), index_of(10, 4, 5)
        places.orders_(index, row, col, by_slot=False, ascending=False)
        getattr(index, part)[at] = wrong
        before = [(tensor.clone(), tensor._version) for tensor in into]
        with pytest.raises(ValueError, match="sk_masked met a number below 0 or too large"):
            places.masked_(into, index, torch.ones(10, dtype=torch.bool), by_slot=False)
        for tensor, (former, version) in zip(into, before, strict=True):  # some were written to before the call ended
            assert torch.equal(tensor, former) or tensor._version > version


def test_lists_without_storage_are_refused() -> None:
    freed = ints(1, 2)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="storage of a list of places was resized to nothing"):
        places.are_legal(freed, ints(1, 2), 3, 3)


@pytest.mark.parametrize("by_slot", [True, False])
def test_autograd_notices_that_an_index_is_rewritten(by_slot: bool) -> None:
    """The library writes behind PyTorch's back: a backward would read the new index where it needs the former."""
    row, col = some_places(4, 5, 9, 1)
    index, into = index_of(10, 4, 5), index_of(10, 4, 5)
    keep = torch.ones(10, dtype=torch.bool)
    kept = {"row_col", "col_row"} if by_slot else set()  # at 1x1 these are row and col, which others write
    for written, write in (
        (index, lambda: places.orders_(index, row, col, by_slot=by_slot, ascending=False)),
        (into, lambda: places.masked_(into, index, keep, by_slot=by_slot)),
    ):
        before = [tensor._version for tensor in written]
        write()
        for name, tensor, version in zip(written._fields, written, before, strict=True):
            assert (tensor._version > version) == (name not in kept), name


def test_orders_do_not_write_by_places_outside_the_grid() -> None:
    """They are refused by the library, and ordered as by the eager kernels."""
    row, col = ints(0, 7, 1), ints(1, 0, -9)
    mine, theirs = (index_of(3, 2, 2) for _ in range(2))
    places.orders_(mine, row, col, by_slot=False, ascending=False)
    eager.orders_(theirs, row, col, by_slot=False, ascending=False)
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize(("rows", "cols", "blocks", "free"), SIZES)
def test_legal_places(rows: int, cols: int, blocks: int, free: int) -> None:
    row, col = some_places(rows, cols, blocks, free)
    assert places.are_legal(row, col, rows, cols)
    for wrong_row, wrong_col in ((row[:1], col[:1]), (ints(rows), ints(0)), (ints(0), ints(cols)), (ints(-1), ints(0))):
        with_it = torch.cat([row, wrong_row]), torch.cat([col, wrong_col])
        # the first may be a free slot, of which there may be two
        assert places.are_legal(*with_it, rows, cols) == eager.are_legal(*with_it, rows, cols)
    used = row >= 0
    assert not places.are_legal(torch.cat([row, row[used][:1]]), torch.cat([col, col[used][:1]]), rows, cols)


@pytest.mark.parametrize(("count", "bound"), [(0, 9), (1, 1), (500, 90), (3000, 70_000), (3000, 2**31 - 1)])
def test_keys(count: int, bound: int) -> None:
    keys, present = drawn(1, count, bound), drawn(2, count // 2, bound).unique()
    assert torch.equal(places.distinct(keys, present, bound), eager.distinct(keys, present, bound))
    assert torch.equal(places.first_occurrences(keys, present, bound), eager.first_occurrences(keys, present, bound))
    some = torch.cat([keys, present[::3], ints(-1)])
    assert torch.equal(places.find(present, some, bound), eager.find(present, some, bound))
    for cols in (1, 7, 2**15):
        assert all(map(torch.equal, places.places_of(some, cols), eager.places_of(some, cols)))
    left_out = torch.arange(0, present.shape[0], 5)
    assert torch.equal(places.leave_out_(present.clone(), left_out), eager.leave_out_(present.clone(), left_out))


def test_keys_out_of_range_are_refused() -> None:
    for bad in (ints(3, 9), ints(3, -1)):
        with pytest.raises(ValueError, match="sk_distinct met a number below 0 or too large"):
            places.distinct(bad, ints(), 9)
        with pytest.raises(ValueError, match="sk_first met"):
            places.first_occurrences(bad, ints(), 9)
    with pytest.raises(ValueError, match="sk_find met"):
        places.find(ints(3, 9), ints(0), 9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("many", "count"), [*((3000, count) for count in (0, 1, 700, 2999, 3000, 4000)), (40_000, 50), (40_000, 5000)]
)
def test_selection(kind: str, many: int, count: int) -> None:
    scores = many_scores(kind, many)
    for select in ("lowest", "highest"):
        some = scores if select == "lowest" else scores.where(scores.isfinite(), -torch.inf)
        for given in (some, some[::2], some[:0], some.double()):
            assert torch.equal(getattr(places, select)(given, count), getattr(eager, select)(given, count))


@pytest.mark.parametrize("edges", [1, 2, 1000])
def test_search(edges: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(edges, dtype=torch.float64, generator=generator)
    weights[: edges // 3] = 0  # some widths are nothing, some nearly
    weights[edges // 2 : edges // 2 + 3] *= 1e-12
    ends = weights.cumsum(0)
    queries = torch.rand(3000, dtype=torch.float64, generator=generator) * ends[-1]
    queries = torch.cat([queries, ends[ends < ends[-1]], ends[-1:].nextafter(torch.zeros(1, dtype=torch.float64))])
    assert torch.equal(places.search(ends, queries), eager.search(ends, queries))


def test_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert places.takes(ints(1), torch.zeros(2))
    assert not places.takes(ints(1), torch.zeros(2, device="meta"))
    assert not places.takes(torch.nn.Parameter(torch.zeros(2)))  # a subclass may be anything
    monkeypatch.setattr(places, "load", lambda: (None, "there is none"))
    assert not places.takes(ints(1))
    with pytest.raises(RuntimeError, match="there is none"):
        places.are_legal(ints(1), ints(1), 2, 2)


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __getattr__(self, name: str) -> object:
            return lambda *_: places.NO_MEMORY

    monkeypatch.setattr(places, "load", lambda: (Full(), ""))
    with pytest.raises(MemoryError, match="sk_check finds no memory for its scratch"):
        places.are_legal(ints(1), ints(1), 2, 2)


def test_every_instruction_set_has_them(instructions: str) -> None:
    assert places.distinct(ints(4, 1, 4), ints(1), 9).tolist() == [4]
