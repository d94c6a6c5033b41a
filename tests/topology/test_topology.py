"""Places of blocks, tied taps, and the kernels for lists of places."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsekern.kernels.cpu import library
from sparsekern.kernels.cpu import places as cpu
from sparsekern.kernels.eager import places as eager
from torch import Tensor

from sparsekern.topology import (
    Grid,
    Topology,
    check_tied,
    conv_grid,
    from_keys,
    one_tap,
    tie,
    with_capacity,
)
from sparsekern.topology.topology import Places, places_for
from tests.topology.strategies import conv_grids, ints, places, topologies

# Slots a to d, and the free slot f, in a grid of 4 x 4 blocks of 2 x 2; the matrix ends after 7 rows and 8 columns.
#
#     a . . .
#     . . b .
#     . . . .
#     c . . d
#
GRID = Grid(7, 8, (2, 2))


def five_slots() -> Topology:
    return Topology(GRID, ints(0, 1, -1, 3, 3), ints(0, 2, -1, 0, 3))


def test_equal_is_the_same_object() -> None:
    """Not a comparison of tensors, of which Python 3.13 asks a truth value that they do not have."""
    topology = Topology(GRID, ints(0), ints(0))
    assert topology == topology and topology != Topology(GRID, topology.row, topology.col)


# Numbers.


def test_counts() -> None:
    topology = five_slots()

    assert topology.slots == 5
    assert topology.blocks() == 4
    assert topology.used().tolist() == [True, True, False, True, True]
    assert topology.elements() == 4 + 4 + 2 + 2  # the last block row has one real row of two
    assert topology.sparsity() == 1 - 12 / 56


def test_keys() -> None:
    assert five_slots().keys().tolist() == [0, 6, 16, 12, 15]
    assert five_slots().keys().dtype == torch.int32
    assert five_slots().sorted_keys().tolist() == [0, 6, 12, 15]


def test_from_keys_is_the_inverse_of_keys() -> None:
    topology = from_keys(GRID, torch.tensor([6, 0, 15]))

    assert places(topology) == [(1, 2), (0, 0), (3, 3)]
    assert topology.row.dtype == topology.col.dtype == torch.int32
    assert topology.keys().tolist() == [6, 0, 15]


def test_real_elements() -> None:
    real = five_slots().real()

    assert real is not None
    whole, none, cut = [[True, True], [True, True]], [[False] * 2] * 2, [[True, True], [False, False]]
    assert real.tolist() == [whole, whole, none, cut, cut]


def test_there_is_no_mask_where_everything_is_real() -> None:
    topology = Topology(Grid(8, 8, (2, 2)), ints(0, 1), ints(0, 2))

    assert topology.real() is None
    assert with_capacity(topology, 3).real() is not None
    assert Topology(Grid(7, 8, (2, 2)), ints(0), ints(0)).real() is not None


@settings(deadline=None, max_examples=60, derandomize=True)
@given(topologies())
def test_elements_are_those_inside_the_matrix(topology: Topology) -> None:
    grid, (bo, bi) = topology.grid, topology.grid.block
    inside = [
        r >= 0 and r * bo + a < grid.out_features and c * bi + b < grid.in_features
        for r, c in places(topology)
        for a in range(bo)
        for b in range(bi)
    ]
    real = topology.real()

    assert topology.elements() == sum(inside)
    assert topology.sparsity() == 1 - sum(inside) / grid.numel
    if real is None:
        assert all(inside)
    else:
        assert real.expand(topology.slots, bo, bi).flatten().tolist() == inside


@settings(deadline=None, max_examples=60, derandomize=True)
@given(topologies())
def test_what_is_drawn_is_valid(topology: Topology) -> None:
    topology.validate()

    assert topology.sorted_keys().tolist() == sorted(r * topology.grid.cols + c for r, c in places(topology) if r >= 0)


# Moves.


def test_moved_by_hand() -> None:
    """a goes to where d is, and d below b; b and c stay.

    . . . .
    . . b .
    . . d .
    c . . a
    """
    before = five_slots()

    after = before.moved(ints(0, 4), ints(3, 2), ints(3, 2))

    assert places(after) == [(3, 3), (1, 2), (-1, -1), (3, 0), (2, 2)]
    assert places(before) == [(0, 0), (1, 2), (-1, -1), (3, 0), (3, 3)]
    assert after.grid == before.grid


def test_a_free_slot_is_taken_and_a_used_one_freed_by_a_move() -> None:
    after = five_slots().moved(ints(2, 0), ints(0, -1), ints(1, -1))

    assert places(after) == [(-1, -1), (1, 2), (0, 1), (3, 0), (3, 3)]


def test_two_blocks_change_places() -> None:
    after = five_slots().moved(ints(0, 1), ints(1, 0), ints(2, 0))

    assert places(after)[:2] == [(1, 2), (0, 0)]


def test_nothing_moves() -> None:
    assert places(five_slots().moved(ints(), ints(), ints())) == places(five_slots())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_moves_take_int32_and_int64(dtype: torch.dtype) -> None:
    after = five_slots().moved(*(torch.tensor([number], dtype=dtype) for number in (0, 2, 1)))

    assert places(after)[0] == (2, 1)
    assert after.row.dtype == after.col.dtype == torch.int32


@pytest.mark.parametrize("slots", [ints(0, 5), ints(-1, 0)])
def test_a_slot_that_does_not_exist_cannot_move(slots: Tensor) -> None:
    with pytest.raises(ValueError, match=rf"slots holds {slots.min()} to {slots.max()}; it must be 0 to 4"):
        five_slots().moved(slots, ints(2, 2), ints(0, 1))


@pytest.mark.parametrize("number", [4, -2, 2**32, 2**32 + 2])
def test_a_block_cannot_go_outside_the_grid(number: int) -> None:
    """Nor by way of an int32 that wraps."""
    far, here = torch.tensor([2, number]), torch.tensor([0, 0])
    with pytest.raises(ValueError, match=rf"row is {number} for slot 3; it must be 0 to 3, or -1 if free"):
        five_slots().moved(ints(1, 3), far, here)
    with pytest.raises(ValueError, match=rf"col is {number} for slot 3; it must be 0 to 3, or -1 if free"):
        five_slots().moved(ints(1, 3), here, far)


@pytest.mark.parametrize(("row", "col"), [(0, -1), (-1, 0)])
def test_a_slot_is_free_in_both_coordinates(row: int, col: int) -> None:
    with pytest.raises(ValueError, match=rf"slot 1 is at block \({row}, {col}\); the grid has 4 x 4 blocks"):
        five_slots().moved(ints(1), ints(row), ints(col))


# Validation.


@pytest.mark.parametrize(
    ("row", "col", "message"),
    [
        (torch.tensor([0]), ints(0), r"row is torch.int64 of shape \(1,\); it must be int32 of shape \(slots,\)"),
        (ints(0), torch.tensor([0.0]), r"col is torch.float32 of shape \(1,\)"),
        (ints(0)[None], ints(0), r"row is torch.int32 of shape \(1, 1\)"),
        (ints(0), torch.tensor(0, dtype=torch.int32), r"col is torch.int32 of shape \(\)"),
        (ints(0, 1), ints(0), "row has 2 slots on cpu, col 1 on cpu; they must agree"),
        (ints(0), ints(0).to("meta"), "row has 1 slots on cpu, col 1 on meta; they must agree"),
        (ints(), ints(), "the topology has no slots; it needs at least one"),
        (ints(0, 4), ints(0, 0), r"slot 1 is at block \(4, 0\); the grid has 4 x 4 blocks, and a free slot"),
        (ints(0, 0), ints(0, 4), r"slot 1 is at block \(0, 4\)"),
        (ints(-1, 0), ints(0, 0), r"slot 0 is at block \(-1, 0\)"),
        (ints(0, -1), ints(-1, -1), r"slot 0 is at block \(0, -1\)"),
        (ints(0, 9, 8), ints(0, 0, 0), r"slot 1 is at block \(9, 0\)"),
        (ints(0, 0, -2), ints(0, 1, -2), r"slot 2 is at block \(-2, -2\)"),
        (ints(2, 0, 2), ints(1, 0, 1), r"slots 0 and 2 are both at block \(2, 1\); each block is stored once"),
    ],
)
def test_what_is_wrong_is_named(row: Tensor, col: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Topology(GRID, row, col).validate()


@pytest.mark.parametrize("slots", [1, 3])
def test_nothing_but_free_slots_is_valid(slots: int) -> None:
    free = torch.full((slots,), -1, dtype=torch.int32)

    Topology(GRID, free, free).validate()


# Capacity.


def test_capacity_is_appended_as_free_slots() -> None:
    topology = with_capacity(five_slots(), 7)

    topology.validate()
    assert places(topology) == [*places(five_slots()), (-1, -1), (-1, -1)]
    assert topology.row.dtype == topology.col.dtype == torch.int32
    assert topology.blocks() == 4


def test_capacity_may_be_just_enough() -> None:
    assert places(with_capacity(five_slots(), 5)) == places(five_slots())


def test_a_topology_is_a_view_of_the_tensors_that_it_is_given() -> None:
    row, col = ints(0, 1), ints(0, 1)
    topology = Topology(GRID, row, col)

    row[0] = 2

    assert places(topology)[0] == (2, 0)


CONV = conv_grid(4, 6, (1, 3), (2, 3))  # 2 block rows, 2 block columns in each of 3 taps


def test_one_tap_by_hand() -> None:
    assert one_tap(CONV) == conv_grid(4, 6, (1, 1), (2, 3))
    assert (one_tap(CONV).rows, one_tap(CONV).cols) == (3, 2)


def test_tie_by_hand() -> None:
    """Cells (2, 0) and (0, 1) of one tap, and a free slot between."""
    topology = tie(Topology(one_tap(CONV), ints(2, -1, 0), ints(0, -1, 1)), CONV)

    free = [(-1, -1)] * 3
    assert places(topology) == [(2, 0), (2, 2), (2, 4), *free, (0, 1), (0, 3), (0, 5)]
    topology.validate()
    check_tied(topology)


def test_one_tap_missing_by_hand() -> None:
    topology = Topology(CONV, ints(1, 1, 0, 0, 0), ints(0, 4, 1, 3, 5))

    with pytest.raises(ValueError, match=r"at row 1, channels 0 is stored in 2 of 3 taps; with tie_taps=True it must"):
        check_tied(topology)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(conv_grids(), st.data())
def test_what_is_tied_is_tied_in_any_order_of_slots(grid: Grid, data: st.DataObject) -> None:
    one = one_tap(grid)
    keys = data.draw(st.sets(st.integers(0, one.cells - 1), min_size=1))
    topology = tie(from_keys(one, torch.tensor(sorted(keys))), grid)
    order = torch.tensor(data.draw(st.permutations(range(topology.slots))))

    assert topology.blocks() == grid.taps * len(keys)
    topology.validate()
    check_tied(Topology(grid, topology.row[order], topology.col[order]))
    if grid.taps > 1:
        with pytest.raises(ValueError, match="it must be all or none"):
            check_tied(Topology(grid, topology.row[1:], topology.col[1:]))


def test_a_linear_layer_has_one_tap() -> None:
    check_tied(Topology(Grid(4, 4, (2, 2)), ints(0, 1), ints(1, 1)))


def test_both_have_all_functions() -> None:
    def functions(where: object, name: str) -> set[str]:
        own = (f for f in vars(where).values() if inspect.isfunction(f) and f.__module__ == name)
        return {f.__name__ for f in own if not f.__name__.startswith("_")}

    names = functions(Places, Places.__module__)
    assert names == functions(eager, eager.__name__) == functions(cpu, cpu.__name__) - {"takes"}
    for name in names:
        wanted = list(inspect.signature(getattr(Places, name)).parameters)[1:]
        assert all(list(inspect.signature(getattr(kernels, name)).parameters) == wanted for kernels in (cpu, eager))


def test_the_native_ones_are_taken_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.zeros(3, dtype=torch.int32)
    monkeypatch.setattr(cpu, "load", lambda: (object(), ""))
    assert places_for(numbers, numbers) is cpu
    assert places_for(numbers, numbers.to("meta")) is eager
    monkeypatch.setattr(cpu, "load", lambda: (None, ""))
    assert places_for(numbers) is eager
    assert library.load is not cpu.load
