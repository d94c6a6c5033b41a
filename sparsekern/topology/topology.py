"""The places of the stored blocks, one pair of coordinates per slot; and the kernels for lists of places."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekern.errors import InputError
from sparsekern.kernels.contract import Index
from sparsekern.kernels.cpu import places as cpu
from sparsekern.kernels.eager import places as eager
from sparsekern.topology.arguments import check_kind
from sparsekern.topology.grid import Grid

CHUNK = 2**16
"""Slots handled at a time where intermediate tensors are several times as large as the places."""


@dataclass(frozen=True, eq=False)
class Topology:
    """The places of the blocks of a weight.

    It holds the tensors it is given, so a layer's topology is a view of its buffers. ``==`` compares identities; use
    ``torch.equal`` to compare places.

    Args:
        grid: the grid of ``R x C`` cells.
        row: ``(Z,)`` int32, block row of each slot; -1 in a free slot.
        col: ``(Z,)`` int32, block column of each slot; -1 in a free slot.
    """

    grid: Grid
    row: Tensor
    col: Tensor

    @property
    def slots(self) -> int:
        """The number of slots Z, used and free."""
        return self.row.shape[0]

    def used(self) -> Tensor:
        """Return ``(Z,)`` bool: whether the slot holds a block."""
        return self.row >= 0

    def blocks(self) -> int:
        """Return the number of stored blocks (synchronises the device)."""
        return int(self.used().count_nonzero())  # sum() would first copy to int64

    def elements(self) -> int:
        """Return the number of stored elements without phantom ones (synchronises the device)."""
        grid = self.grid
        if not grid.has_edge:
            return self.blocks() * grid.block[0] * grid.block[1]
        total = torch.zeros((), dtype=torch.int64, device=self.row.device)
        for row, col in zip(self.row.split(CHUNK), self.col.split(CHUNK), strict=True):
            total += (grid.real_rows(row.long()) * grid.real_cols(col.long())).sum()
        return int(total)

    def sparsity(self) -> float:
        """Return the fraction of the weight that is not stored, in [0, 1] (synchronises the device)."""
        return 1 - self.elements() / self.grid.numel

    def keys(self) -> Tensor:
        """Return ``(Z,)`` int32: ``row * C + col``, or ``R * C`` for a free slot, so that free slots sort last."""
        return torch.where(self.used(), self.row * self.grid.cols + self.col, self.grid.cells)

    def sorted_keys(self) -> Tensor:
        """Return the keys of the stored blocks, ascending (synchronises the device)."""
        used = self.used()
        full = bool(used.all())
        row, col = (places if full else places[used] for places in (self.row, self.col))
        keys = (row * self.grid.cols).add_(col)
        return places_for(keys).distinct(keys, keys[:0], self.grid.cells)

    def real(self) -> Tensor | None:
        """Return a mask, broadcastable to ``(Z, bo, bi)``, of the elements inside the matrix and in a used slot.

        None if that is all of them (synchronises the device).
        """
        grid = self.grid
        if not grid.has_edge and self.blocks() == self.slots:
            return None
        inside_row = torch.arange(grid.block[0], device=self.row.device) < grid.real_rows(self.row)[:, None]
        inside_col = torch.arange(grid.block[1], device=self.row.device) < grid.real_cols(self.col)[:, None]
        return inside_row[:, :, None] & inside_col[:, None, :]

    def moved(self, slots: Tensor, row: Tensor, col: Tensor) -> Topology:
        """Return a new, validated topology in which some slots have other places.

        Args:
            slots: ``(k,)`` integers, the slots to move.
            row, col: ``(k,)`` integers, the new places; -1 in both frees a slot.

        Raises:
            ValueError: a slot or a place does not exist, or two blocks would share a place.
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
            if tensor.numel() and (int(tensor.min()) < -1 or int(tensor.max()) >= count):  # int32 would wrap it
                at = int(((tensor < -1) | (tensor >= count)).int().argmax())
                raise InputError(
                    f"{name} is {int(tensor[at])} for slot {int(slots[at])}; it must be 0 to {count - 1}, or -1 "
                    "if free",
                    parameter=name,
                )
        slots = slots.long()
        if slots.numel() and (int(slots.min()) < 0 or int(slots.max()) >= self.slots):
            raise InputError(
                f"slots holds {int(slots.min())} to {int(slots.max())}; it must be 0 to {self.slots - 1}",
                parameter="slots",
            )
        named = torch.zeros_like(self.row, dtype=torch.bool)
        ascending = bool((slots[1:] > slots[:-1]).all())
        if not ascending and int(named.index_fill_(0, slots, True).count_nonzero()) != slots.numel():
            raise InputError("slots holds a slot twice; each can move to one place only", parameter="slots")
        new = Topology(
            self.grid,
            self.row.index_copy(0, slots, row.to(self.row)),
            self.col.index_copy(0, slots, col.to(self.col)),
        )
        new.validate()
        return new

    def validate(self) -> None:
        """Check that every slot is free or has a place of its own inside the grid (synchronises the device).

        Raises:
            ValueError: a slot is wrong; the message says which and why.
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


class Move(NamedTuple):
    """A move of the blocks of ``slots (k,)`` to block rows ``row (k,)`` and block columns ``col (k,)``."""

    slots: Tensor
    row: Tensor
    col: Tensor


def to_places(slots: Tensor, keys: Tensor, grid: Grid) -> Move:
    """Return the move of ``slots (k,)`` to the cells ``keys (k,)``, ``row * C + col``; a key of -1 frees the slot."""
    keys = keys.int()
    return Move(slots, *places_for(keys).places_of(keys, grid.cols))


def freeing(topology: Topology, kept: Tensor) -> Move:
    """Return the move that frees the used slots that are not in a mask ``kept (Z,)``."""
    slots = (topology.used() & ~kept).nonzero().squeeze(1)
    return to_places(slots, torch.full_like(slots, -1), topology.grid)


def from_keys(grid: Grid, keys: Tensor, *, checked: bool = False) -> Topology:
    """Return the topology with slot ``z`` at cell ``keys[z] = row * C + col``.

    Args:
        grid: the grid.
        keys: ``(Z,)`` keys in any order.
        checked: the keys are known to be distinct and inside the grid.

    Raises:
        ValueError: a key is outside the grid, or occurs twice.
    """
    if not checked and keys.numel() and not 0 <= int(keys.min()) <= int(keys.max()) < grid.cells:
        wrong = int(keys.min()) if int(keys.min()) < 0 else int(keys.max())
        raise InputError(
            f"keys hold {wrong}; in a grid of {grid.rows} x {grid.cols} blocks they must be 0 to {grid.cells - 1}",
            parameter="keys",
        )
    keys = keys.int()
    topology = Topology(grid, *places_for(keys).places_of(keys, grid.cols))
    if not checked and topology.slots:  # a file may hold a matrix of zeros, without a key
        topology.validate()
    return topology


def with_capacity(topology: Topology, capacity: int) -> Topology:
    """Return the topology with free slots appended until it has ``capacity`` slots.

    Raises:
        ValueError: ``capacity`` is below the number of slots.
    """
    if capacity < topology.slots:
        raise InputError(
            f"capacity is {capacity}; it must be at least the number of blocks, {topology.slots}", parameter="capacity"
        )
    free = topology.row.new_full((capacity - topology.slots,), -1)
    return Topology(topology.grid, torch.cat([topology.row, free]), torch.cat([topology.col, free]))


def one_tap(grid: Grid) -> Grid:
    """Return the grid of a single tap of ``grid``; each of its cells stands for one block in every tap."""
    return replace(grid, in_features=grid.tap_in, kernel=(1,) * len(grid.kernel or (1, 1)))


def check_multiple(grid: Grid, blocks: int) -> None:
    """Raise ValueError unless ``blocks`` is a multiple of the number of taps."""
    if blocks % grid.taps:
        raise InputError(
            f"blocks is {blocks}; with tie_taps=True it must be a multiple of the {grid.taps} taps", parameter="blocks"
        )


def tie(topology: Topology, grid: Grid) -> Topology:
    """Return the topology that stores the blocks of a single tap in every tap.

    Slot ``z`` becomes slots ``z * taps`` to ``(z + 1) * taps - 1``, in the order of the taps.

    Args:
        topology: a topology of ``one_tap(grid)``.
        grid: the grid of all taps.
    """
    tap = torch.arange(grid.taps, dtype=torch.int32, device=topology.col.device)
    col = (tap * grid.tap_cols + topology.col[:, None]).flatten()
    row = topology.row.repeat_interleave(grid.taps)
    return Topology(grid, row, torch.where(row >= 0, col, -1))


def check_tied(topology: Topology) -> None:
    """Raise ValueError unless every block of channels is stored in all taps or in none (synchronises the device)."""
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


class Units(NamedTuple):
    """The units of a layer that move as one: blocks, or one block of every tap where a convolution ties its taps."""

    topology: Topology
    """The places of the units: the layer's topology, or that of one tap."""
    slots: Tensor | None
    """``(U, taps)``, the slots of each unit in the order of the taps; None where each slot is a unit."""
    grid: Grid
    """That of the layer, of all taps."""

    @property
    def size(self) -> int:
        """The number of blocks of a unit."""
        return 1 if self.slots is None else self.grid.taps

    def norms(self, norms: Tensor) -> Tensor:
        """Return the Frobenius norm ``(U,)`` of each unit from the norms ``(Z,)`` of the slots."""
        whole: Tensor = norms if self.slots is None else norms[self.slots].norm(dim=1)
        return whole

    def sums(self, numbers: Tensor) -> Tensor:
        """Return the sum ``(U,)`` over the slots of each unit, of a number ``(Z,)`` for each slot."""
        return numbers if self.slots is None else numbers[self.slots].sum(1)

    def replaced(self, dropped: Tensor, keys: Tensor, free: Tensor | None = None) -> Move:
        """Return the move of blocks that drops units and grows others, in their slots.

        Args:
            dropped: ``(k,)`` units.
            keys: ``(n,)`` places of the grown units, ``row * C + col`` in their grid. Where fewer are grown than
                dropped, the slots left over become free.
            free: ``(m,)`` free slots of the layer, which the units that are grown beyond the dropped ones take.
        """
        slots = dropped if self.slots is None else self.slots[dropped.long()].flatten()
        more = keys.shape[0] - dropped.shape[0]
        if more > 0 and free is not None:
            slots = torch.cat([slots, free[: more * self.size]])
        elif more < 0:
            keys = pad(keys, (0, -more), value=-1)
        _, row, col = to_places(keys, keys, self.topology.grid)
        if self.slots is None:
            return Move(slots, row, col)
        tied = tie(Topology(self.topology.grid, row, col), self.grid)
        return Move(slots, tied.row, tied.col)


