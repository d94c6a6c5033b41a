"""The layers of a model computing with some of their units (VR-PGE)."""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor

from sparsekern.nn import lend_index
from sparsekern.topology import Index, empty_index, mask_index_
from sparsekern.training.budget import Budget
from sparsekern.training.candidates import Candidates


class MaskedLayers:
    """Lends layers an index of the chosen units, always in the same tensors: of one mask at a time.

    Args:
        candidates: by the names of the layers.
        budget: says where the units of a layer are.
    """

    def __init__(self, candidates: dict[str, Candidates], budget: Budget) -> None:
        self._candidates, self._budget = candidates, budget
        self._lent: dict[str, Index] = {}

    def slots(self, name: str, units: Tensor) -> Tensor:
        """Return which slots ``(Z,)`` of a layer a mask over all units holds."""
        return self._candidates[name].slots(units[self._budget.part(name)])

    def lending(self, units: Tensor) -> ExitStack:
        """Return a context in which the layers compute with the units of a mask ``(units,)``."""
        stack = ExitStack()
        for name, candidates in self._candidates.items():
            layer = candidates.layer
            lent = self._lent.get(name)
            if lent is None or lent.row_ptr.device != layer.row.device:
                lent = self._lent[name] = empty_index(layer.topology)
            mask_index_(lent, layer.index, self.slots(name, units), layer.block_size)
            stack.enter_context(lend_index(layer, lent))
        return stack

    def clear(self) -> None:
        """Free the tensors."""
        self._lent.clear()
