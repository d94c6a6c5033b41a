"""The kernel of y and dx of a convolution: taps, phases, groups, edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.device import DTYPES
from tests.gpu_checks import check_products, dx, forced, fwd
from tests.gpu_conv2d_checks import (
    GATHER,
    PARTS,
    SHAPES,
    check_kernels,
    check_that_nan_stays_where_it_is_read,
    edge_case,
    whole_case,
)


@pytest.mark.parametrize("name", SHAPES)
def test_any_convolution_by_gathered_blocks(name: str) -> None:
    check_kernels(edge_case(**SHAPES[name]), *GATHER)


@pytest.mark.parametrize("name", ["padded", "dilated and strided", "grouped"])
def test_any_convolution_by_parts_of_blocks(name: str) -> None:
    check_kernels(edge_case(**SHAPES[name], block=(32, 32)), *PARTS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(16, 32), (32, 16)])
def test_rectangles_in_any_dtype(block: tuple[int, int], dtype: torch.dtype) -> None:
    check_kernels(edge_case(block=block, dtype=dtype, images=1), *GATHER)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_that_fit(dtype: torch.dtype) -> None:
    check_kernels(whole_case(dtype=dtype, bias=False, stride=(2, 1)), *GATHER)


def test_as_it_is_configured_by_default() -> None:
    check_kernels(edge_case(block=(64, 64), images=1, height=3, width=4, blocks=6))


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_empty_rows_and_columns(stride: tuple[int, int]) -> None:
    """One block of all: the other rows are the bias, the other channels and phases zero."""
    check_kernels(edge_case(blocks=1, stride=stride), *GATHER)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 1)])
def test_phases_of_few_pixels_or_none(size: tuple[int, int]) -> None:
    """An image of one row has no pixel in the other phases of rows."""
    check_kernels(edge_case(height=size[0], width=size[1], stride=(3, 2), padding=(1, 2, 1, 1)), *GATHER)


def test_tiles_of_several_images() -> None:
    check_kernels(edge_case(images=9, height=2, width=2, kernel=(2, 2), stride=(2, 1)), *GATHER)


@pytest.mark.parametrize(("config", "block"), [(GATHER, (16, 16)), (PARTS, (32, 32))])
def test_a_nan_reaches_only_what_reads_it(config: tuple, block: tuple[int, int]) -> None:
    check_that_nan_stays_where_it_is_read(whole_case(block=block, blocks=6, images=1, height=3, width=3), *config)


def test_infinities_stay_infinite() -> None:
    """Padding is zero and adds nothing; what fills up a tile of blocks is zero on both sides."""
    case = whole_case(height=2, width=2, images=1, blocks=5)
    x, dy = (torch.full_like(part, float("inf")) for part in (case.x, case.dy))
    infinite = replace(case, x=x, dy=dy, values=case.values.abs(), bias=None)
    with forced(*GATHER):
        results = fwd(infinite), dx(infinite)
    for result in results:
        assert result.isinf().any() and not result.isnan().any()


def test_two_calls_agree_to_the_bit() -> None:
    case = edge_case(stride=(2, 2))
    with forced(*GATHER):
        assert torch.equal(dx(case), dx(case))


def test_values_of_another_dtype_are_rounded() -> None:
    check_products(edge_case(dtype=torch.float16, values_dtype=torch.float32, images=1), *GATHER)
