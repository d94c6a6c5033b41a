"""A module that owns an index: it never computes with one that does not belong to its present places."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling

from sparsekern.topology import (
    Grid,
    Index,
    IndexSource,
    Topology,
    check_tied,
    copy_index_,
    empty_index,
    fresh_index,
    rebuild_,
    same_index,
)

Self = TypeVar("Self", bound="Indexed")  # typing has its own from Python 3.11 on


class Indexed(nn.Module):
    """The places of blocks and the index of them, in buffers: what sparse layers know about where their blocks are.

    ``row`` and ``col`` are the topology; the index is derived, and compared with them before each use (two identities
    and a few integers, no look at the device). They change through the layer: a move, loading, a reset. When other
    code puts other tensors in their place, the layer takes these if they are a topology, and rebuilds the index. When
    other code writes into them, it raises if that changed anything, and :meth:`refresh_` takes what is there.
    """

    grid: Grid
    tie_taps: bool
    name: str
    values: nn.Parameter
    row: Tensor
    col: Tensor
    row_ptr: Tensor
    row_col: Tensor
    row_slot: Tensor
    col_ptr: Tensor
    col_row: Tensor
    col_slot: Tensor
    _lent: Index | None
    """See :func:`lend_index`."""
    _source: IndexSource | None
    """Of the layer's own index; None on the meta device."""

    def _allocate_index(self) -> None:
        """Make the buffers of the index, for :meth:`refresh_` to fill."""
        self._settle_places()
        with torch.inference_mode(False):
            index = empty_index(self.topology)
        for name in self._derived():
            self.register_buffer(name, getattr(index, name), persistent=False)

    def _derived(self) -> tuple[str, ...]:
        by_slot = self.grid.block == (1, 1)
        return tuple(n for n in Index._fields if not (by_slot and n in ("row_col", "col_row")))

    def _buffered_index(self) -> Index:
        buffers: dict[str, Any] = self._buffers
        by_slot = self.grid.block == (1, 1)
        return Index(
            buffers["row_ptr"],
            buffers["col" if by_slot else "row_col"],
            buffers["row_slot"],
            buffers["col_ptr"],
            buffers["row" if by_slot else "col_row"],
            buffers["col_slot"],
        )

    def _set_source(self, doubtful: bool = False) -> None:
        """Note that the index in the buffers is that of ``row`` and ``col``, or, where ``doubtful``, may be."""
        self._source = IndexSource(
            self.topology, self._buffered_index(), tied=self.tie_taps, owner=self._called, doubtful=doubtful
        )

    @property
    def _called(self) -> str:
        return f"layer {self.name!r}" if self.name else "a sparse layer"

    def _settle_places(self) -> None:
        """Give kernels ``row`` and ``col`` as they read them, and as versions are counted.

        Other code may have put views with strides there, tensors on another device than the values, or ones that were
        made under ``torch.inference_mode``.
        """
        device = self.row.device if self.values.is_meta else self.values.device
        for name in ("row", "col"):
            places: Tensor = getattr(self, name)
            if places.device != device or not places.is_contiguous() or places.is_inference():
                with torch.inference_mode(False):
                    self._buffers[name] = places.detach().to(device).clone(memory_format=torch.contiguous_format)

    def _index_is_usable(self) -> bool:
        """Return whether the buffers of the index can hold that of ``row`` and ``col``, whatever is in them."""
        wanted = empty_index(Topology(self.grid, self.row.to("meta"), self.col.to("meta")))
        return all(
            (part.shape, part.dtype, part.device) == (want.shape, want.dtype, self.row.device)
            and part.is_contiguous()
            and not part.is_inference()
            for part, want in zip(self._buffered_index(), wanted, strict=True)
        )

    def _renew_index(self) -> Index:
        """Return the layer's own index, compared with ``row`` and ``col`` and rebuilt if it has to be."""
        row, col, source = self.row, self.col, self._source
        if source is not None and row is source.row and col is source.col:
            source.renew()
            return source.index
        if row.is_meta or col.is_meta or type(row) is not Tensor or torch.compiler.is_compiling():
            return self._buffered_index()  # no numbers to compare: a trace, or sizes only
        if source is not None and _same_memory(row, source.row) and _same_memory(col, source.col) and source.fits():
            return source.index  # functional_call with detached buffers
        self._settle_places()
        fresh = fresh_index(self.topology, self.tie_taps, self._called)
        if not self._index_is_usable():
            self._allocate_index()
        if not same_index(index := self._buffered_index(), fresh):
            copy_index_(index, fresh)
        self._set_source()
        return self._buffered_index()

    @_disable_dynamo  # torch.compiler.disable imports all of Dynamo at once
    def _renew_outside_of_the_graph(self) -> None:
        self._renew_index()

    @property
    def topology(self) -> Topology:
        """Return the places of the blocks: a view of the buffers, not a copy."""
        return Topology(self.grid, self.row, self.col)

    @property
    def index(self) -> Index:
        """Return what kernels read: the layer's own index, or the one that :func:`lend_index` lends it.

        Raises:
            ValueError: other code has overwritten ``row`` and ``col``; see :class:`Indexed`.
        """
        source = self._source
        buffers: dict[str, Any] = self._buffers  # an attribute of a module takes five times as long
        if is_dynamo_compiling():  # versions are compared where the op runs: see topology.current_index
            if not buffers["row"].is_meta and (
                source is None or buffers["row"] is not source.row or buffers["col"] is not source.col
            ):
                self._renew_outside_of_the_graph()
            return self._buffered_index() if self._lent is None else self._lent
        if source is None or buffers["row"] is not source.row or buffers["col"] is not source.col or not source.fits():
            own = self._renew_index()
        else:
            own = source.index
        return own if self._lent is None else self._lent

    def refresh_(self) -> None:
        """Take the places that ``row`` and ``col`` hold now: check them and rebuild the index.

        Needed after other code wrote into them, such as a bare ``torch.distributed.checkpoint.load``.

        Raises:
            ValueError: the topology is not one; the text says what is wrong where.
        """
        if self.row.is_meta:
            return
        self._settle_places()
        self._check(self.topology)
        if not self._index_is_usable():
            self._allocate_index()
        index, slots = self._buffered_index(), self.row.shape[0]
        with torch.no_grad():
            for part in (index.row_col, index.row_slot, index.col_row, index.col_slot):
                part[slots:].zero_()  # the padding, which no move writes, is anything after to_empty()
        rebuild_(index, self.topology)
        self._set_source()

    def _check(self, topology: Topology) -> None:
        topology.validate()
        if self.tie_taps:
            check_tied(topology)

    def accept_index_(self) -> None:
        """Say that ``row``, ``col`` and the index have been written to, together, and fit each other."""
        if self._source is not None:
            self._source.accept()

    def _knows_index(self) -> bool:
        """Return whether the index was built from the tensors that are ``row`` and ``col``, whatever is in them now."""
        source = self._source
        return source is not None and self.row is source.row and self.col is source.col

    def _doubt_index(self) -> None:
        """Compare the index before its next use: it, ``row`` and ``col`` are copies of those that it was built from."""
        self._source = None
        if self.row.is_meta or type(self.row) is not Tensor:
            return
        self._settle_places()
        if self._index_is_usable():
            self._set_source(doubtful=True)

    def train(self: Self, mode: bool = True) -> Self:
        """Switch to training or evaluation; a switch compares the index, once.

        Averages are swapped in for an evaluation, and some do that through ``.data``, which counts no version.
        """
        if mode != self.training and self._source is not None:
            self._source.doubt()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles build a source of their own."""
        return self.__dict__ | {"_source": self._knows_index()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"_source": None})
        if state["_source"]:
            self._doubt_index()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        row, col, known = self.row, self.col, self._knows_index()

        def keep_integers(tensor: Tensor) -> Tensor:
            new: Tensor = fn(tensor)
            if tensor.is_floating_point() or tensor.is_complex() or new.dtype == tensor.dtype:
                return new
            return tensor.to(new.device)  # type(dtype) converts coordinates too

        super()._apply(keep_integers, recurse)
        if known and (self.row is not row or self.col is not col):
            self._doubt_index()
        return self


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether ``a`` is another object for what ``b`` is, as ``b.detach()`` is."""
    return a.is_set_to(b) and not a.is_inference() and a._version == b._version
