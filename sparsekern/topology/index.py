"""Building the :class:`~sparsekern.kernels.contract.Index` on the device, in place, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.kernels.contract import PADDING, Index
from sparsekern.topology.grid import Grid
from sparsekern.topology.places import places_for
from sparsekern.topology.topology import Topology

CHUNK = 2**16
"""Entries of an order that :func:`mask_index_` handles together; beside that it takes 4 bytes an entry."""


def empty_index(topology: Topology) -> Index:
    """Return an index of zeros with the right shapes; :func:`rebuild_` fills it.

    At 1x1 ``row_col`` and ``col_row`` are the topology's own tensors (see :class:`Index`), which must be contiguous.
    """
    grid, device = topology.grid, topology.row.device

    def zeros(length: int) -> Tensor:
        return torch.zeros(length, dtype=torch.int32, device=device)

    entries = topology.slots + PADDING
    by_slot = grid.block == (1, 1)
    return Index(
        row_ptr=zeros(grid.rows + 1),
        row_col=topology.col if by_slot else zeros(entries),
        row_slot=zeros(entries),
        col_ptr=zeros(grid.cols + 1),
        col_row=topology.row if by_slot else zeros(entries),
        col_slot=zeros(entries),
    )


def build_index(topology: Topology, *, checked: bool = False, ascending: bool = False) -> Index:
    """Return the index of a topology, whose places may be of any strides and integer dtype.

    Args:
        topology: validated here, which waits for the device, unless it is ``checked``.
        checked: the caller knows that it is valid.
        ascending: as in :func:`rebuild_`.

    Raises:
        ValueError: a place outside the grid, or one that is there twice: kernels would read and write beyond it.
    """
    row, col = (places.to(torch.int32).contiguous() for places in (topology.row, topology.col))
    topology = Topology(topology.grid, row, col)
    if not checked and topology.slots:  # a layer has a slot, an index need not
        topology.validate()
    index = empty_index(topology)
    rebuild_(index, topology, ascending=ascending)
    return index


@torch.no_grad()
def rebuild_(index: Index, topology: Topology, *, ascending: bool = False) -> None:
    """Write the index of ``topology`` into ``index``: same tensors, same addresses. Reads nothing on the host.

    With ``ascending`` the slots are in the order of their keys, free ones last: there is less to sort.

    Raises:
        ValueError: at 1x1, an index that shares its tensors with another topology.
    """
    by_slot = topology.grid.block == (1, 1)
    if by_slot and (index.row_col is not topology.col or index.col_row is not topology.row):
        raise InputError("at 1x1 an index shares row and col with its topology; build a new one for another topology")
    kernels = places_for(topology.row, topology.col, *index)
    kernels.orders_(index, topology.row, topology.col, by_slot=by_slot, ascending=ascending)


def stored_blocks(index: Index) -> int:
    """Return how many blocks an index holds (waits for the device)."""
    return int(index.row_ptr[-1])


def ordered_keys(index: Index, topology: Topology) -> Tensor:
    """Return what ``topology.sorted_keys()`` does, from the order that its index has already: without a sort."""
    slots = index.row_slot[: stored_blocks(index)]
    return topology.row.index_select(0, slots).mul_(topology.grid.cols).add_(topology.col.index_select(0, slots))


@torch.no_grad()
def mask_index(index: Index, keep: Tensor, block: tuple[int, int]) -> Index:
    """Return a transient index of the blocks whose slot is kept, by a prefix sum over the two orders: no sort.

    Args:
        index: the layer's index; not changed.
        keep: ``(Z,)`` bool, over slots. Free slots stay out whatever it says.
        block: the block size of the layer.
    """
    by_slot = block == (1, 1)  # then the lists of columns and rows are the topology's own
    kept = Index(*(torch.zeros_like(tensor) for tensor in index))
    if by_slot:
        kept = kept._replace(row_col=index.row_col, col_row=index.col_row)
    mask_index_(kept, index, keep, block)
    return kept


@torch.no_grad()
def mask_index_(into: Index, index: Index, keep: Tensor, block: tuple[int, int]) -> None:
    """Write what :func:`mask_index` returns for ``index``, ``keep (Z,)`` and ``block`` into ``into``, in place.

    Its tensors and their addresses stay the same.
    """
    by_slot = block == (1, 1)
    _compact_(into[:3], index[:3], keep, by_slot)
    _compact_(into[3:], index[3:], keep, by_slot)


def _compact_(into: tuple[Tensor, ...], order: tuple[Tensor, ...], keep: Tensor, by_slot: bool) -> None:
    """Move the kept entries of one order ``(ptr, other, slot)`` to the front; the others follow, as free slots do."""
    ptr, other, slot = order
    slots, used = slot.shape[0] - PADDING, ptr[-1]
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


def index_bytes(grid: Grid, slots: int) -> int:
    """Return the bytes of row, col and the index together, for ``slots`` slots."""
    lists = 4 if grid.block == (1, 1) else 6  # at 1x1 two of the lists are row and col themselves
    padding = lists - 2
    return 4 * (lists * slots + padding * PADDING + grid.rows + 1 + grid.cols + 1)
