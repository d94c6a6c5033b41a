"""Operations on lists of places that an update of the topology needs, in plain PyTorch: any device.

A key is the place ``row * C + col`` as one number, below the number of cells. ``kernels/cpu/places.py`` does the same
without sorts; what both return is the same to the last number.
"""

from __future__ import annotations

import torch
from sparsekern.kernels.contract import Index, Lists, ordered_bits
from torch import Tensor

CHUNK = 2**16
"""Entries that :func:`masked_` handles at a time; in addition it takes 4 bytes per entry."""


def orders_(index: Index, row: Tensor, col: Tensor, *, by_slot: bool, ascending: bool) -> None:
    """Write both orders of an index in place, free slots last in each; reads nothing on the host.

    Args:
        index: of R block rows and C block columns.
        row, col: ``(Z,)`` int32, the place of each slot; -1 for a free one.
        by_slot: ``row_col`` and ``col_row`` are ``col`` and ``row`` themselves, as at 1x1, and not written.
        ascending: the slots are in the order of their keys, free ones last.
    """
    rows, cols, slots = index.row_ptr.shape[0] - 1, index.col_ptr.shape[0] - 1, row.shape[0]
    for major, minor, majors, minors, ptr, other, slot in (
        (row, col, rows, cols, index.row_ptr, index.row_col, index.row_slot),
        (col, row, cols, rows, index.col_ptr, index.col_row, index.col_slot),
    ):
        key = torch.where(row >= 0, major * minors + minor, rows * cols)
        if ascending and major is row:
            order = torch.arange(slots, dtype=torch.int32, device=key.device)
        else:
            key, order = key.sort(stable=True)
        starts = torch.arange(majors + 1, dtype=torch.int32, device=key.device) * minors
        ptr.copy_(torch.searchsorted(key, starts, out_int32=True))
        slot[:slots].copy_(order)
        if not by_slot:
            other[:slots].copy_(key.remainder_(minors))


def masked_(into: Index, index: Index, keep: Tensor, *, by_slot: bool) -> None:
    """Write the index of some slots, by a prefix sum over both orders; reads nothing on the host.

    Args:
        into: written to; other tensors than those of ``index``.
        index: of Z slots.
        keep: ``(Z,)`` bool; free slots are left out in any case. In ``into``, all slots that are left out are free.
        by_slot: as in :func:`orders_`.
    """
    _mask_order_(into.by_row, index.by_row, keep, by_slot)
    _mask_order_(into.by_col, index.by_col, keep, by_slot)


def _mask_order_(into: Lists, order: Lists, keep: Tensor, by_slot: bool) -> None:
    """Move the kept entries of one order to the front; the others follow, like free slots."""
    (ptr, other, slot), slots = order, keep.shape[0]
    used = ptr[-1]
    before = torch.zeros(slots + 1, dtype=torch.int32, device=ptr.device)  # kept entries before each one
    for start in range(0, slots, CHUNK):
        some = slot[start : min(start + CHUNK, slots)]
        entry = torch.arange(start, start + some.shape[0], dtype=torch.int32, device=ptr.device)
        kept = keep.index_select(0, some) & (entry < used)
        torch.add(kept.cumsum(0, dtype=torch.int32), before[start], out=before[start + 1 : start + 1 + some.shape[0]])
    for start in range(0, slots, CHUNK):
        end = min(start + CHUNK, slots)
        entry = torch.arange(start, end, dtype=torch.int32, device=ptr.device)
        first, after = before[start:end], before[start + 1 : end + 1]
        place = torch.where(after > first, first, before[-1] + entry - first).long()
        into[2].index_copy_(0, place, slot[start:end])
        if not by_slot:
            into[1].index_copy_(0, place, other[start:end])
    into[0].copy_(before.index_select(0, ptr))


