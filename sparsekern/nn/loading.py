"""What a sparse layer accepts as a checkpoint: blocks with their places, or a dense weight."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from sparsekern.topology import Topology, check_tied, gather_blocks

logger = logging.getLogger("sparsekern")

STORED = ("values", "row", "col")


def adapt(topology: Topology, state_dict: dict[str, Any], prefix: str, tie_taps: bool = False) -> str | None:
    """Turn a dense weight in ``state_dict`` into the blocks that ``topology`` has; check a sparse one.

    Args:
        topology: of the layer that loads; not changed.
        state_dict: changed in place where it holds ``<prefix>weight`` and no blocks.
        prefix: the layer's name and a dot, or nothing.
        tie_taps: whether the layer ties its taps; then the checkpoint must, too.

    Returns:
        What is wrong and the way out, or None.
    """
    present = [name for name in STORED if prefix + name in state_dict]
    if present and len(present) < len(STORED):
        absent = ", ".join(name for name in STORED if name not in present)
        return f"the checkpoint has {', '.join(present)} but not {absent}; blocks without their places mean nothing"
    if present:
        return _mismatch(topology, *(state_dict[prefix + name] for name in STORED), tie_taps=tie_taps)
    if prefix + "weight" in state_dict:
        return _take_blocks(topology, state_dict, prefix)
    return None


def _take_blocks(topology: Topology, state_dict: dict[str, Any], prefix: str) -> str | None:
    if topology.row.is_meta:
        return "a dense weight cannot be loaded on the meta device; call to_empty(device=...) first"
    if topology.blocks() == 0:
        return "a dense weight was to be loaded, but the layer has no block; load a checkpoint with row and col"
    dense: Tensor = state_dict[prefix + "weight"]
    try:
        state_dict[prefix + "values"] = gather_blocks(topology, dense.to(topology.row.device))
    except ValueError as error:
        return str(error)
    del state_dict[prefix + "weight"]
    state_dict[prefix + "row"], state_dict[prefix + "col"] = topology.row.clone(), topology.col.clone()
    logger.info("%sweight is dense: kept the blocks of the present topology", prefix)
    return None


def _mismatch(topology: Topology, values: Tensor, row: Tensor, col: Tensor, *, tie_taps: bool) -> str | None:
    grid, block = topology.grid, tuple(values.shape[1:])
    if block != grid.block:
        return (
            f"the checkpoint has blocks of {block}, the layer of {grid.block}; build the layer with block_size={block}"
        )
    if values.shape[0] != topology.slots:
        return (
            f"the checkpoint has {values.shape[0]} slots, the layer {topology.slots}; "
            f"build the layer with blocks={values.shape[0]}, or sparsify_ with the sparsity of the checkpoint"
        )
    if row.shape != topology.row.shape:
        return f"the checkpoint has {row.shape[0]} places for {values.shape[0]} slots; it is damaged"
    try:
        if not row.is_meta:
            Topology(grid, row, col).validate()
            if tie_taps:
                check_tied(Topology(grid, row, col))
    except ValueError as error:
        return f"the checkpoint's topology does not fit: {error}"
    return None
