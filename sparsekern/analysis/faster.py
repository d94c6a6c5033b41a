"""The race behind ``sparsify_(..., only_if_faster=sample)``: which layers of a model are faster sparse, and how."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from sparsekern.analysis.layer_race import (
    CALM,
    Contestant,
    dense_contestant,
    kind_of,
    layer_inputs,
    race_steps,
    sparse_contestant,
)
from sparsekern.nn import BlockSparse, Choice, register_racer

logger = logging.getLogger("sparsekern")

ALIKE = 0.05
"""Relative difference of the number of blocks up to which layers are equal: allocation rounds it."""


class LayerRaces:
    """Chooses between the layers of a model and the sparse layers that could take their places.

    Building it runs the model once, in evaluation mode. The model is not changed, nor are its gradients, the statistics
    of norms or random generators.

    Args:
        model: the model.
        layers: those of its layers that may become sparse, by name.
        sample: a tensor, a tuple of arguments, or a dict of keyword arguments of the model.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], sample: Any) -> None:
        self._layers = layers
        self._inputs = layer_inputs(model, layers, sample)
        self._known: dict[Any, list[tuple[list[float], Choice]]] = {}

    def __call__(self, name: str, candidates: Sequence[BlockSparse]) -> Choice:
        """Race a layer against sparse layers of several block sizes, unless an equal one has been raced."""
        if name not in self._inputs:
            return Choice(name, None, {}, float("nan"))
        layer, given = self._layers[name], self._inputs[name]
        kind = kind_of(layer, given), *(twin.block_size for twin in candidates)
        densities = [twin.topology.slots / twin.grid.cells for twin in candidates]
        known = self._known.setdefault(kind, [])
        for others, choice in known:
            if all(math.isclose(*pair, rel_tol=ALIKE) for pair in zip(densities, others, strict=True)):
                return choice.named(name)
        contestants: dict[Any, Contestant] = {"dense": dense_contestant(layer)}
        contestants |= {twin.block_size: sparse_contestant(twin) for twin in candidates}
        timings = race_steps(contestants, given)
        dense = timings.pop("dense")
        if dense.spread > CALM:
            apart = f"{dense.spread:.0%} of its median apart; the machine is too busy to choose"
            logger.warning(
                "%s: the quartiles of the dense layer are %s; the machine is too busy to choose", name, apart
            )
        times = {block: timing.median for block, timing in timings.items()}
        choice = _of_first_rank(Choice.of(times, dense.median))
        known.append((densities, choice))
        return choice.named(name)


def _of_first_rank(choice: Choice) -> Choice:
    """Return the first rank's choice on every rank of a process group: their times differ, their layers must not."""
    if not (dist.is_available() and dist.is_initialized()):
        return choice
    choices = [choice]
    dist.broadcast_object_list(choices, src=0)
    return choices[0]


register_racer(LayerRaces)
