"""What every backend offers, and the index that its kernels read.

One letter per axis, used in all kernels and their tests:

    T  tokens: the rows of x, all leading dimensions flattened
    O  out features, cut into R block rows of ``bo``        R = ceil(O / bo)
    I  in features, cut into C block columns of ``bi``      C = ceil(I / bi)
    Z  slots: stored blocks, free ones included

    x       (T, I)        the compute dtype: float16 | bfloat16 | float32 | float64, any strides
    dy      (T, O)        the compute dtype, any strides (autograd hands expanded views)
    values  (Z, bo, bi)   any floating dtype, rounded to the compute dtype when read
    y       (T, O)        the compute dtype, contiguous; sums in float32 (float64 for float64)

When ``bo`` does not divide O (or ``bi`` I), the last block row (column) sticks out. The part of a block outside the
matrix is *phantom*: ``dvalues`` writes zeros there, and no result depends on what it holds as long as that is finite.

A slot that is in no block row is free. Free slots are in no list of the index, and ``dvalues`` writes zeros there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

PADDING = 16
"""Zero entries behind every list of an :class:`Index`, so that a kernel may read one group ahead."""


class Index(NamedTuple):
    """Where the stored blocks are, by block row (for the forward) and by block column (for the input gradient).

    All int32. ``Z`` entries each, then :data:`PADDING` zeros; entries from ``row_ptr[R]`` on belong to free slots.

    Blocks of 1x1 are many, and their index is kept to 16 bytes a value: there ``row_col`` and ``col_row`` are the
    topology's own ``col`` and ``row``, *by slot* and without padding, so that entry ``e`` of block row ``r`` is in
    block column ``row_col[row_slot[e]]``. :func:`entry_columns` and :func:`entry_rows` hide the difference.
    """

    row_ptr: Tensor
    """(R + 1,): block row ``r`` holds entries ``row_ptr[r]`` to ``row_ptr[r + 1]`` of the next two lists."""
    row_col: Tensor
    """(Z + PADDING,): block column of each entry, ascending within a block row."""
    row_slot: Tensor
    """(Z + PADDING,): slot of each entry in ``values``."""
    col_ptr: Tensor
    """(C + 1,): as ``row_ptr``, for block columns."""
    col_row: Tensor
    """(Z + PADDING,): block row of each entry, ascending within a block column."""
    col_slot: Tensor
    """(Z + PADDING,): slot of each entry in ``values``."""

    @property
    def slots(self) -> int:
        """Z, the number of slots."""
        return self.row_slot.shape[0] - PADDING


class Backend(Protocol):
    """The functions of a backend. ``kernels/eager`` is the one to read first."""

    def why_not(self, op: str, device: torch.device, dtype: torch.dtype, block: tuple[int, int]) -> str | None:
        """Return None when the backend can run ``op`` so, else the reason as half a sentence."""

    def fwd(self, x: Tensor, values: Tensor, bias: Tensor | None, index: Index, out_features: int) -> Tensor:
        """Return ``y = x W' + bias``. An empty block row yields the bias."""

    def dx(self, dy: Tensor, values: Tensor, index: Index, in_features: int) -> Tensor:
        """Return ``dx = dy W``, shape ``(T, I)``. An empty block column yields zeros."""

    def dvalues(self, dy: Tensor, x: Tensor, index: Index, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return the stored blocks of ``dW = dy' x`` as ``(Z, bo, bi)`` of ``dtype``."""

    def backward(self, dy: Tensor, x: Tensor, values: Tensor, index: Index) -> tuple[Tensor, Tensor]:
        """Return ``dx`` and ``dvalues`` (of the dtype of ``values``): both gradients of a layer, at once."""

    def block_norms(self, dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int]) -> Tensor:
        """Return the Frobenius norms ``(K,)`` of the blocks ``(row[k], col[k])`` of ``dy' x``."""

    def all_block_norms(self, dy: Tensor, x: Tensor, block: tuple[int, int]) -> Tensor:
        """Return the Frobenius norms ``(R, C)`` of all blocks of ``dy' x``, none of them stored."""

    def sketch(self, dy: Tensor, x: Tensor, u: Tensor, v: Tensor, block: tuple[int, int]) -> Tensor:
        """Return ``(r, R, C)``: ``u[q]' G v[q]`` block by block, for ``u (r, O)``, ``v (r, I)``, ``G = dy' x``."""


def backward_in_two_calls(
    dx: Callable[..., Tensor], dvalues: Callable[..., Tensor], dy: Tensor, x: Tensor, values: Tensor, index: Index
) -> tuple[Tensor, Tensor]:
    """Return what :meth:`Backend.backward` does, where doing both at once saves nothing."""
    block = (values.shape[1], values.shape[2])
    return dx(dy, values, index, x.shape[1]), dvalues(dy, x, index, block, values.dtype)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums of ``dtype`` are formed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def entry_columns(index: Index, block: tuple[int, int], start: int, stop: int) -> Tensor:
    """Return the block columns of entries ``start`` to ``stop`` of the row lists; any legal one for a free slot."""
    if block == (1, 1):
        return index.row_col.index_select(0, index.row_slot[start:stop]).clamp_(min=0)
    return index.row_col[start:stop]


def entry_rows(index: Index, block: tuple[int, int], start: int, stop: int) -> Tensor:
    """Return the block rows of entries ``start`` to ``stop`` of the column lists; any legal one for a free slot."""
    if block == (1, 1):
        return index.col_row.index_select(0, index.col_slot[start:stop]).clamp_(min=0)
    return index.col_row[start:stop]
