"""What a training method wants to know of the gradient of a convolution's whole weight, a chunk at a time."""

from __future__ import annotations

import torch
from sparsekern.kernels.contract import ConvShape
from sparsekern.kernels.cpu.conv2d import conv2d_outer_blocks
from sparsekern.kernels.cpu.library import Call, call
from sparsekern.kernels.cpu.linear import positive
from sparsekern.kernels.cpu.scores import chunk_of, directions, in_tiles, row_ptr_of, tiles_of
from sparsekern.kernels.eager.chunks import spans
from torch import Tensor

__all__ = ["conv2d_all_block_norms", "conv2d_block_norms", "conv2d_sketch"]


def conv2d_block_norms(
    dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int], shape: ConvShape
) -> Tensor:
    """Return the norms ``(K,)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_block_norms`."""
    row, col = row.int(), col.int()
    order = row.argsort(stable=True)
    norms = torch.empty(row.shape[0], dtype=torch.float32, device=x.device)
    for some in order.split(chunk_of(block)):
        norms[some] = _norms(dy, x, row[some], col[some], block, shape)
    return norms


def conv2d_all_block_norms(dy: Tensor, x: Tensor, block: tuple[int, int], shape: ConvShape) -> Tensor:
    """Return the norms ``(R, C)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_all_block_norms`."""
    rows, cols = shape.groups * shape.block_rows(block[0]), shape.taps * shape.block_cols(block[1])
    norms = torch.empty(rows * cols, dtype=torch.float32, device=x.device)
    for start, stop in spans(rows * cols, chunk_of(block)):
        cells = torch.arange(start, stop, device=x.device)
        norms[start:stop] = _norms(dy, x, (cells // cols).int(), (cells % cols).int(), block, shape)
    return norms.view(rows, cols)


def conv2d_sketch(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, block: tuple[int, int], shape: ConvShape) -> Tensor:
    """Return ``(r, R, C)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_sketch`.

    As :func:`sparsekern.kernels.cpu.scores.sketch`: dy is read once, x once for each tap.
    """
    pairs, groups, rows, cols = (
        u.shape[0],
        shape.groups,
        shape.block_rows(block[0]),
        shape.taps * shape.block_cols(block[1]),
    )
    if not (pairs and dy.numel()):
        return torch.zeros(pairs, groups * rows, cols, dtype=torch.float32, device=x.device)
    dy, x = positive(dy), positive(x)
    u, v = directions(u, v, shape.out_channels, shape.taps * shape.group_in)
    tiles = tiles_of(pairs, groups, rows, cols, x.device)
    call("sk_sketch", Call.sketch(x, dy, tiles, u, v, pairs, block, shape))
    return in_tiles(tiles, rows, cols)


def _norms(dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int], shape: ConvShape) -> Tensor:
    """Return the norms of blocks that are given in the order of their rows; only what they read is packed."""
    lists = row_ptr_of(row, shape.groups * shape.block_rows(block[0])), col.contiguous(), _slots(row)
    blocks = conv2d_outer_blocks(dy, x, lists, row.shape[0], block, shape)
    norms: Tensor = torch.linalg.vector_norm(blocks, dim=(1, 2))
    return norms


def _slots(row: Tensor) -> Tensor:
    return torch.arange(row.shape[0], dtype=torch.int32, device=row.device)
