"""The block-sparse linear layer on the native library. Axes and edge cases: :mod:`sparsekern.kernels.contract`.

Beside inputs and outputs a call holds the scratch of the library (packed panels of tokens; in the forward one
transposed float32 copy of the stored blocks, or for each thread of a block row, where one panel holds all tokens),
which it keeps for the next call, and a float32 copy of values or of their gradient where these are of another dtype. At
1x1 the scratch is 16 MiB of packed tokens (or one panel, where that is more) and, a thread, the copy of some rows: 128
Ki entries of 6 to 10 bytes, or those of 16 rows; 12 bytes for each of these rows and each chunk of features; and up to
128 Ki numbers of y or dy.
"""

from __future__ import annotations

import torch
from sparsekern.kernels.contract import Index, LinearShape, Lists
from sparsekern.kernels.cpu.library import Call, call, numbers, positive, rounded, takes_bfloat16
from sparsekern.kernels.cpu.scores import (
    all_norms,
    chosen_norms,
    chunk_of,
    directions,
    in_tiles,
    row_ptr_of,
    tiles_of,
)
from sparsekern.kernels.eager.chunks import spans
from torch import Tensor

TILE = 64
"""Side of the blocks in which all single elements are computed."""


def fwd(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, geometry: LinearShape) -> Tensor:
    """Return ``y (T, O)``; see :meth:`sparsekern.kernels.contract.Kernels.fwd`."""
    y = x.new_empty(x.shape[0], geometry.out_features)
    if y.numel() == 0:
        return y
    x, read, bias = positive(x), _as_read(values, x.dtype), None if bias is None else numbers(bias)
    call("sk_multiply", Call.of(x, y, read, bias, index.by_row))
    return y


def dx(dy: Tensor, values: Tensor, index: Index, geometry: LinearShape, size: tuple[int, ...] = ()) -> Tensor:
    """Return ``dx (T, I)``; see :meth:`sparsekern.kernels.contract.Kernels.dx`."""
    grad_x = dy.new_empty(dy.shape[0], geometry.in_features)
    if grad_x.numel() == 0:
        return grad_x
    dy, read = positive(dy), _as_read(values, dy.dtype)
    call("sk_multiply", Call.of(grad_x, dy, read, None, index.by_col, transposed=True))
    return grad_x


def dvalues(
    dy: Tensor, x: Tensor, index: Index, block: tuple[int, int], geometry: LinearShape, dtype: torch.dtype
) -> Tensor:
    """Return ``(Z, bo, bi)``; see :meth:`sparsekern.kernels.contract.Kernels.dvalues`."""
    out = outer_blocks(dy, x, index.by_row, index.slots, block)
    return out if dtype is torch.float32 else out.to(dtype)


def outer_blocks(dy: Tensor, x: Tensor, lists: Lists, slots: int, block: tuple[int, int]) -> Tensor:
    """Return blocks of ``dy' x`` as ``(Z, bo, bi)`` in float32.

    Args:
        dy: ``(T, O)``.
        x: ``(T, I)``.
        lists: ``row_ptr``, ``row_col`` and ``row_slot`` of an index of these blocks.
        slots: Z.
        block: ``(bo, bi)``.
    """
    if x.shape[0] == 0 or slots == 0:
        return torch.zeros(slots, *block, dtype=torch.float32, device=x.device)
    dy, x = positive(dy), positive(x)
    out = torch.empty(slots, *block, dtype=torch.float32, device=x.device)
    call("sk_outer", Call.of(x, dy, out, None, lists))
    return out


def backward(dy: Tensor, x: Tensor, values: Tensor, index: Index, geometry: LinearShape) -> tuple[Tensor, Tensor]:
    """Return ``dx, dvalues``, the same to the bit as one after the other: ``dy`` is packed once for both.

    See :meth:`sparsekern.kernels.contract.Kernels.backward`.
    """
    if x.shape[0] == 0 or index.slots == 0:
        block = (values.shape[1], values.shape[2])
        return dx(dy, values, index, geometry), dvalues(dy, x, index, block, geometry, values.dtype)
    grad_x = dy.new_empty(x.shape)
    grad_values = torch.empty(values.shape, dtype=torch.float32, device=x.device)
    dy, x, read = positive(dy), positive(x), _as_read(values, dy.dtype)
    call(
        "sk_backward",
        Call.of(grad_x, dy, read, None, index.by_col, transposed=True),
        Call.of(x, dy, grad_values, None, index.by_row),
    )
    return grad_x, grad_values if values.dtype is torch.float32 else grad_values.to(values.dtype)


