"""The state of a sparse layer: its metadata, and loading from stored blocks or from a dense weight."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.nn.sharded import whole
from sparsekern.topology import Grid, Topology, check_tied, gather_blocks, reblock, with_capacity

logger = logging.getLogger("sparsekern")

STORED = ("values", "row", "col")
"""Names of the tensors that store the weight of a sparse layer."""

LAYER_VERSION = 2
"""Version of the state of a layer; its metadata hold the grid without the block size."""


def describe(grid: Grid) -> dict[str, Any]:
    """Return the metadata of a layer's state: its grid as plain values, without the block size."""
    described = {
        "out_features": grid.out_features,
        "in_features": grid.in_features,
        "kernel": None if grid.kernel is None else list(grid.kernel),
        "groups": grid.groups,
    }
    return described | ({"transposed": True} if grid.transposed else {})


def grid_in(metadata: Any, block: tuple[int, int]) -> Grid | None:
    """Return the grid in the metadata of a layer, with the block size ``block``; None if they hold none.

    Raises:
        ValueError: the metadata are damaged or of another version.
    """
    if not isinstance(metadata, dict):
        raise InputError(f"its metadata are {metadata!r}, which is damaged; save it again")
    version = metadata.get("version")
    if version is not None and version != LAYER_VERSION:
        raise InputError(
            f"it has version {version!r}, and this sparsekern reads version {LAYER_VERSION}; use the version of "
            "sparsekern that saved it"
        )
    if "grid" not in metadata:
        return None
    described: Any = metadata["grid"]
    try:
        kernel = described["kernel"]
        sizes = [described["out_features"], described["in_features"], described["groups"], *(kernel or ())]
        transposed = described.get("transposed", False)
        if any(type(size) is not int for size in sizes) or len(sizes) not in (3, 4, 5) or type(transposed) is not bool:
            raise TypeError
        return Grid(sizes[0], sizes[1], block, None if kernel is None else tuple(kernel), sizes[2], transposed)
    except (KeyError, TypeError, IndexError, AttributeError):
        raise InputError(f"its metadata describe the grid as {described!r}, which is damaged; save it again") from None


