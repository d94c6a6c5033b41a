"""Where a token of a convolution is: its image, and the coordinates of x at which its window has its origin.

Tokens are numbered image by image and row by row of y. Kernels that sum over tokens carry the place of each from one
tile to the next; dividing anew in every turn would be most of their instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_of_token(token, height_out, width_out, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr):
    """Return ``(image, y, x)``, all int32: y and x are the coordinates in y times the stride."""
    in_image = token % (height_out * width_out)
    return (
        token // (height_out * width_out),
        in_image // width_out * STRIDE_Y,
        in_image % width_out * STRIDE_X,
    )


@triton.jit
def place_of_next_token(
    image, y, x, tokens: tl.constexpr, height_out, width_out, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr
):
    """Return the place so many tokens further on: an addition and a carry for each coordinate."""
    in_image = tokens % (height_out * width_out)
    x += in_image % width_out * STRIDE_X
    carry = x >= width_out * STRIDE_X
    x = tl.where(carry, x - width_out * STRIDE_X, x)
    y += in_image // width_out * STRIDE_Y
    y = tl.where(carry, y + STRIDE_Y, y)
    carry = y >= height_out * STRIDE_Y
    y = tl.where(carry, y - height_out * STRIDE_Y, y)
    image += tokens // (height_out * width_out)
    return tl.where(carry, image + 1, image), y, x


@triton.jit
def is_inside(place, size):
    """Return ``0 <= place < size`` by one comparison."""
    return place.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)
