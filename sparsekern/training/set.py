"""SET: drop the weakest blocks, grow as many at random.

Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
science", Nature Communications 2018; with the drop fraction along a cosine, as in Evci et al. 2020.
"""

from __future__ import annotations

import torch

from sparsekern.nn import BlockSparse
from sparsekern.topology import ordered_keys, sample_absent
from sparsekern.training.base import Method
from sparsekern.training.followers import Move, to_places
from sparsekern.training.scores import lowest, part_of
from sparsekern.training.tied import units


class SET(Method):
    """Sparse Evolutionary Training on blocks.

    At an update ``floor(drop_fraction * blocks)`` blocks of smallest Frobenius norm go to places drawn uniformly among
    those that were empty, so a dropped block never returns in the same update. They restart from zero.

    Takes the arguments of :class:`Method`.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.75, block_size=16)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparse = sk.SET(model, optimizer, update_every=100, stop=7500, drop_fraction=0.5)
        >>> sparse.step(), sparse.update()
        (False, True)
        >>> sparse.metrics()["churn/0"]
        0.5
    """

    def choose(self, name: str, layer: BlockSparse, fraction: float, generator: torch.Generator) -> Move | None:
        """Return the weakest blocks and as many empty places; tied taps go together, by their common norm."""
        parts = units(layer)
        topology = parts.topology
        present = topology.sorted_keys() if parts.slots is not None else ordered_keys(layer.index, topology)
        blocks = present.shape[0]
        strength = self.strength(name, layer, parts)
        slots = lowest(strength, min(part_of(blocks, fraction), topology.grid.cells - blocks))
        keys = sample_absent(present, topology.grid.cells, slots.shape[0], generator, ordered=True)
        return parts.spread(to_places(slots, keys, topology.grid))
