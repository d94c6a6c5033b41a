"""What a training method wants to know of the gradient ``G = dy' x`` of the whole weight, without ever holding it."""

from __future__ import annotations

import torch
from sparsekern.kernels.contract import accumulate_dtype
from sparsekern.kernels.eager.chunks import cut, spans, token_panel
from sparsekern.kernels.eager.products import outer_blocks
from torch import Tensor
from torch.nn.functional import pad

TILE = 256
"""Side, in elements, of the tile of G that :func:`all_block_norms` holds at a time."""


def block_norms(dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the norms ``(K,)`` of chosen blocks; see :meth:`sparsekern.kernels.contract.Backend.block_norms`."""
    norms = torch.empty(row.shape[0], dtype=accumulate_dtype(x.dtype), device=x.device)
    for e0, e1, part in outer_blocks(dy, x, lambda e0, e1: (row[e0:e1], col[e0:e1]), row.shape[0], block):
        norms[e0:e1] = torch.linalg.vector_norm(part, dim=(1, 2))
    return norms


def all_block_norms(dy: Tensor, x: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the norms ``(R, C)`` of all blocks; see :meth:`sparsekern.kernels.contract.Backend.all_block_norms`.

    One tile of G at a time is formed and reduced: at most half its block rows by half its block columns, rounded up.
    """
    (bo, bi), acc = block, accumulate_dtype(x.dtype)
    rows, cols = -(-dy.shape[1] // bo), -(-x.shape[1] // bi)
    norms = torch.empty(rows, cols, dtype=acc, device=x.device)
    tile_rows = min(max(1, TILE // bo), -(-rows // 2))
    tile_cols = min(max(1, TILE // bi), -(-cols // 2))
    panel = token_panel(x.shape[0], (tile_rows * bo + tile_cols * bi) * acc.itemsize)
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


def sketch(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, block: tuple[int, int]) -> Tensor:
    """Return ``(r, R, C)``; see :meth:`sparsekern.kernels.contract.Backend.sketch`.

    ``u' G v`` of a block is a sum over tokens of ``(dy . u) (x . v)``, so G is not needed.
    """
    (bo, bi), acc = block, accumulate_dtype(x.dtype)
    pairs, tokens = u.shape[0], x.shape[0]
    u_blocks = cut(u.to(acc), bo).permute(1, 2, 0)  # (R, bo, r)
    v_blocks = cut(v.to(acc), bi).permute(1, 2, 0)  # (C, bi, r)
    total = torch.zeros(pairs, u_blocks.shape[0], v_blocks.shape[0], dtype=acc, device=x.device)
    per_token = (dy.shape[1] + x.shape[1]) * 2 + (total.shape[1] + total.shape[2]) * pairs
    for t0, t1 in spans(tokens, token_panel(tokens, per_token * acc.itemsize)):
        left = torch.bmm(cut(dy[t0:t1].to(acc), bo).transpose(0, 1), u_blocks)  # (R, T, r)
        right = torch.bmm(cut(x[t0:t1].to(acc), bi).transpose(0, 1), v_blocks)  # (C, T, r)
        total.baddbmm_(left.permute(2, 0, 1), right.permute(2, 1, 0))
    return total
