"""How many places of a grid have ever held a block, in memory that does not grow with the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.topology import Topology, generator_for, places_for, sample_distinct

LEAST = 4096
"""Places that are watched at least: the standard error of the rate is then below 0.8 %."""

SLOTS_PER_WATCHED = 4
"""Of a layer with more slots, one place is watched for so many of them."""


class Coverage:
    """Watches places of one layer: all of a small grid, a fixed random sample of a large one.

    The rate is the in-time over-parametrization of Liu et al. 2021: the fraction of all places that were ever in use.

    Args:
        topology: the first one; its places count.
        seed, name: decide the sample.

    Attributes:
        seen: ``(n,)`` bool, for each watched place; with it the rate can be saved.
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
        """Note that these places hold a block; keys in any order, on any device. One below 0 is no place."""
        keys = keys.to("cpu", torch.int32)
        at = places_for(self.places, keys).find(self.places, keys, self._cells)
        self.seen[at[at >= 0]] = True

    def rate(self) -> float:
        """Return the fraction of watched places that ever held a block."""
        return float(self.seen.sum()) / self.seen.shape[0]
