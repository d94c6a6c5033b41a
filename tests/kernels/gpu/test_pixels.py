"""Where tokens are, by counting; and division without a division."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from sparsekern.kernels.gpu.pixels import is_inside, place_of_next_token, place_of_token, quotient

from tests.device import DEVICE


@triton.jit
def places_kernel(
    out_ptr, first, height, width, height_out, width_out,
    TILE: tl.constexpr, TURNS: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
):  # fmt: skip
    t = tl.arange(0, TILE)
    pixel, y, x = place_of_token(first + t, height, width, height_out, width_out, STRIDE_Y, STRIDE_X)
    for turn in range(TURNS):
        out = out_ptr + (turn * TILE + t) * 3
        tl.store(out, pixel)
        tl.store(out + 1, y)
        tl.store(out + 2, x)
        pixel, y, x = place_of_next_token(pixel, y, x, TILE, height, width, height_out, width_out, STRIDE_Y, STRIDE_X)


@triton.jit(do_not_specialize=["divisor"])
def quotients_kernel(numbers_ptr, out_ptr, divisor, SIZE: tl.constexpr):
    n = tl.arange(0, SIZE)
    tl.store(out_ptr + n, quotient(tl.load(numbers_ptr + n), divisor, 1))


@triton.jit(do_not_specialize=["size"])
def inside_kernel(places_ptr, out_ptr, size, SIZE: tl.constexpr):
    n = tl.arange(0, SIZE)
    tl.store(out_ptr + n, is_inside(tl.load(places_ptr + n), size).to(tl.int32))


@pytest.mark.parametrize(("height_out", "width_out"), [(1, 1), (1, 3), (2, 5), (3, 1), (4, 8), (7, 9), (2, 40)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("first", [0, 11])
def test_places(height_out: int, width_out: int, stride: tuple[int, int], first: int) -> None:
    """Tiles of less than a row, of several rows, of several images; x is a little larger than what windows begin in."""
    height, width, tile, turns = height_out * stride[0] + 1, width_out * stride[1] + 2, 16, 4
    out = torch.empty(turns * tile, 3, dtype=torch.int32, device=DEVICE)
    places_kernel[(1,)](out, first, height, width, height_out, width_out, tile, turns, *stride)

    for token, found in enumerate(out.tolist(), start=first):
        image, (row, col) = token // (height_out * width_out), divmod(token % (height_out * width_out), width_out)
        y, x = row * stride[0], col * stride[1]
        assert found == [(image * height + y) * width + x, y, x], f"token {token}"


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 10, 49, 127, 4095, 65537, 2**20 - 1])
def test_quotients_on_either_side_of_a_multiple(divisor: int) -> None:
    multiples = torch.arange(64) * (2**20 // divisor // 64 + 1) * divisor
    numbers = torch.cat([multiples, multiples + divisor - 1, multiples - 1, torch.arange(64)]).clamp(0, 2**20 - 1)
    out = torch.empty(256, dtype=torch.int32, device=DEVICE)
    quotients_kernel[(1,)](numbers.int().to(DEVICE), out, divisor, 256)

    assert torch.equal(out.cpu(), (numbers // divisor).int())


def test_inside_is_from_zero_to_below_the_size() -> None:
    places = torch.tensor([-(2**31), -1, 0, 4, 5, 6, 2**31 - 1, 1], dtype=torch.int32, device=DEVICE)
    out = torch.empty(8, dtype=torch.int32, device=DEVICE)
    inside_kernel[(1,)](places, out, 5, 8)

    assert out.tolist() == [0, 0, 1, 1, 0, 0, 0, 1]
