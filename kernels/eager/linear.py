"""The block-sparse linear layer in plain PyTorch. Axes and edge cases: :mod:`sparsekern.kernels.contract`.

y[t, o]          = bias[o] + sum over stored (o, i) of x[t, i] * W[o, i]
dx[t, i]         = sum over stored (o, i) of dy[t, o] * W[o, i]
dvalues[z, a, b] = sum over t of dy[t, row[z] * bo + a] * x[t, col[z] * bi + b]
"""

from __future__ import annotations

import torch
from sparsekern.kernels.contract import Index
from sparsekern.kernels.eager.products import entry_owners, multiply, outer_blocks, stored_places
from torch import Tensor


def fwd(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, out_features: int) -> Tensor:
    """Return ``y (T, O)``; see :meth:`sparsekern.kernels.contract.Backend.fwd`."""
    return multiply(x, values, bias, index, out_features, transposed=False)


def dx(dy: Tensor, values: Tensor, index: Index, in_features: int) -> Tensor:
    """Return ``dx (T, I)``; see :meth:`sparsekern.kernels.contract.Backend.dx`."""
    return multiply(dy, values, None, index, in_features, transposed=True)


def dvalues(dy: Tensor, x: Tensor, index: Index, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return ``(Z, bo, bi)``; see :meth:`sparsekern.kernels.contract.Backend.dvalues`."""
    slots, rows = index.slots, index.row_ptr.shape[0] - 1
    places = stored_places(index, block)
    out = torch.empty(slots, *block, dtype=dtype, device=x.device)
    for e0, e1, part in outer_blocks(dy, x, places, slots, block):
        free = entry_owners(index.row_ptr, e0, e1) == rows
        part.masked_fill_(free.view(-1, 1, 1), 0)
        out.index_copy_(0, index.row_slot[e0:e1].long(), part.to(dtype))
    return out
