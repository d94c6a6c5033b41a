"""The block-sparse linear layer in plain PyTorch. Axes and edge cases: :mod:`sparsekern.kernels.contract`.

y[t, o]          = bias[o] + sum over stored (o, i) of x[t, i] * W[o, i]
dx[t, i]         = sum over stored (o, i) of dy[t, o] * W[o, i]
dvalues[z, a, b] = sum over t of dy[t, row[z] * bo + a] * x[t, col[z] * bi + b]

:func:`multiply` gathers blocks of x, multiplies each by its stored block and adds the results into block rows (for dx:
block columns). :func:`outer_blocks` forms chosen blocks of ``dy' x``. Both work in a bounded scratch, with sums in
float32 (float64 for float64).
"""

from __future__ import annotations

import torch
from sparsekern.kernels.contract import Index, LinearShape, accumulate_dtype, entry_columns, entry_rows
from sparsekern.kernels.eager.chunks import cut, piece, spans
from sparsekern.kernels.eager.products import (
    Parts,
    Places,
    add_at,
    batched,
    clear_phantom,
    entry_owners,
    norms_of,
    start_sums,
    stored_gradient,
    stored_places,
)
from torch import Tensor
from torch.nn.functional import pad

TILE = 256
"""Side, in elements, of the tile of a gradient that :func:`all_block_norms` holds at a time."""


def fwd(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, geometry: LinearShape) -> Tensor:
    """Return ``y (T, O)``; see :meth:`sparsekern.kernels.contract.Kernels.fwd`."""
    return multiply(x, values, bias, index, geometry.out_features, transposed=False)


def dx(dy: Tensor, values: Tensor, index: Index, geometry: LinearShape, size: tuple[int, ...] = ()) -> Tensor:
    """Return ``dx (T, I)``; see :meth:`sparsekern.kernels.contract.Kernels.dx`."""
    return multiply(dy, values, None, index, geometry.in_features, transposed=True)


def dvalues(
    dy: Tensor, x: Tensor, index: Index, block: tuple[int, int], geometry: LinearShape, dtype: torch.dtype
) -> Tensor:
    """Return ``(Z, bo, bi)``; see :meth:`sparsekern.kernels.contract.Kernels.dvalues`."""
    parts = outer_blocks(dy, x, stored_places(index, block), index.slots, block)
    return stored_gradient(parts, index, block, dtype)


def backward(dy: Tensor, x: Tensor, values: Tensor, index: Index, geometry: LinearShape) -> tuple[Tensor, Tensor]:
    """Return ``dx, dvalues``; see :meth:`sparsekern.kernels.contract.Kernels.backward`."""
    block = (values.shape[1], values.shape[2])
    return dx(dy, values, index, geometry), dvalues(dy, x, index, block, geometry, values.dtype)


def block_norms(
    dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int], geometry: LinearShape
) -> Tensor:
    """Return the norms ``(K,)`` of chosen blocks; see :meth:`sparsekern.kernels.contract.Kernels.block_norms`."""
    parts = outer_blocks(dy, x, lambda e0, e1: (row[e0:e1], col[e0:e1]), row.shape[0], block)
    return norms_of(parts, row, x.dtype)


