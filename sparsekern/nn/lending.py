"""Passes over part of a layer's blocks: the layer reads another index for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sparsekern.errors import InputError
from sparsekern.nn.block_sparse import BlockSparse
from sparsekern.topology import Index


@contextmanager
def lend_index(layer: BlockSparse, index: Index) -> Iterator[None]:
    """Let a layer compute with another index, such as one of :func:`~sparsekern.topology.mask_index`.

    The topology stays what it is. A backward may follow after the end, as long as ``index`` is not written to. Lend the
    same tensors each time (:func:`~sparsekern.topology.mask_index_` writes into them), and compiled code goes on.

    Raises:
        ValueError: the index is not for the layer's slots.
        RuntimeError: the layer has a lent index already.
    """
    if index.slots != layer.values.shape[0] or index.row_ptr.shape != layer.row_ptr.shape:
        raise InputError(
            f"the index has {index.slots} slots and {index.row_ptr.shape[0] - 1} block rows; the layer has "
            f"{layer.values.shape[0]} and {layer.grid.rows}: make it of the layer's own index"
        )
    if layer._lent is not None:
        raise RuntimeError("the layer computes with a lent index already; end that before lending another")
    layer._lent = index
    try:
        yield
    finally:
        layer._lent = None
