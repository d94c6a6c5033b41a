"""SET: drop the weakest blocks, grow as many at random.

Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
science", Nature Communications 2018; with the drop fraction along a cosine, as in Evci et al. 2020.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from sparsekern.nn import BlockSparse
from sparsekern.topology import sample_absent
from sparsekern.training.base import Method
from sparsekern.training.followers import Move
from sparsekern.training.scores import block_norms, lowest, protect_last
from sparsekern.training.tied import units


class SET(Method):
    """Sparse Evolutionary Training on blocks.

    At an update ``floor(drop_fraction * blocks)`` blocks of smallest Frobenius norm go to places drawn uniformly among
    those that were empty, so a dropped block never returns in the same update. They restart from zero.

    Args:
        keep_connected: never drop the strongest block of a block row or column, so that none becomes empty.
        options: the arguments of :class:`Method`: ``update_every``, ``start``, ``stop``, ``drop_fraction``,
            ``grown_state``, ``seed``.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, keep_connected: bool = False, **options: Any
    ) -> None:
        super().__init__(model, optimizer, **options)
        self.keep_connected = keep_connected

    def choose(self, name: str, layer: BlockSparse, fraction: float, generator: torch.Generator) -> Move | None:
        """Return the weakest blocks and as many empty places; tied taps go together, by their common norm."""
        parts = units(layer)
        topology = parts.topology
        present = topology.sorted_keys()
        blocks = present.shape[0]
        scores = parts.norms(block_norms(layer))
        if self.keep_connected:
            scores = protect_last(topology, scores)
        # floor: with ceil one block a layer would go on moving until the end of the cosine. 0.29 of 100 is 28.99...96
        slots = lowest(scores, min(math.floor(fraction * blocks + 1e-9), topology.grid.cells - blocks))
        keys = sample_absent(present, topology.grid.cells, slots.shape[0], generator)
        return parts.spread(Move(slots, (keys // topology.grid.cols).int(), (keys % topology.grid.cols).int()))
