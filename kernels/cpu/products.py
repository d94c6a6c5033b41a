"""The products and scores of both geometries on the native library. Axes: :mod:`sparsekern.kernels.contract`.

Beside inputs and outputs a call holds a float32 copy of values, or of their gradient, where these are of another dtype,
and the scratch of the library, which keeps it for the next call. For a linear layer that is

    packed panels of tokens
    fwd     one transposed float32 copy of the stored blocks, or one of a block row for each thread, where one panel
            holds all tokens
    1x1     up to 16 MiB of packed tokens (or a panel for each thread, where that is more); the copy of some rows: 256
            Ki entries of 6 bytes (or 128 Ki for each thread, or those of a strip), and 12 bytes for each of these rows
            and each chunk of features; for each thread up to 128 Ki numbers of y or dy, and except for dx 8 bytes for
            each entry of a strip

and for a convolution

    some images at a time, packed with zeros around them, and a list of where each stored block begins
    fwd     one transposed float32 copy of the stored blocks (where bfloat16 has instructions of its own, one in
            bfloat16, also for dx)
    dvalues a second gradient of the stored blocks, where these are few beside the images
    1x1     the entries in the order in which they are read, 8 bytes each, 12 for their gradient, and for each thread a
            copy of those of 32 rows, 12 bytes each
"""

from __future__ import annotations

import torch
from sparsekern.kernels.contract import ConvShape, Geometry, Index, LinearShape, Lists, new_input, new_output
from sparsekern.kernels.cpu.library import Call, call, numbers, positive, rounded, takes_bfloat16
from sparsekern.kernels.eager.chunks import spans
from torch import Tensor
from torch.nn.functional import pad

TILE = 64
"""Side of the blocks in which all single elements of a linear layer are computed."""

CHUNK_BYTES = 8 * 2**20
"""Bytes that a chunk of blocks may take before it is reduced to norms, including the lists of where the blocks are."""

LIST_BYTES = 48
"""Bytes that these lists take for each block, including those in the scratch of the library; at 1x1 far more than the
block itself.

Chosen blocks are sorted all at once before that: int64 keys, their sorted copy and the order take 24 bytes a block."""

GROUP, GROUP_PAIRS = 32, 8
"""Of ``csrc/api.h``: block rows and columns in a tile of a sketch, and pairs that are computed at a time."""


def fwd(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, geometry: Geometry) -> Tensor:
    """Return y; see :meth:`sparsekern.kernels.contract.Kernels.fwd`."""
    y = new_output(x, geometry)
    if y.numel() == 0:
        return y
    x, read, bias = positive(x), _as_read(values, x.dtype, geometry), None if bias is None else numbers(bias)
    call("sk_multiply", Call.of(x, y, read, bias, index.by_row, geometry))
    return y


def dx(dy: Tensor, values: Tensor, index: Index, geometry: Geometry, size: tuple[int, ...] = ()) -> Tensor:
    """Return dx; see :meth:`sparsekern.kernels.contract.Kernels.dx`."""
    grad_x = new_input(dy, geometry, size)
    if grad_x.numel() == 0:
        return grad_x
    dy, read = positive(dy), _as_read(values, dy.dtype, geometry)
    call("sk_multiply", Call.of(grad_x, dy, read, None, index.by_col, geometry, transposed=True))
    return grad_x


def dvalues(
    dy: Tensor, x: Tensor, index: Index, block: tuple[int, int], geometry: Geometry, dtype: torch.dtype
) -> Tensor:
    """Return ``(Z, bo, bi)``; see :meth:`sparsekern.kernels.contract.Kernels.dvalues`."""
    out = outer_blocks(dy, x, index.by_row, index.slots, block, geometry)
    return out if dtype is torch.float32 else out.to(dtype)


