"""Building the :class:`~sparsekern.kernels.contract.Index` on the device, in place; checking that it is current."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.kernels.contract import PADDING, Index
from sparsekern.topology.grid import Grid
from sparsekern.topology.topology import Topology, check_tied, places_for


def empty_index(topology: Topology) -> Index:
    """Return an index of zeros with the shapes for a topology; :func:`rebuild_` fills it.

    With 1x1 blocks ``row_col`` and ``col_row`` are the topology's own tensors (see :class:`Index`), which must be
    contiguous.
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
    """Return the index of a topology, whose places may have any strides and integer dtype.

    Args:
        topology: the places.
        checked: the topology is known to be valid. Otherwise it is validated, which synchronises the device.
        ascending: as in :func:`rebuild_`.

    Raises:
        ValueError: a place is outside the grid or taken twice; kernels would read and write out of bounds.
    """
    row, col = (places.to(torch.int32).contiguous() for places in (topology.row, topology.col))
    topology = Topology(topology.grid, row, col)
    if not checked and topology.slots:  # an index may be empty, a layer may not
        topology.validate()
    index = empty_index(topology)
    rebuild_(index, topology, ascending=ascending)
    return index


@torch.no_grad()
def rebuild_(index: Index, topology: Topology, *, ascending: bool = False) -> None:
    """Write the index of a topology into existing tensors, without synchronising the device.

    Args:
        index: written to; its tensors and addresses stay the same.
        topology: a valid topology.
        ascending: the slots are ordered by key, with free ones last, so there is less to sort.

    Raises:
        ValueError: with 1x1 blocks, the index shares its tensors with another topology.
    """
    by_slot = topology.grid.block == (1, 1)
    if by_slot and (index.row_col is not topology.col or index.col_row is not topology.row):
        raise InputError(
            "index is of another topology, and with 1x1 blocks it shares row and col with it; build a new one",
            parameter="index",
        )
    kernels = places_for(topology.row, topology.col, *index)
    kernels.orders_(index, topology.row, topology.col, by_slot=by_slot, ascending=ascending)


def stored_blocks(index: Index) -> int:
    """Return the number of blocks in an index (synchronises the device)."""
    return int(index.row_ptr[-1])


def ordered_keys(index: Index, topology: Topology) -> Tensor:
    """Return ``topology.sorted_keys()`` without sorting, from the order in its index."""
    slots = index.row_slot[: stored_blocks(index)]
    return topology.row.index_select(0, slots).mul_(topology.grid.cols).add_(topology.col.index_select(0, slots))


@torch.no_grad()
def mask_index(index: Index, keep: Tensor, block: tuple[int, int]) -> Index:
    """Return an index of some of the blocks, by a prefix sum over both orders instead of a sort.

    Args:
        index: the layer's index; not changed.
        keep: ``(Z,)`` bool, the slots to keep; free slots are left out in any case.
        block: the block size of the layer.
    """
    by_slot = block == (1, 1)  # the lists of columns and rows are the topology's own
    kept = Index(*(torch.zeros_like(tensor) for tensor in index))
    if by_slot:
        kept = kept._replace(row_col=index.row_col, col_row=index.col_row)
    mask_index_(kept, index, keep, block)
    return kept


@torch.no_grad()
def mask_index_(into: Index, index: Index, keep: Tensor, block: tuple[int, int]) -> None:
    """Write the result of :func:`mask_index` into existing tensors, whose addresses stay the same.

    Args:
        into: the index to write.
        index, keep, block: as in :func:`mask_index`; ``keep (Z,)``.

    Raises:
        ValueError: ``keep`` is not one bool a slot.
    """
    if keep.dtype is not torch.bool or keep.shape != (index.slots,):
        raise InputError(
            f"keep is {keep.dtype} {tuple(keep.shape)}; it must be torch.bool ({index.slots},), one a slot",
            parameter="keep",
        )
    places_for(keep, *index, *into).masked_(into, index, keep, by_slot=block == (1, 1))


def index_bytes(grid: Grid, slots: int) -> int:
    """Return the bytes of ``row``, ``col`` and the index of a layer with this many ``slots``."""
    lists = 4 if grid.block == (1, 1) else 6  # with 1x1 blocks two of the lists are row and col themselves
    padding = lists - 2
    return 4 * (lists * slots + padding * PADDING + grid.rows + 1 + grid.cols + 1)


