"""Scores of stored blocks, and choices among them."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from sparsekern.kernels.contract import accumulate_dtype
from sparsekern.nn import BlockSparse
from sparsekern.topology import Topology, places_for, stored_blocks

_log = logging.getLogger("sparsekern")


def part_of(blocks: int, fraction: float) -> int:
    """Return how many of the blocks a fraction is, rounded down: with ceil one would move to the cosine's end."""
    return math.floor(fraction * blocks + 1e-9)  # 0.29 of 100 is 28.999999999999996


def warn_of_few_blocks(layers: dict[str, BlockSparse], fraction: float) -> None:
    """Warn of layers of which no update moves a block, because the fraction of them is rounded down to none."""
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
    """Return the Frobenius norm ``(Z,)`` of every stored block; infinity for a free slot, so that none is dropped."""
    norms = norms_of(layer.values.detach())
    if stored_blocks(layer.index) < layer.topology.slots:
        norms.masked_fill_(~layer.topology.used(), torch.inf)
    return norms


def norms_of(blocks: Tensor) -> Tensor:
    """Return the Frobenius norms ``(Z,)`` of blocks ``(Z, bo, bi)``."""
    dtype = accumulate_dtype(blocks.dtype)
    if blocks.shape[1:] == (1, 1):
        return blocks.flatten().to(dtype).abs()  # nothing to add up, and no square that underflows
    norms: Tensor = torch.linalg.vector_norm(blocks, dim=(1, 2), dtype=dtype)
    return norms


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity; without a temporary of its size."""
    if tensor.numel() == 0:
        return True
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def ascending(scores: Tensor) -> Tensor:
    """Return the positions of scores in ascending order, those of ties too.

    The scores are 0 or more, or infinite: such floats are in the order of their bits, and PyTorch sorts integers ten
    times faster than floats on a CPU.
    """
    return _bits(scores).sort(stable=True).indices


def descending(scores: Tensor) -> Tensor:
    """Return the positions of scores from high to low, those of ties ascending; as :func:`ascending`."""
    return _bits(scores).neg_().sort(stable=True).indices


def _bits(scores: Tensor) -> Tensor:
    """Return a copy that is read as integers; of minus infinity, the lowest, they are negative."""
    return scores.contiguous().view(torch.int64 if scores.element_size() == 8 else torch.int32).clone()


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return the slots ``(k,)`` of the ``count`` lowest finite scores, ascending; ties go to the lower slot.

    Fewer are returned when fewer are finite (waits for the device).
    """
    return places_for(scores).lowest(scores, count)


def highest(scores: Tensor, count: int) -> Tensor:
    """Return the positions ``(k,)`` of the ``count`` highest scores, ascending; ties go to the lower position.

    Scores of minus infinity are never chosen, so fewer may be returned (waits for the device).
    """
    return places_for(scores).highest(scores, count)


def protect_last(topology: Topology, scores: Tensor) -> Tensor:
    """Return the scores with infinity at the highest one of every block row and block column.

    Dropping among the rest then leaves each block row and column that has a block with at least one.
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
