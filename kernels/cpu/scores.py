"""What a training method wants to know of the gradient ``G = dy' x`` of the whole weight, a chunk at a time."""

from __future__ import annotations

import torch
from sparsekern.kernels.cpu.linear import outer_blocks
from sparsekern.kernels.eager import sketch
from torch import Tensor

__all__ = ["all_block_norms", "block_norms", "sketch"]

CHUNK_BYTES = 8 * 2**20
"""What the blocks of a chunk may take before they are reduced to norms."""


def block_norms(dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the norms ``(K,)`` of chosen blocks; see :meth:`sparsekern.kernels.contract.Backend.block_norms`."""
    order = row.argsort(stable=True)
    norms = torch.empty(row.shape[0])
    chunk = max(1, CHUNK_BYTES // (4 * block[0] * block[1]))
    for some in order.split(chunk):
        norms[some] = _norms(dy, x, row[some], col[some], block)
    return norms


def all_block_norms(dy: Tensor, x: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the norms ``(R, C)`` of all blocks; see :meth:`sparsekern.kernels.contract.Backend.all_block_norms`."""
    rows, cols = -(-dy.shape[1] // block[0]), -(-x.shape[1] // block[1])
    norms = torch.empty(rows * cols)
    chunk = max(1, CHUNK_BYTES // (4 * block[0] * block[1]))
    for cells in torch.arange(rows * cols, dtype=torch.int32).split(chunk):
        norms[cells[0] : cells[-1] + 1] = _norms(dy, x, cells // cols, cells % cols, block)
    return norms.view(rows, cols)


def _norms(dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the norms of blocks that are given in the order of their rows."""
    rows = -(-dy.shape[1] // block[0])
    row_ptr = torch.searchsorted(row, torch.arange(rows + 1, dtype=row.dtype), out_int32=True)
    slot = torch.arange(row.shape[0], dtype=torch.int32)
    blocks = outer_blocks(dy, x, (row_ptr, col.contiguous(), slot), row.shape[0], block)
    norms: Tensor = torch.linalg.vector_norm(blocks, dim=(1, 2))
    return norms
