"""Topologies for hypothesis to draw, and what several tests of this folder say about them."""

from __future__ import annotations

from hypothesis import strategies as st

from sparsekern.topology import Grid, Topology, conv_grid
from tests.kernels.calls import ints

SIDES = (1, 2, 3, 4)


@st.composite
def grids(draw: st.DrawFn, sides: tuple[int, ...] = SIDES, most: int = 9) -> Grid:
    """Rectangular grids of up to ``most`` blocks a side; the matrix ends anywhere inside the last ones."""
    bo, bi = draw(st.sampled_from(sides)), draw(st.sampled_from(sides))
    return Grid(draw(st.integers(1, most * bo)), draw(st.integers(1, most * bi)), (bo, bi))


@st.composite
def conv_grids(draw: st.DrawFn, sides: tuple[int, ...] = SIDES) -> Grid:
    """Grids of convolutions of up to 3 x 3 taps and 3 groups; each tap and group ends anywhere inside a block."""
    bo, bi = draw(st.sampled_from(sides)), draw(st.sampled_from(sides))
    kernel = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    group_out, group_in = draw(st.integers(1, 3 * bo)), draw(st.integers(1, 3 * bi))
    return conv_grid(groups * group_in, groups * group_out, kernel, (bo, bi), groups)


@st.composite
def topologies(draw: st.DrawFn, sides: tuple[int, ...] = SIDES, of: st.SearchStrategy[Grid] | None = None) -> Topology:
    """Any blocks of a grid in slots of any order, with up to 4 free ones between; sometimes all are free."""
    grid = draw(grids(sides) if of is None else of)
    free = draw(st.integers(0, 4))
    keys = draw(st.sets(st.integers(0, grid.cells - 1), min_size=0 if free else 1))
    slots = draw(st.permutations([*keys, *[-1] * free]))
    row = [-1 if key < 0 else key // grid.cols for key in slots]
    col = [-1 if key < 0 else key % grid.cols for key in slots]
    return Topology(grid, ints(*row), ints(*col))


def places(topology: Topology) -> list[tuple[int, int]]:
    """Return ``(row, col)`` of each slot, as Python numbers."""
    return list(zip(topology.row.tolist(), topology.col.tolist(), strict=True))
