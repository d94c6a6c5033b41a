"""Norms of all blocks of the weight's gradient of a convolution, as :mod:`sparsekern.kernels.gpu.supertiles` forms
those of a linear layer: a program forms a tile of one tap of one group and reduces it.

It costs a dense weight gradient in time and one float a block in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from sparsekern.kernels.gpu.pixels import is_inside, place_of_next_token, place_of_token


@triton.jit(
    do_not_specialize=[
        "T", "groups", "rows", "height", "width", "height_out", "width_out", "taps", "per_tap", "kernel_width",
        "top", "left", "dilation_y", "dilation_x",
    ]
)  # fmt: skip
def conv2d_supertile_kernel(
    dy_ptr, x_ptr, norms_ptr,
    T, groups, rows, height, width, height_out, width_out,
    taps, per_tap, kernel_width, top, left, dilation_y, dilation_x, group_in, group_out, in_units, out_units,
    ALIGN: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr, TILE_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``TILE_OUT / BO`` by ``TILE_IN / BI`` norms of one tap of one group, both by the last program number."""
    ROWS: tl.constexpr = TILE_OUT // BO
    COLS: tl.constexpr = TILE_IN // BI
    group, tap = tl.program_id(2) // taps, tl.program_id(2) % taps
    o = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    i = tl.program_id(1) * TILE_IN + tl.arange(0, TILE_IN)
    t = tl.arange(0, TILE_T)
    in_group, out_group = in_units * ALIGN, out_units * ALIGN
    x_pitch, dy_pitch = (groups * in_group).to(tl.int64), (groups * out_group).to(tl.int64)
    tap_y, tap_x = tap // kernel_width * dilation_y - top, tap % kernel_width * dilation_x - left
    o_mask, i_mask = (o < out_group)[:, None], (i < in_group)[None, :]
    dy_ptrs = dy_ptr + (group * out_group + o)[:, None] + (t.to(tl.int64) * dy_pitch)[None, :]
    x_columns = x_ptr + (tap_y * width + tap_x).to(tl.int64) * x_pitch + (group * in_group + i)

    pixel, y, x = place_of_token(t, height, width, height_out, width_out, STRIDE_Y, STRIDE_X)
    acc = tl.zeros((TILE_OUT, TILE_IN), tl.float32)
    for begin in range(0, T, TILE_T):
        here = t < T - begin
        seen = here & is_inside(y + tap_y, height) & is_inside(x + tap_x, width)
        dy = tl.load(dy_ptrs + tl.cast(begin, tl.int64) * dy_pitch, mask=here[None, :] & o_mask, other=0.0)
        columns = tl.load(x_columns[None, :] + (pixel * x_pitch)[:, None], mask=seen[:, None] & i_mask, other=0.0)
        pixel, y, x = place_of_next_token(pixel, y, x, TILE_T, height, width, height_out, width_out, STRIDE_Y, STRIDE_X)
        acc = tl.dot(dy, columns, acc, input_precision=PRECISION)

    # An infinity that met the filling is no NaN.
    acc = tl.where((o < group_out)[:, None] & (i < group_in)[None, :], acc, 0.0)
    squares = tl.sum(tl.sum(tl.reshape(acc * acc, (ROWS, BO, COLS, BI)), 3), 1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    out = norms_ptr + (group * rows + r).to(tl.int64)[:, None] * (taps * per_tap) + (tap * per_tap + c)[None, :]
    tl.store(out, tl.sqrt(squares), mask=(r < rows)[:, None] & (c < per_tap)[None, :])
