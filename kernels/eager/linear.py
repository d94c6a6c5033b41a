"""The block-sparse linear layer in plain PyTorch. Axes and edge cases: :mod:`sparsekern.kernels.contract`.

y[t, o]          = bias[o] + sum over stored (o, i) of x[t, i] * W[o, i]
dx[t, i]         = sum over stored (o, i) of dy[t, o] * W[o, i]
dvalues[z, a, b] = sum over t of dy[t, row[z] * bo + a] * x[t, col[z] * bi + b]
"""

from __future__ import annotations

import torch
from sparsekern.kernels.contract import Index, entry_columns, entry_rows
from sparsekern.kernels.eager.products import entry_owners, multiply, outer_blocks
from torch import Tensor


def fwd(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, out_features: int) -> Tensor:
    """Return ``y (T, O)``; see :meth:`sparsekern.kernels.contract.Backend.fwd`."""
    slot = index.row_slot[: index.slots]
    col = entry_columns(index, block_of(values))
    return multiply(x, values, bias, index.row_ptr, col, slot, out_features, transposed=False)


def dx(dy: Tensor, values: Tensor, index: Index, in_features: int) -> Tensor:
    """Return ``dx (T, I)``; see :meth:`sparsekern.kernels.contract.Backend.dx`."""
    slot = index.col_slot[: index.slots]
    row = entry_rows(index, block_of(values))
    return multiply(dy, values, None, index.col_ptr, row, slot, in_features, transposed=True)


def dvalues(dy: Tensor, x: Tensor, index: Index, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return ``(Z, bo, bi)``; see :meth:`sparsekern.kernels.contract.Backend.dvalues`."""
    slots, rows = index.slots, index.row_ptr.shape[0] - 1
    slot = index.row_slot[:slots].long()
    owner = entry_owners(index.row_ptr, slots)
    free = owner == rows
    out = torch.empty(slots, *block, dtype=dtype, device=x.device)
    for e0, e1, part in outer_blocks(dy, x, owner.clamp(max=rows - 1), entry_columns(index, block), block):
        part.masked_fill_(free[e0:e1].view(-1, 1, 1), 0)
        out.index_copy_(0, slot[e0:e1], part.to(dtype))
    return out


def block_of(values: Tensor) -> tuple[int, int]:
    """Return ``(bo, bi)`` of ``values (Z, bo, bi)``."""
    return values.shape[1], values.shape[2]
