"""Scores of both geometries: norms of blocks, a chunk at a time, and the tiles of a sketch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sparsekern.kernels.cpu.library import numbers
from sparsekern.kernels.eager.chunks import spans
from torch import Tensor
from torch.nn.functional import pad

CHUNK_BYTES = 8 * 2**20
"""Bytes that a chunk of blocks may take before it is reduced to norms, including the lists of where the blocks are."""

LIST_BYTES = 48
"""Bytes that these lists take for each block, including those in the scratch of the library; at 1x1 far more than the
block itself.

Chosen blocks are sorted all at once before that: int64 keys, their sorted copy and the order take 24 bytes a block."""

GROUP, GROUP_PAIRS = 32, 8
"""Of ``csrc/api.h``: block rows and columns in a tile of a sketch, and pairs that are computed at a time."""

Norms = Callable[[Tensor, Tensor], Tensor]
"""Computes the norms of the blocks ``(row[k], col[k])``, both int32 ``(K,)`` and sorted by row."""


def chosen_norms(norms_of: Norms, row: Tensor, col: Tensor, order: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the norms ``(K,)`` of chosen blocks.

    Args:
        norms_of: computes a chunk.
        row, col: ``(K,)``, the places.
        order: ``(K,)``, the positions of the places in the order of their rows.
        block: ``(bo, bi)``.
    """
    row, col = row.int(), col.int()
    norms = torch.empty(row.shape[0], dtype=torch.float32, device=row.device)
    for some in order.split(chunk_of(block)):
        norms[some] = norms_of(row[some], col[some])
    return norms


def all_norms(norms_of: Norms, rows: int, cols: int, block: tuple[int, int], device: torch.device) -> Tensor:
    """Return the norms ``(rows, cols)`` of all blocks of a grid."""
    norms = torch.empty(rows * cols, dtype=torch.float32, device=device)
    for start, stop in spans(rows * cols, chunk_of(block)):
        cells = torch.arange(start, stop, device=device)
        norms[start:stop] = norms_of((cells // cols).int(), (cells % cols).int())
    return norms.view(rows, cols)


def chunk_of(block: tuple[int, int]) -> int:
    """Return how many blocks are computed at a time."""
    return max(1, CHUNK_BYTES // (4 * block[0] * block[1] + LIST_BYTES))


def row_ptr_of(row: Tensor, rows: int) -> Tensor:
    """Return ``(rows + 1,)``: where each of the rows begins in an ascending list."""
    return torch.searchsorted(row, torch.arange(rows + 1, dtype=torch.int32, device=row.device), out_int32=True)


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
