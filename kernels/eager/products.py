"""The two products that all eager kernels are made of, each in a bounded scratch.

:func:`multiply` gathers blocks of x, multiplies each by its stored block and adds the results into block rows (for dx:
block columns). :func:`outer_blocks` forms chosen blocks of ``dy' x``. Sums are in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from sparsekern.kernels.contract import Index, accumulate_dtype, entry_columns, entry_rows
from sparsekern.kernels.eager.chunks import block_chunk, cut, spans, token_panel
from torch import Tensor


def entry_owners(ptr: Tensor, start: int, stop: int) -> Tensor:
    """Return the block row of entries ``start`` to ``stop``, from ``row_ptr (R + 1,)``.

    Entries of free slots get ``R``, one more than there is.
    """
    entries = torch.arange(start, stop, dtype=torch.int32, device=ptr.device)
    return torch.searchsorted(ptr, entries, right=True, out_int32=True) - 1


def stored_places(index: Index, block: tuple[int, int]) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """Return a function that gives the block rows and columns of entries ``start`` to ``stop`` of the row lists.

    Those of free slots are any legal ones.
    """
    rows = index.row_ptr.shape[0] - 1

    def places(start: int, stop: int) -> tuple[Tensor, Tensor]:
        row = entry_owners(index.row_ptr, start, stop).clamp_(max=rows - 1)
        return row, entry_columns(index, block, start, stop)

    return places


def multiply(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Index, features: int, *, transposed: bool
) -> Tensor:
    """Return ``y (T, features)``: ``y[:, row] += x[:, col] @ values[slot]'`` over all entries, plus ``bias``.

    Args:
        x: ``(T, F)``.
        values: ``(Z, bo, bi)``.
        bias: ``(features,)`` or None.
        index: the places.
        features: size of the last axis of y; the last block row may stick out.
        transposed: multiply by ``values[slot]`` instead of its transpose and go by the column lists, as dx does: rows
            and columns change parts.
    """
    tokens, slots, acc = x.shape[0], values.shape[0], accumulate_dtype(x.dtype)
    block = (values.shape[1], values.shape[2])
    bo, bi = block[::-1] if transposed else block
    ptr, slot = (index.col_ptr, index.col_slot) if transposed else (index.row_ptr, index.row_slot)
    others = entry_rows if transposed else entry_columns
    rows, whole = ptr.shape[0] - 1, features // bo
    size, x_size = acc.itemsize, x.element_size()
    y = x.new_empty(tokens, features)

    panel = token_panel(tokens, (rows + 1) * bo * size + x.shape[1] * x_size)
    chunk = block_chunk(slots, panel * (bi * (x_size + size) + bo * size) + bo * bi * (8 + size) + 16)
    for t0, t1 in spans(tokens, panel):
        total = start_sums(bias, 1, rows, t1 - t0, bo, acc, x.device)
        x_blocks = cut(x[t0:t1], bi)
        for e0, e1 in spans(slots, chunk):
            gathered = x_blocks.index_select(1, others(index, block, e0, e1)).to(acc).transpose(0, 1)  # (n, T, bi)
            weight = values.index_select(0, slot[e0:e1]).to(x.dtype).to(acc)
            weight = weight if transposed else weight.transpose(1, 2)  # (n, bi, bo)
            add_at(total, entry_owners(ptr, e0, e1), batched(gathered, weight))
            del gathered, weight  # before the next chunk makes its own
        out = y[t0:t1]
        out[:, : whole * bo].unflatten(1, (whole, bo)).copy_(total[:whole].transpose(0, 1))
        if whole < rows:
            out[:, whole * bo :].copy_(total[whole, :, : features - whole * bo])
        del total, x_blocks
    return y


def outer_blocks(
    dy: Tensor,
    x: Tensor,
    places: Callable[[int, int], tuple[Tensor, Tensor]],
    count: int,
    block: tuple[int, int],
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ``(start, stop, part)``: ``part (n, bo, bi)`` are chosen blocks of ``dy' x``, in order.

    Phantom elements are zero, also when dy or x hold NaN.

    Args:
        dy: ``(T, O)``.
        x: ``(T, I)``.
        places: gives the block rows and columns of blocks ``start`` to ``stop``.
        count: number of blocks.
        block: ``(bo, bi)``.
    """
    (bo, bi), acc = block, accumulate_dtype(x.dtype)
    tokens, size, x_size = x.shape[0], acc.itemsize, x.element_size()
    edge_bytes = (dy.shape[1] * (dy.shape[1] % bo > 0) + x.shape[1] * (x.shape[1] % bi > 0)) * x_size
    panel = min(token_panel(tokens, (bo + bi) * (size + x_size) + edge_bytes), 4096)
    chunk = block_chunk(count, panel * (bo + bi) * (size + x_size) + bo * bi * (size + 8) + 32)
    for e0, e1 in spans(count, chunk):
        row, col = places(e0, e1)
        part = torch.zeros(e1 - e0, bo, bi, dtype=acc, device=x.device)
        for t0, t1 in spans(tokens, panel):
            dy_blocks = cut(dy[t0:t1], bo).index_select(1, row).to(acc).permute(1, 2, 0)  # (n, bo, T)
            x_blocks = cut(x[t0:t1], bi).index_select(1, col).to(acc).transpose(0, 1)  # (n, T, bi)
            part.baddbmm_(dy_blocks, x_blocks)
            del dy_blocks, x_blocks  # before the next panel makes its own
        clear_phantom(part, row, dy.shape[1], axis=1)
        clear_phantom(part, col, x.shape[1], axis=2)
        yield e0, e1, part
        del part


def batched(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for ``(n, T, k)`` and ``(n, k, m)``; a product of singletons is no work for a matrix library."""
    return a * b if a.shape[2] == 1 else torch.bmm(a, b)


def start_sums(
    bias: Tensor | None, groups: int, rows: int, tokens: int, side: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the sums ``(rows + 1, tokens, side)`` before the first block: the bias, or zeros.

    One row more than there is: free slots add into it, and it is thrown away. Skipping them instead would need their
    number on the host.
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
    """Zero what lies beyond ``features`` in blocks at the edge: NaN times the zero filling is NaN, not zero."""
    side = part.shape[axis]
    real = features % side
    if real:
        at_edge = position == features // side
        part.narrow(axis, real, side - real).masked_fill_(at_edge.view(-1, 1, 1), 0)
