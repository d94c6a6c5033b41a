"""The sparse layers that a state holds, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.files.weight_files import metadata_of, sparse_names
from sparsekern.nn.layer_state import STORED, described_grid
from sparsekern.topology import Grid, Topology


@dataclass(frozen=True)
class StoredLayer:
    """A sparse layer in a state.

    Attributes:
        name: of the layer.
        values: ``(Z, bo, bi)``.
        topology: the places. Of a state that does not say what matrix they are of, in the smallest grid that has them.
        described: whether the state says it.
    """

    name: str
    values: Tensor
    topology: Topology
    described: bool

    def bytes(self) -> dict[str, int]:
        """Return the stored bytes of the values and of the places."""
        places = (self.topology.row, self.topology.col)
        return {"values": self.values.nbytes, "places": sum(part.nbytes for part in places)}


def stored_layers(state: Mapping[str, Tensor]) -> dict[str, StoredLayer]:
    """Return the sparse layers of a state by name: our own, and weights that are ``torch.sparse_bsr`` tensors.

    Raises:
        ValueError: their tensors do not go together, or places are not a topology.
    """
    metadata = metadata_of(state)
    layers = {name: _layer(state, name, metadata.get(name, {})) for name in sparse_names(state)}
    for key, tensor in state.items():
        if tensor.layout == torch.sparse_bsr and tensor.dim() == 2 and (key == "weight" or key.endswith(".weight")):
            name = key.removesuffix("weight").removesuffix(".")
            layers[name] = _from_bsr(name, tensor)
    return layers


def _from_bsr(name: str, weight: Tensor) -> StoredLayer:
    values, crow, col = weight.values(), weight.crow_indices(), weight.col_indices()
    counts = crow.diff()
    if int(crow[0]) != 0 or int(crow[-1]) != values.shape[0] or bool((counts < 0).any()) or 0 in values.shape[1:]:
        raise InputError(f"layer {name!r} is damaged: its BSR tensor does not go together")
    grid = Grid(weight.shape[0], weight.shape[1], (values.shape[1], values.shape[2]))
    row = torch.repeat_interleave(torch.arange(counts.shape[0], device=counts.device), counts)
    topology = Topology(grid, row.int(), col.int())
    if topology.slots:
        topology.validate()
    return StoredLayer(name, values, topology, described=True)


def _layer(state: Mapping[str, Tensor], name: str, metadata: dict[str, Any]) -> StoredLayer:
    values, row, col = (state[f"{name}.{part}".lstrip(".")] for part in STORED)
    if values.dim() != 3 or row.shape != values.shape[:1] or col.shape != row.shape or 0 in values.shape:
        shapes = ", ".join(str(tuple(part.shape)) for part in (values, row, col))
        raise InputError(
            f"layer {name!r} has values, row and col of shapes {shapes}; they must be (Z, bo, bi), (Z,), (Z,)"
        )
    block = (values.shape[1], values.shape[2])
    try:
        if "grid" in metadata:
            grid = described_grid(metadata["grid"], block)
        else:
            grid = _smallest(row, col, block)
        topology = Topology(grid, row, col)
        topology.validate()
    except ValueError as error:
        raise InputError(f"layer {name!r} is damaged: {error}") from None
    return StoredLayer(name, values, topology, "grid" in metadata)


def _smallest(row: Tensor, col: Tensor, block: tuple[int, int]) -> Grid:
    if row.dtype != torch.int32 or col.dtype != torch.int32:
        raise InputError(f"row is {row.dtype} and col is {col.dtype}; they must be int32", parameter="row")
    rows, cols = (max(1, int(part.max()) + 1) for part in (row, col))
    return Grid(rows * block[0], cols * block[1], block)
