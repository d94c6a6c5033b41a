"""The form in which ``torch.onnx.export`` writes the forward ops: a product with a dense weight, in plain PyTorch ops.

The exporter decomposes an op that it cannot translate by PyTorch's table of decompositions, where these are entered.
The file stores values and index; a runtime that folds constants makes the dense weight once, when it loads the file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch.nn import functional as F

import sparsekern.ops.products  # noqa: F401  the ops must be defined before their decompositions
from sparsekern.kernels.contract import Geometry, Index, LinearShape
from sparsekern.ops.library import unpack


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


def dense_weight(values: Tensor, index: Index, geometry: Geometry) -> Tensor:
    """Return ``(O, I)``, or ``(Cout, Cin / groups, kh, kw)`` of a convolution."""
    bo, bi = values.shape[1:]
    rows, cols = index.row_ptr.shape[0] - 1, index.col_ptr.shape[0] - 1
    blocks = dense_blocks(values, index, rows, cols)
    if isinstance(geometry, LinearShape):
        return blocks.reshape(rows * bo, cols * bi)[: geometry.out_features, : geometry.in_features]
    groups, taps = geometry.groups, geometry.taps
    parts = blocks.reshape(groups, rows // groups * bo, taps, cols // taps * bi)
    parts = parts[:, : geometry.group_out, :, : geometry.group_in]
    return parts.reshape(geometry.out_channels, *geometry.kernel, geometry.group_in).permute(0, 3, 1, 2)


@register_decomposition([torch.ops.sparsekern.linear.default, torch.ops.sparsekern.conv2d.default])
def forward(x: Tensor, values: Tensor, bias: Tensor | None, index: list[Tensor], sizes: list[int], *_: Any) -> Tensor:
    """Return ``sparsekern::linear`` of ``x (T, I)`` or ``sparsekern::conv2d`` of ``x (N, Cin, H, W)`` in plain ops."""
    geometry = unpack(sizes)
    weight = dense_weight(values, Index(*index), geometry)
    if isinstance(geometry, LinearShape):
        return F.linear(x, weight, bias)
    top, bottom, left, right = geometry.padding
    padded = F.pad(x, (left, right, top, bottom)) if any(geometry.padding) else x
    return F.conv2d(padded, weight, bias, geometry.stride, 0, geometry.dilation, geometry.groups)
