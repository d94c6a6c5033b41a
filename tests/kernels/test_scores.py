"""What the scores of the eager and of the native kernels must do, of layers and of convolutions.

The native ones on every instruction set here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.kernels.calls import NAN, AnyCase, Calls, directions, ints, small_layer
from tests.oracle import DY_LAYOUTS, X_LAYOUTS, all_cells, check_sketch

Block = tuple[int, int]
Make = Callable[..., AnyCase]


@pytest.mark.parametrize("dy_layout", DY_LAYOUTS)
def test_any_strides(calls: Calls, block: Block, dy_layout: str) -> None:
    for x_layout in X_LAYOUTS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            calls.check_scores(small_layer(block, x_layout=x_layout, dy_layout=dy_layout, dtype=dtype))


def test_scores_of_nothing(calls: Calls, make: Make, block: Block) -> None:
    """Of no tokens they are zero; no blocks have no norms, and no directions no sketch."""
    case = make(block)
    cells, (u, v) = (case.grid.rows, case.grid.cols), directions(case, 2)
    nothing = replace(case, dy=case.dy[:0], x=case.x[:0])

    assert torch.equal(calls.all_norms(nothing), torch.zeros(cells))
    assert torch.equal(calls.chosen_norms(nothing, *all_cells(case)), torch.zeros(case.grid.cells))
    assert torch.equal(calls.sketch(nothing, u, v), torch.zeros(2, *cells))
    assert calls.chosen_norms(case, ints(), ints()).shape == (0,)
    assert calls.sketch(case, u[:0], v[:0]).shape == (0, *cells)


def test_sketches_of_micro_batches_add_up(calls: Calls, make: Make, block: Block) -> None:
    case = make(block, **({"tokens": 33} if make is small_layer else {"images": 5}))
    u, v = directions(case, 5)
    parts = [replace(case, dy=dy, x=x) for dy, x in zip(case.dy.split(2), case.x.split(2), strict=True)]

    check_sketch(case, sum(calls.sketch(part, u, v) for part in parts), u, v)


@pytest.mark.parametrize("which", ["dy", "x"])
def test_a_nan_reaches_only_the_blocks_that_it_belongs_to(calls: Calls, make: Make, block: Block, which: str) -> None:
    """In dy a block row, in x a block column (of every tap); also in the last one, which is filled up with zeros."""
    case = make(block)
    grid, axis = case.grid, int(which == "x")
    for number in (0, 1, (grid.rows, grid.groups * grid.tap_cols)[axis] - 1):
        group, place = divmod(number, (grid.group_rows, grid.tap_cols)[axis])
        channel = group * (grid.group_out, grid.tap_in)[axis] + place * grid.block[axis]
        broken = getattr(case, which).clone()
        broken[(1, channel, *(n // 2 for n in broken.shape[2:]))] = NAN
        expected = torch.zeros(grid.groups, grid.group_rows, grid.taps, grid.tap_cols, dtype=torch.bool)
        expected[group].select(2 * axis, place).fill_(True)
        expected = expected.flatten(2).flatten(0, 1)
        now = replace(case, **{which: broken})

        assert torch.equal(calls.all_norms(now).isnan(), expected)
        assert torch.equal(calls.chosen_norms(now, *all_cells(case)).view_as(expected).isnan(), expected)
        sketch = calls.sketch(now, *directions(case, 2))
        assert torch.equal(sketch.isnan(), expected.expand_as(sketch))


def test_two_calls_agree_to_the_bit(calls: Calls, make: Make, block: Block) -> None:
    case = make(block, dtype=torch.bfloat16)
    u, v = directions(case, 2)

    for score in (calls.all_norms, lambda c: calls.chosen_norms(c, *all_cells(c)), lambda c: calls.sketch(c, u, v)):
        assert torch.equal(score(case), score(case))
