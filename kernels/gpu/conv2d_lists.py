"""The lists of blocks by which dx of a convolution is formed, made on the device for each call.

The index has a list for each block column, that is for each tap and block of channels. A program of dx works on a
block of channels in one phase (:mod:`sparsekern.kernels.gpu.conv2d_multiply`), and a list for each tap would be one
block or none: a loop over nothing. So the lists of all taps of a phase are put behind one another, group by group:

    list    (phase * groups + group) * CB + cb
    entry   tap * RB + the block row within the group, and the slot

ascending by tap, then by block row, whatever the order of slots: the same sum every time.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    ]
)  # fmt: skip
def lists_kernel(
    col_ptr_ptr, col_row_ptr, col_slot_ptr, ptr_ptr, other_ptr, slot_ptr,
    cols, per_tap, kernel_width, rows, groups, top, left, dilation_y, dilation_x, search_steps,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, PADDING: tl.constexpr, COLS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Write one list and where it begins; the last program also where it ends, and the zeros behind it."""
    number = tl.program_id(0)
    block, group, phase = number % per_tap, number // per_tap % groups, number // per_tap // groups

    c, before = tl.arange(0, COLS), tl.zeros((COLS,), tl.int32)
    for first in range(0, cols, COLS):
        here = first + c < cols
        start = tl.load(col_ptr_ptr + first + c, mask=here, other=0)
        stop = tl.load(col_ptr_ptr + first + c + 1, mask=here, other=0)
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