def units(topology: Topology, tied: bool) -> Units:
    """Return the units of a layer. With tied taps those of stored blocks only, and it synchronises the device."""
    grid = topology.grid
    if not tied:
        return Units(topology, None, grid)
    tap, channel = topology.col // grid.tap_cols, topology.col % grid.tap_cols
    key = ((topology.row.long() * grid.tap_cols + channel) * grid.taps + tap).masked_fill(~topology.used(), grid.cells)
    slots = key.argsort(stable=True)[: topology.blocks()].view(-1, grid.taps)
    first = slots[:, 0]
    return Units(Topology(one_tap(grid), topology.row[first], topology.col[first]), slots, grid)


class Places(Protocol):
    """The functions of :mod:`sparsekern.kernels.eager.places`, which documents them."""

    def orders_(self, index: Index, row: Tensor, col: Tensor, *, by_slot: bool, ascending: bool) -> None:
        """Write both orders of an index in place."""

    def masked_(self, into: Index, index: Index, keep: Tensor, *, by_slot: bool) -> None:
        """Write the index of some slots, in which the others are free."""

    def are_legal(self, row: Tensor, col: Tensor, rows: int, cols: int) -> bool:
        """Return whether all places are free, or distinct and inside the grid."""

    def distinct(self, keys: Tensor, present: Tensor, bound: int) -> Tensor:
        """Return the distinct keys that are not present, ascending."""

    def leave_out_(self, numbers: Tensor, positions: Tensor) -> Tensor:
        """Return the numbers at all other positions; the input may be overwritten."""

    def lowest(self, scores: Tensor, count: int) -> Tensor:
        """Return the positions of the lowest finite scores, ascending."""

    def highest(self, scores: Tensor, count: int) -> Tensor:
        """Return the positions of the highest scores, ascending."""

    def find(self, places: Tensor, keys: Tensor, bound: int) -> Tensor:
        """Return the positions of keys in an ascending list, or -1."""

    def first_occurrences(self, keys: Tensor, present: Tensor, bound: int) -> Tensor:
        """Return which keys occur for the first time and are not present."""

    def places_of(self, keys: Tensor, cols: int) -> tuple[Tensor, Tensor]:
        """Return the block rows and block columns of keys."""

    def search(self, edges: Tensor, queries: Tensor) -> Tensor:
        """Return for each query the first edge above it."""


def places_for(*lists: Tensor) -> Places:
    """Return the kernels for lists ``(n,)`` of any lengths, all on one device."""
    return cpu if cpu.takes(*lists) else eager
