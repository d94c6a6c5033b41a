"""Triton kernels for y and for dx of a convolution: an implicit GEMM, pixels on M, channels last.

:func:`lists_kernel` makes the lists of blocks for dx on the device, once for an index.
:func:`conv2d_multiply_kernel` is :func:`sparsekern.kernels.gpu.multiply.multiply_kernel`, but finds in another way
which elements a block reads. The *source* is the tensor that is read (x; dy for dx) and the *result* the one that is
written (y; dx). The pixel ``q`` of the result reads, through a block of tap ``(i, j)``, the pixel

    forward     q * stride - padding + (i, j) * dilation
    dx          (q + padding - (i, j) * dilation) / stride      where that is a whole number

and zeros outside the source. For dx the pixels of the result are sorted by their remainder by the stride, their
*phase*: a tap is seen by one phase only, so a phase has its own lists of blocks, and reads neighbouring pixels of dy.
Both are, with q counted within a phase,

    q * MUL + (origin + phase + (i, j) * step) / DIV       stored at q * DIV + phase

where forward has DIV = 1 and one phase, and dx has MUL = 1. The division is exact and made once for a block, not for a
pixel.

An entry of a list names a block of channels by ``tap * per_tap + block``, the number of its block column for the
forward. It is loaded a turn ahead, carried as it is and taken apart where it is used, so that no turn waits for it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from sparsekern.kernels.gpu.multiply import LISTS, place_of_entry, place_of_tile
from sparsekern.kernels.gpu.pixels import is_inside, place_of_token, quotient


@triton.jit
def place_of_block(
    number, per_tap, kernel_width, origin_y, origin_x, step_y, step_x,
    DIV_Y: tl.constexpr, DIV_X: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Return how far from the pixel a block reads, ``(y, x)``, and which block of channels.

    In a tile of several blocks each number is there SIDE times.
    """
    tap = quotient(number, per_tap, SIDE)
    i = quotient(tap, kernel_width, SIDE)
    y = (origin_y + i * step_y) // DIV_Y
    x = (origin_x + (tap - i * kernel_width) * step_x) // DIV_X
    return y, x, number - tap * per_tap


