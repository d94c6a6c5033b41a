"""What is kept or left out together: the units that have one probability each (VR-PGE)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse
from sparsekern.topology import one_tap, ordered_keys, sample_absent
from sparsekern.training.followers import Move

Group = str | Callable[[BlockSparse], Tensor]
"""``"block"``, ``"row"``, ``"column"``, or a function that returns a whole number ``(Z,)`` for each slot of a layer."""

GROUPS = ("block", "row", "column")

CHUNK = 2**16
"""Slots that are looked at together: what is made of their places is many times as large as they are."""


class Candidates:
    """The stored blocks of a layer, in units. A slot's unit never changes, whatever place the slot moves to.

    Args:
        layer: with at least one block.
        group: what forms a unit. ``"block"``: each block by itself (with tied taps the same channels of all taps);
            ``"row"``: a block row, the output features that it makes; ``"column"``: a block column, of all taps; or a
            function, whose slots of equal number go together.

    Attributes:
        count: units.
        unit: ``(Z,)`` int32, the unit of each slot; ``count`` for a free slot.

    Raises:
        ValueError: an unknown group, a function with another result, or a layer without a block.
    """

    def __init__(self, layer: BlockSparse, group: Group) -> None:
        topology, grid = layer.topology, layer.grid
        self.layer = layer
        self.may_move = group == "block"
        used = topology.used()
        if group == "block" and not layer.tie_taps:  # nothing to look for: units are numbered by their slots
            self.count = topology.blocks()
            self._check()
            self.unit = used.cumsum(0, dtype=torch.int32).sub_(1).masked_fill_(~used, self.count)
            return
        row, channel = topology.row.long(), topology.col.long() % grid.tap_cols
        if callable(group):
            label = group(layer)
            if not isinstance(label, Tensor) or label.shape != row.shape or label.is_floating_point():
                what = f"{label.dtype} {tuple(label.shape)}" if isinstance(label, Tensor) else type(label).__name__
                raise InputError(f"group returned {what}; it must return whole numbers ({row.shape[0]},), one a slot")
            label = label.to(row.device).long()
        elif group == "block":
            label = row * grid.tap_cols + channel
        elif group == "row":
            label = row
        elif group == "column":
            label = row // grid.group_rows * grid.tap_cols + channel
        else:
            raise InputError(
                f"group is {group!r}; it must be one of {', '.join(GROUPS)} or a function of the layer",
                parameter="group",
            )
        names, units = label[used].unique(return_inverse=True)
        self.count = names.shape[0]
        self._check()
        self.unit = torch.full_like(topology.row, self.count).masked_scatter_(used, units.int())

    def _check(self) -> None:
        if not self.count:
            raise InputError("the layer has no block to choose from; store some, at a lower sparsity")

    def costs(self) -> Tensor:
        """Return how many real elements each unit holds, ``(count,)`` float64."""
        grid, topology = self.layer.grid, self.layer.topology
        total = torch.zeros(self.count + 1, dtype=torch.float64, device=topology.row.device)
        for row, col, unit in zip(*(t.split(CHUNK) for t in (topology.row, topology.col, self.unit)), strict=True):
            total.index_add_(0, unit, (grid.real_rows(row.long()) * grid.real_cols(col.long())).double())
        return total[: self.count]

    def slots(self, units: Tensor) -> Tensor:
        """Return which slots ``(Z,)`` belong to the units of a mask ``(count,)``; free slots belong to none."""
        padded = torch.nn.functional.pad(units.to(self.unit.device), (0, 1))
        return padded.index_select(0, self.unit)

    def refill(self, dead: Tensor, limit: int, generator: torch.Generator) -> tuple[Tensor, Move]:
        """Draw new, empty places for units that are chosen hardly ever (waits for the device).

        Args:
            dead: ``(count,)`` bool. Which of them move is drawn too.
            limit: how many may, at most.
            generator: on the CPU.

        Returns:
            The units ``(k,)`` that move, and the move.
        """
        layer, grid = self.layer, self.layer.grid
        units = dead.to(layer.row.device).nonzero().squeeze(1)
        if not units.shape[0]:
            nowhere = units.int()
            return units, Move(units, nowhere, nowhere)
        slots: Tensor | None = None
        if layer.tie_taps:
            plane, taps = one_tap(grid), grid.taps
            row, col = layer.row.long(), layer.col.long()
            order = self.unit.long() * taps + col.clamp(min=0) // grid.tap_cols  # free slots have the last unit
            slots = order.argsort(stable=True)[: self.count * taps].view(-1, taps)  # of each unit, its taps in order
            present = (row * plane.cols + col % plane.cols)[slots[:, 0]].sort().values
        else:
            plane, taps = grid, 1
            present = ordered_keys(layer.index, layer.topology)
        cells, cols = plane.cells, plane.cols
        count = min(limit, units.shape[0], cells - present.shape[0])
        drawn = torch.randperm(units.shape[0], generator=generator, device="cpu")[:count]
        units = units[drawn.to(units.device)]
        keys = sample_absent(present, cells, count, generator)
        del present
        if slots is None:
            slots = (self.unit < self.count).nonzero()  # units are numbered by their slots
        tap = torch.arange(taps, device=keys.device) * grid.tap_cols
        new_row = (keys // cols).int().repeat_interleave(taps)
        new_col = ((keys % cols)[:, None] + tap).flatten().int()
        return units, Move(slots[units].flatten(), new_row, new_col)
