"""The block-sparse convolution in plain PyTorch. Axes and edge cases: :mod:`sparsekern.kernels.contract`.

The products are those of :mod:`sparsekern.kernels.eager.linear`, but a block reads the pixels that its tap sees
(:mod:`sparsekern.kernels.eager.windows`). Tap by tap the weight's gradient is one of a linear layer: ``dy' x`` with x
shifted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sparsekern.kernels.contract import ConvShape, Index, accumulate_dtype, entry_columns, entry_rows
from sparsekern.kernels.eager.chunks import Panel, cut, panels, piece, spans
from sparsekern.kernels.eager.linear import TILE
from sparsekern.kernels.eager.products import (
    Parts,
    Places,
    add_at,
    batched,
    clear_phantom,
    entry_owners,
    norms_of,
    start_sums,
    stored_gradient,
    stored_places,
)
from sparsekern.kernels.eager.windows import Windows, buffer_bytes, one_tap
from torch import Tensor
from torch.nn.functional import pad

PIXELS = 1024
"""Output pixels of a panel in :func:`outer_blocks`, about: few, so that a chunk holds many blocks."""


def fwd(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, geometry: ConvShape) -> Tensor:
    """Return ``y (N, Cout, Ho, Wo)``; see :meth:`sparsekern.kernels.contract.Kernels.fwd`."""
    slots, bo, bi = values.shape
    size, acc = (x.shape[2], x.shape[3]), accumulate_dtype(x.dtype)
    (rows_out, width_out), group_rows = geometry.output_size(*size), geometry.block_rows(bo)
    rows = geometry.groups * group_rows
    y = x.new_empty(x.shape[0], rows_out, width_out, geometry.groups, geometry.group_out)

    row_bytes, image_bytes = buffer_bytes(geometry, size, bi, acc.itemsize)
    row_bytes += width_out * ((rows + 1) * bo * acc.itemsize + 16)
    for panel in panels(x.shape[0], rows_out, row_bytes, image_bytes):
        windows = Windows(geometry, size, panel, bi)
        tokens, buffer = windows.tokens, windows.load(x, acc)
        total = start_sums(bias, geometry.groups, rows, tokens, bo, acc, x.device)
        chunk = piece(slots, tokens * ((bi + bo) * acc.itemsize + 8) + bo * bi * (8 + acc.itemsize) + 64)
        for e0, e1 in spans(slots, chunk):
            row, col = entry_owners(index.row_ptr, e0, e1), entry_columns(index, (bo, bi), e0, e1)
            group = row.clamp(max=rows - 1) // group_rows  # free slots: any legal one
            gathered = windows.gather(buffer, group, col)  # (k, T, bi)
            weight = values.index_select(0, index.row_slot[e0:e1]).to(x.dtype).to(acc).transpose(1, 2)
            add_at(total, row, batched(gathered, weight))
            del gathered, weight  # before the next chunk makes its own
        _write_rows(y[panel.n0 : panel.n1, panel.r0 : panel.r1], total[:rows])
        del total, buffer
    return y.flatten(3).permute(0, 3, 1, 2)


def dx(dy: Tensor, values: Tensor, index: Index, geometry: ConvShape, size: tuple[int, ...]) -> Tensor:
    """Return ``dx (N, Cin, H, W)``; see :meth:`sparsekern.kernels.contract.Kernels.dx`.

    The panels are rows of dx. Where an image has several, the rows of dy that two of them need are multiplied twice.
    One row with all rows of dy that see it is the least it can work with: much, where the kernel reaches far.
    """
    slots, bo, bi = values.shape
    acc, group_rows = accumulate_dtype(dy.dtype), geometry.block_rows(bo)
    cols = index.col_ptr.shape[0] - 1
    height, width = size
    dx = dy.new_zeros(dy.shape[0], height, width, geometry.in_channels).permute(0, 3, 1, 2)

    row_bytes, image_bytes = buffer_bytes(geometry, (height, width), bi, acc.itemsize)
    sums = dy.shape[3] * ((geometry.groups * cols + 1) * bi * acc.itemsize + _edge_bytes(dy, geometry, bo))
    reach = (geometry.kernel[0] - 1) * geometry.dilation[0]  # input rows that a window spans beyond its first
    image_bytes += sums * (reach // geometry.stride[0] + 1) + row_bytes // geometry.stride[0] * reach
    row_bytes += sums // geometry.stride[0]
    for panel in panels(dy.shape[0], height, row_bytes, image_bytes):
        first = max(0, -(-(panel.r0 + geometry.padding[0] - reach) // geometry.stride[0]))
        last = min(dy.shape[2], (panel.r1 - 1 + geometry.padding[0]) // geometry.stride[0] + 1)
        if first >= last:
            continue  # no window sees these rows
        seen = Panel(panel.n0, panel.n1, first, last)
        windows = Windows(geometry, (height, width), seen, bi)
        total = start_sums(None, 1, geometry.groups * cols, windows.tokens, bi, acc, dy.device)
        dy_blocks = _dy_blocks(dy, seen, geometry, bo)
        size_of = windows.tokens * (bo * (dy.element_size() + acc.itemsize) + bi * acc.itemsize)
        for e0, e1 in spans(slots, piece(slots, size_of + bo * bi * (8 + acc.itemsize) + 64)):
            col, row = entry_owners(index.col_ptr, e0, e1), entry_rows(index, (bo, bi), e0, e1)
            gathered = dy_blocks.index_select(1, row).to(acc).transpose(0, 1)  # (k, T, bo)
            weight = values.index_select(0, index.col_slot[e0:e1]).to(dy.dtype).to(acc)
            # Groups share block columns, not channels. Free slots add into one that is thrown away.
            owner = torch.where(col < cols, row // group_rows * cols + col, geometry.groups * cols)
            add_at(total, owner, batched(gathered, weight))
            del gathered, weight
        buffer = windows.empty(dy, acc)
        seen_by = total[:-1].view(
            geometry.groups, geometry.taps, -1, windows.count, windows.rows, windows.width_out, bi
        )
        for tap in range(geometry.taps):  # one after the other: pixels overlap
            windows.tap(buffer, tap).unflatten(4, (-1, bi)).add_(seen_by[:, tap].permute(2, 3, 4, 0, 1, 5))
        windows.store(buffer, dx, (panel.r0, panel.r1))
        del total, seen_by, dy_blocks, buffer  # a view keeps its whole alive
    return dx


def dvalues(
    dy: Tensor, x: Tensor, index: Index, block: tuple[int, int], geometry: ConvShape, dtype: torch.dtype
) -> Tensor:
    """Return ``(Z, bo, bi)``; see :meth:`sparsekern.kernels.contract.Kernels.dvalues`."""
    parts = outer_blocks(dy, x, stored_places(index, block), index.slots, block, geometry)
    return stored_gradient(parts, index, block, dtype)


def backward(dy: Tensor, x: Tensor, values: Tensor, index: Index, geometry: ConvShape) -> tuple[Tensor, Tensor]:
    """Return ``dx, dvalues``; see :meth:`sparsekern.kernels.contract.Kernels.backward`."""
    block, size = (values.shape[1], values.shape[2]), (x.shape[2], x.shape[3])
    return dx(dy, values, index, geometry, size), dvalues(dy, x, index, block, geometry, values.dtype)


def block_norms(dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int], geometry: ConvShape) -> Tensor:
    """Return the norms ``(K,)`` of chosen blocks; see :meth:`sparsekern.kernels.contract.Kernels.block_norms`."""
    parts = outer_blocks(dy, x, lambda e0, e1: (row[e0:e1], col[e0:e1]), row.shape[0], block, geometry)
    return norms_of(parts, row, x.dtype)


def all_block_norms(dy: Tensor, x: Tensor, block: tuple[int, int], geometry: ConvShape) -> Tensor:
    """Return the norms ``(R, C)``; see :meth:`sparsekern.kernels.contract.Kernels.all_block_norms`.

    One tile of the gradient at a time is formed and reduced: some block rows of a group by some block columns of a tap.
    """
    (bo, bi), acc = block, accumulate_dtype(x.dtype)
    rows, cols = geometry.block_rows(bo), geometry.block_cols(bi)
    norms = torch.empty(geometry.groups, rows, geometry.taps, cols, dtype=acc, device=x.device)
    for group in range(geometry.groups):
        dy_group = dy.narrow(1, group * geometry.group_out, geometry.group_out)
        x_group = x.narrow(1, group * geometry.group_in, geometry.group_in)
        for r0, r1 in spans(rows, min(max(1, TILE // bo), -(-rows // 2))):
            for c0, c1 in spans(cols, min(max(1, TILE // bi), -(-cols // 2))):
                dy_part, x_part = dy_group[:, r0 * bo : r1 * bo], x_group[:, c0 * bi : c1 * bi]
                for tap in range(geometry.taps):
                    tile = _tile(dy_part, x_part, one_tap(geometry, tap))
                    tile = pad(tile, (0, (c1 - c0) * bi - tile.shape[1], 0, (r1 - r0) * bo - tile.shape[0]))
                    blocks = tile.view(r1 - r0, bo, c1 - c0, bi)
                    norms[group, r0:r1, tap, c0:c1] = torch.linalg.vector_norm(blocks, dim=(1, 3))
    return norms.view(geometry.groups * rows, geometry.taps * cols)


def sketch(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, block: tuple[int, int], geometry: ConvShape) -> Tensor:
    """Return ``(r, R, C)``; see :meth:`sparsekern.kernels.contract.Kernels.sketch`."""
    (bo, bi), acc, pairs = block, accumulate_dtype(x.dtype), u.shape[0]
    rows, cols = geometry.block_rows(bo), geometry.block_cols(bi)
    u_blocks = cut(u.to(acc).unflatten(1, (geometry.groups, -1)), bo)  # (r, groups, RB, bo)
    v_blocks = cut(v.to(acc).unflatten(1, (geometry.taps, -1)), bi)  # (r, taps, CB, bi)
    total = torch.zeros(geometry.taps, geometry.groups, pairs, rows, cols, dtype=acc, device=x.device)
    extra = (geometry.groups * (rows + cols) * pairs + geometry.groups * (rows * bo + 2 * cols * bi)) * acc.itemsize
    for windows, dy_part in _panels(dy, x, geometry, bi, extra):
        left = torch.einsum("tgRo,qgRo->gqRt", cut(dy_part.to(acc), bo), u_blocks)
        buffer = windows.load(x, acc)
        for tap in range(geometry.taps):
            seen = windows.tap(buffer, tap).reshape(-1, geometry.groups, cols, bi)
            right = torch.einsum("tgCi,qCi->gqtC", seen, v_blocks[:, tap])
            total[tap] += left @ right
    return total.permute(2, 1, 3, 0, 4).reshape(pairs, geometry.groups * rows, geometry.taps * cols)


def outer_blocks(
    dy: Tensor,
    x: Tensor,
    places: Places,
    count: int,
    block: tuple[int, int],
    geometry: ConvShape,
) -> Parts:
    """Yield chosen blocks of the weight's gradient, as :func:`sparsekern.kernels.eager.linear.outer_blocks` does."""
    (bo, bi), acc, size = block, accumulate_dtype(x.dtype), (x.shape[2], x.shape[3])
    rows_out, width_out = dy.shape[2], dy.shape[3]
    per_token = (bo + bi) * acc.itemsize + bo * dy.element_size() + 8
    row_bytes, image_bytes = buffer_bytes(geometry, size, bi, acc.itemsize)
    row_bytes += width_out * (per_token + _edge_bytes(dy, geometry, bo) + 16)
    taken = list(panels(x.shape[0], rows_out, row_bytes, image_bytes, most=PIXELS // width_out))
    tokens = max(((p.n1 - p.n0) * (p.r1 - p.r0) * width_out for p in taken), default=0)
    for e0, e1 in spans(count, piece(count, tokens * per_token + bo * bi * (acc.itemsize + 8) + 64)):
        row, col = places(e0, e1)
        group = row // geometry.block_rows(bo)
        part = torch.zeros(e1 - e0, bo, bi, dtype=acc, device=x.device)
        for panel in taken:
            windows = Windows(geometry, size, panel, bi)
            dy_blocks = _dy_blocks(dy, panel, geometry, bo).index_select(1, row).to(acc).permute(1, 2, 0)  # (k, bo, T)
            gathered = windows.gather(windows.load(x, acc), group, col)  # (k, T, bi)
            part.baddbmm_(dy_blocks, gathered)
            del dy_blocks, gathered  # before the next panel makes its own
        clear_phantom(part, row % geometry.block_rows(bo), geometry.group_out, axis=1)
        clear_phantom(part, col % geometry.block_cols(bi), geometry.group_in, axis=2)
        yield e0, e1, part
        del part


def _dy_blocks(dy: Tensor, panel: Panel, geometry: ConvShape, bo: int) -> Tensor:
    """Return ``(T, R, bo)``: the panel's rows of ``dy (N, Cout, Ho, Wo)``, each group cut into block rows."""
    rows = dy.permute(0, 2, 3, 1)[panel.n0 : panel.n1, panel.r0 : panel.r1]
    return cut(rows.reshape(-1, geometry.groups, geometry.group_out), bo).flatten(1, 2)


def _edge_bytes(dy: Tensor, geometry: ConvShape, bo: int) -> int:
    """Return what :func:`_dy_blocks` copies for each pixel: nothing where blocks fit."""
    return geometry.out_channels * dy.element_size() if geometry.group_out % bo else 0


def _write_rows(y: Tensor, total: Tensor) -> None:
    """Write ``total (R, T, bo)`` into ``y (n, rows, Wo, groups, Cout / groups)`` without its phantom part."""
    groups, features, bo = y.shape[3], y.shape[4], total.shape[2]
    whole = features // bo
    sums = total.view(groups, -1, *y.shape[:3], bo).permute(2, 3, 4, 0, 1, 5)
    y[..., : whole * bo].unflatten(4, (whole, bo)).copy_(sums[..., :whole, :])
    if whole * bo < features:
        y[..., whole * bo :].copy_(sums[..., whole, : features - whole * bo])


def _tile(dy: Tensor, x: Tensor, geometry: ConvShape) -> Tensor:
    """Return ``dy' x (O, I)`` for some channels ``dy (N, O, Ho, Wo)``, ``x (N, I, H, W)``, as one tap sees x."""
    acc, (features_out, features_in) = accumulate_dtype(x.dtype), (dy.shape[1], x.shape[1])
    geometry = geometry._replace(in_channels=features_in, out_channels=features_out, groups=1)
    tile = torch.zeros(features_out, features_in, dtype=acc, device=x.device)
    for windows, dy_part in _panels(dy, x, geometry, features_in, (features_out + features_in) * 2 * acc.itemsize):
        seen = windows.tap(windows.load(x, acc), 0).reshape(-1, features_in)
        tile.addmm_(dy_part.flatten(1).to(acc).T, seen)
    return tile


def _panels(
    dy: Tensor, x: Tensor, geometry: ConvShape, side: int, bytes_per_token: int
) -> Iterator[tuple[Windows, Tensor]]:
    """Yield the windows of one panel after the other and its ``dy (T, groups, Cout / groups)``."""
    size = (x.shape[2], x.shape[3])
    row_bytes, image_bytes = buffer_bytes(geometry, size, side, accumulate_dtype(x.dtype).itemsize)
    for panel in panels(x.shape[0], dy.shape[2], row_bytes + dy.shape[3] * bytes_per_token, image_bytes):
        part = dy.permute(0, 2, 3, 1)[panel.n0 : panel.n1, panel.r0 : panel.r1]
        yield Windows(geometry, size, panel, side), part.reshape(-1, geometry.groups, geometry.group_out)
