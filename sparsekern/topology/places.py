"""Choice of the kernels for lists of places: native ones if possible, otherwise plain PyTorch, with equal results."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sparsekern.kernels.contract import Index
from sparsekern.kernels.cpu import places as cpu
from sparsekern.kernels.eager import places as eager


class Places(Protocol):
    """The functions of :mod:`sparsekern.kernels.eager.places`, which documents them."""

    def orders_(self, index: Index, row: Tensor, col: Tensor, *, by_slot: bool, ascending: bool) -> None:
        """Write both orders of an index in place."""

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
