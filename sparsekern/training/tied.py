"""What moves together: a block, or, where a convolution ties its taps, one block of every tap."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.nn import BlockSparse
from sparsekern.topology import Topology, one_tap
from sparsekern.training.followers import Move


class Units(NamedTuple):
    """The units of a layer; a method chooses among them and :meth:`spread` makes blocks of its choice."""

    topology: Topology
    """Where they are: the layer's own, or that of one tap."""
    slots: Tensor | None
    """``(U, taps)``: the slots of each unit, one a tap in order; None where a unit is a slot."""
    grid_cols: int
    """CB, the block columns of a tap."""

    def norms(self, norms: Tensor) -> Tensor:
        """Return the Frobenius norm ``(U,)`` of each unit from those of the slots ``(Z,)``."""
        whole: Tensor = norms if self.slots is None else norms[self.slots].norm(dim=1)
        return whole

    def sums(self, numbers: Tensor) -> Tensor:
        """Return the sum ``(U,)`` of a number for each slot ``(Z,)`` over those of each unit."""
        return numbers if self.slots is None else numbers[self.slots].sum(1)

    def spread(self, move: Move) -> Move:
        """Return the move of all blocks of the units that move."""
        if self.slots is None:
            return move
        taps = self.slots.shape[1]
        tap = torch.arange(taps, dtype=torch.int32, device=move.col.device) * self.grid_cols
        col = (tap + move.col[:, None]).flatten()
        return Move(self.slots[move.slots.long()].flatten(), move.row.repeat_interleave(taps), col)


def units(layer: BlockSparse) -> Units:
    """Return what moves together in a layer; of tied taps only what is stored, no free slots (waits for the device)."""
    topology, grid = layer.topology, layer.grid
    if not layer.tie_taps:
        return Units(topology, None, grid.tap_cols)
    tap, channel = topology.col // grid.tap_cols, topology.col % grid.tap_cols
    key = ((topology.row.long() * grid.tap_cols + channel) * grid.taps + tap).masked_fill(~topology.used(), grid.cells)
    slots = key.argsort(stable=True)[: topology.blocks()].view(-1, grid.taps)
    first = slots[:, 0]
    return Units(Topology(one_tap(grid), topology.row[first], topology.col[first]), slots, grid.tap_cols)
