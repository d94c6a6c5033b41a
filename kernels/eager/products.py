"""Functions shared by the products of both geometries, and reductions of chosen blocks of a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from sparsekern.kernels.contract import Index, accumulate_dtype, entry_columns
from sparsekern.kernels.eager.chunks import cut
from torch import Tensor

Places = Callable[[int, int], tuple[Tensor, Tensor]]
"""Gives the block rows and block columns of blocks ``start`` to ``stop``."""

Parts = Iterator[tuple[int, int, Tensor]]
"""``(start, stop, part)``: ``part (n, bo, bi)`` are blocks ``start`` to ``stop`` of a gradient."""


def entry_owners(ptr: Tensor, start: int, stop: int) -> Tensor:
    """Return the block row of entries ``start`` to ``stop``, from ``row_ptr (R + 1,)``.

    Entries of free slots get ``R``, one more than there is.
    """
    entries = torch.arange(start, stop, dtype=torch.int32, device=ptr.device)
    return torch.searchsorted(ptr, entries, right=True, out_int32=True) - 1


def stored_places(index: Index, block: tuple[int, int]) -> Places:
    """Return a function that gives the block rows and columns of entries ``start`` to ``stop`` of the row lists.

    Those of free slots are any legal ones.
    """
    rows = index.row_ptr.shape[0] - 1

    def places(start: int, stop: int) -> tuple[Tensor, Tensor]:
        row = entry_owners(index.row_ptr, start, stop).clamp_(max=rows - 1)
        return row, entry_columns(index, block, start, stop)

    return places


def stored_gradient(parts: Parts, index: Index, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return ``(Z, bo, bi)``: the blocks of the row lists in their slots, zeros in the free ones."""
    slots, rows = index.slots, index.row_ptr.shape[0] - 1
    out = torch.empty(slots, *block, dtype=dtype, device=index.row_ptr.device)
    for e0, e1, part in parts:
        free = entry_owners(index.row_ptr, e0, e1) == rows
        part.masked_fill_(free.view(-1, 1, 1), 0)
        out.index_copy_(0, index.row_slot[e0:e1].long(), part.to(dtype))
    return out


def norms_of(parts: Parts, row: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the norms ``(K,)`` of the blocks that are in block rows ``row (K,)``, for inputs of ``dtype``."""
    norms = torch.empty(row.shape[0], dtype=accumulate_dtype(dtype), device=row.device)
    for e0, e1, part in parts:
        norms[e0:e1] = torch.linalg.vector_norm(part, dim=(1, 2))
    return norms


def batched(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for ``(n, T, k)`` and ``(n, k, m)``; a product of singletons is no work for a matrix library."""
    return a * b if a.shape[2] == 1 else torch.bmm(a, b)


def start_sums(
    bias: Tensor | None, groups: int, rows: int, tokens: int, side: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the sums ``(rows + 1, tokens, side)`` before the first block: the bias, or zeros.

    The additional row receives what free slots add and is discarded: to skip free slots, the host would need their
    number.
    """
    total = torch.zeros(rows + 1, tokens, side, dtype=dtype, device=device)
    if bias is not None:
        total[:rows] = cut(bias.unflatten(0, (groups, -1)), side).reshape(rows, 1, side)
    return total


def add_at(total: Tensor, owner: Tensor, part: Tensor) -> None:
    """``total[owner[n]] += part[n]``, in the order of n: on CUDA index_add_ would add in any order."""
    if total.is_cuda:
        total.index_put_((owner,), part, accumulate=True)
    else:
        total.index_add_(0, owner, part)


def clear_phantom(part: Tensor, position: Tensor, features: int, axis: int) -> None:
    """Zero the elements beyond ``features`` in edge blocks, because NaN times the zero padding is NaN."""
    side = part.shape[axis]
    real = features % side
    if real:
        at_edge = position == features // side
        part.narrow(axis, real, side - real).masked_fill_(at_edge.view(-1, 1, 1), 0)