class IndexSource:
    """The tensors that an index was built from, with their versions at that time.

    Tensors count the writes into them (``Tensor._version``), so checking whether an index is current reads a few
    integers and never synchronises the device. Writes through ``.data``, NumPy or another process are not counted.

    Args:
        topology: the topology of the index. Its tensors must count versions, which those made under
            ``torch.inference_mode`` do not.
        index: the index. Its ``row_ptr`` refers to the source from now on, in compiled code too.
        tied: whether the taps of a convolution are tied.
        owner: name of the owner, for errors.
        doubtful: the index may not match the topology, and is compared before its first use.
    """

    def __init__(self, topology: Topology, index: Index, *, tied: bool, owner: str, doubtful: bool = False) -> None:
        self.topology, self.index = topology, index
        self.row, self.col = topology.row, topology.col
        self.tied, self.owner = tied, owner
        self.accept()
        if doubtful:
            self.doubt()
        index.row_ptr.source = _SourceRef(self)  # type: ignore[attr-defined]

    def doubt(self) -> None:
        """Have the index compared before its next use, even if no version changes."""
        self.row_version = -1

    def accept(self) -> None:
        """Record the present versions: the tensors are consistent."""
        self.row_version, self.col_version = self.row._version, self.col._version
        self.index_version = sum(part._version for part in self.index)

    def fits(self) -> bool:
        """Return whether neither the places nor the index have been written to."""
        a, b, c, d, e, f = self.index
        return (
            self.row._version == self.row_version
            and self.col._version == self.col_version
            and a._version + b._version + c._version + d._version + e._version + f._version == self.index_version
        )

    def renew(self) -> None:
        """Compare the index with the places after other code has written to them (synchronises the device).

        Writing equal numbers is allowed, and so is replacing ``row``, ``col`` and the index together, as
        DistributedDataParallel does. If only the index was overwritten, it is rebuilt.

        Raises:
            ValueError: ``row`` and ``col`` are not a valid topology, or not that of the index.
        """
        places_written = (self.row._version, self.col._version) != (self.row_version, self.col_version)
        fresh = fresh_index(self.topology, self.tied, self.owner)
        if not same_index(self.index, fresh):
            if places_written:
                raise InputError(
                    f"other code overwrote row and col of {self.owner}, and its index was built from other places: "
                    "if they were loaded or copied, call sparsekern.refresh_(model); if they were averaged, load a "
                    "checkpoint and average parameters only (use_buffers=False)"
                )
            copy_index_(self.index, fresh)
        self.accept()


class _SourceRef(weakref.ref[IndexSource]):
    """A weak reference, since the source holds the tensor. Copies and pickles of a tensor get None instead."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def fresh_index(topology: Topology, tied: bool, owner: str) -> Index:
    """Validate places that other code has written and return a new index of them.

    Args:
        topology: the places; not changed.
        tied: whether the taps must be tied.
        owner: name of the owner, for errors.

    Raises:
        ValueError: the places are not a valid topology, or the taps are not tied although they must be.
    """
    try:
        topology.validate()
        if tied:
            check_tied(topology)
    except ValueError as error:
        raise InputError(
            f"other code overwrote row and col of {owner}, which are not a topology now: {error}; load a checkpoint, "
            "and if they were averaged, average parameters only (use_buffers=False)"
        ) from None
    return build_index(topology, checked=True)


def same_index(a: Index, b: Index) -> bool:
    """Return whether the indices ``a`` and ``b`` hold the same numbers (synchronises the device)."""
    return all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@torch.no_grad()
def copy_index_(into: Index, index: Index) -> None:
    """Copy an ``index`` into the tensors of another, ``into``."""
    for mine, new in zip(into, index, strict=True):
        if mine is not new:
            mine.copy_(new)


def current_index(tensors: Sequence[Tensor]) -> Index:
    """Return the six ``tensors`` of an op as an index, after comparing it with its source if that was written to.

    Raises:
        ValueError: as :meth:`IndexSource.renew`.
    """
    known: _SourceRef | None = getattr(tensors[0], "source", None)
    if known is not None:
        source = known()
        if source is not None and (
            source.row._version != source.row_version or source.col._version != source.col_version
        ):
            source.renew()
    return Index._make(tensors)
