"""The product of :mod:`sparsekern.kernels.gpu.multiply` for blocks of 64 and more, loaded by Hopper's copy engine.

Descriptors made on the host replace the pointers of x and values: fewer instructions and registers, and what lies
beyond the last token or feature reads as zero, without a mask. What they ask for is in :func:`can_describe`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from sparsekern.kernels.gpu.multiply import place_of_tile, store_tile
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit(do_not_specialize=["T", "rows"])
def multiply_tma_kernel(
    x_desc, values_desc, bias_ptr, row_ptr_ptr, other_ptr, slot_ptr, y_ptr,
    T, rows, out_features,
    IN: tl.constexpr, OUT: tl.constexpr, TRANSPOSED: tl.constexpr,
    TILE_T: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, EDGE_OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the tile ``y[tokens, one block row]``. values_desc is ``(Z * bo, bi)``; TRANSPOSED says that it is dx."""
    tile, row = place_of_tile(T, rows, TILE_T, GROUP)
    start, stop = tl.load(row_ptr_ptr + row), tl.load(row_ptr_ptr + row + 1)
    PARTS: tl.constexpr = IN // TILE_K
    BO: tl.constexpr = IN if TRANSPOSED else OUT

    acc = tl.zeros((TILE_T, OUT), tl.float32)
    column, line = tl.load(other_ptr + start) * IN, tl.load(slot_ptr + start) * BO
    part = 0
    for i in range(0, (stop - start) * PARTS):
        x = x_desc.load([tile * TILE_T, column + part])
        w = values_desc.load([line + part, 0]) if TRANSPOSED else values_desc.load([line, part]).T
        ahead = tl.minimum(start + (i + 1) // PARTS, stop)
        part = (i + 1) % PARTS * TILE_K
        column, line = tl.load(other_ptr + ahead) * IN, tl.load(slot_ptr + ahead) * BO
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    t = tile.to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    store_tile(y_ptr, bias_ptr, acc, t, row, T, out_features, OUT, HAS_BIAS, EDGE_OUT)


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
