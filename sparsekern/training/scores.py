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
    return _smallest(_bits(scores), min(count, int(torch.isfinite(scores).sum())))


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


def highest(scores: Tensor, count: int) -> Tensor:
    """Return the positions ``(k,)`` of the ``count`` highest scores, ascending; ties go to the lower position.

    Scores of minus infinity are never chosen, so fewer may be returned (waits for the device).
    """
    contenders = _contenders(scores, count)
    scores = scores[contenders]
    most = torch.iinfo(torch.int64 if scores.element_size() == 8 else torch.int32).max
    order = _bits(scores).clamp_(min=-1).neg_().add_(most - 1)  # minus infinity comes last
    return contenders[_smallest(order, min(count, int((scores > -torch.inf).sum())))]


def _smallest(numbers: Tensor, count: int) -> Tensor:
    """Return the positions of the ``count`` smallest integers, none negative, ascending; the first of equal ones.

    Linear: their upper bits are counted, and only numbers that agree with the last one there are sorted.
    """
    if count == 0 or numbers.shape[0] <= count:
        return torch.arange(min(count, numbers.shape[0]), device=numbers.device)
    upper = numbers >> (
        51 if numbers.element_size() == 8 else 20
    )  # of a float: its exponent, and what 12 bits hold more
    below = torch.bincount(upper).cumsum(0)
    last = torch.searchsorted(below, count)  # the first value of the upper bits with so many numbers up to it
    edge = (upper == last).nonzero().squeeze(1)
    chosen = upper < last
    del upper
    few = numbers[edge].sort(stable=True).indices[: count - int(chosen.sum())]
    return chosen.index_fill_(0, edge[few], True).nonzero().squeeze(1)


STRIDE = 17
"""Of the scores that :func:`_contenders` looks at; a prime, so that a grid's columns all have their turn."""


def _contenders(scores: Tensor, count: int) -> Tensor:
    """Return positions, ascending, among which the ``count`` highest scores are: not many more where these are few.

    RigL at 1x1 has millions of scores, and sorting them all would cost more than computing them.
    """
    rank = 2 * count // STRIDE + 64  # of the bound in the sample: about twice as many scores as wanted are above it
    if rank * STRIDE * 4 <= scores.shape[0]:
        sample = scores[::STRIDE]
        bound = sample[descending(sample)[rank]]
        above = (scores >= bound).nonzero().squeeze(1)
        if above.shape[0] >= count:
            return above
    return torch.arange(scores.shape[0], device=scores.device)
