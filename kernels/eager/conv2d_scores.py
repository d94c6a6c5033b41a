"""What a training method wants to know of the gradient of a convolution's whole weight, without ever holding it.

Tap by tap that gradient is one of a linear layer: ``dy' x`` with x shifted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sparsekern.kernels.contract import ConvShape, accumulate_dtype
from sparsekern.kernels.eager.chunks import cut, panels, spans
from sparsekern.kernels.eager.conv2d import outer_blocks
from sparsekern.kernels.eager.scores import TILE
from sparsekern.kernels.eager.windows import Windows, buffer_bytes, one_tap
from torch import Tensor
from torch.nn.functional import pad


def conv2d_block_norms(
    dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int], shape: ConvShape
) -> Tensor:
    """Return the norms ``(K,)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_block_norms`."""
    norms = torch.empty(row.shape[0], dtype=accumulate_dtype(x.dtype), device=x.device)
    for e0, e1, part in outer_blocks(dy, x, lambda e0, e1: (row[e0:e1], col[e0:e1]), row.shape[0], block, shape):
        norms[e0:e1] = torch.linalg.vector_norm(part, dim=(1, 2))
    return norms


def conv2d_all_block_norms(dy: Tensor, x: Tensor, block: tuple[int, int], shape: ConvShape) -> Tensor:
    """Return the norms ``(R, C)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_all_block_norms`.

    One tile of the gradient at a time is formed and reduced: some block rows of a group by some block columns of a tap.
    """
    (bo, bi), acc = block, accumulate_dtype(x.dtype)
    rows, cols = shape.block_rows(bo), shape.block_cols(bi)
    norms = torch.empty(shape.groups, rows, shape.taps, cols, dtype=acc, device=x.device)
    for group in range(shape.groups):
        dy_group = dy.narrow(1, group * shape.group_out, shape.group_out)
        x_group = x.narrow(1, group * shape.group_in, shape.group_in)
        for r0, r1 in spans(rows, min(max(1, TILE // bo), -(-rows // 2))):
            for c0, c1 in spans(cols, min(max(1, TILE // bi), -(-cols // 2))):
                dy_part, x_part = dy_group[:, r0 * bo : r1 * bo], x_group[:, c0 * bi : c1 * bi]
                for tap in range(shape.taps):
                    tile = _tile(dy_part, x_part, one_tap(shape, tap))
                    tile = pad(tile, (0, (c1 - c0) * bi - tile.shape[1], 0, (r1 - r0) * bo - tile.shape[0]))
                    blocks = tile.view(r1 - r0, bo, c1 - c0, bi)
                    norms[group, r0:r1, tap, c0:c1] = torch.linalg.vector_norm(blocks, dim=(1, 3))
    return norms.view(shape.groups * rows, shape.taps * cols)


def conv2d_sketch(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, block: tuple[int, int], shape: ConvShape) -> Tensor:
    """Return ``(r, R, C)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_sketch`."""
    (bo, bi), acc, pairs = block, accumulate_dtype(x.dtype), u.shape[0]
    rows, cols = shape.block_rows(bo), shape.block_cols(bi)
    u_blocks = cut(u.to(acc).unflatten(1, (shape.groups, -1)), bo)  # (r, groups, RB, bo)
    v_blocks = cut(v.to(acc).unflatten(1, (shape.taps, -1)), bi)  # (r, taps, CB, bi)
    total = torch.zeros(shape.taps, shape.groups, pairs, rows, cols, dtype=acc, device=x.device)
    extra = (shape.groups * (rows + cols) * pairs + shape.groups * (rows * bo + 2 * cols * bi)) * acc.itemsize
    for windows, dy_part in _panels(dy, x, shape, bi, extra):
        left = torch.einsum("tgRo,qgRo->gqRt", cut(dy_part.to(acc), bo), u_blocks)
        buffer = windows.load(x, acc)
        for tap in range(shape.taps):
            seen = windows.tap(buffer, tap).reshape(-1, shape.groups, cols, bi)
            right = torch.einsum("tgCi,qCi->gqtC", seen, v_blocks[:, tap])
            total[tap] += left @ right
    return total.permute(2, 1, 3, 0, 4).reshape(pairs, shape.groups * rows, shape.taps * cols)


def _tile(dy: Tensor, x: Tensor, shape: ConvShape) -> Tensor:
    """Return ``dy' x (O, I)`` for some channels ``dy (N, O, Ho, Wo)``, ``x (N, I, H, W)``, as one tap sees x."""
    acc, (features_out, features_in) = accumulate_dtype(x.dtype), (dy.shape[1], x.shape[1])
    shape = shape._replace(in_channels=features_in, out_channels=features_out, groups=1)
    tile = torch.zeros(features_out, features_in, dtype=acc, device=x.device)
    for windows, dy_part in _panels(dy, x, shape, features_in, (features_out + features_in) * 2 * acc.itemsize):
        seen = windows.tap(windows.load(x, acc), 0).reshape(-1, features_in)
        tile.addmm_(dy_part.flatten(1).to(acc).T, seen)
    return tile


def _panels(
    dy: Tensor, x: Tensor, shape: ConvShape, side: int, bytes_per_token: int
) -> Iterator[tuple[Windows, Tensor]]:
    """Yield the windows of one panel after the other and its ``dy (T, groups, Cout / groups)``."""
    size = (x.shape[2], x.shape[3])
    row_bytes, image_bytes = buffer_bytes(shape, size, side, accumulate_dtype(x.dtype).itemsize)
    for panel in panels(x.shape[0], dy.shape[2], row_bytes + dy.shape[3] * bytes_per_token, image_bytes):
        part = dy.permute(0, 2, 3, 1)[panel.n0 : panel.n1, panel.r0 : panel.r1]
        yield Windows(shape, size, panel, side), part.reshape(-1, shape.groups, shape.group_out)
