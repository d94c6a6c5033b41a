"""What a training method wants to know of the gradient ``G = dy' x`` of the whole weight, a chunk at a time."""

from __future__ import annotations

import torch
from sparsekern.kernels.cpu.library import Call, call
from sparsekern.kernels.cpu.linear import numbers, outer_blocks, positive
from sparsekern.kernels.eager.chunks import spans
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["all_block_norms", "block_norms", "sketch"]

CHUNK_BYTES = 8 * 2**20
"""What the blocks of a chunk may take before they are reduced to norms, with the lists that say where they are."""

GROUP, GROUP_PAIRS = 32, 8
"""Of ``csrc/api.h``: a sketch comes in tiles of so many block rows and columns, for so many pairs at a time."""

LIST_BYTES = 48
"""What these lists take a block, those in the scratch of the library with them; at 1x1 far more than the block.

Chosen blocks are sorted all at once before that: int64 keys, their sorted copy and the order, 24 bytes a block."""

TILE = 64
"""Side of the blocks in which all single elements are computed."""


def block_norms(dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the norms ``(K,)`` of chosen blocks; see :meth:`sparsekern.kernels.contract.Backend.block_norms`."""
    row, col = row.int(), col.int()
    order = (row.long() * -(-x.shape[1] // block[1]) + col).argsort()  # columns ascend within a row, as in an index
    norms = torch.empty(row.shape[0], dtype=torch.float32, device=x.device)
    for some in order.split(chunk_of(block)):
        norms[some] = _norms(dy, x, row[some], col[some], block)
    return norms


def all_block_norms(dy: Tensor, x: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the norms ``(R, C)`` of all blocks; see :meth:`sparsekern.kernels.contract.Backend.all_block_norms`."""
    if block == (1, 1):
        return _all_magnitudes(dy, x)
    rows, cols = -(-dy.shape[1] // block[0]), -(-x.shape[1] // block[1])
    norms = torch.empty(rows * cols, dtype=torch.float32, device=x.device)
    for start, stop in spans(rows * cols, chunk_of(block)):
        cells = torch.arange(start, stop, device=x.device)
        norms[start:stop] = _norms(dy, x, (cells // cols).int(), (cells % cols).int(), block)
    return norms.view(rows, cols)


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


def chunk_of(block: tuple[int, int]) -> int:
    """Return how many blocks are computed at a time."""
    return max(1, CHUNK_BYTES // (4 * block[0] * block[1] + LIST_BYTES))


def row_ptr_of(row: Tensor, rows: int) -> Tensor:
    """Return ``(rows + 1,)``: where each of the rows begins in an ascending list."""
    return torch.searchsorted(row, torch.arange(rows + 1, dtype=torch.int32, device=row.device), out_int32=True)


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


def sketch(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, block: tuple[int, int]) -> Tensor:
    """Return ``(r, R, C)``; see :meth:`sparsekern.kernels.contract.Backend.sketch`.

    ``u' G v`` of a block is a sum over tokens of ``(dy . u) (x . v)``, so G is not needed: dy and x are read once.
    """
    pairs, rows, cols = u.shape[0], -(-dy.shape[1] // block[0]), -(-x.shape[1] // block[1])
    if not (pairs and rows and cols and x.shape[0]):
        return torch.zeros(pairs, rows, cols, dtype=torch.float32, device=x.device)
    dy, x, (u, v) = positive(dy), positive(x), directions(u, v, dy.shape[1], x.shape[1])
    tiles = tiles_of(pairs, 1, rows, cols, x.device)
    call("sk_sketch", Call.sketch(x, dy, tiles, u, v, pairs, block))
    return in_tiles(tiles, rows, cols)


def directions(u: Tensor, v: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Return ``(r, F)`` both as ``(F, r)`` for the library, with zeros up to a whole number of groups of pairs.

    Raises:
        ValueError: they are not ``(r, rows)`` and ``(r, cols)``: the library would read beyond them.
    """
    if u.shape != (u.shape[0], rows) or v.shape != (u.shape[0], cols):
        shapes = f"{tuple(u.shape)} and {tuple(v.shape)}"
        raise ValueError(f"directions of a sketch have shapes {shapes}; they must be (r, {rows}) and (r, {cols})")
    missing = (0, 0, 0, -u.shape[0] % GROUP_PAIRS)
    return numbers(pad(u.float(), missing).t()), numbers(pad(v.float(), missing).t())


def tiles_of(pairs: int, groups: int, rows: int, cols: int, device: torch.device) -> Tensor:
    """Return memory for the sketch of ``rows`` by ``cols`` blocks in each of ``groups``, as the library writes it."""
    size = (pairs, groups, -(-rows // GROUP), -(-cols // GROUP), GROUP, GROUP)
    return torch.empty(size, dtype=torch.float32, device=device)


def in_tiles(tiles: Tensor, rows: int, cols: int) -> Tensor:
    """Return the ``(r, groups * rows, cols)`` that these tiles hold."""
    whole = tiles.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return whole[:, :, :rows, :cols].flatten(1, 2).contiguous()
