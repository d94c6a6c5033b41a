"""The block-sparse linear layer on the native library. Axes and edge cases: :mod:`sparsekern.kernels.contract`.

Beside inputs and outputs a call holds the scratch of the library (packed panels of tokens; in the forward one
transposed float32 copy of the stored blocks), which it keeps for the next call, and a float32 copy of values or of
their gradient where these are of another dtype.
"""

from __future__ import annotations

import torch
from sparsekern.kernels.contract import Index
from sparsekern.kernels.cpu.library import DTYPES, Matrix, Multiply, Order, Outer, call, takes_bfloat16, threads
from torch import Tensor

Lists = tuple[Tensor, Tensor, Tensor]


def fwd(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, out_features: int) -> Tensor:
    """Return ``y (T, O)``; see :meth:`sparsekern.kernels.contract.Backend.fwd`."""
    lists = (index.row_ptr, index.row_col, index.row_slot)
    return _multiply(x, values, bias, lists, out_features, transposed=False)


def dx(dy: Tensor, values: Tensor, index: Index, in_features: int) -> Tensor:
    """Return ``dx (T, I)``; see :meth:`sparsekern.kernels.contract.Backend.dx`."""
    lists = (index.col_ptr, index.col_row, index.col_slot)
    return _multiply(dy, values, None, lists, in_features, transposed=True)


def _multiply(
    x: Tensor, values: Tensor, bias: Tensor | None, lists: Lists, features: int, *, transposed: bool
) -> Tensor:
    slots, bo, bi = values.shape
    y = x.new_empty(x.shape[0], features)
    if y.numel() == 0:
        return y
    x = x.resolve_neg()  # the library sees memory, and a negated view is a flag beside it
    values = _readable(values, x.dtype).resolve_neg().contiguous()
    bias = None if bias is None else bias.float().resolve_neg().contiguous()
    call(
        "sk_multiply",
        Multiply(
            Matrix.of(x),
            Matrix.of(y),
            values.data_ptr(),
            None if bias is None else bias.data_ptr(),
            Order.of(*lists, slots),
            bo if transposed else bi,
            bi if transposed else bo,
            transposed,
            DTYPES[values.dtype],
            threads(),
        ),
    )
    return y


def _readable(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values as the library reads them beside inputs of a dtype, to which they are rounded here or there."""
    if dtype == torch.bfloat16 and values.shape[1:] != (1, 1) and takes_bfloat16():
        return values if values.dtype == torch.float32 else values.to(dtype)
    return values.to(dtype).float()


def dvalues(dy: Tensor, x: Tensor, index: Index, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return ``(Z, bo, bi)``; see :meth:`sparsekern.kernels.contract.Backend.dvalues`."""
    return outer_blocks(dy, x, (index.row_ptr, index.row_col, index.row_slot), index.slots, block).to(dtype)


def outer_blocks(dy: Tensor, x: Tensor, lists: Lists, slots: int, block: tuple[int, int]) -> Tensor:
    """Return blocks of ``dy' x`` as ``(Z, bo, bi)`` in float32.

    Args:
        dy: ``(T, O)``.
        x: ``(T, I)``.
        lists: ``row_ptr``, ``row_col`` and ``row_slot`` of an index of these blocks.
        slots: Z.
        block: ``(bo, bi)``.
    """
    if x.shape[0] == 0 or slots == 0:
        return torch.zeros(slots, *block, dtype=torch.float32, device=x.device)
    dy, x = dy.resolve_neg(), x.resolve_neg()
    out = torch.empty(slots, *block, dtype=torch.float32, device=x.device)
    call(
        "sk_outer",
        Outer(Matrix.of(dy), Matrix.of(x), out.data_ptr(), Order.of(*lists, slots), *block, threads()),
    )
    return out