def adapt(
    topology: Topology,
    state_dict: dict[str, Any],
    prefix: str,
    tie_taps: bool = False,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Convert the entries of a state dict for a layer to the blocks and slots of that layer, in place.

    From a dense weight the blocks of ``topology`` are taken. Stored blocks keep their places. Blocks of another size
    are re-cut exactly. If there are fewer blocks than the layer has slots, the other slots are free.

    Args:
        topology: topology of the layer that loads; not changed.
        state_dict: changed in place.
        prefix: the layer's name and a dot, or the empty string.
        tie_taps: whether the layer ties its taps; then those of the checkpoint must be tied, too.
        metadata: the layer's metadata, as ``load_state_dict`` passes it.

    Raises:
        ValueError: the checkpoint does not fit the layer; ``state_dict`` is unchanged.
    """
    present = [name for name in STORED if prefix + name in state_dict]
    if present and len(present) < len(STORED):
        absent = ", ".join(name for name in STORED if name not in present)
        raise InputError(f"the checkpoint has {', '.join(present)} but not {absent}; save values, row and col together")
    for name in (*STORED, "weight"):
        if not isinstance(state_dict.get(prefix + name, topology.row), Tensor):
            raise InputError(
                f"the checkpoint's {name} is a {type(state_dict[prefix + name]).__name__}; it must be a tensor"
            )
    if present and (mark := state_dict.get(prefix + "weight")) is not None and mark.numel() == 0:
        del state_dict[prefix + "weight"]  # it makes readers fail that do not know sparse layers
    if present:
        _fit(topology, state_dict, prefix, tie_taps, metadata or {})
    elif prefix + "weight" in state_dict:
        _take_blocks(topology, state_dict, prefix)


def _take_blocks(topology: Topology, state_dict: dict[str, Any], prefix: str) -> None:
    if topology.row.is_meta:
        raise InputError("a dense weight cannot be loaded on the meta device; call to_empty(device=...) first")
    if topology.blocks() == 0:
        raise InputError(
            "a dense weight cannot be loaded into a layer without a block; load a checkpoint that holds row and col"
        )
    dense = whole(state_dict[prefix + "weight"])
    state_dict[prefix + "values"] = gather_blocks(topology, dense.to(topology.row.device))
    del state_dict[prefix + "weight"]
    state_dict[prefix + "row"], state_dict[prefix + "col"] = topology.row.clone(), topology.col.clone()
    logger.info("%sweight is dense: kept the blocks of the present topology", prefix)


def source_grid(values: Tensor, row: Tensor, col: Tensor, grid: Grid, metadata: dict[str, Any]) -> Grid:
    """Return the grid of stored blocks: from the metadata, else that of the layer with their block size.

    Args:
        values, row, col: the stored blocks and their places.
        grid: the grid of the layer.
        metadata: the layer's metadata, or an empty dict.

    Raises:
        ValueError: the tensors are inconsistent, or the blocks belong to another matrix than the layer's.
    """
    if values.dim() != 3 or min(values.shape[1:]) < 1:
        raise InputError(f"the checkpoint's values have shape {tuple(values.shape)}; they must be (slots, bo, bi)")
    if row.shape != values.shape[:1] or col.shape != row.shape:
        raise InputError(
            f"the checkpoint has rows of shape {tuple(row.shape)} and columns of shape {tuple(col.shape)} for "
            f"{values.shape[0]} slots; it is damaged"
        )
    block = (values.shape[1], values.shape[2])
    found = grid_in(metadata, block)
    if found is None:
        return replace(grid, block=block)
    found = replace(found, transposed=grid.transposed)  # blocks do not depend on it
    if replace(found, block=grid.block, groups=grid.groups) != grid:
        raise InputError(
            f"the checkpoint is for a weight {found.weight_shape}, and the layer has {grid.weight_shape}; load it into "
            "a layer of that size"
        )
    return found


def _fit(topology: Topology, state_dict: dict[str, Any], prefix: str, tie_taps: bool, metadata: dict[str, Any]) -> None:
    values, row, col = (state_dict[prefix + name] for name in STORED)
    grid, source = topology.grid, source_grid(values, row, col, topology.grid, metadata)
    if row.is_meta:
        if source.block != grid.block or values.shape[0] != topology.slots:
            raise InputError("a checkpoint on the meta device must have the layer's blocks and slots")
        return
    found = Topology(source, row, col)
    try:
        found.validate()
        if tie_taps:
            check_tied(found)
    except ValueError as error:
        raise InputError(f"the checkpoint's topology does not fit: {error}") from None
    if source == grid and found.slots == topology.slots:
        return
    values = whole(values)
    if source != grid:
        found, values = reblock(found, values, grid)
    elif found.slots > topology.slots:
        used = found.used()
        found, values = Topology(grid, row[used], col[used]), values[used]
    blocks = int((row >= 0).sum())
    if found.slots > topology.slots:
        cut = f" ({blocks} of {source.block})" if source.block != grid.block else ""
        raise InputError(
            f"the checkpoint fills {found.slots} blocks of {grid.block}{cut}, the layer has {topology.slots} slots; "
            f"build the layer with block_size={source.block}, blocks={blocks}, or with capacity={found.slots}"
        )
    logger.info(
        "%svalues: %d blocks of %s fill %d of %d slots", prefix, blocks, source.block, found.slots, topology.slots
    )
    padded = with_capacity(found, topology.slots)
    new = values.new_zeros(topology.slots, *grid.block)
    new[: found.slots] = values
    state_dict |= {prefix + "values": new, prefix + "row": padded.row, prefix + "col": padded.col}
