"""State dicts without a model: their metadata, the sparse layers in them, and names as other libraries write them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.nn.layer_state import STORED, grid_in
from sparsekern.topology import Grid, Topology

ORIGINAL, MASK = "_orig", "_mask"
"""Endings of the two entries whose product is a parameter under PyTorch's pruning."""

Metadata = dict[str, dict[str, Any]]
"""Metadata of a state dict, by the name of the module to which ``load_state_dict`` passes them."""


def metadata_of(state: Mapping[str, Tensor]) -> Metadata:
    """Return the metadata of a state dict, empty if it has none."""
    found = getattr(state, "_metadata", None)
    return {str(name): entry for name, entry in found.items()} if isinstance(found, dict) else {}


def with_metadata(tensors: Mapping[str, Tensor], metadata: Metadata) -> OrderedDict[str, Tensor]:
    """Return tensors by name as a state dict with metadata, like ``module.state_dict()``."""
    state = OrderedDict(tensors)
    state._metadata = metadata  # type: ignore[attr-defined]
    return state


def sparse_names(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the sparse layers in a state dict; the name is empty for a model that is one layer."""
    ends = (key.removesuffix("values") for key in state if key == "values" or key.endswith(".values"))
    return [end.removesuffix(".") for end in ends if all(end + part in state for part in STORED)]


@dataclass(frozen=True)
class StoredLayer:
    """A sparse layer in a state dict.

    Attributes:
        name: name of the layer.
        values: ``(Z, bo, bi)``.
        topology: the places; without metadata, in the smallest grid that contains them.
        described: whether the state dict has metadata with the grid of the layer.
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
    """Return the sparse layers of a state dict by name, including weights that are ``torch.sparse_bsr`` tensors.

    Raises:
        ValueError: the tensors of a layer are inconsistent, or its places are not a valid topology.
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
        raise InputError(f"layer {name!r} is damaged: its BSR tensor is inconsistent; save it again")
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
        grid = grid_in(metadata, block)
        topology = Topology(_smallest(row, col, block) if grid is None else grid, row, col)
        topology.validate()
    except InputError as error:
        raise InputError(f"layer {name!r} is damaged: {error}") from None
    return StoredLayer(name, values, topology, grid is not None)


def _smallest(row: Tensor, col: Tensor, block: tuple[int, int]) -> Grid:
    if row.dtype != torch.int32 or col.dtype != torch.int32:
        raise InputError(f"row is {row.dtype} and col is {col.dtype}; they must be int32", parameter="row")
    rows, cols = (max(1, int(part.max()) + 1) for part in (row, col))
    return Grid(rows * block[0], cols * block[1], block)


def without_compile(name: str) -> str:
    """Return a name in a state dict without the prefix that ``torch.compile`` adds to compiled modules."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def merge_pruned(state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Return the state dict with each ``<name>_orig`` and ``<name>_mask`` of PyTorch's pruning replaced by ``<name>``.

    Raises:
        ValueError: the two have different shapes.
    """
    merged: OrderedDict[str, Tensor] = OrderedDict()
    for key, tensor in state.items():
        whole = key.removesuffix(ORIGINAL)
        mask = state.get(whole + MASK) if whole != key else None
        if isinstance(tensor, Tensor) and isinstance(mask, Tensor) and whole not in state:
            if mask.shape != tensor.shape:
                raise InputError(
                    f"{key} has shape {tuple(tensor.shape)} and {whole}{MASK} {tuple(mask.shape)}; a pruning mask "
                    "must have the shape of the parameter",
                    parameter=key,
                )
            merged[whole] = tensor * mask.to(tensor.dtype)
        elif not (key.endswith(MASK) and key.removesuffix(MASK) + ORIGINAL in state):
            merged[key] = tensor
    if hasattr(state, "_metadata"):
        merged._metadata = state._metadata  # type: ignore[attr-defined]
    return merged


def shared_prefix(keys: list[str], wanted: set[str]) -> str:
    """Return the prefix of all keys without which they are in modules of a model; empty if there is no such prefix.

    Args:
        keys: names in a state dict.
        wanted: names of the model's modules that have parameters or buffers.
    """
    prefix, rest = "", list(keys)
    while rest and not wanted & {key.rpartition(".")[0] for key in rest}:
        first = rest[0].partition(".")[0] + "."
        if not all(key.startswith(first) and len(key) > len(first) for key in rest):
            return ""
        prefix, rest = prefix + first, [key.removeprefix(first) for key in rest]
    return prefix if rest else ""
