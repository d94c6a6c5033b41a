from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekern.topology import Grid, Topology, check_multiple, check_tied, conv_grid, from_keys, one_tap, tie
from tests.topology.strategies import conv_grids, ints, places

GRID = conv_grid(4, 6, (1, 3), (2, 3))  # 2 block rows, 2 block columns in each of 3 taps


def test_one_tap_by_hand() -> None:
    assert one_tap(GRID) == conv_grid(4, 6, (1, 1), (2, 3))
    assert (one_tap(GRID).rows, one_tap(GRID).cols) == (3, 2)


def test_tie_by_hand() -> None:
    """Cells (2, 0) and (0, 1) of one tap, and a free slot between."""
    topology = tie(Topology(one_tap(GRID), ints(2, -1, 0), ints(0, -1, 1)), GRID)

    free = [(-1, -1)] * 3
    assert places(topology) == [(2, 0), (2, 2), (2, 4), *free, (0, 1), (0, 3), (0, 5)]
    topology.validate()
    check_tied(topology)


def test_one_tap_missing_by_hand() -> None:
    topology = Topology(GRID, ints(1, 1, 0, 0, 0), ints(0, 4, 1, 3, 5))

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


def test_a_number_of_blocks_that_is_no_multiple_of_the_taps() -> None:
    check_multiple(GRID, 6)
    with pytest.raises(ValueError, match="blocks is 5; with tie_taps=True it must be a multiple of the 3 taps"):
        check_multiple(GRID, 5)