def outer_blocks(dy: Tensor, x: Tensor, lists: Lists, slots: int, block: tuple[int, int], geometry: Geometry) -> Tensor:
    """Return blocks of the weight's gradient as ``(Z, bo, bi)`` in float32.

    Args:
        dy: ``(T, O)`` or ``(N, Cout, Ho, Wo)``.
        x: ``(T, I)`` or ``(N, Cin, H, W)``.
        lists: ``row_ptr``, ``row_col`` and ``row_slot`` of an index of these blocks.
        slots: Z.
        block: ``(bo, bi)``.
        geometry: of the layer; only its kind is read of a linear one.
    """
    if dy.numel() == 0 or slots == 0:
        return torch.zeros(slots, *block, dtype=torch.float32, device=x.device)
    dy, x = positive(dy), positive(x)
    out = torch.empty(slots, *block, dtype=torch.float32, device=x.device)
    call("sk_outer", Call.of(x, dy, out, None, lists, geometry))
    return out


def backward(dy: Tensor, x: Tensor, values: Tensor, index: Index, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return ``dx, dvalues``, the same to the bit as one after the other: ``dy`` is packed once for both.

    See :meth:`sparsekern.kernels.contract.Kernels.backward`.
    """
    if dy.numel() == 0 or index.slots == 0:
        block = (values.shape[1], values.shape[2])
        grad_x = dx(dy, values, index, geometry, x.shape[2:])
        return grad_x, dvalues(dy, x, index, block, geometry, values.dtype)
    grad_x = new_input(dy, geometry, x.shape[2:])
    grad_values = torch.empty(values.shape, dtype=torch.float32, device=x.device)
    dy, x, read = positive(dy), positive(x), _as_read(values, dy.dtype, geometry)
    call(
        "sk_backward",
        Call.of(grad_x, dy, read, None, index.by_col, geometry, transposed=True),
        Call.of(x, dy, grad_values, None, index.by_row, geometry),
    )
    return grad_x, grad_values if values.dtype is torch.float32 else grad_values.to(values.dtype)


def _as_read(values: Tensor, dtype: torch.dtype, geometry: Geometry) -> Tensor:
    """Return values as the library reads them beside inputs of a dtype, to which they are rounded here or there."""
    if (
        dtype is torch.bfloat16
        and isinstance(geometry, LinearShape)
        and values.shape[1:] != (1, 1)
        and takes_bfloat16()
    ):
        values = positive(values if values.dtype in (torch.float32, dtype) else values.to(dtype))
        return values if values.is_contiguous() else values.contiguous()
    return rounded(values, dtype)


def block_norms(dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int], geometry: Geometry) -> Tensor:
    """Return the norms ``(K,)`` of chosen blocks; see :meth:`sparsekern.kernels.contract.Kernels.block_norms`."""
    order = (row.long() * geometry.cells(block)[1] + col).argsort()  # columns ascend within a row, as in an index
    row, col = row.int(), col.int()
    norms = torch.empty(row.shape[0], dtype=torch.float32, device=row.device)
    for some in order.split(chunk_of(block)):
        norms[some] = _norms(dy, x, row[some], col[some], block, geometry)
    return norms


def all_block_norms(dy: Tensor, x: Tensor, block: tuple[int, int], geometry: Geometry) -> Tensor:
    """Return the norms ``(R, C)`` of all blocks; see :meth:`sparsekern.kernels.contract.Kernels.all_block_norms`."""
    if block == (1, 1) and isinstance(geometry, LinearShape):
        return _all_magnitudes(dy, x, geometry)
    rows, cols = geometry.cells(block)
    norms = torch.empty(rows * cols, dtype=torch.float32, device=x.device)
    for start, stop in spans(rows * cols, chunk_of(block)):
        cells = torch.arange(start, stop, device=x.device)
        norms[start:stop] = _norms(dy, x, (cells // cols).int(), (cells % cols).int(), block, geometry)
    return norms.view(rows, cols)


def chunk_of(block: tuple[int, int]) -> int:
    """Return how many blocks are computed at a time."""
    return max(1, CHUNK_BYTES // (4 * block[0] * block[1] + LIST_BYTES))


def _all_magnitudes(dy: Tensor, x: Tensor, geometry: LinearShape) -> Tensor:
    """Return ``|dy' x|``: all elements are wanted, so they are computed in larger blocks, some at a time."""
    norms = torch.empty(dy.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    rows, cols = geometry.cells((TILE, TILE))
    chunk = max(1, chunk_of((TILE, TILE)) // 2)  # the blocks, and their elements in the order of the rows
    for r0, r1 in spans(rows, max(1, chunk // max(1, cols))):
        for c0, c1 in spans(cols, chunk):
            some = norms[r0 * TILE : r1 * TILE, c0 * TILE : c1 * TILE]
            parts = dy[:, r0 * TILE : r1 * TILE], x[:, c0 * TILE : c1 * TILE]
            cells = torch.arange((r1 - r0) * (c1 - c0), dtype=torch.int32, device=x.device)
            row_ptr = torch.arange(0, cells.shape[0] + 1, c1 - c0, dtype=torch.int32, device=x.device)
            lists = row_ptr, cells % (c1 - c0), cells
            blocks = outer_blocks(*parts, lists, cells.shape[0], (TILE, TILE), geometry)
            whole = blocks.view(r1 - r0, c1 - c0, TILE, TILE).transpose(1, 2)
            torch.abs(whole.reshape((r1 - r0) * TILE, -1)[: some.shape[0], : some.shape[1]], out=some)
    return norms


def _norms(dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int], geometry: Geometry) -> Tensor:
    """Return the norms of blocks that are given in the order of their rows; only what they read is packed."""
    if not row.shape[0]:
        return torch.empty(0, dtype=torch.float32, device=x.device)
    rows = geometry.cells(block)[0]
    if isinstance(geometry, LinearShape):
        first, rows = int(row[0]), int(row[-1]) + 1 - int(row[0])
        dy, row = dy[:, first * block[0] : (first + rows) * block[0]], row - first
    starts = torch.arange(rows + 1, dtype=torch.int32, device=row.device)
    slot = torch.arange(row.shape[0], dtype=torch.int32, device=row.device)
    lists = torch.searchsorted(row, starts, out_int32=True), col.contiguous(), slot
    norms: Tensor = torch.linalg.vector_norm(outer_blocks(dy, x, lists, row.shape[0], block, geometry), dim=(1, 2))
    return norms


def sketch(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, block: tuple[int, int], geometry: Geometry) -> Tensor:
    """Return ``(r, R, C)``; see :meth:`sparsekern.kernels.contract.Kernels.sketch`.

    ``u' G v`` of a block is a sum over tokens of ``(dy . u) (x . v)``, so G is not needed: dy is read once, and x once
    for each tap.

    Raises:
        ValueError: ``u`` or ``v`` has another number of features: the library would read beyond them.
    """
    pairs, (rows, cols) = u.shape[0], geometry.cells(block)
    if not (pairs and dy.numel()):
        return torch.zeros(pairs, rows, cols, dtype=torch.float32, device=x.device)
    groups, features = 1, x.shape[1]
    if isinstance(geometry, ConvShape):
        groups, features = geometry.groups, geometry.taps * geometry.group_in
    if u.shape != (pairs, dy.shape[1]) or v.shape != (pairs, features):
        shapes, wanted = f"{tuple(u.shape)} and {tuple(v.shape)}", f"(r, {dy.shape[1]}) and (r, {features})"
        raise ValueError(f"directions of a sketch have shapes {shapes}; they must be {wanted}")
    missing = (0, 0, 0, -pairs % GROUP_PAIRS)  # the library reads (F, r), with zeros up to a whole group of pairs
    u, v = numbers(pad(u.float(), missing).t()), numbers(pad(v.float(), missing).t())
    dy, x = positive(dy), positive(x)
    size = (pairs, groups, -(-(rows // groups) // GROUP), -(-cols // GROUP), GROUP, GROUP)
    tiles = torch.empty(size, dtype=torch.float32, device=x.device)
    call("sk_sketch", Call.sketch(x, dy, tiles, u, v, pairs, block, geometry))
    whole = tiles.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return whole[:, :, : rows // groups, :cols].flatten(1, 2).contiguous()
