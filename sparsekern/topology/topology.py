"""Where the stored blocks are: one coordinate pair a slot, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.topology.arguments import check_kind
from sparsekern.topology.grid import Grid
from sparsekern.topology.places import places_for

CHUNK = 2**16
"""Slots that are looked at together where what is made of their places is many times as large as they are."""


@dataclass(frozen=True, eq=False)
class Topology:
    """The places of the blocks. Holds the tensors it is given, so a layer's topology is a view of its buffers.

    Two are equal when they are the same object: ``torch.equal`` compares places, and waits for the device.

    Args:
        grid: the grid of ``R x C`` cells.
        row: ``(Z,)`` int32, block row of each slot; -1 is a free slot.
        col: ``(Z,)`` int32, block column of each slot; -1 where ``row`` is.
    """

    grid: Grid
    row: Tensor
    col: Tensor

    @property
    def slots(self) -> int:
        """Z, stored blocks and free slots together."""
        return self.row.shape[0]

    def used(self) -> Tensor:
        """Return ``(Z,)`` bool: the slot holds a block."""
        return self.row >= 0

    def blocks(self) -> int:
        """Return the number of stored blocks (waits for the device)."""
        return int(self.used().count_nonzero())  # a sum would make a copy of whole numbers first

    def elements(self) -> int:
        """Return the number of stored elements, phantom ones not counted (waits for the device)."""
        grid = self.grid
        if not grid.has_edge:
            return self.blocks() * grid.block[0] * grid.block[1]
        total = torch.zeros((), dtype=torch.int64, device=self.row.device)
        for row, col in zip(self.row.split(CHUNK), self.col.split(CHUNK), strict=True):
            total += (grid.real_rows(row.long()) * grid.real_cols(col.long())).sum()
        return int(total)

    def sparsity(self) -> float:
        """Return the fraction of the matrix that is absent, in [0, 1] (waits for the device)."""
        return 1 - self.elements() / self.grid.numel

    def keys(self) -> Tensor:
        """Return ``(Z,)`` int32: ``row * C + col``, and ``R * C`` for a free slot, so that free slots sort last."""
        return torch.where(self.used(), self.row * self.grid.cols + self.col, self.grid.cells)

    def sorted_keys(self) -> Tensor:
        """Return the keys of the stored blocks only, ascending (waits for the device)."""
        used = self.used()
        full = bool(used.all())
        row, col = (places if full else places[used] for places in (self.row, self.col))
        keys = (row * self.grid.cols).add_(col)
        return places_for(keys).distinct(keys, keys[:0], self.grid.cells)

    def real(self) -> Tensor | None:
        """Return a bool mask, ``(Z, bo, bi)``-broadcastable, of elements that are inside the matrix and in a used slot.

        None when every slot is used and no block sticks out.
        """
        grid = self.grid
        if not grid.has_edge and self.blocks() == self.slots:
            return None
        inside_row = torch.arange(grid.block[0], device=self.row.device) < grid.real_rows(self.row)[:, None]
        inside_col = torch.arange(grid.block[1], device=self.row.device) < grid.real_cols(self.col)[:, None]
        return inside_row[:, :, None] & inside_col[:, None, :]

    def moved(self, slots: Tensor, row: Tensor, col: Tensor) -> Topology:
        """Return a new topology, validated, in which ``slots (k,)`` are at ``row (k,)``, ``col (k,)``.

        Raises:
            ValueError: a slot or a place does not exist, or two blocks would be at one place.
        """
        for name, tensor in (("slots", slots), ("row", row), ("col", col)):
            check_kind(name, tensor, Tensor, "a tensor (k,) of integers")
        if not slots.shape == row.shape == col.shape or slots.dim() != 1:
            shapes = ", ".join(str(tuple(t.shape)) for t in (slots, row, col))
            raise InputError(f"slots, row and col have shapes {shapes}; they must be (k,) all three")
        for name, tensor in (("slots", slots), ("row", row), ("col", col)):
            if tensor.is_floating_point() or tensor.is_complex():
                raise InputError(f"{name} is {tensor.dtype}; it must hold integers", parameter=name)
        for name, tensor, count in (("row", row, self.grid.rows), ("col", col, self.grid.cols)):
            if tensor.numel() and (int(tensor.min()) < -1 or int(tensor.max()) >= count):  # before int32 wraps it
                at = int(((tensor < -1) | (tensor >= count)).int().argmax())
                raise InputError(
                    f"{name} is {int(tensor[at])} for slot {int(slots[at])}; it must be 0 to {count - 1}, or -1 "
                    "if free",
                    parameter=name,
                )
        slots = slots.long()
        if slots.numel() and (int(slots.min()) < 0 or int(slots.max()) >= self.slots):
            raise InputError(f"slots to move are 0 to {self.slots - 1}; got {int(slots.min())} to {int(slots.max())}")
        named = torch.zeros_like(self.row, dtype=torch.bool)
        ascending = bool((slots[1:] > slots[:-1]).all())
        if not ascending and int(named.index_fill_(0, slots, True).count_nonzero()) != slots.numel():
            raise InputError("a slot is named twice among those to move; each can go to one place only")
        new = Topology(
            self.grid,
            self.row.index_copy(0, slots, row.to(self.row)),
            self.col.index_copy(0, slots, col.to(self.col)),
        )
        new.validate()
        return new

    def validate(self) -> None:
        """Check that every slot is free or at a place of its own inside the grid (waits for the device).

        Raises:
            ValueError: what is wrong, and in which slot.
        """
        grid = self.grid
        for name in ("row", "col"):
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != torch.int32 or tensor.dim() != 1:
                shape = tuple(tensor.shape)
                raise InputError(
                    f"{name} is {tensor.dtype} of shape {shape}; it must be int32 of shape (slots,)", parameter=name
                )
        if self.row.shape != self.col.shape or self.row.device != self.col.device:
            raise InputError(
                f"row has {self.row.shape[0]} slots on {self.row.device}, col {self.col.shape[0]} on "
                f"{self.col.device}; they must agree",
                parameter="row",
            )
        if self.slots == 0:
            raise InputError("the topology has no slots; it needs at least one")
        if places_for(self.row, self.col).are_legal(self.row, self.col, grid.rows, grid.cols):
            return
        free = (self.row == -1) & (self.col == -1)
        inside = (self.row >= 0) & (self.row < grid.rows) & (self.col >= 0) & (self.col < grid.cols)
        wrong = ~(free | inside)
        if bool(wrong.any()):
            slot = int(wrong.int().argmax())
            raise InputError(
                f"slot {slot} is at block ({int(self.row[slot])}, {int(self.col[slot])}); the grid has "
                f"{grid.rows} x {grid.cols} blocks, and a free slot has row = col = -1"
            )
        keys, slots = self.keys().sort(stable=True)
        same = (keys[1:] == keys[:-1]) & (keys[1:] < grid.cells)
        at = int(same.int().argmax())
        first, second = int(slots[at]), int(slots[at + 1])
        raise InputError(
            f"slots {first} and {second} are both at block ({int(self.row[first])}, {int(self.col[first])}); "
            "each block is stored once"
        )


def from_keys(grid: Grid, keys: Tensor, *, checked: bool = False) -> Topology:
    """Return the topology whose slot ``z`` is at cell ``keys[z] = row * C + col``, keys ``(Z,)`` in any order.

    With ``checked`` the caller knows that they are distinct and inside the grid.

    Raises:
        ValueError: a key is outside the grid, or there twice.
    """
    if not checked and keys.numel() and not 0 <= int(keys.min()) <= int(keys.max()) < grid.cells:
        wrong = int(keys.min()) if int(keys.min()) < 0 else int(keys.max())
        raise InputError(
            f"keys hold key {wrong}; the keys of {grid.rows} x {grid.cols} places are 0 to {grid.cells - 1}"
        )
    keys = keys.int()
    topology = Topology(grid, *places_for(keys).places_of(keys, grid.cols))
    if not checked and topology.slots:  # no key: a matrix of zeros, which a file may hold
        topology.validate()
    return topology


def with_capacity(topology: Topology, capacity: int) -> Topology:
    """Return the topology with free slots appended until it has ``capacity`` slots.

    Raises:
        ValueError: ``capacity`` is below the slots there are.
    """
    if capacity < topology.slots:
        raise InputError(
            f"capacity is {capacity}; it must be at least the number of blocks, {topology.slots}", parameter="capacity"
        )
    free = topology.row.new_full((capacity - topology.slots,), -1)
    return Topology(topology.grid, torch.cat([topology.row, free]), torch.cat([topology.col, free]))