def all_block_norms(dy: Tensor, x: Tensor, block: tuple[int, int], geometry: LinearShape) -> Tensor:
    """Return the norms ``(R, C)`` of all blocks; see :meth:`sparsekern.kernels.contract.Kernels.all_block_norms`.

    One tile of G at a time is formed and reduced: at most half its block rows by half its block columns, rounded up.
    """
    (bo, bi), acc = block, accumulate_dtype(x.dtype)
    rows, cols = geometry.cells(block)
    norms = torch.empty(rows, cols, dtype=acc, device=x.device)
    tile_rows = min(max(1, TILE // bo), -(-rows // 2))
    tile_cols = min(max(1, TILE // bi), -(-cols // 2))
    panel = piece(x.shape[0], (tile_rows * bo + tile_cols * bi) * acc.itemsize)
    for r0, r1 in spans(rows, tile_rows):
        for c0, c1 in spans(cols, tile_cols):
            dy_part, x_part = dy[:, r0 * bo : r1 * bo], x[:, c0 * bi : c1 * bi]
            tile = torch.zeros(dy_part.shape[1], x_part.shape[1], dtype=acc, device=x.device)
            for t0, t1 in spans(x.shape[0], panel):
                tile.addmm_(dy_part[t0:t1].to(acc).T, x_part[t0:t1].to(acc))
            tile = pad(tile, (0, (c1 - c0) * bi - tile.shape[1], 0, (r1 - r0) * bo - tile.shape[0]))
            blocks = tile.view(r1 - r0, bo, c1 - c0, bi)
            norms[r0:r1, c0:c1] = torch.linalg.vector_norm(blocks, dim=(1, 3))
    return norms


def sketch(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, block: tuple[int, int], geometry: LinearShape) -> Tensor:
    """Return ``(r, R, C)``; see :meth:`sparsekern.kernels.contract.Kernels.sketch`.

    ``u' G v`` of a block is a sum over tokens of ``(dy . u) (x . v)``, so G is not needed.
    """
    (bo, bi), acc = block, accumulate_dtype(x.dtype)
    pairs, tokens = u.shape[0], x.shape[0]
    u_blocks = cut(u.to(acc), bo).permute(1, 2, 0)  # (R, bo, r)
    v_blocks = cut(v.to(acc), bi).permute(1, 2, 0)  # (C, bi, r)
    total = torch.zeros(pairs, u_blocks.shape[0], v_blocks.shape[0], dtype=acc, device=x.device)
    per_token = (dy.shape[1] + x.shape[1]) * 2 + (total.shape[1] + total.shape[2]) * pairs
    for t0, t1 in spans(tokens, piece(tokens, per_token * acc.itemsize)):
        left = torch.bmm(cut(dy[t0:t1].to(acc), bo).transpose(0, 1), u_blocks)  # (R, T, r)
        right = torch.bmm(cut(x[t0:t1].to(acc), bi).transpose(0, 1), v_blocks)  # (C, T, r)
        total.baddbmm_(left.permute(2, 0, 1), right.permute(2, 1, 0))
    return total


def multiply(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Index, features: int, *, transposed: bool
) -> Tensor:
    """Return ``y (T, features)``: ``y[:, row] += x[:, col] @ values[slot]'`` over all entries, plus ``bias``.

    Args:
        x: ``(T, F)``.
        values: ``(Z, bo, bi)``.
        bias: ``(features,)`` or None.
        index: the places.
        features: size of the last axis of y; the last block row may stick out.
        transposed: multiply by ``values[slot]`` instead of its transpose and go by the column lists, as dx does: rows
            and columns change parts.
    """
    tokens, slots, acc = x.shape[0], values.shape[0], accumulate_dtype(x.dtype)
    block = (values.shape[1], values.shape[2])
    bo, bi = block[::-1] if transposed else block
    ptr, slot = (index.col_ptr, index.col_slot) if transposed else (index.row_ptr, index.row_slot)
    others = entry_rows if transposed else entry_columns
    rows, whole = ptr.shape[0] - 1, features // bo
    size, x_size = acc.itemsize, x.element_size()
    y = x.new_empty(tokens, features)

    panel = piece(tokens, (rows + 1) * bo * size + x.shape[1] * x_size)
    chunk = piece(slots, panel * (bi * (x_size + size) + bo * size) + bo * bi * (8 + size) + 16)
    for t0, t1 in spans(tokens, panel):
        total = start_sums(bias, 1, rows, t1 - t0, bo, acc, x.device)
        x_blocks = cut(x[t0:t1], bi)
        for e0, e1 in spans(slots, chunk):
            gathered = x_blocks.index_select(1, others(index, block, e0, e1)).to(acc).transpose(0, 1)  # (n, T, bi)
            weight = values.index_select(0, slot[e0:e1]).to(x.dtype).to(acc)
            weight = weight if transposed else weight.transpose(1, 2)  # (n, bi, bo)
            add_at(total, entry_owners(ptr, e0, e1), batched(gathered, weight))
            del gathered, weight  # before the next chunk makes its own
        out = y[t0:t1]
        out[:, : whole * bo].unflatten(1, (whole, bo)).copy_(total[:whole].transpose(0, 1))
        if whole < rows:
            out[:, whole * bo :].copy_(total[whole, :, : features - whole * bo])
        del total, x_blocks
    return y


def outer_blocks(
    dy: Tensor,
    x: Tensor,
    places: Places,
    count: int,
    block: tuple[int, int],
) -> Parts:
    """Yield ``(start, stop, part)``: ``part (n, bo, bi)`` are chosen blocks of ``dy' x``, in order.

    Phantom elements are zero, also when dy or x hold NaN.

    Args:
        dy: ``(T, O)``.
        x: ``(T, I)``.
        places: gives the block rows and columns of blocks ``start`` to ``stop``.
        count: number of blocks.
        block: ``(bo, bi)``.
    """
    (bo, bi), acc = block, accumulate_dtype(x.dtype)
    tokens, size, x_size = x.shape[0], acc.itemsize, x.element_size()
    edge_bytes = (dy.shape[1] * (dy.shape[1] % bo > 0) + x.shape[1] * (x.shape[1] % bi > 0)) * x_size
    panel = min(piece(tokens, (bo + bi) * (size + x_size) + edge_bytes), 4096)
    chunk = piece(count, panel * (bo + bi) * (size + x_size) + bo * bi * (size + 8) + 32)
    for e0, e1 in spans(count, chunk):
        row, col = places(e0, e1)
        part = torch.zeros(e1 - e0, bo, bi, dtype=acc, device=x.device)
        for t0, t1 in spans(tokens, panel):
            dy_blocks = cut(dy[t0:t1], bo).index_select(1, row).to(acc).permute(1, 2, 0)  # (n, bo, T)
            x_blocks = cut(x[t0:t1], bi).index_select(1, col).to(acc).transpose(0, 1)  # (n, T, bi)
            part.baddbmm_(dy_blocks, x_blocks)
            del dy_blocks, x_blocks  # before the next panel makes its own
        clear_phantom(part, row, dy.shape[1], axis=1)
        clear_phantom(part, col, x.shape[1], axis=2)
        yield e0, e1, part
        del part
