"""The control of comparisons: no block moves."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from sparsekern.nn import BlockSparse
from sparsekern.topology import Move
from sparsekern.training.base import Method


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
