"""The two products that all eager kernels are made of, each in a bounded scratch.

:func:`multiply` gathers blocks of x, multiplies each by its stored block and adds the results into block rows (for dx:
block columns). :func:`outer_blocks` forms chosen blocks of ``dy' x``. Sums are in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sparsekern.kernels.contract import accumulate_dtype
from sparsekern.kernels.eager.chunks import block_chunk, cut, spans, token_panel
from torch import Tensor


def entry_owners(ptr: Tensor, slots: int) -> Tensor:
    """Return the block row of each entry ``(Z,)`` from ``row_ptr``; free slots' entries get ``R``, one too many."""
    entries = torch.arange(slots, dtype=torch.int32, device=ptr.device)
    return torch.searchsorted(ptr, entries, right=True, out_int32=True) - 1


def multiply(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    ptr: Tensor,
    other: Tensor,
    slot: Tensor,
    features: int,
    *,
    transposed: bool,
) -> Tensor:
    """Return ``y (T, features)``: ``y[:, owner] += x[:, other] @ values[slot]'`` over all entries, plus ``bias``.

    Args:
        x: ``(T, F)``.
        values: ``(Z, bo, bi)``.
        bias: ``(features,)`` or None.
        ptr: ``(R + 1,)`` entries of each block row of y.
        other: ``(Z,)`` block of x that each entry reads.
        slot: ``(Z,)`` slot of each entry.
        features: size of the last axis of y; the last block row may stick out.
        transposed: multiply by ``values[slot]`` instead of its transpose, as dx does; then ptr are block columns.
    """
    tokens, slots, acc = x.shape[0], values.shape[0], accumulate_dtype(x.dtype)
    bo, bi = (values.shape[2], values.shape[1]) if transposed else (values.shape[1], values.shape[2])
    rows, whole = ptr.shape[0] - 1, features // bo
    size, x_size = acc.itemsize, x.element_size()
    y = x.new_empty(tokens, features)
    owner = entry_owners(ptr, slots)

    panel = token_panel(tokens, (rows + 1) * bo * size + x.shape[1] * x_size)
    chunk = block_chunk(slots, panel * (bi * (x_size + size) + bo * size) + bo * bi * (8 + size))
    for t0, t1 in spans(tokens, panel):
        total = _start(bias, rows, whole, t1 - t0, bo, features, acc, x.device)
        x_blocks = cut(x[t0:t1], bi)
        for e0, e1 in spans(slots, chunk):
            gathered = x_blocks.index_select(1, other[e0:e1]).to(acc).transpose(0, 1)  # (n, T, bi)
            weight = values.index_select(0, slot[e0:e1]).to(x.dtype).to(acc)
            weight = weight if transposed else weight.transpose(1, 2)  # (n, bi, bo)
            _add_at(total, owner[e0:e1], _batched(gathered, weight))
        out = y[t0:t1]
        out[:, : whole * bo].unflatten(1, (whole, bo)).copy_(total[:whole].transpose(0, 1))
        if whole < rows:
            out[:, whole * bo :].copy_(total[whole, :, : features - whole * bo])
    return y


def outer_blocks(
    dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int]
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ``(start, stop, part)``: ``part (n, bo, bi)`` are the blocks ``(row[k], col[k])`` of ``dy' x``.

    ``part`` is overwritten by the next one. Its phantom elements are zero, also when dy or x hold NaN.
    """
    (bo, bi), acc = block, accumulate_dtype(x.dtype)
    tokens, size, x_size = x.shape[0], acc.itemsize, x.element_size()
    edge_bytes = (dy.shape[1] * (dy.shape[1] % bo > 0) + x.shape[1] * (x.shape[1] % bi > 0)) * x_size
    panel = min(token_panel(tokens, (bo + bi) * (size + x_size) + edge_bytes), 4096)
    chunk = block_chunk(row.shape[0], panel * (bo + bi) * (size + x_size) + bo * bi * (size + 8))
    for e0, e1 in spans(row.shape[0], chunk):
        part = torch.zeros(e1 - e0, bo, bi, dtype=acc, device=x.device)
        for t0, t1 in spans(tokens, panel):
            dy_blocks = cut(dy[t0:t1], bo).index_select(1, row[e0:e1]).to(acc).permute(1, 2, 0)  # (n, bo, T)
            x_blocks = cut(x[t0:t1], bi).index_select(1, col[e0:e1]).to(acc).transpose(0, 1)  # (n, T, bi)
            part.baddbmm_(dy_blocks, x_blocks)
        _clear_phantom(part, row[e0:e1], dy.shape[1], axis=1)
        _clear_phantom(part, col[e0:e1], x.shape[1], axis=2)
        yield e0, e1, part


def _batched(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for ``(n, T, k)`` and ``(n, k, m)``; a product of singletons is no work for a matrix library."""
    return a * b if a.shape[2] == 1 else torch.bmm(a, b)


def _start(
    bias: Tensor | None,
    rows: int,
    whole: int,
    tokens: int,
    side: int,
    features: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return the sums ``(rows + 1, tokens, side)`` before the first block: the bias, or zeros.

    One row more than there is: free slots add into it, and it is thrown away. Skipping them instead would need their
    number on the host.
    """
    total = torch.zeros(rows + 1, tokens, side, dtype=dtype, device=device)
    if bias is not None:
        total[:whole] = bias[: whole * side].view(whole, 1, side)
        if whole < rows:
            total[whole, :, : features - whole * side] = bias[whole * side :]
    return total


def _add_at(total: Tensor, owner: Tensor, part: Tensor) -> None:
    """``total[owner[n]] += part[n]``, in the order of n: on CUDA index_add_ would add in any order."""
    if total.is_cuda:
        total.index_put_((owner,), part, accumulate=True)
    else:
        total.index_add_(0, owner, part)


def _clear_phantom(part: Tensor, position: Tensor, features: int, axis: int) -> None:
    """Zero what lies beyond ``features`` in blocks at the edge: NaN times the zero filling is NaN, not zero."""
    side = part.shape[axis]
    real = features % side
    if real:
        at_edge = position == features // side
        part.narrow(axis, real, side - real).masked_fill_(at_edge.view(-1, 1, 1), 0)
