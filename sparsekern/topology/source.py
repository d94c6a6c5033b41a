"""What an index was built from, so that nothing computes with one that no longer fits."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.kernels.contract import Index
from sparsekern.topology.index import build_index
from sparsekern.topology.tied import check_tied
from sparsekern.topology.topology import Topology


class IndexSource:
    """The tensors that an index was built from, and their versions when it was.

    A tensor counts the writes into it (``Tensor._version``), so comparing costs an attribute each and no look at the
    device. Writes through ``.data``, NumPy or another process are not counted.

    Args:
        topology: what the index was built from. Its tensors count versions: none was made under
            ``torch.inference_mode``.
        index: built from it. Its ``row_ptr`` knows the source from now on, in compiled code too.
        tied: whether the taps of a convolution are tied.
        owner: names the owner in errors.
        doubtful: the index may not fit, and is compared before its first use.
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
        """Compare the index before its next use, whatever versions say."""
        self.row_version = -1

    def accept(self) -> None:
        """Take the tensors as they are now: whoever wrote into them has seen to it that they fit each other."""
        self.row_version, self.col_version = self.row._version, self.col._version
        self.index_version = sum(part._version for part in self.index)

    def fits(self) -> bool:
        """Return whether neither the tensors nor the index were written to."""
        a, b, c, d, e, f = self.index
        return (
            self.row._version == self.row_version
            and self.col._version == self.col_version
            and a._version + b._version + c._version + d._version + e._version + f._version == self.index_version
        )

    def renew(self) -> None:
        """Compare the index with its tensors after other code wrote into them (waits for the device).

        Copies of equal numbers do not matter. Nor does it when ``row``, ``col`` and the index together became those of
        another model, as DistributedDataParallel does it. Where only the index was overwritten, it is rebuilt.

        Raises:
            ValueError: ``row`` and ``col`` are no topology, or not the one of the index.
        """
        places_written = (self.row._version, self.col._version) != (self.row_version, self.col_version)
        fresh = fresh_index(self.topology, self.tied, self.owner)
        if not same_index(self.index, fresh):
            if places_written:
                raise InputError(
                    f"other code overwrote row and col of {self.owner}, and its index was built from other places: "
                    "call sparsekern.refresh_(model) if they were loaded or copied whole; if they were averaged, load "
                    "a checkpoint, and average parameters only (use_buffers=False)"
                )
            copy_index_(self.index, fresh)
        self.accept()


class _SourceRef(weakref.ref[IndexSource]):
    """Weak: the source holds the tensor. Copies and pickles of an index have none until their owner says so."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def fresh_index(topology: Topology, tied: bool, owner: str) -> Index:
    """Return a new index of places that other code has written.

    Args:
        topology: the places; not changed.
        tied: whether the taps must be tied.
        owner: names whose places they are, in errors.

    Raises:
        ValueError: they are no topology, or not one of tied taps where those are asked for.
    """
    try:
        topology.validate()
        if tied:
            check_tied(topology)
    except ValueError as error:
        raise InputError(
            f"other code overwrote row and col of {owner}, and they are no topology: {error}; load a checkpoint, and "
            "if they were averaged, average parameters only (use_buffers=False)"
        ) from None
    return build_index(topology, checked=True)


def same_index(a: Index, b: Index) -> bool:
    """Return whether the indices ``a`` and ``b`` hold the same numbers (waits for the device)."""
    return all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@torch.no_grad()
def copy_index_(into: Index, index: Index) -> None:
    """Copy an index into the tensors of another, ``into``."""
    for mine, new in zip(into, index, strict=True):
        if mine is not new:
            mine.copy_(new)


def current_index(tensors: Sequence[Tensor]) -> Index:
    """Return the index of the six ``tensors`` that an op was given, compared with its source if that was written to.

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
