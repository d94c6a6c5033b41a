"""The block-sparse convolution in plain PyTorch. Axes and edge cases: :mod:`sparsekern.kernels.contract`.

The linear layer's products (:mod:`sparsekern.kernels.eager.products`) with another way to find what a block reads: the
pixels that its tap sees (:mod:`sparsekern.kernels.eager.windows`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from sparsekern.kernels.contract import ConvShape, Index, accumulate_dtype, entry_columns, entry_rows
from sparsekern.kernels.eager.chunks import Panel, block_chunk, cut, panels, spans
from sparsekern.kernels.eager.products import (
    add_at,
    batched,
    clear_phantom,
    entry_owners,
    start_sums,
    stored_places,
)
from sparsekern.kernels.eager.windows import Windows, buffer_bytes
from torch import Tensor

PIXELS = 1024
"""Output pixels of a panel in :func:`outer_blocks`, about: few, so that a chunk holds many blocks."""


def conv2d_fwd(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, shape: ConvShape) -> Tensor:
    """Return ``y (N, Cout, Ho, Wo)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_fwd`."""
    slots, bo, bi = values.shape
    size, acc = (x.shape[2], x.shape[3]), accumulate_dtype(x.dtype)
    (rows_out, width_out), group_rows = shape.output_size(*size), shape.block_rows(bo)
    rows = shape.groups * group_rows
    y = x.new_empty(x.shape[0], rows_out, width_out, shape.groups, shape.group_out)

    row_bytes, image_bytes = buffer_bytes(shape, size, bi, acc.itemsize)
    row_bytes += width_out * ((rows + 1) * bo * acc.itemsize + 16)
    for panel in panels(x.shape[0], rows_out, row_bytes, image_bytes):
        windows = Windows(shape, size, panel, bi)
        tokens, buffer = windows.tokens, windows.load(x, acc)
        total = start_sums(bias, shape.groups, rows, tokens, bo, acc, x.device)
        chunk = block_chunk(slots, tokens * ((bi + bo) * acc.itemsize + 8) + bo * bi * (8 + acc.itemsize) + 64)
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


def conv2d_dx(dy: Tensor, values: Tensor, index: Index, shape: ConvShape, size: tuple[int, int]) -> Tensor:
    """Return ``dx (N, Cin, H, W)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_dx`.

    The panels are rows of dx. Where an image has several, the rows of dy that two of them need are multiplied twice.
    One row with all rows of dy that see it is the least it can work with: much, where the kernel reaches far.
    """
    slots, bo, bi = values.shape
    acc, group_rows = accumulate_dtype(dy.dtype), shape.block_rows(bo)
    cols = index.col_ptr.shape[0] - 1
    dx = dy.new_zeros(dy.shape[0], *size, shape.in_channels).permute(0, 3, 1, 2)

    row_bytes, image_bytes = buffer_bytes(shape, size, bi, acc.itemsize)
    sums = dy.shape[3] * ((shape.groups * cols + 1) * bi * acc.itemsize + _edge_bytes(dy, shape, bo))
    reach = (shape.kernel[0] - 1) * shape.dilation[0]  # input rows that a window spans beyond its first
    image_bytes += sums * (reach // shape.stride[0] + 1) + row_bytes // shape.stride[0] * reach
    row_bytes += sums // shape.stride[0]
    for panel in panels(dy.shape[0], size[0], row_bytes, image_bytes):
        first = max(0, -(-(panel.r0 + shape.padding[0] - reach) // shape.stride[0]))
        last = min(dy.shape[2], (panel.r1 - 1 + shape.padding[0]) // shape.stride[0] + 1)
        if first >= last:
            continue  # no window sees these rows
        seen = Panel(panel.n0, panel.n1, first, last)
        windows = Windows(shape, size, seen, bi)
        total = start_sums(None, 1, shape.groups * cols, windows.tokens, bi, acc, dy.device)
        dy_blocks = _dy_blocks(dy, seen, shape, bo)
        size_of = windows.tokens * (bo * (dy.element_size() + acc.itemsize) + bi * acc.itemsize)
        for e0, e1 in spans(slots, block_chunk(slots, size_of + bo * bi * (8 + acc.itemsize) + 64)):
            col, row = entry_owners(index.col_ptr, e0, e1), entry_rows(index, (bo, bi), e0, e1)
            gathered = dy_blocks.index_select(1, row).to(acc).transpose(0, 1)  # (k, T, bo)
            weight = values.index_select(0, index.col_slot[e0:e1]).to(dy.dtype).to(acc)
            # Groups share block columns, not channels. Free slots add into one that is thrown away.
            owner = torch.where(col < cols, row // group_rows * cols + col, shape.groups * cols)
            add_at(total, owner, batched(gathered, weight))
            del gathered, weight
        buffer = windows.empty(dy, acc)
        seen_by = total[:-1].view(shape.groups, shape.taps, -1, windows.count, windows.rows, windows.width_out, bi)
        for tap in range(shape.taps):  # one after the other: pixels overlap
            windows.tap(buffer, tap).unflatten(4, (-1, bi)).add_(seen_by[:, tap].permute(2, 3, 4, 0, 1, 5))
        windows.store(buffer, dx, (panel.r0, panel.r1))
        del total, seen_by, dy_blocks, buffer  # a view keeps its whole alive
    return dx


def conv2d_dvalues(
    dy: Tensor, x: Tensor, index: Index, block: tuple[int, int], shape: ConvShape, dtype: torch.dtype
) -> Tensor:
    """Return ``(Z, bo, bi)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_dvalues`."""
    rows = index.row_ptr.shape[0] - 1
    places = stored_places(index, block)
    out = torch.empty(index.slots, *block, dtype=dtype, device=x.device)
    for e0, e1, part in outer_blocks(dy, x, places, index.slots, block, shape):
        free = entry_owners(index.row_ptr, e0, e1) == rows
        part.masked_fill_(free.view(-1, 1, 1), 0)
        out.index_copy_(0, index.row_slot[e0:e1].long(), part.to(dtype))
    return out


def outer_blocks(
    dy: Tensor,
    x: Tensor,
    places: Callable[[int, int], tuple[Tensor, Tensor]],
    count: int,
    block: tuple[int, int],
    shape: ConvShape,
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield chosen blocks of the weight's gradient, as :func:`sparsekern.kernels.eager.products.outer_blocks` does."""
    (bo, bi), acc, size = block, accumulate_dtype(x.dtype), (x.shape[2], x.shape[3])
    rows_out, width_out = dy.shape[2], dy.shape[3]
    per_token = (bo + bi) * acc.itemsize + bo * dy.element_size() + 8
    row_bytes, image_bytes = buffer_bytes(shape, size, bi, acc.itemsize)
    row_bytes += width_out * (per_token + _edge_bytes(dy, shape, bo) + 16)
    taken = list(panels(x.shape[0], rows_out, row_bytes, image_bytes, most=PIXELS // width_out))
    tokens = max(((p.n1 - p.n0) * (p.r1 - p.r0) * width_out for p in taken), default=0)
    for e0, e1 in spans(count, block_chunk(count, tokens * per_token + bo * bi * (acc.itemsize + 8) + 64)):
        row, col = places(e0, e1)
        group = row // shape.block_rows(bo)
        part = torch.zeros(e1 - e0, bo, bi, dtype=acc, device=x.device)
        for panel in taken:
            windows = Windows(shape, size, panel, bi)
            dy_blocks = _dy_blocks(dy, panel, shape, bo).index_select(1, row).to(acc).permute(1, 2, 0)  # (k, bo, T)
            gathered = windows.gather(windows.load(x, acc), group, col)  # (k, T, bi)
            part.baddbmm_(dy_blocks, gathered)
            del dy_blocks, gathered  # before the next panel makes its own
        clear_phantom(part, row % shape.block_rows(bo), shape.group_out, axis=1)
        clear_phantom(part, col % shape.block_cols(bi), shape.group_in, axis=2)
        yield e0, e1, part
        del part


def _dy_blocks(dy: Tensor, panel: Panel, shape: ConvShape, bo: int) -> Tensor:
    """Return ``(T, R, bo)``: the panel's rows of ``dy (N, Cout, Ho, Wo)``, each group cut into block rows."""
    rows = dy.permute(0, 2, 3, 1)[panel.n0 : panel.n1, panel.r0 : panel.r1]
    return cut(rows.reshape(-1, shape.groups, shape.group_out), bo).flatten(1, 2)


def _edge_bytes(dy: Tensor, shape: ConvShape, bo: int) -> int:
    """Return what :func:`_dy_blocks` copies for each pixel: nothing where blocks fit."""
    return shape.out_channels * dy.element_size() if shape.group_out % bo else 0


def _write_rows(y: Tensor, total: Tensor) -> None:
    """Write ``total (R, T, bo)`` into ``y (n, rows, Wo, groups, Cout / groups)`` without its phantom part."""
    groups, features, bo = y.shape[3], y.shape[4], total.shape[2]
    whole = features // bo
    sums = total.view(groups, -1, *y.shape[:3], bo).permute(2, 3, 4, 0, 1, 5)
    y[..., : whole * bo].unflatten(4, (whole, bo)).copy_(sums[..., :whole, :])
    if whole * bo < features:
        y[..., whole * bo :].copy_(sums[..., whole, : features - whole * bo])
