"""Metrics of a topology that moves: churn, places kept from the start, places ever in use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekern.nn import BlockSparse
from sparsekern.topology import (
    Move,
    Topology,
    are_absent,
    generator_for,
    places_for,
    sample_distinct,
    stored_blocks,
)

LEAST = 4096
"""Minimum number of places that :class:`Coverage` watches: the standard error of its rate is then below 0.8 %."""

SLOTS_PER_WATCHED = 4
"""In a layer with more slots, the number of slots for each watched place."""


class Coverage:
    """The fraction of a layer's places that ever held a block, in memory that does not grow with the grid.

    Watches all places of a small grid, and a fixed random sample of a large one. The rate is the in-time
    over-parametrization of Liu et al. 2021 (ITOP).

    Args:
        topology: the first topology, whose places count.
        seed, name: determine the sample.

    Attributes:
        seen: ``(n,)`` bool, whether each watched place ever held a block. All that needs saving.
    """

    def __init__(self, topology: Topology, seed: int, name: str) -> None:
        cells = topology.grid.cells
        watched = min(cells, max(LEAST, topology.slots // SLOTS_PER_WATCHED))
        if watched == cells:
            places = torch.arange(cells, device="cpu")
        else:
            places = sample_distinct(cells, watched, generator_for(seed, name, "watched")).sort().values
        self.places, self._cells = places.int(), cells
        self.seen = torch.zeros(watched, dtype=torch.bool, device="cpu")
        self.add(topology.sorted_keys())

    def add(self, keys: Tensor) -> None:
        """Mark places as used: keys in any order, on any device. Negative keys are ignored."""
        keys = keys.to("cpu", torch.int32)
        at = places_for(self.places, keys).find(self.places, keys, self._cells)
        self.seen[at[at >= 0]] = True

    def rate(self) -> float:
        """Return the fraction of watched places that ever held a block."""
        return float(self.seen.sum()) / self.seen.shape[0]


class TopologyMetrics:
    """Metrics of the topologies of some layers, updated with every move from the first topology on.

    Args:
        layers: by name.
        seed: determines which places of a large grid are watched.

    Attributes:
        start: sorted keys ``row * C + col`` of each layer's first topology, on the CPU.
        churn: fraction of each layer's blocks that the last update moved.
    """

    def __init__(self, layers: dict[str, BlockSparse], seed: int) -> None:
        self._layers = layers
        self._slots = {name: layer.topology.slots for name, layer in layers.items()}
        self.start: dict[str, Tensor] = {n: layer.topology.sorted_keys().cpu() for n, layer in layers.items()}
        self._coverage = {name: Coverage(layer.topology, seed, name) for name, layer in layers.items()}
        self.begin_update()

    def begin_update(self) -> None:
        """Reset the churn."""
        self.churn = dict.fromkeys(self._layers, 0.0)

    def add(self, name: str, move: Move) -> None:
        """Record a move that was made."""
        layer = self._layers[name]
        self.churn[name] = move.slots.numel() / max(1, stored_blocks(layer.index))
        self._coverage[name].add(move.row * layer.grid.cols + move.col)

    def free(self, moves: Mapping[str, Move]) -> None:
        """Set the churn of moves that freed slots and grew nothing: the fraction of the blocks that were there."""
        for name, layer in self._layers.items():
            left, freed = stored_blocks(layer.index), moves[name].slots.numel() if name in moves else 0
            self.churn[name] = 1 - left / max(1, left + freed)

    def values(self) -> dict[str, float]:
        """Return the metrics of :meth:`sparsekern.training.Method.metrics` by name; synchronises the device."""
        numbers: dict[str, float] = {}
        stored, total, explored = 0, 0, 0.0
        for name, layer in self._layers.items():
            elements = layer.topology.elements()
            stored, total = stored + elements, total + layer.grid.numel
            numbers[f"sparsity/{name}"] = 1 - elements / layer.grid.numel
            numbers[f"churn/{name}"] = self.churn[name]
            rate = numbers[f"itop/{name}"] = self._coverage[name].rate()
            explored += rate * layer.grid.numel
            now = layer.topology.sorted_keys().cpu()
            start = self.start[name]
            kept = int((~are_absent(start, now, layer.grid.cells)).count_nonzero())
            numbers[f"kept/{name}"] = kept / max(1, start.shape[0])
        numbers["sparsity/global"] = 1 - stored / total
        numbers["itop/global"] = explored / total
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {
            "churn": dict(self.churn),
            # Padded with -1 to the first number of slots: one shape in all states.
            "start": {n: pad(k, (0, max(0, self._slots[n] - k.shape[0])), value=-1) for n, k in self.start.items()},
            "explored": {name: coverage.seen.clone() for name, coverage in self._coverage.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self.churn = dict(state["churn"])
        self.start = {name: keys[keys >= 0].clone() for name, keys in state["start"].items()}
        for name, seen in state["explored"].items():
            self._coverage[name].seen.copy_(seen)
