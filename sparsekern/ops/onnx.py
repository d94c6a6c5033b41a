"""What ``torch.onnx.export`` writes for the forward ops: a dense weight made of plain PyTorch ops, and a dense product.

The exporter decomposes ops that it has no translation of by PyTorch's table of decompositions; ours are entered there.
Values and index stay what the file stores; a runtime that folds constants makes the dense weight once, when it loads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch.nn import functional as F

import sparsekern.ops.conv2d
import sparsekern.ops.linear  # noqa: F401  the ops must be defined before their decompositions
from sparsekern.kernels.contract import Index
from sparsekern.ops.shapes import unpack_shape


def dense_blocks(values: Tensor, index: Index, rows: int, cols: int) -> Tensor:
    """Return ``(R, bo, C, bi)``: the stored blocks at their places, zeros elsewhere, without a shape that is data."""
    slots, bo, bi = values.shape
    slot = index.row_slot[:slots].long()
    starts = torch.zeros(slots + 1, dtype=torch.int64, device=values.device)
    starts = starts.index_put((index.row_ptr[1:].long(),), torch.ones_like(index.row_ptr[1:]).long(), accumulate=True)
    row = starts[:slots].cumsum(0)  # of each entry; R for those of free slots, which go into a row below the matrix
    by_slot = (bo, bi) == (1, 1)
    col = (index.row_col[slot].clamp(min=0) if by_slot else index.row_col[:slots]).long()
    flat = torch.zeros((rows + 1) * cols, bo * bi, dtype=values.dtype, device=values.device)
    flat = flat.index_put((row * cols + col,), values[slot].reshape(slots, bo * bi))
    return flat.reshape(rows + 1, cols, bo, bi)[:rows].permute(0, 2, 1, 3)


@register_decomposition(torch.ops.sparsekern.linear.default)
def linear(x: Tensor, values: Tensor, bias: Tensor | None, index: list[Tensor], out_features: int, *_: Any) -> Tensor:
    """Return ``sparsekern::linear`` in plain ops; ``x (T, I)``."""
    full = Index(*index)
    bo, bi = values.shape[1:]
    rows, cols = full.row_ptr.shape[0] - 1, full.col_ptr.shape[0] - 1
    weight = dense_blocks(values, full, rows, cols).reshape(rows * bo, cols * bi)
    return F.linear(x, weight[:out_features, : x.shape[1]], bias)


@register_decomposition(torch.ops.sparsekern.conv2d.default)
def conv2d(x: Tensor, values: Tensor, bias: Tensor | None, index: list[Tensor], shape: list[int], *_: Any) -> Tensor:
    """Return ``sparsekern::conv2d`` in plain ops; ``x (N, Cin, H, W)``."""
    sizes = unpack_shape(shape)
    bo, bi = values.shape[1:]
    rows, cols = sizes.block_rows(bo), sizes.block_cols(bi)
    blocks = dense_blocks(values, Index(*index), sizes.groups * rows, sizes.taps * cols)
    parts = blocks.reshape(sizes.groups, rows * bo, sizes.taps, cols * bi)[:, : sizes.group_out, :, : sizes.group_in]
    weight = parts.reshape(sizes.out_channels, *sizes.kernel, sizes.group_in).permute(0, 3, 1, 2)
    top, bottom, left, right = sizes.padding
    padded = F.pad(x, (left, right, top, bottom)) if any(sizes.padding) else x
    return F.conv2d(padded, weight, bias, sizes.stride, 0, sizes.dilation, sizes.groups)