def block_norms(
    dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int], geometry: LinearShape
) -> Tensor:
    """Return the norms ``(K,)`` of chosen blocks; see :meth:`sparsekern.kernels.contract.Kernels.block_norms`."""
    order = (row.long() * geometry.cells(block)[1] + col).argsort()  # columns ascend within a row, as in an index
    return chosen_norms(lambda row, col: _norms(dy, x, row, col, block), row, col, order, block)


def all_block_norms(dy: Tensor, x: Tensor, block: tuple[int, int], geometry: LinearShape) -> Tensor:
    """Return the norms ``(R, C)`` of all blocks; see :meth:`sparsekern.kernels.contract.Kernels.all_block_norms`."""
    if block == (1, 1):
        return _all_magnitudes(dy, x)
    return all_norms(lambda row, col: _norms(dy, x, row, col, block), *geometry.cells(block), block, x.device)


def _all_magnitudes(dy: Tensor, x: Tensor) -> Tensor:
    """Return ``|dy' x|``: all elements are wanted, so they are computed in larger blocks, some at a time."""
    norms = torch.empty(dy.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    rows, cols = -(-dy.shape[1] // TILE), -(-x.shape[1] // TILE)
    chunk = max(1, chunk_of((TILE, TILE)) // 2)  # the blocks, and their elements in the order of the rows
    for r0, r1 in spans(rows, max(1, chunk // max(1, cols))):
        for c0, c1 in spans(cols, chunk):
            some = norms[r0 * TILE : r1 * TILE, c0 * TILE : c1 * TILE]
            dy_part, x_part = dy[:, r0 * TILE : r1 * TILE], x[:, c0 * TILE : c1 * TILE]
            cells = torch.arange((r1 - r0) * (c1 - c0), dtype=torch.int32, device=x.device)
            row_ptr = torch.arange(0, cells.shape[0] + 1, c1 - c0, dtype=torch.int32, device=x.device)
            blocks = outer_blocks(dy_part, x_part, (row_ptr, cells % (c1 - c0), cells), cells.shape[0], (TILE, TILE))
            whole = blocks.view(r1 - r0, c1 - c0, TILE, TILE).transpose(1, 2)
            torch.abs(whole.reshape((r1 - r0) * TILE, -1)[: some.shape[0], : some.shape[1]], out=some)
    return norms


def _norms(dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the norms of blocks that are given in the order of their rows; only these rows of dy are packed."""
    if not row.shape[0]:
        return torch.empty(0, dtype=torch.float32, device=x.device)
    first, rows = int(row[0]), int(row[-1]) + 1 - int(row[0])
    dy, row = dy[:, first * block[0] : (first + rows) * block[0]], row - first
    row_ptr = row_ptr_of(row, rows)
    slot = torch.arange(row.shape[0], dtype=torch.int32, device=x.device)
    blocks = outer_blocks(dy, x, (row_ptr, col.contiguous(), slot), row.shape[0], block)
    norms: Tensor = torch.linalg.vector_norm(blocks, dim=(1, 2))
    return norms


def sketch(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, block: tuple[int, int], geometry: LinearShape) -> Tensor:
    """Return ``(r, R, C)``; see :meth:`sparsekern.kernels.contract.Kernels.sketch`.

    ``u' G v`` of a block is a sum over tokens of ``(dy . u) (x . v)``, so G is not needed: dy and x are read once.
    """
    pairs, (rows, cols) = u.shape[0], geometry.cells(block)
    if not (pairs and rows and cols and x.shape[0]):
        return torch.zeros(pairs, rows, cols, dtype=torch.float32, device=x.device)
    dy, x, (u, v) = positive(dy), positive(x), directions(u, v, dy.shape[1], x.shape[1])
    tiles = tiles_of(pairs, 1, rows, cols, x.device)
    call("sk_sketch", Call.sketch(x, dy, tiles, u, v, pairs, block))
    return in_tiles(tiles, rows, cols)


def _as_read(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values as the library reads them beside inputs of a dtype, to which they are rounded here or there."""
    if dtype is torch.bfloat16 and values.shape[1:] != (1, 1) and takes_bfloat16():
        values = positive(values if values.dtype in (torch.float32, dtype) else values.to(dtype))
        return values if values.is_contiguous() else values.contiguous()
    return rounded(values, dtype)
