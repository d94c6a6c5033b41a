"""The block-sparse linear layer on the native library. Axes and edge cases: :mod:`sparsekern.kernels.contract`.

Beside inputs and outputs a call holds the scratch of the library (packed panels of tokens; in the forward one
transposed float32 copy of the stored blocks, or for each thread of a block row, where one panel holds all tokens),
which it keeps for the next call, and a float32 copy of values or of their gradient where these are of another dtype. At
1x1 the scratch is 16 MiB of packed tokens (or one panel, where that is more) and, a thread, the copy of some rows: 128
Ki entries of 6 to 10 bytes, or those of 16 rows; 12 bytes for each of these rows and each chunk of features; and up to
128 Ki numbers of y or dy.
"""

from __future__ import annotations

import torch
from sparsekern.kernels.contract import Index, backward_in_two_calls
from sparsekern.kernels.cpu.library import Call, call, takes_bfloat16
from torch import Tensor

Lists = tuple[Tensor, Tensor, Tensor]


def fwd(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, out_features: int) -> Tensor:
    """Return ``y (T, O)``; see :meth:`sparsekern.kernels.contract.Backend.fwd`."""
    y = x.new_empty(x.shape[0], out_features)
    if y.numel() == 0:
        return y
    x, read, bias = positive(x), _as_read(values, x.dtype), None if bias is None else numbers(bias)
    call("sk_multiply", Call.of(x, y, read, bias, (index.row_ptr, index.row_col, index.row_slot)))
    return y


def dx(dy: Tensor, values: Tensor, index: Index, in_features: int) -> Tensor:
    """Return ``dx (T, I)``; see :meth:`sparsekern.kernels.contract.Backend.dx`."""
    grad = dy.new_empty(dy.shape[0], in_features)
    if grad.numel() == 0:
        return grad
    dy, read = positive(dy), _as_read(values, dy.dtype)
    lists = (index.col_ptr, index.col_row, index.col_slot)
    call("sk_multiply", Call.of(grad, dy, read, None, lists, transposed=True))
    return grad


def positive(x: Tensor) -> Tensor:
    """Return a tensor that is no negated view: the library sees memory, and that is a flag beside it."""
    return x.resolve_neg() if x.is_neg() else x


def numbers(x: Tensor) -> Tensor:
    """Return a tensor as the library reads weights: contiguous float32. Asking is cheaper than converting in vain."""
    x = positive(x if x.dtype is torch.float32 else x.float())
    return x if x.is_contiguous() else x.contiguous()


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values rounded to the dtype of the inputs, as :func:`numbers`."""
    return numbers(values if values.dtype is dtype else values.to(dtype))


def dvalues(dy: Tensor, x: Tensor, index: Index, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return ``(Z, bo, bi)``; see :meth:`sparsekern.kernels.contract.Backend.dvalues`."""
    out = outer_blocks(dy, x, (index.row_ptr, index.row_col, index.row_slot), index.slots, block)
    return out if dtype is torch.float32 else out.to(dtype)


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
    dy, x = positive(dy), positive(x)
    out = torch.empty(slots, *block, dtype=torch.float32, device=x.device)
    call("sk_outer", Call.of(x, dy, out, None, lists))
    return out


def backward(dy: Tensor, x: Tensor, values: Tensor, index: Index) -> tuple[Tensor, Tensor]:
    """Return ``dx, dvalues``, the same to the bit as one after the other: ``dy`` is packed once for both.

    See :meth:`sparsekern.kernels.contract.Backend.backward`.
    """
    if x.shape[0] == 0 or index.slots == 0:
        return backward_in_two_calls(dx, dvalues, dy, x, values, index)
    grad_x = dy.new_empty(x.shape)
    grad_values = torch.empty(values.shape, dtype=torch.float32, device=x.device)
    dy, x, read = positive(dy), positive(x), _as_read(values, dy.dtype)
    call(
        "sk_backward",
        Call.of(grad_x, dy, read, None, (index.col_ptr, index.col_row, index.col_slot), transposed=True),
        Call.of(x, dy, grad_values, None, (index.row_ptr, index.row_col, index.row_slot)),
    )
    return grad_x, grad_values if values.dtype is torch.float32 else grad_values.to(values.dtype)


def _as_read(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values as the library reads them beside inputs of a dtype, to which they are rounded here or there."""
    if dtype is torch.bfloat16 and values.shape[1:] != (1, 1) and takes_bfloat16():
        values = positive(values if values.dtype in (torch.float32, dtype) else values.to(dtype))
        return values if values.is_contiguous() else values.contiguous()
    return rounded(values, dtype)
