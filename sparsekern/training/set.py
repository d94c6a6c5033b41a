"""SET: drop the weakest blocks, and grow as many at random; and Static, which moves none.

Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
science", Nature Communications 2018. The defaults are those with which Evci et al. 2020 (RigL) compare it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsekern.nn import BlockSparse
from sparsekern.nn.init import draw_values
from sparsekern.nn.sharded import copy_slots_
from sparsekern.topology import Move, Topology, generator_for, ordered_keys, sample_absent, stored_blocks
from sparsekern.topology.arguments import check_choice
from sparsekern.training.base import Method
from sparsekern.training.distributed import slot_scores
from sparsekern.training.scores import Units, free_slots, lowest, part_of, units


class SET(Method):
    """Sparse Evolutionary Training on blocks.

    An update moves the ``floor(drop_fraction * blocks)`` blocks of smallest Frobenius norm to places drawn uniformly
    among the empty ones, where they start from zero. A dropped block never returns in the same update.

    This is SET as RigL's paper and most later ones compare it. SET of its own paper is ``drop="signs",
    grown_values="random", anneal="constant"``, once an epoch: ``preset("set-mocanu")``.

    Args:
        drop: ``"norm"``: the weakest blocks. ``"signs"``: the same fraction of the positive and of the negative blocks,
            the weakest of each; a block of several elements has the sign of their sum.
        grown_values: ``"zero"``, or ``"random"``: drawn like a layer's initial values. In a copy of the model that
            follows, grown blocks start from zero in both cases.
        options: the arguments of :class:`Method`.

    Raises:
        ValueError: ``drop`` or ``grown_values`` is unknown, or what :class:`Method` raises.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.75, block_size=16)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparse = sk.SET(model, optimizer, update_every=100, stop=7500, drop_fraction=0.5)
        >>> sparse.step(), sparse.update()
        (False, True)
        >>> sparse.metrics()["churn/0"]
        0.5
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        drop: str = "norm",
        grown_values: str = "zero",
        **options: Any,
    ) -> None:
        check_choice("drop", drop, ("norm", "signs"))
        check_choice("grown_values", grown_values, ("zero", "random"))
        super().__init__(model, optimizer, **options)
        self.drop, self.grown_values = drop, grown_values

    def choose(self, name: str, layer: BlockSparse, fraction: float, generator: torch.Generator) -> Move | None:
        """Return the weakest blocks and as many empty places. Tied taps move together, by their common norm."""
        parts = units(layer)
        blocks = stored_blocks(layer.index) // parts.size
        empty = parts.topology.grid.cells - blocks
        strength = self.strength(name, layer, parts)
        if self.drop == "signs":
            slots = _weakest_of_each_sign(layer, parts, strength, fraction)
            if slots.shape[0] > empty:
                slots = slots[lowest(strength[slots], empty)]
        else:
            slots = lowest(strength, min(part_of(blocks, fraction), empty))
        return grow_at_random(layer, parts, slots, slots.shape[0], generator)

    @torch.no_grad()
    def fill(self, name: str, move: Move) -> None:
        """Draw the values of blocks that have just moved, with ``grown_values="random"``."""
        if self.grown_values == "zero":
            return
        layer = self.layers[name]
        whole = Topology(layer.grid, layer.row.cpu(), layer.col.cpu())
        moved = Topology(layer.grid, move.row.cpu(), move.col.cpu())
        generator = generator_for(self.seed, type(self).__name__, name, self.steps, "values")
        drawn = draw_values(moved, layer.values.dtype, generator, layer.init_scale, whole)
        copy_slots_(layer.values, move.slots.long(), drawn.to(layer.values.device))


def grow_at_random(layer: BlockSparse, parts: Units, dropped: Tensor, count: int, generator: torch.Generator) -> Move:
    """Return the move that drops units and grows others, at places drawn uniformly among those that are empty before.

    Args:
        layer: see above.
        parts: its units.
        dropped: ``(k,)`` units.
        count: how many grow, in the slots of the dropped ones and in free ones, as far as there are places and slots.
        generator: on the CPU.
    """
    topology, free = parts.topology, None
    present = topology.sorted_keys() if parts.slots is not None else ordered_keys(layer.index, topology)
    room = dropped.shape[0]
    if count > room:
        free = free_slots(layer)
        room += free.shape[0] // parts.size
    count = min(count, room, topology.grid.cells - present.shape[0])
    return parts.replaced(dropped, sample_absent(present, topology.grid.cells, count, generator, ordered=True), free)


def _weakest_of_each_sign(layer: BlockSparse, parts: Units, strength: Tensor, fraction: float) -> Tensor:
    """Return a fraction of the positive units and of the negative ones, the weakest of each, in ascending order."""
    sums = slot_scores(layer.values, lambda blocks: blocks.sum((1, 2), dtype=strength.dtype))
    positive = parts.sums(sums) >= 0
    used = parts.topology.used()
    chosen = [
        lowest(strength.masked_fill(~side, torch.inf), part_of(int(side.sum()), fraction))
        for side in (positive & used, ~positive & used)
    ]
    return torch.cat(chosen).sort().values


class Static(Method):
    """The control of every comparison: the same layers and the same loop, but no block ever moves.

    Args:
        model, optimizer: as for :class:`Method`.
        options: of :class:`Method`, ``update_every``, ``start``, ``stop`` and ``offset``, which say when an update is
            counted and ranks are compared, ``seed``, ``check_ranks`` and ``process_group``.

    Raises:
        ValueError: an option about moves is given, or what :class:`Method` raises.
    """

    unused_options: ClassVar = ("drop_fraction", "anneal", "grown_state", "keep_connected", "min_age")
    moves_fraction = False

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        self.check_options(options)
        super().__init__(model, optimizer, **options)

    def choose(self, name: str, layer: BlockSparse, fraction: float, generator: torch.Generator) -> Move | None:
        """Return None."""
        return None
