"""Grids, and checks of arguments."""

from __future__ import annotations

import dataclasses

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekern.topology import Grid, block_pair, conv_grid
from sparsekern.topology.arguments import check_number, check_whole
from tests.topology.strategies import conv_grids, grids, ints


def test_a_grid_by_hand() -> None:
    """7 x 8 in blocks of 3 x 4: the third block row has one real row of three."""
    grid = Grid(out_features=7, in_features=8, block=(3, 4))

    assert (grid.rows, grid.cols, grid.cells, grid.numel) == (3, 2, 6, 56)
    assert grid.has_edge


@pytest.mark.parametrize(
    ("out_features", "in_features", "has_edge"), [(6, 8, False), (7, 8, True), (6, 9, True), (5, 7, True)]
)
def test_has_edge(out_features: int, in_features: int, has_edge: bool) -> None:
    assert Grid(out_features, in_features, (3, 4)).has_edge is has_edge


def test_a_block_larger_than_the_matrix() -> None:
    grid = Grid(2, 3, (128, 128))

    assert (grid.rows, grid.cols, grid.numel, grid.has_edge) == (1, 1, 6, True)
    assert grid.real_rows(ints(0)).tolist() == [2]
    assert grid.real_cols(ints(0)).tolist() == [3]


def test_real_rows_and_cols() -> None:
    """11 = 3 + 3 + 3 + 2 and 9 = 4 + 4 + 1; a free slot (-1) has none."""
    grid = Grid(11, 9, (3, 4))

    assert grid.real_rows(ints(0, 1, 2, 3, -1)).tolist() == [3, 3, 3, 2, 0]
    assert grid.real_cols(ints(0, 1, 2, -1)).tolist() == [4, 4, 1, 0]


@settings(deadline=None, max_examples=120, derandomize=True)
@given(st.one_of(grids(), conv_grids()))
def test_the_real_parts_make_up_the_matrix(grid: Grid) -> None:
    assert int(grid.real_rows(ints(*range(grid.rows))).sum()) == grid.out_features
    assert int(grid.real_cols(ints(*range(grid.cols))).sum()) == grid.in_features
    assert grid.has_edge == (grid.rows * grid.block[0] * grid.cols * grid.block[1] != grid.numel)


def test_grids_are_values() -> None:
    assert Grid(4, 6, (2, 3)) == Grid(4, 6, (2, 3))
    assert Grid(4, 6, (2, 3)) != Grid(4, 6, (2, 2))
    assert len({Grid(4, 6, (2, 3)), Grid(4, 6, (2, 3))}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Grid(4, 6, (2, 3)).out_features = 5  # type: ignore[misc]


@pytest.mark.parametrize("size", [0, -3])
@pytest.mark.parametrize("name", ["out_features", "in_features"])
def test_a_size_below_one_is_refused(name: str, size: int) -> None:
    sizes = {"out_features": 4, "in_features": 4, name: size}

    with pytest.raises(ValueError, match=rf"{name} is {size}; it must be 1 or more"):
        Grid(block=(2, 2), **sizes)


@pytest.mark.parametrize("block", [(0, 2), (2, 0), (-1, 4), (2,), (2, 2, 2)])
def test_a_block_that_is_none_is_refused(block: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="block_size is .* it must be an int or a pair"):
        Grid(4, 4, block)  # type: ignore[arg-type]


def test_a_grid_beyond_int32_is_refused() -> None:
    assert Grid(2**15, 2**16 - 1, (1, 1)).cells == 2**31 - 2**15
    with pytest.raises(ValueError, match=r"2147483648 cells; there must be fewer .* use larger blocks"):
        Grid(2**15, 2**16, (1, 1))


def test_block_pair() -> None:
    assert block_pair(32) == (32, 32)
    assert block_pair((16, 64)) == (16, 64)
    assert block_pair([16, 64]) == (16, 64)  # type: ignore[arg-type]


@pytest.mark.parametrize("block_size", [(1, 2, 3), (4,), 32.0, (16.7, 2), True, (True, 2), "32", None])
def test_a_block_size_that_is_no_pair_of_ints_is_refused(block_size: object) -> None:
    with pytest.raises(TypeError, match="block_size is .*; it must be an int or a pair of ints"):
        block_pair(block_size)  # type: ignore[arg-type]


# Convolutions.


def test_the_grid_of_a_convolution_by_hand() -> None:
    """Two groups of 5 x 3 channels and 3 x 1 taps, in blocks of 4 x 2: every group and every tap ends in an edge."""
    grid = conv_grid(6, 10, (3, 1), (4, 2), groups=2)

    assert (grid.out_features, grid.in_features, grid.weight_shape) == (10, 9, (10, 3, 3, 1))
    assert (grid.rows, grid.cols, grid.group_rows, grid.tap_cols) == (4, 6, 2, 2)
    assert grid.real_rows(ints(0, 1, 2, 3, -1)).tolist() == [4, 1, 4, 1, 0]
    assert grid.real_cols(ints(0, 1, 2, 3, 4, 5, -1)).tolist() == [2, 1, 2, 1, 2, 1, 0]
    assert grid.has_edge


def test_an_edge_is_one_of_a_tap_or_a_group_not_of_the_matrix() -> None:
    assert conv_grid(3, 8, (2, 2), (4, 4)).has_edge  # 12 columns divide by 4, 3 do not
    assert conv_grid(4, 8, (2, 2), (4, 4), groups=2).has_edge
    assert conv_grid(6, 8, (2, 2), (4, 2)).has_edge is False


def test_a_linear_grid_is_no_pointwise_convolution() -> None:
    assert Grid(4, 6, (2, 3)) != conv_grid(6, 4, (1, 1), (2, 3))
    assert Grid(4, 6, (2, 3)).weight_shape == (4, 6)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"in_channels": 0}, "in_channels is 0; it must be 1 or more"),
        ({"out_channels": -2}, "out_channels is -2; it must be 1 or more"),
        ({"groups": 3}, "in_channels is 4; it must be a multiple of groups = 3"),
        ({"groups": 4}, "out_channels is 6; it must be a multiple of groups = 4"),
        ({"groups": 0}, "groups is 0; it must be 1 or more"),
        ({"kernel": (3, 0)}, "kernel_size is .3, 0.; it must be 1 or more each way"),
        ({"block": (0, 4)}, "block_size is"),
    ],
)
def test_a_convolution_that_is_none_is_refused(sizes: dict[str, object], text: str) -> None:
    given = {"in_channels": 4, "out_channels": 6, "kernel": (3, 3), "block": (2, 2), **sizes}

    with pytest.raises(ValueError, match=text):
        conv_grid(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -3, numpy.int64(5), torch.tensor(7)])
def test_whole_numbers(value):
    check_whole("seed", value)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, torch.tensor(7.0), torch.ones(2)])
def test_no_whole_numbers(value):
    with pytest.raises(TypeError) as error:
        check_whole("seed", value)
    assert str(error.value) == f"seed is {value!r}; it must be a whole number"


@pytest.mark.parametrize("value", [0, 0.5, float("nan"), numpy.float32(1)])
def test_numbers(value):
    check_number("rate", value, "a number")


@pytest.mark.parametrize("value", ["0.5", None, 1j])
def test_no_numbers(value):
    with pytest.raises(TypeError) as error:
        check_number("rate", value, "a number above 0")
    assert str(error.value) == f"rate is {value!r}; it must be a number above 0"
