"""Coordinates of the tokens of a convolution: the number of the pixel in x, and where its window begins.

Tokens are numbered image by image and row by row of y; the pixels of x likewise. All are int32: ``aligned_images``
sees to it. Kernels that sum over tokens carry the place of each from one tile to the next: dividing anew in every turn
would be most of their instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_of_token(token, height, width, height_out, width_out, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr):
    """Return ``(pixel, y, x)`` of x, ``height`` by ``width``: where the window of a token begins, without padding."""
    in_image = token % (height_out * width_out)
    y = in_image // width_out * STRIDE_Y
    x = in_image % width_out * STRIDE_X
    return (token // (height_out * width_out) * height + y) * width + x, y, x


@triton.jit
def place_of_next_token(
    pixel, y, x, tokens: tl.constexpr,
    height, width, height_out, width_out, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
):  # fmt: skip
    """Return the place ``tokens`` further on: an addition and a carry for each coordinate."""
    images, in_image = tokens // (height_out * width_out), tokens % (height_out * width_out)
    ahead_y, ahead_x = in_image // width_out * STRIDE_Y, in_image % width_out * STRIDE_X
    end_y, end_x = height_out * STRIDE_Y, width_out * STRIDE_X
    pixel += (images * height + ahead_y) * width + ahead_x
    y += ahead_y
    x += ahead_x
    carry = x >= end_x
    pixel = tl.where(carry, pixel + (STRIDE_Y * width - end_x), pixel)
    y = tl.where(carry, y + STRIDE_Y, y)
    x = tl.where(carry, x - end_x, x)
    carry = y >= end_y
    pixel = tl.where(carry, pixel + (height - end_y) * width, pixel)
    return pixel, tl.where(carry, y - end_y, y), x


@triton.jit
def is_inside(place, size):
    """Return ``0 <= place < size`` by one comparison."""
    return place.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)


@triton.jit
def quotient(number, divisor, SAME: tl.constexpr):
    """Return ``number // divisor`` of small numbers, below 2**20: a sixth of the instructions of a division.

    The half keeps the product farther from a whole number than float32 rounds. SAME numbers in a row are equal (1 for
    one number); the compiler forgets that at a conversion, and at the end of a function too.
    """
    found = ((number.to(tl.float32) + 0.5) * (1.0 / divisor.to(tl.float32))).to(tl.int32)
    return tl.max_constancy(found, SAME) if SAME > 1 else found
