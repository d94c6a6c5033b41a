"""The block-sparse convolution on the native library. Axes and edge cases: :mod:`sparsekern.kernels.contract`.

Beside inputs and outputs a call holds the scratch of the library, which it keeps for the next call: some images at a
time, packed with zeros around them; in the forward one transposed float32 copy of the stored blocks (where bfloat16 has
instructions of its own, one in bfloat16, also for dx); at 1x1 the entries in the order in which they are read, 8 bytes
each, 12 for their gradient, and, a thread, a copy of those of 32 rows, 12 bytes each; where blocks are few beside the
images, a second gradient of the stored blocks. And a list of where each stored block begins, and a float32 copy of
values or of their gradient where these are of another dtype.
"""

from __future__ import annotations

import torch
from sparsekern.kernels.contract import ConvShape, Index, conv2d_backward_in_two_calls
from sparsekern.kernels.cpu.library import Call, call
from sparsekern.kernels.cpu.linear import Lists, numbers, positive, rounded
from torch import Tensor


def conv2d_fwd(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, shape: ConvShape) -> Tensor:
    """Return ``y (N, Cout, Ho, Wo)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_fwd`."""
    size = shape.output_size(x.shape[2], x.shape[3])
    y = x.new_empty(x.shape[0], *size, shape.out_channels).permute(0, 3, 1, 2)
    if y.numel() == 0:
        return y
    x, read, bias = positive(x), rounded(values, x.dtype), None if bias is None else numbers(bias)
    lists = (index.row_ptr, index.row_col, index.row_slot)
    call("sk_multiply", Call.of(x, y, read, bias, lists, shape))
    return y


def conv2d_dx(dy: Tensor, values: Tensor, index: Index, shape: ConvShape, size: tuple[int, int]) -> Tensor:
    """Return ``dx (N, Cin, H, W)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_dx`."""
    dx = dy.new_empty(dy.shape[0], *size, shape.in_channels).permute(0, 3, 1, 2)
    if dx.numel() == 0:
        return dx
    dy, read = positive(dy), rounded(values, dy.dtype)
    lists = (index.col_ptr, index.col_row, index.col_slot)
    call("sk_multiply", Call.of(dx, dy, read, None, lists, shape, transposed=True))
    return dx


def conv2d_dvalues(
    dy: Tensor, x: Tensor, index: Index, block: tuple[int, int], shape: ConvShape, dtype: torch.dtype
) -> Tensor:
    """Return ``(Z, bo, bi)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_dvalues`."""
    out = conv2d_outer_blocks(dy, x, (index.row_ptr, index.row_col, index.row_slot), index.slots, block, shape)
    return out if dtype is torch.float32 else out.to(dtype)


def conv2d_outer_blocks(
    dy: Tensor, x: Tensor, lists: Lists, slots: int, block: tuple[int, int], shape: ConvShape
) -> Tensor:
    """Return blocks of the weight's gradient as ``(Z, bo, bi)`` in float32.

    Args:
        dy: ``(N, Cout, Ho, Wo)``.
        x: ``(N, Cin, H, W)``.
        lists: ``row_ptr``, ``row_col`` and ``row_slot`` of an index of these blocks.
        slots: Z.
        block: ``(bo, bi)``.
        shape: of the convolution.
    """
    if dy.numel() == 0 or slots == 0:
        return torch.zeros(slots, *block, dtype=torch.float32, device=x.device)
    dy, x = positive(dy), positive(x)
    out = torch.empty(slots, *block, dtype=torch.float32, device=x.device)
    call("sk_outer", Call.of(x, dy, out, None, lists, shape))
    return out


def conv2d_backward(dy: Tensor, x: Tensor, values: Tensor, index: Index, shape: ConvShape) -> tuple[Tensor, Tensor]:
    """Return ``dx, dvalues``, the same to the bit as one after the other: ``dy`` is packed once for both.

    See :meth:`sparsekern.kernels.contract.Backend.conv2d_backward`.
    """
    if dy.numel() == 0 or index.slots == 0:
        return conv2d_backward_in_two_calls(conv2d_dx, conv2d_dvalues, dy, x, values, index, shape)
    grad_x = dy.new_empty(x.shape[0], x.shape[2], x.shape[3], x.shape[1]).permute(0, 3, 1, 2)
    grad_values = torch.empty(values.shape, dtype=torch.float32, device=x.device)
    dy, x, read = positive(dy), positive(x), rounded(values, dy.dtype)
    columns, rows = (index.col_ptr, index.col_row, index.col_slot), (index.row_ptr, index.row_col, index.row_slot)
    call(
        "sk_backward",
        Call.of(grad_x, dy, read, None, columns, shape, transposed=True),
        Call.of(x, dy, grad_values, None, rows, shape),
    )
    return grad_x, grad_values if values.dtype is torch.float32 else grad_values.to(values.dtype)
