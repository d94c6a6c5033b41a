"""What a training method wants to know of the gradient ``G = dy' x`` of the whole weight, reduced as it is formed."""

from __future__ import annotations

import torch
import triton
from sparsekern.kernels.gpu import tables
from sparsekern.kernels.gpu.config import Config, Supertile, problem
from sparsekern.kernels.gpu.launch import aligned_rows, alignment, arch, dot_precision, on_device_of
from sparsekern.kernels.gpu.linear import outer_blocks
from sparsekern.kernels.gpu.projection import TILE_T, projection_kernel
from sparsekern.kernels.gpu.supertiles import supertile_kernel
from torch import Tensor

SKETCH_BYTES = 64 * 2**20
"""What :func:`sketch` may hold of projected tokens at a time."""


def block_norms(dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the norms ``(K,)`` of chosen blocks; see :meth:`sparsekern.kernels.contract.Backend.block_norms`."""
    norms = torch.empty(row.shape[0], dtype=torch.float32, device=x.device)
    lists = lists_of(row, col, -(-dy.shape[1] // block[0]))
    outer_blocks("block_norms", dy, x, lists, row.shape[0], block, norms)
    return norms


def lists_of(row: Tensor, col: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the lists of chosen blocks: where each block row begins, and the column and number of each block.

    In the order of block rows, blocks side by side share the tiles of dy.
    """
    sorted_row, order = row.sort(stable=True)
    starts = torch.arange(rows + 1, dtype=row.dtype, device=row.device)
    row_ptr = torch.searchsorted(sorted_row, starts, out_int32=True)
    return row_ptr, col[order], order.int()


def all_block_norms(dy: Tensor, x: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the norms ``(R, C)`` of all blocks; see :meth:`sparsekern.kernels.contract.Backend.all_block_norms`."""
    (bo, bi), tokens = block, x.shape[0]
    in_features, out_features = x.shape[1], dy.shape[1]
    rows, cols = -(-out_features // bo), -(-in_features // bi)
    norms = torch.empty(rows, cols, dtype=torch.float32, device=x.device)
    if tokens == 0:
        return norms.zero_()
    x, dy = aligned_rows(x), aligned_rows(dy)
    align, precision = alignment(x.dtype), dot_precision(x.dtype)

    def launch(config: Config) -> None:
        assert isinstance(config, Supertile)
        grid = (triton.cdiv(rows * bo, config.tile_out), triton.cdiv(cols * bi, config.tile_in))
        supertile_kernel[grid](
            dy, x, norms,
            tokens, in_features, out_features,
            x.shape[1] // align, dy.shape[1] // align, x.stride(0) // align, dy.stride(0) // align, rows, cols,
            ALIGN=align, BO=bo, BI=bi,
            TILE_OUT=config.tile_out, TILE_IN=config.tile_in, TILE_T=config.tile_t, PRECISION=precision,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    with on_device_of(x):
        which = problem("all_block_norms", arch(x.device), x.dtype, precision, block, tokens, rows * cols, rows)
        launch(tables.choose(which, launch))
    return norms


def sketch(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, block: tuple[int, int]) -> Tensor:
    """Return ``(r, R, C)``; see :meth:`sparsekern.kernels.contract.Backend.sketch`.

    ``u' G v`` of a block is a sum over tokens of ``(dy . u) (x . v)``: both are projected first, which is one pass over
    each, and multiplied then. That is ``bo * bi / r`` times less work than forming G in an accumulator.
    """
    (bo, bi), pairs, tokens = block, u.shape[0], x.shape[0]
    rows, cols = -(-dy.shape[1] // bo), -(-x.shape[1] // bi)
    total = torch.zeros(pairs, rows, cols, dtype=torch.float32, device=x.device)
    if pairs == 0:
        return total
    panel = max(TILE_T, SKETCH_BYTES // (4 * pairs * (rows + cols)) // TILE_T * TILE_T)
    for start in range(0, tokens, panel):
        left = project(dy[start : start + panel], u, bo)
        right = project(x[start : start + panel], v, bi)
        total.baddbmm_(left, right.transpose(1, 2))
    return total


def project(x: Tensor, directions: Tensor, side: int) -> Tensor:
    """Return ``(r, blocks, T)``: each block of columns of ``x (T, F)`` times that part of each direction ``(r, F)``."""
    (tokens, features), pairs = x.shape, directions.shape[0]
    blocks = -(-features // side)
    out = torch.empty(pairs, blocks, tokens, dtype=torch.float32, device=x.device)
    directions = directions.float().contiguous()
    with on_device_of(x):
        projection_kernel[(triton.cdiv(tokens, TILE_T) * blocks,)](
            x, directions, out,
            tokens, features, blocks, pairs, x.stride(0), x.stride(1),
            SIDE=side, TILE_T=TILE_T, num_warps=4,
        )  # fmt: skip
    return out
