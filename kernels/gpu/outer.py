"""Triton kernels of a linear layer for its weight's gradient ``G = dy' x``, which is never stored whole.

:func:`outer_kernel` forms chosen blocks (the gradient of the stored ones) or their norms; :func:`supertile_kernel` the
norms of all blocks; :func:`projection_kernel` each half of a sketch. Of the first:

    g  columns of x, TILE_IN a program: several small blocks of one block row side by side, or a part of a large one
    n  the bo rows of the block row
    t  tokens, TILE_T per turn, cut into splits when there are too few blocks to fill the device

    out[slot, n, i] = sum over t of dy[t, row * bo + n] * x[t, col * bi + i]

The columns do not change in the loop, so it reads no index. Side by side, blocks of 16 reach ``wgmma``, and a tile of
dy is read once for all of them. Splits write to a float32 workspace, which :func:`sum_splits_kernel` adds up in order:
the same bits every time.

Programs find their block row by themselves. Row r gets ``row_ptr[r + 1] // BLOCKS - row_ptr[r] // BLOCKS + 1``
programs, at least as many as it has groups of BLOCKS blocks, so its first one is ``row_ptr[r] // BLOCKS + r``: nothing
is built or read on the host when blocks move. The rest have nothing to add up and store nothing, but for those behind
the last row, which write the zeros of the free slots.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_of_group(row_ptr_ptr, rows, slots, search_steps, BLOCKS: tl.constexpr):
    """Return ``(row, first, stop)`` of this program: its block row, its first entry, and where the row ends."""
    task = tl.program_id(0)
    row, above = 0, rows + 1  # the last row whose first program is not after this one
    for _ in range(search_steps):
        middle = (row + above) // 2
        before = tl.load(row_ptr_ptr + middle) // BLOCKS + middle <= task
        row, above = tl.where(before, middle, row), tl.where(before, above, middle)
    start = tl.load(row_ptr_ptr + row)
    stop = tl.load(row_ptr_ptr + row + 1, mask=row < rows, other=slots)
    return row, start + (task - start // BLOCKS - row) * BLOCKS, stop


LISTS = ["row_ptr_ptr", "column_ptr", "slot_ptr"]
"""Pointers that may lie anywhere, as in :mod:`sparsekern.kernels.gpu.multiply`."""


@triton.jit(
    do_not_specialize=["T", "tokens_per_split", "rows", "slots", "search_steps"], do_not_specialize_on_alignment=LISTS
)
def outer_kernel(
    dy_ptr, x_ptr, row_ptr_ptr, column_ptr, slot_ptr, out_ptr,
    T, tokens_per_split, rows, slots, search_steps, in_features, out_features,
    in_units, out_units, x_stride_units, dy_stride_units,
    ALIGN: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, TILE_IN: tl.constexpr, TILE_T: tl.constexpr,
    EDGE_T: tl.constexpr, EDGE_IN: tl.constexpr, EDGE_OUT: tl.constexpr,
    NORMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a group of blocks (their norms if NORMS) of one split of the tokens."""
    BLOCKS: tl.constexpr = TILE_IN // BI if TILE_IN > BI else 1
    split, piece = tl.program_id(1), tl.program_id(2)
    row, first, stop = place_of_group(row_ptr_ptr, rows, slots, search_steps, BLOCKS)

    g = piece * TILE_IN + tl.arange(0, TILE_IN)
    n, t = tl.arange(0, BO), tl.arange(0, TILE_T)
    entry = tl.maximum(tl.minimum(first + g // BI, stop - 1), 0)
    column = tl.load(column_ptr + entry) * BI + g % BI
    column = tl.max_contiguous(tl.multiple_of(column, BI if BI < TILE_IN else TILE_IN), BI if BI < TILE_IN else TILE_IN)
    feature = row * BO + n
    in_width, out_width = in_units * ALIGN, out_units * ALIGN  # of the rows, which may be filled up with zeros
    x_stride, dy_stride = x_stride_units * ALIGN, dy_stride_units * ALIGN

    begin = split * tokens_per_split
    count = tl.minimum(tokens_per_split, T - begin)
    count = tl.where((first < stop) & (row < rows), count, 0)  # else there is nothing to add up
    token = begin.to(tl.int64) + t  # rows may lie far apart, such as the last tokens of long sequences
    x_ptrs = x_ptr + column[:, None] + token[None, :] * x_stride
    dy_ptrs = dy_ptr + token[:, None] * dy_stride + feature[None, :]
    acc = tl.zeros((TILE_IN, BO), tl.float32)
    for i in range(0, count, TILE_T):
        ahead = tl.cast(i, tl.int64)
        # A mask that is not needed costs two instructions per copy.
        here = t < (count - i if EDGE_T else TILE_T)
        x_mask = here[None, :] & (column < in_width)[:, None] if EDGE_IN else here[None, :]
        dy_mask = here[:, None] & (feature < out_width)[None, :] if EDGE_OUT else here[:, None]
        x = tl.load(x_ptrs + ahead * x_stride, mask=x_mask, other=0.0)
        dy = tl.load(dy_ptrs + ahead * dy_stride, mask=dy_mask, other=0.0)
        acc = tl.dot(x, dy, acc, input_precision=PRECISION)

    if EDGE_IN or EDGE_OUT:  # a NaN that met the filling
        acc = tl.where((column < in_features)[:, None] & (feature < out_features)[None, :], acc, 0.0)
    if NORMS:
        b = tl.arange(0, BLOCKS)
        norms = tl.sqrt(tl.sum(tl.reshape(acc * acc, (BLOCKS, BI * BO)), 1))
        slot = tl.load(slot_ptr + tl.maximum(tl.minimum(first + b, stop - 1), 0))
        tl.store(out_ptr + slot, norms, mask=first + b < stop)
    else:
        slot = tl.load(slot_ptr + entry).to(tl.int64) + split.to(tl.int64) * slots
        out = out_ptr + (slot * (BO * BI) + g % BI)[:, None] + (n * BI)[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(first + g // BI < stop)[:, None])


@triton.jit(do_not_specialize=["slots", "splits"])
def sum_splits_kernel(parts_ptr, out_ptr, slots, splits, SIZE: tl.constexpr, NORMS: tl.constexpr):
    """Add up the splits of one slot in order and write the block (its norm if NORMS). SIZE is bo * bi."""
    slot = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for split in range(splits):
        total += tl.load(parts_ptr + (tl.cast(split, tl.int64) * slots + slot) * SIZE + e)
    if NORMS:
        tl.store(out_ptr + slot, tl.sqrt(tl.sum(total * total)))
    else:
        tl.store(out_ptr + slot * SIZE + e, total.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "rows", "cols"])
def supertile_kernel(
    dy_ptr, x_ptr, norms_ptr,
    T, in_features, out_features, in_units, out_units, x_stride_units, dy_stride_units, rows, cols,
    ALIGN: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr, TILE_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``TILE_OUT / BO`` by ``TILE_IN / BI`` norms of G, of which this program forms a tile and stores nothing.

    norms[r, c] = sqrt(sum over the block (r, c) of G ** 2). It costs the time of a dense weight gradient and the memory
    of one float a block.
    """
    ROWS: tl.constexpr = TILE_OUT // BO
    COLS: tl.constexpr = TILE_IN // BI
    tiles = tl.cdiv(rows * BO, TILE_OUT)  # one number for both: the second of a grid ends at 65535
    tile_out, tile_in = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    o = tile_out * TILE_OUT + tl.arange(0, TILE_OUT)
    i = tile_in * TILE_IN + tl.arange(0, TILE_IN)
    t = tl.arange(0, TILE_T)
    o_mask, i_mask = (o < out_units * ALIGN)[:, None], (i < in_units * ALIGN)[None, :]
    dy_stride, x_stride = dy_stride_units * ALIGN, x_stride_units * ALIGN
    dy_ptrs = dy_ptr + o[:, None] + t.to(tl.int64)[None, :] * dy_stride
    x_ptrs = x_ptr + t.to(tl.int64)[:, None] * x_stride + i[None, :]

    acc = tl.zeros((TILE_OUT, TILE_IN), tl.float32)
    for begin in range(0, T, TILE_T):
        ahead = tl.cast(begin, tl.int64)
        dy = tl.load(dy_ptrs + ahead * dy_stride, mask=(t < T - begin)[None, :] & o_mask, other=0.0)
        x = tl.load(x_ptrs + ahead * x_stride, mask=(t < T - begin)[:, None] & i_mask, other=0.0)
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)

    # An infinity that met the filling is no NaN.
    acc = tl.where((o < out_features)[:, None] & (i < in_features)[None, :], acc, 0.0)
    squares = tl.sum(tl.sum(tl.reshape(acc * acc, (ROWS, BO, COLS, BI)), 3), 1)
    r = tile_out * ROWS + tl.arange(0, ROWS)
    c = tile_in * COLS + tl.arange(0, COLS)
    out = norms_ptr + r.to(tl.int64)[:, None] * cols + c[None, :]
    tl.store(out, tl.sqrt(squares), mask=(r < rows)[:, None] & (c < cols)[None, :])


@triton.jit(do_not_specialize=["T", "blocks", "pairs"])
def projection_kernel(
    x_ptr, direction_ptr, out_ptr,
    T, features, blocks, pairs, stride_t, stride_i,
    SIDE: tl.constexpr, TILE_T: tl.constexpr,
):  # fmt: skip
    """Write ``out[all q, one block, TILE_T tokens]``: x is read once for all directions, in float32.

    out[q, b, t] = sum over i in block b of x[t, i] * direction[q, i]
    """
    block = tl.program_id(0) % blocks
    t = (tl.program_id(0) // blocks).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    i = block * SIDE + tl.arange(0, SIDE)
    mask = (t < T)[:, None] & (i < features)[None, :]
    x = tl.load(x_ptr + t[:, None] * stride_t + i.to(tl.int64)[None, :] * stride_i, mask=mask, other=0.0)
    x = x.to(tl.float32)
    for q in range(pairs):
        line = tl.cast(q, tl.int64)
        direction = tl.load(direction_ptr + line * features + i, mask=i < features, other=0.0)
        out = out_ptr + (line * blocks + block) * T + t
        tl.store(out, tl.sum(x * direction[None, :], 1), mask=t < T)