def are_legal(row: Tensor, col: Tensor, rows: int, cols: int) -> bool:
    """Return whether all ``(row, col)``, int32 ``(Z,)``, are distinct and in a grid, or both -1 (synchronises).

    Args:
        row, col: the place of each slot.
        rows, cols: R and C.
    """
    free = (row == -1) & (col == -1)
    inside = (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
    if not bool((free | inside).all()):
        return False
    keys = torch.where(free, rows * cols, row * cols + col).sort().values
    return not bool(((keys[1:] == keys[:-1]) & (keys[1:] < rows * cols)).any())


def distinct(keys: Tensor, present: Tensor, bound: int) -> Tensor:
    """Return the distinct keys that are not present, int32, ascending.

    Args:
        keys: ``(n,)`` int32 from 0 to below ``bound``, in any order.
        present: ``(m,)`` distinct int32 keys, ascending.
        bound: the number of cells.
    """
    keys = torch.unique(keys)
    return keys[find(present, keys, bound) < 0]


def leave_out_(numbers: Tensor, positions: Tensor) -> Tensor:
    """Return int32 ``numbers (n,)`` without those at ``positions (k,)``; ``numbers`` may be overwritten.

    The positions are int64, distinct and ascending.
    """
    return numbers[torch.ones_like(numbers, dtype=torch.bool).index_fill_(0, positions, False)]


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return the positions of the ``count`` lowest finite scores; see :func:`highest`."""
    return _smallest(ordered_bits(scores), min(count, int(torch.isfinite(scores).sum())))


def highest(scores: Tensor, count: int) -> Tensor:
    """Return the positions ``(k,)`` of the ``count`` highest scores, ascending; the first of equal ones.

    Args:
        scores: ``(n,)`` floats of 0 or more, or infinite; of minus infinity, they are never chosen.
        count: number of positions; fewer are returned if there are not as many.
    """
    contenders = _contenders(scores, count)
    scores = scores[contenders]
    most = torch.iinfo(torch.int64 if scores.element_size() == 8 else torch.int32).max
    order = ordered_bits(scores).clamp_(min=-1).neg_().add_(most - 1)  # minus infinity comes last
    return contenders[_smallest(order, min(count, int((scores > -torch.inf).sum())))]


def _smallest(numbers: Tensor, count: int) -> Tensor:
    """Return the positions of the ``count`` smallest integers, none negative, ascending; the first of equal ones.

    Linear: their upper bits are counted, and only numbers that agree with the last one there are sorted.
    """
    if count == 0 or numbers.shape[0] <= count:
        return torch.arange(min(count, numbers.shape[0]), device=numbers.device)
    upper = numbers >> (
        51 if numbers.element_size() == 8 else 20
    )  # of a float: its exponent, and what 12 bits hold more
    below = torch.bincount(upper).cumsum(0)
    last = torch.searchsorted(below, count)  # the first value of the upper bits with so many numbers up to it
    edge = (upper == last).nonzero().squeeze(1)
    chosen = upper < last
    del upper
    few = numbers[edge].sort(stable=True).indices[: count - int(chosen.sum())]
    return chosen.index_fill_(0, edge[few], True).nonzero().squeeze(1)


STRIDE = 17
"""Of the scores that :func:`_contenders` looks at; a prime, so that a grid's columns all have their turn."""


def _contenders(scores: Tensor, count: int) -> Tensor:
    """Return positions, ascending, among which the ``count`` highest scores are: not many more where these are few.

    RigL at 1x1 has millions of scores, and sorting them all would cost more than computing them.
    """
    rank = 2 * count // STRIDE + 64  # of the bound in the sample: about twice as many scores as wanted are above it
    if rank * STRIDE * 4 <= scores.shape[0]:
        sample = scores[::STRIDE]
        bound = sample[ordered_bits(sample).neg_().sort(stable=True).indices[rank]]
        above = (scores >= bound).nonzero().squeeze(1)
        if above.shape[0] >= count:
            return above
    return torch.arange(scores.shape[0], device=scores.device)


def find(places: Tensor, keys: Tensor, bound: int) -> Tensor:
    """Return the positions ``(n,)`` int32 of keys ``(n,)`` in ``places (m,)``, or -1.

    Args:
        places: distinct int32 keys, ascending, from 0 to below ``bound``.
        keys: int32, in any order.
        bound: the number of cells.
    """
    if places.shape[0] == 0:
        return torch.full_like(keys, -1)
    near = torch.searchsorted(places, keys, out_int32=True).clamp_(max=places.shape[0] - 1)
    return torch.where(places[near] == keys, near, -1)


def first_occurrences(keys: Tensor, present: Tensor, bound: int) -> Tensor:
    """Return ``(n,)`` bool: whether a key occurs for the first time and is not present.

    Args:
        keys: ``(n,)`` int32 from 0 to below ``bound``, in any order.
        present: ``(m,)`` distinct int32 keys, ascending.
        bound: the number of cells.
    """
    ordered, position = keys.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    if present.shape[0]:
        near = torch.searchsorted(present, ordered, out_int32=True).clamp_(max=present.shape[0] - 1)
        first &= present[near] != ordered
    del ordered
    return torch.empty_like(first).index_copy_(0, position, first)


def places_of(keys: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """Return ``row, col``, int32 ``(n,)``, of int32 ``keys (n,)``; -1 both where a key is below 0."""
    row = torch.div(keys, cols, rounding_mode="floor").clamp_(min=-1)
    return row, torch.where(keys < 0, -1, keys - row * cols)


def search(edges: Tensor, queries: Tensor) -> Tensor:
    """Return for each query ``(n,)`` the first of the ``edges (m,)`` that is above it: int32; both are float64.

    Args:
        edges: ascending, from 0 or more.
        queries: from 0 to below the last edge, in any order.
    """
    return torch.searchsorted(edges, queries, right=True, out_int32=True)
