"""Tied taps: a block of channels is stored in all taps of a convolution or in none."""

from __future__ import annotations

from dataclasses import replace

import torch

from sparsekern.errors import InputError
from sparsekern.topology.grid import Grid
from sparsekern.topology.topology import Topology


def one_tap(grid: Grid) -> Grid:
    """Return the grid of one tap: a cell of it stands for a block in each tap of ``grid``."""
    return replace(grid, in_features=grid.tap_in, kernel=(1,) * len(grid.kernel or (1, 1)))


def check_multiple(grid: Grid, blocks: int) -> None:
    """Raise ValueError unless ``blocks`` are the same number in every tap."""
    if blocks % grid.taps:
        raise InputError(
            f"blocks is {blocks}; with tie_taps=True it must be a multiple of the {grid.taps} taps", parameter="blocks"
        )


def tie(topology: Topology, grid: Grid) -> Topology:
    """Return the topology of ``grid`` that has the blocks of ``topology``, a topology of one tap, in every tap.

    Slot ``z`` becomes slots ``z * taps`` to ``(z + 1) * taps - 1``, one for each tap in order.
    """
    tap = torch.arange(grid.taps, dtype=torch.int32, device=topology.col.device)
    col = (tap * grid.tap_cols + topology.col[:, None]).flatten()
    row = topology.row.repeat_interleave(grid.taps)
    return Topology(grid, row, torch.where(row >= 0, col, -1))


def check_tied(topology: Topology) -> None:
    """Raise ValueError unless every block of channels is stored in all taps or in none (waits for the device)."""
    grid, used = topology.grid, topology.used()
    row, col = topology.row[used].long(), topology.col[used].long()
    cell, count = (row * grid.tap_cols + col % grid.tap_cols).unique(return_counts=True)
    loose = count != grid.taps
    if bool(loose.any()):
        at = int(loose.int().argmax())
        place, taps = int(cell[at]), int(count[at])
        raise InputError(
            f"the block at row {place // grid.tap_cols}, channels {place % grid.tap_cols} is stored in {taps} of "
            f"{grid.taps} taps; with tie_taps=True it must be all or none: move the blocks of all taps together"
        )
