"""Triton kernels for the gradient of a convolution's weight, as :mod:`sparsekern.kernels.gpu.outer` for linear layers.

Groups, pieces and splits of the pixels are as there, with pixels of y as tokens.

out[slot, n, i] = sum over t of dy[t, row * bo + n] * x[where the block's tap sees it from t, its channel i]

A column of a tile is a tap and a channel. Both stay as they are in the loop; the pixels of the tile move on.
"""

from __future__ import annotations

import triton
import triton.language as tl
from sparsekern.kernels.gpu.outer import LISTS, place_of_group
from sparsekern.kernels.gpu.pixels import is_inside, place_of_next_token, place_of_token


@triton.jit(
    do_not_specialize=[
        "T", "tokens_per_split", "groups", "rows", "slots", "search_steps", "height", "width", "height_out",
        "width_out", "per_tap", "kernel_width", "top", "left", "dilation_y", "dilation_x",
    ],
    do_not_specialize_on_alignment=LISTS,
)  # fmt: skip
def conv2d_outer_kernel(
    dy_ptr, x_ptr, row_ptr_ptr, column_ptr, slot_ptr, out_ptr,
    T, tokens_per_split, groups, rows, slots, search_steps, height, width, height_out, width_out,
    per_tap, kernel_width, top, left, dilation_y, dilation_x, group_in, group_out, in_units, out_units,
    ALIGN: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, TILE_IN: tl.constexpr, TILE_T: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, EDGE_T: tl.constexpr, EDGE_IN: tl.constexpr,
    EDGE_OUT: tl.constexpr, NORMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a group of blocks (their norms if NORMS) of one split of the pixels.

    ``rows`` are the block rows of a group; ``in_units * ALIGN`` are the channels of a group of x, filled up with zeros.
    """
    BLOCKS: tl.constexpr = TILE_IN // BI if TILE_IN > BI else 1
    SIDE: tl.constexpr = BI if BI < TILE_IN else TILE_IN
    split, piece, all_rows = tl.program_id(1), tl.program_id(2), groups * rows
    row, first, stop = place_of_group(row_ptr_ptr, all_rows, slots, search_steps, BLOCKS)

    g = piece * TILE_IN + tl.arange(0, TILE_IN)
    n, t = tl.arange(0, BO), tl.arange(0, TILE_T)
    entry = tl.maximum(tl.minimum(first + g // BI, stop - 1), 0)
    number = tl.load(column_ptr + entry)
    tap = number // per_tap
    tap_y = tl.max_constancy(tap // kernel_width * dilation_y - top, SIDE)
    tap_x = tl.max_constancy(tap % kernel_width * dilation_x - left, SIDE)
    channel = tl.max_contiguous(tl.multiple_of(number % per_tap * BI + g % BI, SIDE), SIDE)
    group, feature = row // rows, row % rows * BO + n
    in_group, out_group = in_units * ALIGN, out_units * ALIGN
    x_pitch, dy_pitch = (groups * in_group).to(tl.int64), groups * out_group
    reach = (tap_y * width + tap_x).to(tl.int64) * x_pitch + (group * in_group + channel)
    x_columns = x_ptr + tl.max_contiguous(tl.multiple_of(reach, ALIGN), SIDE)

    begin = split * tokens_per_split
    count = tl.minimum(tokens_per_split, T - begin)
    count = tl.where((first < stop) & (row < all_rows), count, 0)  # else there is nothing to add up
    pixel, y, x = place_of_token(begin + t, height, width, height_out, width_out, STRIDE_Y, STRIDE_X)
    token = begin.to(tl.int64) + t
    dy_ptrs = dy_ptr + token[:, None] * dy_pitch + (group * out_group + feature)[None, :]
    acc = tl.zeros((TILE_IN, BO), tl.float32)
    for i in range(0, count, TILE_T):
        # A mask that is not needed costs two instructions per copy.
        here = t < (count - i if EDGE_T else TILE_T)
        seen = is_inside(y[None, :] + tap_y[:, None], height) & is_inside(x[None, :] + tap_x[:, None], width)
        seen = seen & here[None, :] if EDGE_T else seen
        seen = seen & (channel < in_group)[:, None] if EDGE_IN else seen
        dy_mask = here[:, None] & (feature < out_group)[None, :] if EDGE_OUT else here[:, None]
        columns = tl.load(x_columns[:, None] + (pixel * x_pitch)[None, :], mask=seen, other=0.0)
        dy = tl.load(dy_ptrs + tl.cast(i, tl.int64) * dy_pitch, mask=dy_mask, other=0.0)
        pixel, y, x = place_of_next_token(pixel, y, x, TILE_T, height, width, height_out, width_out, STRIDE_Y, STRIDE_X)
        acc = tl.dot(columns, dy, acc, input_precision=PRECISION)

    if EDGE_IN or EDGE_OUT:  # a NaN that met the filling
        acc = tl.where((channel < group_in)[:, None] & (feature < group_out)[None, :], acc, 0.0)
    if NORMS:
        b = tl.arange(0, BLOCKS)
        norms = tl.sqrt(tl.sum(tl.reshape(acc * acc, (BLOCKS, BI * BO)), 1))
        slot = tl.load(slot_ptr + tl.maximum(tl.minimum(first + b, stop - 1), 0))
        tl.store(out_ptr + slot, norms, mask=first + b < stop)
    else:
        slot = tl.load(slot_ptr + entry).to(tl.int64) + split.to(tl.int64) * slots
        out = out_ptr + (slot * (BO * BI) + g % BI)[:, None] + (n * BI)[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(first + g // BI < stop)[:, None])


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
    """Write ``TILE_OUT / BO`` by ``TILE_IN / BI`` norms of one tap of one group.

    One program number counts tiles, taps and groups: the second and third of a grid end at 65535.
    """
    ROWS: tl.constexpr = TILE_OUT // BO
    COLS: tl.constexpr = TILE_IN // BI
    tiles_out, tiles_in = tl.cdiv(rows * BO, TILE_OUT), tl.cdiv(per_tap * BI, TILE_IN)
    tile_out, tile_in = tl.program_id(0) % tiles_out, tl.program_id(0) // tiles_out % tiles_in
    number = tl.program_id(0) // (tiles_out * tiles_in)
    group, tap = number // taps, number % taps
    o = tile_out * TILE_OUT + tl.arange(0, TILE_OUT)
    i = tile_in * TILE_IN + tl.arange(0, TILE_IN)
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
    r = tile_out * ROWS + tl.arange(0, ROWS)
    c = tile_in * COLS + tl.arange(0, COLS)
    out = norms_ptr + (group * rows + r).to(tl.int64)[:, None] * (taps * per_tap) + (tap * per_tap + c)[None, :]
    tl.store(out, tl.sqrt(squares), mask=(r < rows)[:, None] & (c < per_tap)[None, :])


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
    """Write ``out[all q, one group, one block column, TILE_T pixels]``; t counts the T pixels from ``first`` on.

    out[q, group, tap * CB + cb, t] = sum over i in block cb of x[where the tap sees it from t, group, i] * v[q, tap, i]
    """
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
