"""Scores of stored blocks, choices among them, and units of blocks that move together."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.kernels.contract import accumulate_dtype, ordered_bits
from sparsekern.nn import BlockSparse
from sparsekern.topology import Move, Topology, one_tap, places_for, stored_blocks
from sparsekern.training.distributed import slot_scores

_log = logging.getLogger("sparsekern")


def part_of(blocks: int, fraction: float) -> int:
    """Return ``floor(fraction * blocks)``."""
    return math.floor(fraction * blocks + 1e-9)  # 0.29 * 100 is 28.999999999999996


def warn_of_few_blocks(layers: dict[str, BlockSparse], fraction: float) -> None:
    """Log a warning of layers in which no block ever moves, because the fraction rounds down to none."""
    never = []
    for name, layer in layers.items():
        blocks = stored_blocks(layer.index)
        units = blocks // layer.grid.taps if layer.tie_taps else blocks
        if (
            fraction > 0
            and layer.values.requires_grad
            and 0 < blocks < layer.grid.cells
            and not part_of(units, fraction)
        ):
            never.append(f"{name} ({units})")
    if never:
        _log.warning(
            "drop_fraction is %s, which rounds down to no block in layers of so few, and they never move: %s. Take "
            "smaller blocks, or a larger fraction",
            fraction,
            ", ".join(never),
        )


def block_norms(layer: BlockSparse) -> Tensor:
    """Return the Frobenius norm ``(Z,)`` of each slot's block; infinity for a free slot, which is never dropped."""
    norms = slot_scores(layer.values, norms_of)
    if stored_blocks(layer.index) < layer.topology.slots:
        norms.masked_fill_(~layer.topology.used(), torch.inf)
    return norms


def norms_of(blocks: Tensor) -> Tensor:
    """Return the Frobenius norms ``(Z,)`` of blocks ``(Z, bo, bi)``."""
    dtype = accumulate_dtype(blocks.dtype)
    if blocks.shape[1:] == (1, 1):
        return blocks.flatten().to(dtype).abs()  # exact: no square that underflows
    norms: Tensor = torch.linalg.vector_norm(blocks, dim=(1, 2), dtype=dtype)
    return norms


def is_finite(tensor: Tensor) -> bool:
    """Return whether all elements are finite, without a temporary of the tensor's size; synchronises the device."""
    if tensor.numel() == 0:
        return True
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def ascending(scores: Tensor) -> Tensor:
    """Return the positions that sort scores in ascending order; equal scores keep their order.

    Scores must be 0 or more, or infinite.
    """
    return ordered_bits(scores).sort(stable=True).indices


def descending(scores: Tensor) -> Tensor:
    """Return the positions that sort scores in descending order, as :func:`ascending`."""
    return ordered_bits(scores).neg_().sort(stable=True).indices


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return the slots ``(k,)`` of the ``count`` lowest finite scores, ascending; ties go to the lower slot.

    Returns fewer where fewer scores are finite. Synchronises the device.
    """
    return places_for(scores).lowest(scores, count)


def highest(scores: Tensor, count: int) -> Tensor:
    """Return the positions ``(k,)`` of the ``count`` highest scores, ascending; ties go to the lower position.

    Scores of minus infinity are never chosen, so fewer may be returned. Synchronises the device.
    """
    return places_for(scores).highest(scores, count)


def protect_last(topology: Topology, scores: Tensor) -> Tensor:
    """Return the scores with infinity at the highest one of each block row and block column.

    Dropping finite scores then leaves at least one block in every block row and column that has any.
    """
    scores = scores.clone()
    free = ~topology.used()
    protected = torch.zeros_like(free)
    by_score = ascending(torch.where(free, -torch.inf, scores))  # the last write is the highest
    for place, count in ((topology.row, topology.grid.rows), (topology.col, topology.grid.cols)):
        rank = torch.empty_like(by_score)
        rank[by_score] = torch.arange(by_score.shape[0], device=rank.device)
        best = torch.full((count,), -1, device=rank.device)
        best.scatter_reduce_(0, place.clamp(min=0).long(), torch.where(free, -1, rank), "amax")
        protected[by_score[best[best >= 0]]] = True
    return scores.masked_fill_(protected, torch.inf)


def protect_strongest(strength: Tensor) -> Tensor:
    """Return the strengths with infinity at the highest finite one, so that a layer keeps a block."""
    finite = torch.isfinite(strength)
    return strength.index_fill(0, torch.where(finite, strength, -torch.inf).argmax(), torch.inf)


class Units(NamedTuple):
    """The units of a layer that move as one: blocks, or one block of every tap where a convolution ties its taps."""

    topology: Topology
    """The places of the units: the layer's topology, or that of one tap."""
    slots: Tensor | None
    """``(U, taps)``, the slots of each unit in the order of the taps; None where each slot is a unit."""
    tap_cols: int
    """Block columns of a tap."""

    def norms(self, norms: Tensor) -> Tensor:
        """Return the Frobenius norm ``(U,)`` of each unit from the norms ``(Z,)`` of the slots."""
        whole: Tensor = norms if self.slots is None else norms[self.slots].norm(dim=1)
        return whole

    def sums(self, numbers: Tensor) -> Tensor:
        """Return the sum ``(U,)`` over the slots of each unit, of a number ``(Z,)`` for each slot."""
        return numbers if self.slots is None else numbers[self.slots].sum(1)

    def spread(self, move: Move) -> Move:
        """Return the move of blocks that a move of units stands for."""
        if self.slots is None:
            return move
        taps = self.slots.shape[1]
        tap = torch.arange(taps, dtype=torch.int32, device=move.col.device) * self.tap_cols
        col = (tap + move.col[:, None]).flatten()
        return Move(self.slots[move.slots.long()].flatten(), move.row.repeat_interleave(taps), col)


def units(layer: BlockSparse) -> Units:
    """Return the units of a layer. With tied taps those of stored blocks only, and it synchronises the device."""
    topology, grid = layer.topology, layer.grid
    if not layer.tie_taps:
        return Units(topology, None, grid.tap_cols)
    tap, channel = topology.col // grid.tap_cols, topology.col % grid.tap_cols
    key = ((topology.row.long() * grid.tap_cols + channel) * grid.taps + tap).masked_fill(~topology.used(), grid.cells)
    slots = key.argsort(stable=True)[: topology.blocks()].view(-1, grid.taps)
    first = slots[:, 0]
    return Units(Topology(one_tap(grid), topology.row[first], topology.col[first]), slots, grid.tap_cols)
