"""Norms of all blocks of ``G = dy' x``, and nothing else of it: each program forms a tile of it and reduces that.

    norms[r, c] = sqrt(sum over the block (r, c) of G ** 2)

It costs a dense weight gradient in time and one float a block in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "rows", "cols"])
def supertile_kernel(
    dy_ptr, x_ptr, norms_ptr,
    T, in_features, out_features, in_units, out_units, x_stride_units, dy_stride_units, rows, cols,
    ALIGN: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr, TILE_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``TILE_OUT / BO`` by ``TILE_IN / BI`` norms."""
    ROWS: tl.constexpr = TILE_OUT // BO
    COLS: tl.constexpr = TILE_IN // BI
    o = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    i = tl.program_id(1) * TILE_IN + tl.arange(0, TILE_IN)
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
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    out = norms_ptr + r.to(tl.int64)[:, None] * cols + c[None, :]
    tl.store(out, tl.sqrt(squares), mask=(r < rows)[:, None] & (c < cols)[None, :])
