"""A module that owns the places of its blocks and the index derived from them, and keeps the two consistent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling

from sparsekern.errors import InputError
from sparsekern.nn.init import draw_topology
from sparsekern.ops import Probe
from sparsekern.topology import (
    Grid,
    Index,
    IndexSource,
    Topology,
    check_tied,
    copy_index_,
    empty_index,
    fresh_index,
    generator_for,
    rebuild_,
    same_index,
    with_capacity,
)

Self = TypeVar("Self", bound="Indexed")  # typing has its own from Python 3.11 on


class Indexed(nn.Module):
    """The places of blocks, ``row`` and ``col``, and the index derived from them, in buffers.

    The index is checked against the places before each use, by identities and version counters, without synchronising
    the device. Places change through the layer: a move, loading, a reset. If other code replaces the tensors, the layer
    takes the new ones if they are a valid topology and rebuilds the index. If other code writes into them, the layer
    raises if a place changed; :meth:`refresh_` accepts what is there.
    """

    grid: Grid
    tie_taps: bool
    init: str
    """How the initial topology is drawn, or ``"given"``."""
    seed: int
    name: str
    values: nn.Parameter
    probe: Probe | None
    row: Tensor
    col: Tensor
    row_ptr: Tensor
    row_col: Tensor
    row_slot: Tensor
    col_ptr: Tensor
    col_row: Tensor
    col_slot: Tensor
    _blocks: int
    """Number of blocks of the initial topology."""
    _capacity: int
    """Number of slots."""
    _lost: bool
    """Whether the places were given, and have been lost on the meta device."""
    _lent: Index | None
    """The index that replaces the layer's own; see :func:`lend_index`."""
    gradient_index: Index | None
    """The blocks whose gradient is computed, where they are others than those that compute; see :func:`lend_index`."""
    _source: IndexSource | None
    """What the layer's own index was built from; None on the meta device."""

    def _draw(self) -> Topology:
        """Draw the initial topology on the CPU, from the seed and the name alone, so that all ranks agree."""
        if self.init == "given":  # there is nothing to draw: all slots are free until a checkpoint is loaded
            free = torch.full((self._capacity,), -1, dtype=torch.int32, device="cpu")
            return Topology(self.grid, free, free.clone())
        generator = generator_for(self.seed, self.name, "topology")
        drawn = draw_topology(self.grid, self.init, self._blocks, self.tie_taps, generator)
        return with_capacity(drawn, self._capacity)

    def _draw_again(self) -> Topology:
        """Draw the initial topology into ``row`` and ``col``, whose content is undefined; return it on the CPU."""
        topology = self._draw()
        self.row.copy_(topology.row)
        self.col.copy_(topology.col)
        self._lost = self.init == "given"
        return topology

    def _places(self) -> Topology:
        """Return the topology on the CPU; draw it again if the buffers hold no valid one.

        Raises:
            ValueError: the topology was given, and is lost.
        """
        topology = Topology(self.grid, self.row.cpu(), self.col.cpu())
        try:
            self._check(topology)
        except ValueError:
            topology = self._draw_again()
        if self._lost:
            raise InputError(
                "the layer was built with a given topology, which is lost; load a checkpoint that holds row and col"
            )
        return topology

    def _allocate_index(self) -> None:
        """Register empty buffers for the index; :meth:`refresh_` fills them."""
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
        """Record that the index in the buffers belongs to ``row`` and ``col``; if ``doubtful``, only that it may."""
        self._source = IndexSource(
            self.topology, self._buffered_index(), tied=self.tie_taps, owner=self._called, doubtful=doubtful
        )

    @property
    def _called(self) -> str:
        return f"layer {self.name!r}" if self.name else "a sparse layer"

    def _settle_places(self) -> None:
        """Make ``row`` and ``col`` contiguous, on the device of the values, and tensors that count versions.

        Other code may have put strided views there, tensors on another device, or tensors made under
        ``torch.inference_mode``.
        """
        device = self.row.device if self.values.is_meta else self.values.device
        for name in ("row", "col"):
            places: Tensor = getattr(self, name)
            if places.device != device or not places.is_contiguous() or places.is_inference():
                with torch.inference_mode(False):
                    self._buffers[name] = places.detach().to(device).clone(memory_format=torch.contiguous_format)

    def _index_is_usable(self) -> bool:
        """Return whether the buffers have the shapes, dtypes and device that an index of ``row`` and ``col`` needs."""
        wanted = empty_index(Topology(self.grid, self.row.to("meta"), self.col.to("meta")))
        return all(
            (part.shape, part.dtype, part.device) == (want.shape, want.dtype, self.row.device)
            and part.is_contiguous()
            and not part.is_inference()
            for part, want in zip(self._buffered_index(), wanted, strict=True)
        )

    def _renew_index(self) -> Index:
        """Compare the layer's own index with ``row`` and ``col``, rebuild it if necessary, and return it."""
        row, col, source = self.row, self.col, self._source
        if source is not None and row is source.row and col is source.col:
            source.renew()
            return source.index
        if row.is_meta or col.is_meta or type(row) is not Tensor or torch.compiler.is_compiling():
            return self._buffered_index()  # nothing to compare: a trace, or tensors without data
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
        """The places of the blocks: a view of the buffers, not a copy."""
        return Topology(self.grid, self.row, self.col)

    @property
    def index(self) -> Index:
        """The index that kernels read: the layer's own, or the one set by :func:`lend_index`.

        Raises:
            ValueError: other code has overwritten ``row`` and ``col``; see :class:`Indexed`.
        """
        source = self._source
        buffers: dict[str, Any] = self._buffers  # an attribute of a module takes five times as long
        if is_dynamo_compiling():  # the op compares versions when it runs: see topology.current_index
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

    def operands(self) -> tuple[Tensor, Index, Probe | None]:
        """Return the values, the index and the probe of the layer's product."""
        index, trained = self.index, self.gradient_index
        if trained is None:
            return self.values, index, self.probe
        return self.values.detach(), index, Probe.of_stored(self.values, trained)

    def refresh_(self) -> None:
        """Accept the places that ``row`` and ``col`` hold now: validate them and rebuild the index.

        Call it after other code has written into them, such as ``torch.distributed.checkpoint.load``.

        Raises:
            ValueError: the places are not a valid topology.
        """
        if not self.row.is_meta:
            self._settle_places()
            self._check(self.topology)
            self._build_index()

    def _build_index(self) -> None:
        """Build the index of the places that ``row`` and ``col`` hold, which are known to be valid."""
        if not self._index_is_usable():
            self._allocate_index()
        index, slots = self._buffered_index(), self.row.shape[0]
        with torch.no_grad():
            for part in (index.row_col, index.row_slot, index.col_row, index.col_slot):
                part[slots:].zero_()  # the padding, which moves never write; undefined after to_empty()
        rebuild_(index, self.topology)
        self._set_source()

    def _check(self, topology: Topology) -> None:
        topology.validate()
        if self.tie_taps:
            check_tied(topology)

    @torch.no_grad()
    def keep_slots_(self, slots: Tensor) -> None:
        """Keep some slots, with their gradient: ``values``, ``row``, ``col`` and the index become smaller tensors.

        ``values`` is a new parameter, which an optimizer does not know: :func:`sparsekern.compact_` tells it.

        Args:
            slots: ``(n,)`` distinct slots; slot ``slots[i]`` becomes slot ``i``.
        """
        old, slots = self.values, slots.long()
        values = nn.Parameter(old.detach().index_select(0, slots), requires_grad=old.requires_grad)
        if old.grad is not None:
            values.grad = old.grad.index_select(0, slots)
        values.__dict__.update(vars(old))
        self.values = values
        for name in ("row", "col"):
            self._buffers[name] = getattr(self, name).index_select(0, slots)
        self._capacity = self._blocks = slots.shape[0]
        self.init = "given"  # the topology of the first draw has more slots
        self._allocate_index()
        self.refresh_()

    def accept_index_(self) -> None:
        """Record that ``row``, ``col`` and the index were all written to and are consistent."""
        if self._source is not None:
            self._source.accept()

    def _knows_index(self) -> bool:
        """Return whether the index was built from the very tensors ``row`` and ``col``, whatever they hold now."""
        source = self._source
        return source is not None and self.row is source.row and self.col is source.col

    def _doubt_index(self) -> None:
        """Have the index compared before its next use, because it, ``row`` and ``col`` are copies of the originals."""
        self._source = None
        if self.row.is_meta or type(self.row) is not Tensor:
            return
        self._settle_places()
        if self._index_is_usable():
            self._set_source(doubtful=True)

    def train(self: Self, mode: bool = True) -> Self:
        """Set the mode; if it changes, the index is compared before its next use.

        Averaged weights are swapped in for evaluation, sometimes through ``.data``, which increments no version.
        """
        if mode != self.training and self._source is not None:
            self._source.doubt()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the source, of which copies and pickles build their own, and what the layer was lent."""
        return self.__dict__ | {"_source": self._knows_index(), "_lent": None, "gradient_index": None}

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
    """Return whether ``a`` shares memory and version with ``b``, as ``b.detach()`` does."""
    return a.is_set_to(b) and not a.is_inference() and a._version == b._version


@contextmanager
def lend_index(layer: Indexed, index: Index, gradient_index: Index | None = None) -> Iterator[None]:
    """Make a layer compute with another index, such as one from :func:`~sparsekern.topology.mask_index`.

    The layer's topology does not change. A backward may follow after the context ends, if ``index`` has not been
    written to since. Compiled code is reused if every call passes the same tensors
    (:func:`~sparsekern.topology.mask_index_` writes into them).

    Args:
        layer: a sparse layer.
        index: an index with as many slots as the layer.
        gradient_index: the blocks whose gradient is computed, such as the layer's own index. Default: those of
            ``index``.

    Raises:
        ValueError: the index has another number of slots or block rows.
        RuntimeError: the layer already computes with another index.
    """
    if index.slots != layer.values.shape[0] or index.row_ptr.shape != layer.row_ptr.shape:
        raise InputError(
            f"index has {index.slots} slots and {index.row_ptr.shape[0] - 1} block rows; the layer has "
            f"{layer.values.shape[0]} and {layer.grid.rows}: make it from the layer's own index",
            parameter="index",
        )
    if layer._lent is not None:
        raise RuntimeError("the layer already computes with another index; leave that context before entering this one")
    layer._lent, layer.gradient_index = index, gradient_index
    try:
        yield
    finally:
        layer._lent = layer.gradient_index = None