@triton.jit(
    do_not_specialize=[
        "images", "height", "width", "height_out", "width_out", "groups", "rows", "per_tap", "kernel_width",
        "origin_y", "origin_x", "step_y", "step_x",
    ],
    do_not_specialize_on_alignment=LISTS,
)  # fmt: skip
def conv2d_multiply_kernel(
    x_ptr, values_ptr, bias_ptr, row_ptr_ptr, other_ptr, slot_ptr, y_ptr,
    images, height, width, height_out, width_out,
    groups, rows, per_tap, kernel_width, origin_y, origin_x, step_y, step_x, in_units, group_out,
    ALIGN: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_N: tl.constexpr,
    MUL_Y: tl.constexpr, MUL_X: tl.constexpr, DIV_Y: tl.constexpr, DIV_X: tl.constexpr,
    TILE_T: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, EDGE_IN: tl.constexpr, EDGE_OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the pixels of a tile, in one block row of one group.

    ``height`` and ``width`` are those of the source, ``in_units * ALIGN`` the channels of one group of it, filled up;
    ``rows`` are the block rows of a group of the result, ``group_out`` its channels.
    """
    phase = tl.program_id(1)
    phase_y, phase_x = phase // DIV_X, phase % DIV_X
    all_rows = groups * rows
    # All phases have programs for the first one, which has the most pixels.
    most = images * tl.cdiv(height_out, DIV_Y) * tl.cdiv(width_out, DIV_X)
    tile, line = place_of_tile(most, all_rows, TILE_T, GROUP)
    group, row = line // rows, line % rows
    phase_height, phase_width = tl.cdiv(height_out - phase_y, DIV_Y), tl.cdiv(width_out - phase_x, DIV_X)
    T = images * phase_height * phase_width
    start = tl.load(row_ptr_ptr + phase * all_rows + line)
    stop = tl.load(row_ptr_ptr + phase * all_rows + line + 1)
    stop = tl.where(tile * TILE_T < T, stop, start)

    t = tile * TILE_T + tl.arange(0, TILE_T)
    # Behind the last pixel the last one is read again, and not written. A phase may have no pixel at all.
    last, some_y, some_x = tl.maximum(T - 1, 0), tl.maximum(phase_height, 1), tl.maximum(phase_width, 1)
    pixel, y, x = place_of_token(tl.minimum(t, last), height, width, some_y, some_x, MUL_Y, MUL_X)
    k, n = tl.arange(0, TILE_K), tl.arange(0, OUT)
    in_group = in_units * ALIGN
    pitch = (groups * in_group).to(tl.int64)
    x_rows = x_ptr + (pixel * pitch + group * in_group)[:, None]
    origin_y += phase_y
    origin_x += phase_x
    acc = tl.zeros((TILE_T, OUT), tl.float32)

    if IN < TILE_K:
        BLOCKS: tl.constexpr = TILE_K // IN
        number, offset = place_of_entry(other_ptr, slot_ptr, start + k // IN, 1, IN * OUT)
        for i in range(start, stop, BLOCKS):
            off_y, off_x, block = place_of_block(
                number, per_tap, kernel_width, origin_y, origin_x, step_y, step_x, DIV_Y, DIV_X, IN
            )
            channel = tl.max_contiguous(tl.multiple_of(block * IN + k % IN, IN), IN)
            reach = (off_y * width + off_x).to(tl.int64) * pitch + channel
            reach = tl.max_contiguous(tl.multiple_of(reach, ALIGN), IN)
            offsets = offset + k % IN * STRIDE_K
            offsets = tl.max_contiguous(tl.multiple_of(offsets, IN), IN) if STRIDE_K == 1 else offsets
            in_row = i + k // IN < stop  # masks both: a NaN or an infinity of another row times zero is a NaN
            seen = in_row & (channel < in_group) if EDGE_IN else in_row
            x_mask = is_inside(y[:, None] + off_y[None, :], height) & is_inside(x[:, None] + off_x[None, :], width)
            source = tl.load(x_rows + reach[None, :], mask=x_mask & seen[None, :], other=0.0)
            w = tl.load(values_ptr + (offsets[:, None] + n[None, :] * STRIDE_N), mask=in_row[:, None], other=0.0)
            number, offset = place_of_entry(other_ptr, slot_ptr, i + BLOCKS + k // IN, 1, IN * OUT)
            acc = tl.dot(source, w, acc, input_precision=PRECISION)
    else:
        PARTS: tl.constexpr = IN // TILE_K
        number, offset = place_of_entry(other_ptr, slot_ptr, start, 1, IN * OUT)
        for i in range(0, (stop - start) * PARTS):
            off_y, off_x, block = place_of_block(
                number, per_tap, kernel_width, origin_y, origin_x, step_y, step_x, DIV_Y, DIV_X, 1
            )
            channel = block * IN + i % PARTS * TILE_K + k
            reach = (off_y * width + off_x).to(tl.int64) * pitch + channel
            reach = tl.max_contiguous(tl.multiple_of(reach, ALIGN), TILE_K)
            x_mask = (is_inside(y + off_y, height) & is_inside(x + off_x, width))[:, None]
            x_mask = x_mask & (channel < in_group)[None, :] if EDGE_IN else x_mask
            source = tl.load(x_rows + reach[None, :], mask=x_mask, other=0.0)
            w = tl.load(values_ptr + offset + (k[:, None] * STRIDE_K + n[None, :] * STRIDE_N))
            # At most stop, or the compiler advances 64-bit pointers instead, which takes more instructions.
            ahead = tl.minimum(start + (i + 1) // PARTS, stop)
            number, offset = place_of_entry(other_ptr, slot_ptr, ahead, 1, IN * OUT)
            offset += (i + 1) % PARTS * TILE_K * STRIDE_K
            acc = tl.dot(source, w, acc, input_precision=PRECISION)

    feature = row * OUT + n
    n_mask = feature < group_out if EDGE_OUT else n < OUT
    if HAS_BIAS:
        acc += tl.load(bias_ptr + group * group_out + feature, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    pixel, _, _ = place_of_token(tl.minimum(t, last), height_out, width_out, some_y, some_x, DIV_Y, DIV_X)
    pixel = (pixel + (phase_y * width_out + phase_x)).to(tl.int64) * (groups * group_out)
    out = y_ptr + pixel[:, None] + (group * group_out + feature)[None, :]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(t[:, None] < T) & n_mask[None, :])


@triton.jit
def phase_of_tap(tap, kernel_width, top, left, dilation_y, dilation_x, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr):
    """Return the phase of the pixels of x that a tap sees; division of integers rounds towards zero on a GPU."""
    y = ((tap // kernel_width * dilation_y - top) % STRIDE_Y + STRIDE_Y) % STRIDE_Y
    x = ((tap % kernel_width * dilation_x - left) % STRIDE_X + STRIDE_X) % STRIDE_X
    return y * STRIDE_X + x


@triton.jit
def first_at_least(rows_ptr, low, high, bound, search_steps):
    """Return the first of the entries ``low`` to ``high`` whose block row is at least ``bound``; high for none."""
    for _ in range(search_steps):
        middle = (low + high) // 2
        searching = low < high
        below = tl.load(rows_ptr + middle, mask=searching, other=0) < bound
        low, high = tl.where(searching & below, middle + 1, low), tl.where(searching & (below == 0), middle, high)
    return low


@triton.jit(
    do_not_specialize=[
        "cols", "per_tap", "kernel_width", "rows", "groups", "top", "left", "dilation_y", "dilation_x", "search_steps",
    ],
    do_not_specialize_on_alignment=["col_ptr_ptr", "col_row_ptr", "col_slot_ptr", "ptr_ptr", "other_ptr", "slot_ptr"],
)  # fmt: skip
def lists_kernel(
    col_ptr_ptr, col_row_ptr, col_slot_ptr, ptr_ptr, other_ptr, slot_ptr,
    cols, per_tap, kernel_width, rows, groups, top, left, dilation_y, dilation_x, search_steps,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, GROUPED: tl.constexpr,
    PADDING: tl.constexpr, COLS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Write one list of blocks for dx and where it begins; the last program also its end, and the zeros behind it.

    The index has a list for each block column, that is for each tap and block of channels. A program of dx works on a
    block of channels in one phase, and a list for each tap would be one block or none: a loop over nothing. So the
    lists of all taps of a phase are put behind one another, group by group:

        list    (phase * groups + group) * CB + cb
        entry   tap * RB + the block row within the group, and the slot

    ascending by tap, then by block row, whatever the order of slots, so that sums are formed in the same order.
    """
    number = tl.program_id(0)
    block, group, phase = number % per_tap, number // per_tap % groups, number // per_tap // groups

    c, before = tl.arange(0, COLS), tl.zeros((COLS,), tl.int32)
    for first in range(0, cols, COLS):
        here = first + c < cols
        start = tl.load(col_ptr_ptr + first + c, mask=here, other=0)
        stop = tl.load(col_ptr_ptr + first + c + 1, mask=here, other=0)
        low, high = start, stop
        if GROUPED:  # else the search, one load after the other, finds all rows
            low = first_at_least(col_row_ptr, start, stop, group * rows, search_steps)
            high = first_at_least(col_row_ptr, low, stop, (group + 1) * rows, search_steps)
        its = phase_of_tap((first + c) // per_tap, kernel_width, top, left, dilation_y, dilation_x, STRIDE_Y, STRIDE_X)
        before += tl.where(its < phase, stop - start, 0) + tl.where(its == phase, low - start, 0)
        before += tl.where((its == phase) & ((first + c) % per_tap < block), high - low, 0)
    begin = tl.sum(before)
    tl.store(ptr_ptr + number, begin)

    for tap in range(0, cols // per_tap):
        column = tap * per_tap + block
        start, stop = tl.load(col_ptr_ptr + column), tl.load(col_ptr_ptr + column + 1)
        low, high = start, stop
        if GROUPED:
            low = first_at_least(col_row_ptr, start, stop, group * rows, search_steps)
            high = first_at_least(col_row_ptr, low, stop, (group + 1) * rows, search_steps)
        its = phase_of_tap(tap, kernel_width, top, left, dilation_y, dilation_x, STRIDE_Y, STRIDE_X)
        high = tl.where(its == phase, high, low)
        for first in range(low, high, RUN):
            entry = first + tl.arange(0, RUN)
            row = tl.load(col_row_ptr + entry, mask=entry < high, other=0)
            slot = tl.load(col_slot_ptr + entry, mask=entry < high, other=0)
            tl.store(other_ptr + begin + entry - low, tap * rows + row % rows, mask=entry < high)
            tl.store(slot_ptr + begin + entry - low, slot, mask=entry < high)
        begin += high - low

    behind = tl.arange(0, PADDING)
    last = number == tl.num_programs(0) - 1
    tl.store(ptr_ptr + number + 1, begin, mask=last)
    tl.store(other_ptr + begin + behind, tl.zeros((PADDING,), tl.int32), mask=(behind >= 0) & last)
    tl.store(slot_ptr + begin + behind, tl.zeros((PADDING,), tl.int32), mask=(behind >= 0) & last)
