"""Triton kernels of a linear layer for ``y = x W' + bias`` and for ``dx = dy W``.

They are written for the forward; dx is the same product with rows and columns exchanged and the block not transposed.
:func:`multiply_kernel` has tokens on M, so that any block reaches ``wgmma``; :func:`multiply_tma_kernel` does the same
for blocks of 64 and more, loaded by Hopper's copy engine; :func:`few_tokens_kernel` is for decoding.

    t  tokens, TILE_T a program              IN   side of a block that is summed over (bi; bo for dx)
    n  output features, one block row        OUT  side of a block along the output (bo; bi for dx)
    k  the stored inputs of a block row, end to end, TILE_K per turn of the loop

    y[t, row * OUT + n] = bias[row * OUT + n] + sum over stored (row, col) and k of x[t, col * IN + k] * w[k, n]

A tile of K holds several small blocks (a gather over block columns) or a part of a large one, so it is always whole
cache lines. Three things keep the pipeline full, each seen in the compiled code (``bench/gpu_code.py``): the places of
the next tile are loaded in this turn and carried in registers (an index load in the turn that uses it costs half the
buffers; the lists are padded for the last turn); what is carried is the int64 *offset* of a block, not its slot; the
loop has one ``tl.dot``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LISTS = ["bias_ptr", "row_ptr_ptr", "other_ptr", "slot_ptr"]
"""Pointers that may lie anywhere: where a list begins in its memory depends on how many blocks there are, and a kernel
must not be compiled anew when one is added."""


@triton.jit
def place_of_tile(T, rows, TILE_T: tl.constexpr, GROUP: tl.constexpr):
    """Return ``(tile, row)`` of this program: all rows for GROUP token tiles first, so that x stays in the L2 cache."""
    tiles = tl.cdiv(T, TILE_T)
    pid = tl.program_id(0)
    first = pid // (GROUP * rows) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    inside = pid % (GROUP * rows)
    return first + inside % size, inside // size


@triton.jit
def place_of_entry(other_ptr, slot_ptr, entry, IN: tl.constexpr, SIZE: tl.constexpr):
    """Return where a stored block starts: its first column of x, and its first element of values (int64)."""
    return tl.load(other_ptr + entry) * IN, tl.load(slot_ptr + entry).to(tl.int64) * SIZE


@triton.jit
def add_blocks(
    acc, x_rows, values_ptr, other_ptr, slot_ptr, start, stop, k, n, in_features, t_mask,
    IN: tl.constexpr, OUT: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_N: tl.constexpr,
    TILE_K: tl.constexpr, WEIGHT_ON_M: tl.constexpr, EDGE_IN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to ``acc`` the product of tokens with the blocks of a row, ``start`` to ``stop``.

    ``acc`` is ``(T, N)``, or ``(N, T)`` if WEIGHT_ON_M. ``x_rows`` points to the rows of x, along the axis of tokens;
    ``t_mask`` says which there are, None for all. STRIDE_K and STRIDE_N are those of w[k, n] in a block.
    """
    T_AXIS: tl.constexpr = 1 if WEIGHT_ON_M else 0
    K_AXIS: tl.constexpr = 1 - T_AXIS
    if IN < TILE_K:
        BLOCKS: tl.constexpr = TILE_K // IN
        column, offset = place_of_entry(other_ptr, slot_ptr, start + k // IN, IN, IN * OUT)
        for i in range(start, stop, BLOCKS):
            columns = tl.max_contiguous(tl.multiple_of(column + k % IN, IN), IN)
            offsets = offset + k % IN * STRIDE_K
            offsets = tl.max_contiguous(tl.multiple_of(offsets, IN), IN) if STRIDE_K == 1 else offsets
            in_row = i + k // IN < stop  # masks both: a NaN or an infinity of another row times zero is a NaN
            seen = tl.expand_dims(in_row & (columns < in_features) if EDGE_IN else in_row, T_AXIS)
            x_mask = seen if t_mask is None else t_mask & seen
            x = tl.load(x_rows + tl.expand_dims(columns, T_AXIS), mask=x_mask, other=0.0)
            w_ptrs = values_ptr + (tl.expand_dims(offsets, K_AXIS) + tl.expand_dims(n, T_AXIS) * STRIDE_N)
            w = tl.load(w_ptrs, mask=tl.expand_dims(in_row, K_AXIS), other=0.0)
            column, offset = place_of_entry(other_ptr, slot_ptr, i + BLOCKS + k // IN, IN, IN * OUT)
            acc = add_product(acc, x, w, WEIGHT_ON_M, PRECISION)
    else:
        PARTS: tl.constexpr = IN // TILE_K
        column, offset = place_of_entry(other_ptr, slot_ptr, start, IN, IN * OUT)
        for i in range(0, (stop - start) * PARTS):
            x_ptrs = x_rows + tl.expand_dims(column + k, T_AXIS)
            if EDGE_IN:
                seen = tl.expand_dims(column + k < in_features, T_AXIS)
                x = tl.load(x_ptrs, mask=seen if t_mask is None else t_mask & seen, other=0.0)
            else:
                x = tl.load(x_ptrs, mask=t_mask, other=None if t_mask is None else 0.0)
            w = tl.load(
                values_ptr + offset + (tl.expand_dims(k, K_AXIS) * STRIDE_K + tl.expand_dims(n, T_AXIS) * STRIDE_N)
            )
            # At most stop, or the compiler advances 64-bit pointers instead, which takes more instructions.
            ahead = tl.minimum(start + (i + 1) // PARTS, stop)
            column, offset = place_of_entry(other_ptr, slot_ptr, ahead, IN, IN * OUT)
            part = (i + 1) % PARTS * TILE_K
            column += part
            offset += part * STRIDE_K
            acc = add_product(acc, x, w, WEIGHT_ON_M, PRECISION)
    return acc


@triton.jit
def add_product(acc, x, w, WEIGHT_ON_M: tl.constexpr, PRECISION: tl.constexpr):
    """Add ``x w``, or ``w x`` if WEIGHT_ON_M, to ``acc``; values of another dtype than x are converted in registers."""
    w = w.to(x.dtype)
    return tl.dot(w, x, acc, input_precision=PRECISION) if WEIGHT_ON_M else tl.dot(x, w, acc, input_precision=PRECISION)


@triton.jit
def store_tile(
    y_ptr, bias_ptr, acc, t, row, n, T, out_features,
    OUT: tl.constexpr, HAS_BIAS: tl.constexpr, EDGE_OUT: tl.constexpr,
):  # fmt: skip
    """Add the bias and write the features ``n`` of ``y[t, block row]``, cut off at the last token and feature."""
    feature = row * OUT + n
    n_mask = feature < out_features if EDGE_OUT else n < OUT
    if HAS_BIAS:
        acc += tl.load(bias_ptr + feature, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    y = y_ptr + t[:, None] * out_features + feature[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(t[:, None] < T) & n_mask[None, :])


@triton.jit(do_not_specialize=["T", "rows"], do_not_specialize_on_alignment=LISTS)
def multiply_kernel(
    x_ptr, values_ptr, bias_ptr, row_ptr_ptr, other_ptr, slot_ptr, y_ptr,
    T, rows, in_units, out_features, stride_units,
    ALIGN: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_N: tl.constexpr,
    TILE_T: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr, CUT: tl.constexpr,
    HAS_BIAS: tl.constexpr, EDGE_IN: tl.constexpr, EDGE_OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the tile ``y[tokens, a part of one block row]``.

    Sizes in units of ALIGN elements tell the compiler that rows of x are 16-byte aligned.
    """
    tile, line = place_of_tile(T, rows * CUT, TILE_T, GROUP)
    row = line // CUT
    start, stop = tl.load(row_ptr_ptr + row), tl.load(row_ptr_ptr + row + 1)

    TILE_N: tl.constexpr = OUT // CUT
    t = tile.to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    k, n = tl.arange(0, TILE_K), line % CUT * TILE_N + tl.arange(0, TILE_N)
    # Behind the last token the last one is read again, and not written: a mask costs two instructions per copy.
    x_rows = x_ptr + tl.minimum(t, T - 1)[:, None] * (stride_units * ALIGN)
    acc = add_blocks(
        tl.zeros((TILE_T, TILE_N), tl.float32), x_rows, values_ptr, other_ptr, slot_ptr, start, stop, k, n,
        in_units * ALIGN, None,
        IN, OUT, STRIDE_K, STRIDE_N, TILE_K, False, EDGE_IN, PRECISION,
    )  # fmt: skip
    store_tile(y_ptr, bias_ptr, acc, t, row, n, T, out_features, OUT, HAS_BIAS, EDGE_OUT)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=LISTS)
def few_tokens_kernel(
    x_ptr, values_ptr, bias_ptr, row_ptr_ptr, other_ptr, slot_ptr, y_ptr,
    T, in_units, out_features, stride_units,
    ALIGN: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_N: tl.constexpr,
    TOKENS: tl.constexpr, TILE_K: tl.constexpr, TILE_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, EDGE_IN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``y[all tokens, TILE_N features of one block row]``; T is at most TOKENS.

    The weight is on M and all tokens on N. With few tokens the time is that of reading the stored blocks once, so a
    program takes only TILE_N rows of a block: many programs, many loads in flight. Values of another dtype than x are
    converted in registers: a copy first would read them twice.
    """
    PIECES: tl.constexpr = OUT // TILE_N
    row = tl.program_id(0) // PIECES
    start, stop = tl.load(row_ptr_ptr + row), tl.load(row_ptr_ptr + row + 1)

    t, k = tl.arange(0, TOKENS), tl.arange(0, TILE_K)
    n = tl.program_id(0) % PIECES * TILE_N + tl.arange(0, TILE_N)
    x_rows = x_ptr + t.to(tl.int64)[None, :] * (stride_units * ALIGN)
    t_mask = t[None, :] < T
    acc = add_blocks(
        tl.zeros((TILE_N, TOKENS), tl.float32), x_rows, values_ptr, other_ptr, slot_ptr, start, stop, k, n,
        in_units * ALIGN, t_mask,
        IN, OUT, STRIDE_K, STRIDE_N, TILE_K, True, EDGE_IN, PRECISION,
    )  # fmt: skip

    feature = row * OUT + n
    n_mask = feature < out_features
    if HAS_BIAS:
        acc += tl.load(bias_ptr + feature, mask=n_mask, other=0.0).to(tl.float32)[:, None]
    y = y_ptr + t.to(tl.int64)[None, :] * out_features + feature[:, None]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=t_mask & n_mask[:, None])


@triton.jit(do_not_specialize=["T", "rows"], do_not_specialize_on_alignment=LISTS)
def multiply_tma_kernel(
    x_desc, values_desc, bias_ptr, row_ptr_ptr, other_ptr, slot_ptr, y_ptr,
    T, rows, out_features,
    IN: tl.constexpr, OUT: tl.constexpr, TRANSPOSED: tl.constexpr,
    TILE_T: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr, CUT: tl.constexpr,
    HAS_BIAS: tl.constexpr, EDGE_OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the tile ``y[tokens, a part of one block row]``. values_desc is ``(Z * bo, bi)``; TRANSPOSED is set for dx.

    Descriptors made on the host replace the pointers of x and values: fewer instructions and registers, and elements
    beyond the last token or feature read as zero without a mask. :func:`can_describe` says what they require.
    """
    tile, line = place_of_tile(T, rows * CUT, TILE_T, GROUP)
    row = line // CUT
    start, stop = tl.load(row_ptr_ptr + row), tl.load(row_ptr_ptr + row + 1)
    PARTS: tl.constexpr = IN // TILE_K
    TILE_N: tl.constexpr = OUT // CUT
    first = line % CUT * TILE_N
    BO: tl.constexpr = IN if TRANSPOSED else OUT

    acc = tl.zeros((TILE_T, TILE_N), tl.float32)
    column, slot = tl.load(other_ptr + start) * IN, tl.load(slot_ptr + start) * BO
    part = 0
    for i in range(0, (stop - start) * PARTS):
        x = x_desc.load([tile * TILE_T, column + part])
        w = values_desc.load([slot + part, first]) if TRANSPOSED else values_desc.load([slot + first, part]).T
        ahead = tl.minimum(start + (i + 1) // PARTS, stop)
        part = (i + 1) % PARTS * TILE_K
        column, slot = tl.load(other_ptr + ahead) * IN, tl.load(slot_ptr + ahead) * BO
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    t, n = tile.to(tl.int64) * TILE_T + tl.arange(0, TILE_T), first + tl.arange(0, TILE_N)
    store_tile(y_ptr, bias_ptr, acc, t, row, n, T, out_features, OUT, HAS_BIAS, EDGE_OUT)


def can_describe(x: Tensor, values: Tensor, tile: tuple[int, int]) -> bool:
    """Return whether the copy engine can load tiles of x, and of values (contiguous).

    Rows of 16 bytes at a multiple of 16 bytes, coordinates in int32; nothing that drivers are known to stumble over: no
    tile larger than x, and no holes between its rows (triton-lang/triton#9235).
    """
    rows = x.is_contiguous() and x.shape[1] * x.element_size() % 16 == 0 and max(x.shape) < 2**31
    boxes = x.shape[0] >= tile[0] and x.shape[1] >= tile[1]
    blocks = 0 < values.shape[0] * values.shape[1] < 2**31
    return rows and boxes and blocks and x.data_ptr() % 16 == 0 and values.data_ptr() % 16 == 0


def descriptor(matrix: Tensor, tile: tuple[int, int]) -> TensorDescriptor:
    """Return the descriptor by which a kernel loads tiles of a matrix."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(tile))
