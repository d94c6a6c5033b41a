"""The norms of all blocks, a supertile of them a program, of layers and of convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sparsekern.kernels import gpu
from sparsekern.kernels.contract import ConvShape
from sparsekern.kernels.gpu.config import Supertile

from tests.device import DEVICE, DTYPES, in_dtypes
from tests.gpu_checks import SUPERTILE, calls, check_all_block_norms, corners, drawn, far_apart, forced
from tests.gpu_conv2d_checks import SHAPES, edge_case
from tests.oracle import check_norms


def config(tile_out: int, tile_in: int, tile_t: int = 16) -> Supertile:
    return Supertile(tile_out, tile_in, tile_t, warps=4, stages=3)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    in_dtypes(
        ((16, 16), 16, 16),
        ((16, 16), 64, 32),  # 3 rows and 4 columns of blocks: no whole number of supertiles
        ((16, 16), 128, 128),
        ((32, 32), 64, 64),
        ((64, 16), 64, 64),
        ((16, 64), 32, 128),
        ((128, 128), 128, 128),
    ),
)
def test_any_block_and_supertile(sizes: tuple[tuple[int, int], int, int], dtype: torch.dtype) -> None:
    check_all_block_norms(corners(sizes[0], dtype=dtype), config(*sizes[1:]))


@pytest.mark.parametrize("tokens", [1, 16, 17, 33])
@pytest.mark.parametrize("tile_t", [16, 64])
def test_any_number_of_tokens(tile_t: int, tokens: int) -> None:
    check_all_block_norms(corners((16, 16), tokens=tokens), config(32, 32, tile_t))


@pytest.mark.parametrize(("out_features", "in_features"), [(48, 64), (48, 61), (43, 64), (40, 56)])
def test_edges_on_either_side_aligned_or_not(out_features: int, in_features: int) -> None:
    check_all_block_norms(corners((16, 16), out_features=out_features, in_features=in_features), SUPERTILE)


@pytest.mark.parametrize("tile_t", [16, 64])
def test_tokens_behind_the_element_2_to_the_31(tile_t: int) -> None:
    """Reached by a later turn, and by a later token of one turn."""
    case = drawn(("xx",), block=(16, 16), tokens=33, out_features=16, in_features=32, dtype=torch.float16)

    with forced(config(16, 32, tile_t)):
        norms = gpu.linear.all_block_norms(far_apart(case.dy), far_apart(case.x), (16, 16), case.geometry)

    check_norms(case, norms.cpu())


def test_rows_that_are_2_to_the_31_elements_apart() -> None:
    """The stride itself is no int32."""
    case = drawn(("xx",), block=(16, 16), tokens=2, out_features=16, in_features=32, dtype=torch.float16)

    with forced(SUPERTILE):
        norms = gpu.linear.all_block_norms(far_apart(case.dy, 2**31), far_apart(case.x, 2**31), (16, 16), case.geometry)

    check_norms(case, norms.cpu())


def test_an_infinity_that_meets_the_filling_is_no_nan() -> None:
    case = corners((16, 16), out_features=43, in_features=61)
    case = replace(case, dy=case.dy.abs() + 1, x=case.x.abs() + 1)
    case.dy[2, 3] = float("inf")

    with forced(SUPERTILE):
        norms = calls.all_norms(case).cpu()

    assert norms[0].isinf().all() and norms[1:].isfinite().all()


def test_two_calls_agree_to_the_bit() -> None:
    case = corners((16, 16))

    with forced(SUPERTILE):
        assert torch.equal(calls.all_norms(case), calls.all_norms(case))


# Convolutions.


@pytest.mark.parametrize("name", ["padded", "dilated and strided", "grouped", "same, on four sides"])
def test_of_any_convolution(name: str) -> None:
    check_all_block_norms(edge_case(**SHAPES[name]), SUPERTILE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_a_convolution_of_any_dtype_as_it_is_configured_by_default(dtype: torch.dtype) -> None:
    check_all_block_norms(edge_case(dtype=dtype, kernel=(2, 2), block=(32, 16)))


@pytest.mark.parametrize("which", ["dy", "x"])
def test_a_nan_reaches_only_the_blocks_of_the_taps_that_see_it(which: str) -> None:
    """In dy a block row, in x a block of channels in the taps that see the pixel: the last one, which sticks out."""
    case = edge_case(kernel=(2, 1), padding=(0, 0, 0, 0), height=3, width=2, images=1)
    broken = getattr(case, which).clone()
    broken[0, -1, 0, 0] = float("nan")  # the pixel above left: seen by the first tap only
    expected = torch.zeros(2, 2, 3, dtype=torch.bool)  # row, tap, block of channels
    if which == "dy":
        expected[1] = True
    else:
        expected[:, 0, 2] = True
    with forced(SUPERTILE):
        norms = calls.all_norms(replace(case, **{which: broken}))
    assert torch.equal(norms.isnan().cpu().view(2, 2, 3), expected)


class Grid:
    """Stands for a kernel: notes its grid and launches nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grid = grid
        return lambda *args, **kwargs: None


def test_programs_are_counted_by_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second and third number of a grid end at 65535: 8192 groups of 9 taps are more."""
    kernel = Grid()
    monkeypatch.setattr(gpu.conv2d, "conv2d_supertile_kernel", kernel)
    x = torch.zeros(1, 8192 * 16, 1, 1, dtype=torch.float16, device=DEVICE)
    shape = ConvShape(8192 * 16, 8192 * 16, (3, 3), padding=(1, 1, 1, 1), groups=8192)
    with forced(config(64, 64)):
        gpu.conv2d.all_block_norms(x, x, (16, 16), shape)
    assert kernel.grid == (8192 * 9,)
