"""Building the :class:`~sparsekern.kernels.contract.Index` on the device, in place, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.kernels.contract import PADDING, Index
from sparsekern.topology.grid import Grid
from sparsekern.topology.places import places_for
from sparsekern.topology.topology import Topology


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
        raise ValueError("at 1x1 an index shares row and col with its topology; build a new one for another topology")
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
    row_ptr, row_col, row_slot = _compact(index.row_ptr, index.row_col, index.row_slot, keep, block)
    col_ptr, col_row, col_slot = _compact(index.col_ptr, index.col_row, index.col_slot, keep, block)
    return Index(row_ptr, row_col, row_slot, col_ptr, col_row, col_slot)


@torch.no_grad()
def mask_index_(into: Index, index: Index, keep: Tensor, block: tuple[int, int]) -> None:
    """Write what :func:`mask_index` returns for ``index``, ``keep (Z,)`` and ``block`` into ``into``, in place.

    Its tensors and their addresses stay the same.
    """
    for tensor, new in zip(into, mask_index(index, keep, block), strict=True):
        if tensor is not new:
            tensor.copy_(new)


def _compact(
    ptr: Tensor, other: Tensor, slot: Tensor, keep: Tensor, block: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Move the kept entries of one order to the front; the others follow them, as free slots do."""
    slots = slot.shape[0] - PADDING
    entry = torch.arange(slots, dtype=torch.int32, device=ptr.device)
    kept = keep.index_select(0, slot[:slots]) & (entry < ptr[-1])
    before = torch.nn.functional.pad(kept.cumsum(0, dtype=torch.int32), (1, 0))  # kept entries before each one
    place = torch.where(kept, before[:-1], before[-1] + entry - before[:-1]).long()
    new_slot = torch.zeros_like(slot).index_copy_(0, place, slot[:slots])
    new_ptr = before.index_select(0, ptr)
    if block == (1, 1):
        return new_ptr, other, new_slot
    return new_ptr, torch.zeros_like(other).index_copy_(0, place, other[:slots]), new_slot


def index_bytes(grid: Grid, slots: int) -> int:
    """Return the bytes of row, col and the index together, for ``slots`` slots."""
    lists = 4 if grid.block == (1, 1) else 6  # at 1x1 two of the lists are row and col themselves
    padding = lists - 2
    return 4 * (lists * slots + padding * PADDING + grid.rows + 1 + grid.cols + 1)
