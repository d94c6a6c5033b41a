"""GraNet: gradual pruning, with an exchange of weak blocks for ones of large gradient after each step of it.

Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS 2021, arXiv 2106.10404.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from sparsekern.topology import Move, stored_blocks
from sparsekern.training.gradual import Gradual
from sparsekern.training.growth.rigl import RigL
from sparsekern.training.scores import part_of


class GraNet(Gradual, RigL):
    """Gradual pruning with zero-cost neuroregeneration on blocks (Liu et al., NeurIPS 2021, section 4).

    An update frees the weakest blocks, as :class:`Gradual` does, until the sparsity of its schedule is reached. Then
    each layer moves the ``floor(drop_fraction * blocks)`` weakest of the blocks that are left to the empty places where
    the blocks of the gradient have the largest norms, as :class:`RigL` does: the number of blocks stays. Blocks that
    were freed do not return in the same update.

    Args:
        final_sparsity, stop, compact: as in :class:`Gradual`.
        scope: of the blocks that are freed, as in :class:`Gradual`; in the paper that of all layers together. Each
            layer exchanges by itself.
        drop_fraction: fraction of the blocks left that are exchanged at ``start``; it falls along a cosine.
        options: the arguments of :class:`RigL` and :class:`Method`.

    Raises:
        ValueError: what :class:`Gradual` or :class:`RigL` raises.
        NotImplementedError: a layer ties its taps.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.5, block_size=16)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparse = sk.GraNet(model, optimizer, final_sparsity=0.75, stop=5, update_every=2)
        >>> for step in range(4):
        ...     model(torch.ones(8, 64)).square().mean().backward()
        ...     optimizer.step(); optimizer.zero_grad()
        ...     if sparse.step():
        ...         print(model[0].sparsity, sparse.metrics()["churn/0"])
        0.6875 0.8
        0.75 0.25
    """

    unused_options: ClassVar = ()
    initial_sparsity: ClassVar[float] = 0.5

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        final_sparsity: float | Mapping[str, float] = 0.9,
        scope: str = "global",
        drop_fraction: float | Callable[[int], float] = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            final_sparsity=final_sparsity,
            scope=scope,
            drop_fraction=drop_fraction,
            **options,
        )

    def choose_all(self, fraction: float) -> dict[str, Move]:
        """Return the moves of all layers: the blocks that go, and those that are exchanged."""
        moves = super().choose_all(fraction)
        for name, layer in self.trained_layers():
            strength, left = self.strength(name, layer), stored_blocks(layer.index)
            parts = [moves[name]] if name in moves else []
            for freed in parts:
                strength = strength.index_fill(0, freed.slots.long(), torch.inf)
                left -= freed.slots.shape[0]
            parts.append(self.exchange(name, layer, strength, part_of(left, fraction)))
            moves[name] = Move(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        return moves
