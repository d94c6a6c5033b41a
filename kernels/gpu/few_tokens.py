"""``y = x W' + bias`` and ``dx = dy W`` for few tokens (decoding): the weight on M, all tokens on N.

Names and axes are those of :mod:`sparsekern.kernels.gpu.multiply`. With few tokens the time is that of reading the
stored blocks once, so a program takes only TILE_N rows of a block: many programs, many loads in flight. Values of
another dtype than x are converted in registers here (a copy first would read them twice).
"""

from __future__ import annotations

import triton
import triton.language as tl
from sparsekern.kernels.gpu.multiply import place_of_entry


@triton.jit(do_not_specialize=["T"])
def few_tokens_kernel(
    x_ptr, values_ptr, bias_ptr, row_ptr_ptr, other_ptr, slot_ptr, y_ptr,
    T, in_units, out_features, stride_units,
    ALIGN: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_N: tl.constexpr,
    TOKENS: tl.constexpr, TILE_K: tl.constexpr, TILE_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, EDGE_IN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``y[all tokens, TILE_N features of one block row]``; T is at most TOKENS."""
    PIECES: tl.constexpr = OUT // TILE_N
    row = tl.program_id(0) // PIECES
    start, stop = tl.load(row_ptr_ptr + row), tl.load(row_ptr_ptr + row + 1)

    t, k = tl.arange(0, TOKENS), tl.arange(0, TILE_K)
    n = tl.program_id(0) % PIECES * TILE_N + tl.arange(0, TILE_N)
    in_features = in_units * ALIGN
    x_rows = x_ptr + t.to(tl.int64)[None, :] * (stride_units * ALIGN)
    t_mask = t[None, :] < T
    acc = tl.zeros((TILE_N, TOKENS), tl.float32)

    if IN < TILE_K:
        BLOCKS: tl.constexpr = TILE_K // IN
        column, offset = place_of_entry(other_ptr, slot_ptr, start + k // IN, IN, IN * OUT)
        for i in range(start, stop, BLOCKS):
            columns = tl.max_contiguous(tl.multiple_of(column + k % IN, IN), IN)
            offsets = offset + k % IN * STRIDE_K
            offsets = tl.max_contiguous(tl.multiple_of(offsets, IN), IN) if STRIDE_K == 1 else offsets
            in_row = i + k // IN < stop  # masks both: a NaN or an infinity of another row times zero is a NaN
            x_mask = in_row & (columns < in_features) if EDGE_IN else in_row
            x = tl.load(x_rows + columns[:, None], mask=t_mask & x_mask[:, None], other=0.0)
            w = tl.load(values_ptr + (offsets[None, :] + n[:, None] * STRIDE_N), mask=in_row[None, :], other=0.0)
            column, offset = place_of_entry(other_ptr, slot_ptr, i + BLOCKS + k // IN, IN, IN * OUT)
            acc = tl.dot(w.to(x_ptr.dtype.element_ty), x, acc, input_precision=PRECISION)
    else:
        PARTS: tl.constexpr = IN // TILE_K
        column, offset = place_of_entry(other_ptr, slot_ptr, start, IN, IN * OUT)
        for i in range(0, (stop - start) * PARTS):
            x_mask = (t_mask & (column + k < in_features)[:, None]) if EDGE_IN else t_mask
            x = tl.load(x_rows + (column + k)[:, None], mask=x_mask, other=0.0)
            w = tl.load(values_ptr + offset + (k[None, :] * STRIDE_K + n[:, None] * STRIDE_N))
            # At most stop, or the compiler advances 64-bit pointers instead, which takes more instructions.
            ahead = tl.minimum(start + (i + 1) // PARTS, stop)
            column, offset = place_of_entry(other_ptr, slot_ptr, ahead, IN, IN * OUT)
            part = (i + 1) % PARTS * TILE_K
            column += part
            offset += part * STRIDE_K
            acc = tl.dot(w.to(x_ptr.dtype.element_ty), x, acc, input_precision=PRECISION)

    feature = row * OUT + n
    n_mask = feature < out_features
    if HAS_BIAS:
        acc += tl.load(bias_ptr + feature, mask=n_mask, other=0.0).to(tl.float32)[:, None]
    y = y_ptr + t.to(tl.int64)[None, :] * out_features + feature[:, None]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=t_mask & n_mask[:, None])
