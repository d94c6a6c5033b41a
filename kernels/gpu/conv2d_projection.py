"""What each tap of a convolution sees of x, times random directions: one half of a sketch of the weight's gradient.

out[q, group, tap * CB + cb, t] = sum over i in block cb of x[where the tap sees it from t, group, i] * v[q, tap, i]
"""

from __future__ import annotations

import triton
import triton.language as tl
from sparsekern.kernels.gpu.pixels import is_inside, place_of_token


@triton.jit(
    do_not_specialize=[
        "first", "T", "groups", "group_in", "height", "width", "height_out", "width_out", "taps", "per_tap",
        "kernel_width", "top", "left", "dilation_y", "dilation_x", "pairs",
    ]
)  # fmt: skip
def conv2d_projection_kernel(
    x_ptr, direction_ptr, out_ptr,
    first, T, groups, group_in, height, width, height_out, width_out,
    taps, per_tap, kernel_width, top, left, dilation_y, dilation_x, pairs,
    SIDE: tl.constexpr, TILE_T: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
):  # fmt: skip
    """Write ``out[all q, one group, one block column, TILE_T pixels]``; t counts the T pixels from ``first`` on."""
    blocks = groups * taps * per_tap
    block = tl.program_id(0) % blocks
    group, column = block // (taps * per_tap), block % (taps * per_tap)
    tap = column // per_tap
    t = tl.program_id(0) // blocks * TILE_T + tl.arange(0, TILE_T)
    pixel, y, x = place_of_token(first + t, height, width, height_out, width_out, STRIDE_Y, STRIDE_X)
    tap_y, tap_x = tap // kernel_width * dilation_y - top, tap % kernel_width * dilation_x - left
    i = column % per_tap * SIDE + tl.arange(0, SIDE)
    seen = (t < T) & is_inside(y + tap_y, height) & is_inside(x + tap_x, width)
    start = (pixel + (tap_y * width + tap_x)).to(tl.int64) * (groups * group_in) + group * group_in
    x = tl.load(x_ptr + start[:, None] + i[None, :], mask=seen[:, None] & (i < group_in)[None, :], other=0.0)
    x = x.to(tl.float32)
    for q in range(pairs):
        line = tl.cast(q, tl.int64)
        direction = direction_ptr + (line * taps + tap) * group_in + i
        direction = tl.load(direction, mask=i < group_in, other=0.0)
        out = out_ptr + (line * blocks + block) * T + t
        tl.store(out, tl.sum(x * direction[None, :], 1), mask=t < T)
