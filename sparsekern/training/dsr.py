"""DSR: one threshold drops the weak blocks of all layers, which grow again where layers kept many.

Mostafa and Wang, "Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse
Reparameterization", ICML 2019, arXiv 1902.05967.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from sparsekern.topology import Move, generator_for, part_of, stored_blocks, units
from sparsekern.topology.arguments import check_number
from sparsekern.topology.draw import fill, round_to_sum
from sparsekern.training.base import Method
from sparsekern.training.magnitude import grow_at_random
from sparsekern.training.scores import free_slots, lowest, protect_strongest, warn_of_no_room

SMALLEST, LARGEST = 2.0**-100, 2.0**100
"""Bounds of the threshold, which would otherwise become 0 or infinite where nothing can be dropped."""

THRESHOLD = "above 0, and finite", lambda number: 0 < number < math.inf
"""Which thresholds may be given or loaded: the arguments of ``check_number``."""


class DSR(Method):
    """Dynamic sparse reparameterization on blocks (Mostafa and Wang, ICML 2019).

    An update drops the blocks of all layers whose root mean square is below one threshold, and as many grow at places
    drawn uniformly among the empty ones, where they start from zero. A layer grows in proportion to the blocks that it
    has left, as far as it has slots (``capacity`` of :func:`sparsekern.sparsify_`), so that blocks leave the layers in
    which they are weak. The strongest block of each layer stays.

    The threshold adapts to ``drop_fraction``: it doubles after an update that dropped less than that, and is halved
    after one that dropped more. No update drops more than twice that fraction of a layer.

    Args:
        threshold: the first threshold, above 0.
        tolerance: how far the number of dropped blocks may be from the wanted one before the threshold changes, as a
            fraction of it.
        drop_fraction: fraction of the blocks of all layers that an update is to drop.
        options: the arguments of :class:`Method`.

    Raises:
        ValueError: a number is out of range, here or in :class:`Method`.
        NotImplementedError: a layer ties its taps; DSR moves single blocks.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), 0.5, 16, capacity=1.5)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparse = sk.DSR(model, optimizer, update_every=1, threshold=0.2)
        >>> sparse.update(), sum(layer.topology.blocks() for layer in model)
        (True, 16)
    """

    moves_fraction = False
    moves_tied_taps = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        threshold: float = 1e-3,
        tolerance: float = 0.1,
        **options: Any,
    ) -> None:
        check_number("threshold", threshold, *THRESHOLD)
        check_number("tolerance", tolerance, "in [0, 1]", lambda part: 0 <= part <= 1)
        super().__init__(model, optimizer, **options)
        self.threshold, self.tolerance = threshold, tolerance
        if len(self.layers) > 1:
            warn_of_no_room(dict(self.trained_layers()), "DSR moves blocks between layers", "use SET")

    def choose_all(self, fraction: float) -> dict[str, Move]:
        """Return the moves of all layers: the blocks below the threshold go, and as many grow."""
        layers = dict(self.trained_layers())
        dropped, left, room = {}, [], []
        for name, layer in layers.items():
            blocks = stored_blocks(layer.index)
            strength = protect_strongest(self.strength(name, layer))
            weak = int((strength < self.threshold * math.sqrt(math.prod(layer.block_size))).count_nonzero())
            empty = layer.grid.cells - blocks
            most = part_of(blocks, min(1.0, 2 * fraction))  # norms of large blocks may be on one side of any threshold
            dropped[name] = lowest(strength, min(weak, empty, most))
            left.append(float(max(1, blocks - dropped[name].shape[0])))
            room.append(float(min(dropped[name].shape[0] + free_slots(layer).shape[0], empty)))
        total = sum(slots.shape[0] for slots in dropped.values())
        grown = round_to_sum(fill(left, [0.0] * len(left), room, total), total)
        moves = {}
        for (name, layer), count in zip(layers.items(), grown, strict=True):
            generator = generator_for(self.seed, type(self).__name__, name, self.steps)
            parts = units(layer.topology, tied=False)
            moves[name] = grow_at_random(layer, parts, dropped[name], count, generator)
        return moves

    def settle(self, moves: dict[str, Move]) -> None:
        """Adapt the threshold: as many blocks as have grown were dropped."""
        dropped = sum(int((move.row >= 0).count_nonzero()) for move in moves.values())
        blocks = sum(stored_blocks(layer.index) for _, layer in self.trained_layers())
        wanted = part_of(blocks, self.schedule.fraction(self.steps))
        if dropped < (1 - self.tolerance) * wanted:
            self.threshold = min(2 * self.threshold, LARGEST)
        elif dropped > (1 + self.tolerance) * wanted:
            self.threshold = max(self.threshold / 2, SMALLEST)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of :meth:`Method.metrics`, and the ``threshold``."""
        return super().metrics() | {"threshold": self.threshold}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, including the threshold."""
        return super().state_dict() | {"threshold": float(self.threshold)}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise what :meth:`load_state_dict` would raise, without loading anything."""
        super().check_state(state)
        check_number("threshold of the state", state["threshold"], *THRESHOLD)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.threshold = state["threshold"]
