"""The stored elements of one grid in the blocks of another: exact, and never a dense weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.topology.dense import movable, moved
from sparsekern.topology.grid import Grid
from sparsekern.topology.topology import Topology, from_keys

CHUNK = 2**20
"""Elements that are mapped at a time: the scratch is some 40 bytes for each."""


@torch.no_grad()
def reblock(topology: Topology, values: Tensor, grid: Grid) -> tuple[Topology, Tensor]:
    """Return the blocks of ``grid`` that hold a stored element, in the order of the cells, and their values.

    Every stored element keeps its value; what a new block covers beyond them is zero. Memory is in proportion to the
    stored elements, old and new.

    Args:
        topology: the blocks there are, validated.
        values: theirs, ``(Z, bo, bi)``.
        grid: cuts the same matrix into other blocks, or into another number of groups.

    Raises:
        ValueError: ``grid`` is of another matrix.
    """
    if replace(grid, block=topology.grid.block, groups=topology.grid.groups) != topology.grid:
        raise InputError(f"the blocks are of a weight {topology.grid.weight_shape}, the layer is {grid.weight_shape}")
    found = [torch.unique(key[real]) for _, key, _, real in _places(topology, grid)]
    keys = torch.unique(torch.cat(found)) if found else topology.row.new_empty(0, dtype=torch.int64)
    area = grid.block[0] * grid.block[1]
    stored = movable(values)
    new = stored.new_zeros(keys.shape[0] * area)
    for slots, key, offset, real in _places(topology, grid):
        at = torch.searchsorted(keys, key[real]) * area + offset[real]
        new[at] = stored[slots][real]
    return from_keys(grid, keys), moved(new.view(-1, *grid.block), values.dtype)


def _places(topology: Topology, grid: Grid) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield used slots ``(k,)``; of their elements ``(k, bo, bi)`` the new cell, the offset in it, and "is real"."""
    old, device = topology.grid, topology.row.device
    used = topology.used().nonzero().squeeze(1)
    down, right = (torch.arange(side, device=device) for side in old.block)
    for slots in used.split(max(1, CHUNK // (old.block[0] * old.block[1]))):
        row, col = topology.row[slots, None].long(), topology.col[slots, None].long()
        in_group = row % old.group_rows * old.block[0] + down
        channel = col % old.tap_cols * old.block[1] + right
        real = (in_group < old.group_out)[:, :, None] & (channel < old.tap_in)[:, None, :]
        element = row // old.group_rows * old.group_out + in_group  # row of the matrix
        inside = element % grid.group_out
        new_row = element // grid.group_out * grid.group_rows + inside // grid.block[0]
        new_col = col // old.tap_cols * grid.tap_cols + channel // grid.block[1]
        key = new_row[:, :, None] * grid.cols + new_col[:, None, :]
        offset = (inside % grid.block[0] * grid.block[1])[:, :, None] + (channel % grid.block[1])[:, None, :]
        yield slots, key, offset, real
