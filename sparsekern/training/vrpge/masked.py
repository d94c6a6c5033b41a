"""The layers of a model computing with some of their units, and passes over a batch in which they do (VR-PGE)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor, nn

from sparsekern.nn import lend_index
from sparsekern.topology import Index, empty_index, mask_index_
from sparsekern.training.closures import backpropagate, loss_of
from sparsekern.training.followers import Move
from sparsekern.training.passes import Randomness, keep_norm_statistics, without_sync
from sparsekern.training.vrpge.budget import Budget
from sparsekern.training.vrpge.candidates import Candidates


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

    def leaving(self, name: str, units: Tensor) -> Move:
        """Return the move that frees the slots of a layer that a mask over all units does not hold."""
        used = self._candidates[name].layer.topology.used()
        slots = (used & ~self.slots(name, units)).nonzero().squeeze(1)
        nowhere = torch.full_like(slots, -1, dtype=torch.int32)
        return Move(slots, nowhere, nowhere)

    def clear(self) -> None:
        """Free the tensors."""
        self._lent.clear()


def masked_passes(
    model: nn.Module,
    layers: MaskedLayers,
    masks: Tensor,
    closure: Callable[[], Tensor],
    every: bool,
    scaler: torch.amp.GradScaler | None,
) -> Tensor:
    """Run the closure under each mask, with the same random numbers, and its backward under the first.

    Args:
        model: in which running statistics of norms shall see the first mask only.
        layers: that compute with the masks.
        masks: ``(K, units)``.
        closure: computes the loss ``()``.
        every: whether all passes have a backward, each of a K-th of its loss.
        scaler: scales the loss before a backward.

    Returns:
        The losses ``(K,)``, detached and not scaled.
    """
    randomness, losses = Randomness(model), []
    # The pass with a graph comes last: the index that autograd saves is not written to before its backward.
    for number in reversed(range(masks.shape[0])):
        randomness.restore()
        extra = number > 0
        with layers.lending(masks[number]), keep_norm_statistics(model) if extra else nullcontext():
            if extra and not every:
                with torch.no_grad():
                    losses.append(loss_of(closure).detach())
                continue
            loss = loss_of(closure)
            part = loss / masks.shape[0] if every else loss
            with without_sync(model) if extra else nullcontext():
                backpropagate(part, scaler)
            losses.append(loss.detach())
    return torch.stack(losses[::-1])
