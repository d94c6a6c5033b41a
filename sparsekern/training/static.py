"""No moves: the topology stays as it was drawn."""

from __future__ import annotations

import torch

from sparsekern.nn import BlockSparse
from sparsekern.training.base import Method
from sparsekern.training.followers import Move


class Static(Method):
    """The control of every comparison: the same layers, the same loop, and no block ever moves.

    Takes the arguments of :class:`Method`; those about updates have no effect.
    """

    moves_fraction = False

    def choose(self, name: str, layer: BlockSparse, fraction: float, generator: torch.Generator) -> Move | None:
        """Return None."""
        return None
