"""Which blocks: scores of stored blocks, and choices among them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsekern.kernels.contract import accumulate_dtype
from sparsekern.nn import BlockSparse
from sparsekern.topology import Topology


def part_of(blocks: int, fraction: float) -> int:
    """Return how many of the blocks a fraction is, rounded down: with ceil one would move to the cosine's end."""
    return math.floor(fraction * blocks + 1e-9)  # 0.29 of 100 is 28.999999999999996


def block_norms(layer: BlockSparse) -> Tensor:
    """Return the Frobenius norm ``(Z,)`` of every stored block; infinity for a free slot, so that none is dropped."""
    norms: Tensor = torch.linalg.vector_norm(
        layer.values.detach(), dim=(1, 2), dtype=accumulate_dtype(layer.values.dtype)
    )
    return norms.masked_fill(~layer.topology.used(), torch.inf)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return the slots ``(k,)`` of the ``count`` lowest finite scores; ties go to the lower slot.

    Fewer are returned when fewer are finite (waits for the device).
    """
    count = min(count, int(torch.isfinite(scores).sum()))
    return scores.sort(stable=True).indices[:count]


def protect_last(topology: Topology, scores: Tensor) -> Tensor:
    """Return the scores with infinity at the highest one of every block row and block column.

    Dropping among the rest then leaves each block row and column that has a block with at least one.
    """
    scores = scores.clone()
    free = ~topology.used()
    protected = torch.zeros_like(free)
    by_score = torch.where(free, -torch.inf, scores).argsort(stable=True)  # ascending: the last write is the highest
    for place, count in ((topology.row, topology.grid.rows), (topology.col, topology.grid.cols)):
        rank = torch.empty_like(by_score)
        rank[by_score] = torch.arange(by_score.shape[0], device=rank.device)
        best = torch.full((count,), -1, device=rank.device)
        best.scatter_reduce_(0, place.clamp(min=0).long(), torch.where(free, -1, rank), "amax")
        protected[by_score[best[best >= 0]]] = True
    return scores.masked_fill_(protected, torch.inf)


def highest(scores: Tensor, count: int) -> Tensor:
    """Return the positions ``(k,)`` of the ``count`` highest scores, ascending; ties go to the lower position.

    Scores of minus infinity are never chosen, so fewer may be returned (waits for the device). Linear in the number of
    scores: they may be one for each place of the grid.
    """
    count = min(count, int((scores > -torch.inf).sum()))
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    bound = scores.topk(count).values[-1]
    above = (scores > bound).nonzero().squeeze(1)
    equal = (scores == bound).nonzero().squeeze(1)[: count - above.shape[0]]
    return torch.cat([above, equal]).sort().values
