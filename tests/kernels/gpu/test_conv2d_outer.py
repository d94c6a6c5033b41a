"""The kernel of stored gradients of a convolution and of the norms of chosen blocks."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels.gpu import conv2d
from sparsekern.kernels.gpu.config import Outer

from tests.device import DTYPES
from tests.gpu_checks import check_block_norms, check_outer, dvalues, forced
from tests.gpu_conv2d_checks import (
    GATHER,
    PARTS,
    check_that_phantom_elements_are_zero,
    edge_case,
)

SPLIT = {"images": 4, "height": 9, "width": 11, "blocks": 3, "padding": (0, 1, 1, 0)}
"""So few blocks that the pixels are cut; the last split is short."""


@pytest.mark.parametrize("tile_in", [16, 64, 128])
@pytest.mark.parametrize("free", [0, 5])
def test_programs_find_their_row(tile_in: int, free: int) -> None:
    check_outer(edge_case(images=1, height=3, width=3, free=free, blocks=9, groups=2), Outer(tile_in, 16, 4, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("given", "config"), [({}, GATHER), ({"block": (16, 32)}, PARTS)])
def test_pixels_in_splits(given: dict, config: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []
    healthy = conv2d.sum_splits_kernel

    class Counting:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: sums.append(args[3]) or healthy[grid](*args, **kwargs)

    monkeypatch.setattr(conv2d, "sum_splits_kernel", Counting())
    check_outer(edge_case(**SPLIT, **given, dtype=dtype), *config)
    assert sums == [2]


@pytest.mark.parametrize("tile_t", [16, 64, 128])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (2, 40), (9, 2)])
def test_tiles_over_rows_and_images(tile_t: int, height: int, width: int) -> None:
    """A tile spans less than a row, several rows, several images, with a stride."""
    given = {"height": height, "width": width, "images": 5, "stride": (2, 3), "padding": (1, 1, 2, 1), "blocks": 4}

    check_outer(edge_case(**given), Outer(32, tile_t, 4, 3))


def test_the_gradient_comes_in_the_dtype_that_is_asked_for() -> None:
    check_outer(edge_case(dtype=torch.float16, blocks=3), *GATHER, dtype=torch.float32)


def test_two_calls_agree_to_the_bit() -> None:
    case = edge_case(**SPLIT)
    with forced(*GATHER):
        assert torch.equal(dvalues(case), dvalues(case))


@pytest.mark.parametrize("given", [{}, {"groups": 2, "group_out": 21, "group_in": 16}])
def test_phantom_elements_and_free_slots_are_zero_whatever_dy_and_x_hold(given: dict) -> None:
    check_that_phantom_elements_are_zero(edge_case(**{"padding": (0, 0, 0, 0), **given}), *GATHER)


@pytest.mark.parametrize("given", [{"images": 1}, {"kernel": (1, 2), "images": 8, "groups": 2}])
def test_norms_of_chosen_blocks(given: dict) -> None:
    """The second one in splits: the norm of a sum is formed after the sum."""
    check_block_norms(edge_case(**given), *GATHER)
