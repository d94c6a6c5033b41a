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
from sparsekern.kernels.contract import ConvShape, Index, Lists
from sparsekern.kernels.cpu.library import Call, call, numbers, positive, rounded
from sparsekern.kernels.cpu.scores import all_norms, chosen_norms, directions, in_tiles, row_ptr_of, tiles_of
from torch import Tensor


def fwd(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, geometry: ConvShape) -> Tensor:
    """Return ``y (N, Cout, Ho, Wo)``; see :meth:`sparsekern.kernels.contract.Kernels.fwd`."""
    size = geometry.output_size(x.shape[2], x.shape[3])
    y = x.new_empty(x.shape[0], *size, geometry.out_channels).permute(0, 3, 1, 2)
    if y.numel() == 0:
        return y
    x, read, bias = positive(x), rounded(values, x.dtype), None if bias is None else numbers(bias)
    call("sk_multiply", Call.of(x, y, read, bias, index.by_row, geometry))
    return y


def dx(dy: Tensor, values: Tensor, index: Index, geometry: ConvShape, size: tuple[int, ...]) -> Tensor:
    """Return ``dx (N, Cin, H, W)``; see :meth:`sparsekern.kernels.contract.Kernels.dx`."""
    grad_x = dy.new_empty(dy.shape[0], *size, geometry.in_channels).permute(0, 3, 1, 2)
    if grad_x.numel() == 0:
        return grad_x
    dy, read = positive(dy), rounded(values, dy.dtype)
    call("sk_multiply", Call.of(grad_x, dy, read, None, index.by_col, geometry, transposed=True))
    return grad_x


def dvalues(
    dy: Tensor, x: Tensor, index: Index, block: tuple[int, int], geometry: ConvShape, dtype: torch.dtype
) -> Tensor:
    """Return ``(Z, bo, bi)``; see :meth:`sparsekern.kernels.contract.Kernels.dvalues`."""
    out = outer_blocks(dy, x, index.by_row, index.slots, block, geometry)
    return out if dtype is torch.float32 else out.to(dtype)


def outer_blocks(
    dy: Tensor, x: Tensor, lists: Lists, slots: int, block: tuple[int, int], geometry: ConvShape
) -> Tensor:
    """Return blocks of the weight's gradient as ``(Z, bo, bi)`` in float32.

    Args:
        dy: ``(N, Cout, Ho, Wo)``.
        x: ``(N, Cin, H, W)``.
        lists: ``row_ptr``, ``row_col`` and ``row_slot`` of an index of these blocks.
        slots: Z.
        block: ``(bo, bi)``.
        geometry: of the convolution.
    """
    if dy.numel() == 0 or slots == 0:
        return torch.zeros(slots, *block, dtype=torch.float32, device=x.device)
    dy, x = positive(dy), positive(x)
    out = torch.empty(slots, *block, dtype=torch.float32, device=x.device)
    call("sk_outer", Call.of(x, dy, out, None, lists, geometry))
    return out


def backward(dy: Tensor, x: Tensor, values: Tensor, index: Index, geometry: ConvShape) -> tuple[Tensor, Tensor]:
    """Return ``dx, dvalues``, the same to the bit as one after the other: ``dy`` is packed once for both.

    See :meth:`sparsekern.kernels.contract.Kernels.backward`.
    """
    if dy.numel() == 0 or index.slots == 0:
        block, size = (values.shape[1], values.shape[2]), (x.shape[2], x.shape[3])
        return dx(dy, values, index, geometry, size), dvalues(dy, x, index, block, geometry, values.dtype)
    grad_x = dy.new_empty(x.shape[0], x.shape[2], x.shape[3], x.shape[1]).permute(0, 3, 1, 2)
    grad_values = torch.empty(values.shape, dtype=torch.float32, device=x.device)
    dy, x, read = positive(dy), positive(x), rounded(values, dy.dtype)
    call(
        "sk_backward",
        Call.of(grad_x, dy, read, None, index.by_col, geometry, transposed=True),
        Call.of(x, dy, grad_values, None, index.by_row, geometry),
    )
    return grad_x, grad_values if values.dtype is torch.float32 else grad_values.to(values.dtype)


def block_norms(dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int], geometry: ConvShape) -> Tensor:
    """Return the norms ``(K,)`` of chosen blocks; see :meth:`sparsekern.kernels.contract.Kernels.block_norms`."""
    order = row.int().argsort(stable=True)
    return chosen_norms(lambda row, col: _norms(dy, x, row, col, block, geometry), row, col, order, block)


def all_block_norms(dy: Tensor, x: Tensor, block: tuple[int, int], geometry: ConvShape) -> Tensor:
    """Return the norms ``(R, C)`` of all blocks; see :meth:`sparsekern.kernels.contract.Kernels.all_block_norms`."""
    cells = geometry.cells(block)
    return all_norms(lambda row, col: _norms(dy, x, row, col, block, geometry), *cells, block, x.device)


def _norms(dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int], geometry: ConvShape) -> Tensor:
    """Return the norms of blocks that are given in the order of their rows; only what they read is packed."""
    slot = torch.arange(row.shape[0], dtype=torch.int32, device=row.device)
    lists = row_ptr_of(row, geometry.cells(block)[0]), col.contiguous(), slot
    norms: Tensor = torch.linalg.vector_norm(outer_blocks(dy, x, lists, row.shape[0], block, geometry), dim=(1, 2))
    return norms


def sketch(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, block: tuple[int, int], geometry: ConvShape) -> Tensor:
    """Return ``(r, R, C)``; see :meth:`sparsekern.kernels.contract.Kernels.sketch`.

    As :func:`sparsekern.kernels.cpu.linear.sketch`: dy is read once, x once for each tap.
    """
    pairs, groups, rows, cols = (
        u.shape[0],
        geometry.groups,
        geometry.block_rows(block[0]),
        geometry.taps * geometry.block_cols(block[1]),
    )
    if not (pairs and dy.numel()):
        return torch.zeros(pairs, groups * rows, cols, dtype=torch.float32, device=x.device)
    dy, x = positive(dy), positive(x)
    u, v = directions(u, v, geometry.out_channels, geometry.taps * geometry.group_in)
    tiles = tiles_of(pairs, groups, rows, cols, x.device)
    call("sk_sketch", Call.sketch(x, dy, tiles, u, v, pairs, block, geometry))
    return in_tiles(tiles, rows, cols)
