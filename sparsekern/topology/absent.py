"""Uniform draws of cells that hold no block, in memory proportional to the blocks and never to the grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sample_absent(
    present: Tensor, cells: int, count: int, generator: torch.Generator, *, ordered: bool = False
) -> Tensor:
    """Draw ``count`` distinct cells outside ``present``, every such set equally likely.

    Args:
        present: ``(n,)`` distinct keys of the cells to avoid, ascending, any device.
        cells: number of cells; keys are 0 to ``cells - 1``.
        count: how many to draw.
        generator: a CPU generator.
        ordered: return them ascending, which is faster than to draw them in random order.

    Returns:
        ``(count,)`` int64 keys on the device of ``present``, in random order unless ``ordered``.

    Raises:
        ValueError: fewer than ``count`` cells are absent.
    """
    absent = cells - present.shape[0]
    if count > absent:
        raise ValueError(f"{count} blocks were to be added, but only {absent} of {cells} cells are empty")
    ranks = (sample_ascending if ordered else sample_distinct)(absent, count, generator).to(present.device)
    # A present key p has p - position(p) absent cells before it. The absent cell of rank j is therefore j plus the
    # number of present keys with at most j absent cells before them.
    position = torch.arange(present.shape[0], dtype=present.dtype, device=present.device)
    before = torch.searchsorted(present - position, ranks.to(present.dtype), right=True, out_int32=True)
    return ranks.add_(before)


def sample_distinct(population: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` distinct integers ``(count,)`` of ``range(population)``, int64 on the CPU, in random order.

    Draws with replacement and keeps first occurrences, unless the population is small enough to be shuffled: so the
    memory is O(count).

    Raises:
        ValueError: there are fewer.
    """
    if not 0 <= count <= population:
        raise ValueError(f"{count} distinct integers were asked for out of {population}; it must be 0 to {population}")
    if population <= 4 * count + 64:
        return torch.randperm(population, generator=generator, device="cpu")[:count]
    drawn = torch.empty(0, dtype=torch.int64, device="cpu")
    while drawn.shape[0] < count:
        more = 16 + (count - drawn.shape[0]) * 5 // 4
        drawn = torch.cat([drawn, torch.randint(population, (more,), generator=generator, device="cpu")])
        drawn = first_occurrences(drawn)
    return drawn[:count]


def sample_ascending(population: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` distinct integers of ``range(population)``, int64 on the CPU, ascending, without a sort.

    The partial sums of independent exponential gaps, over the last of them, are uniform numbers in order. So draws with
    replacement come out ascending, equal ones side by side. The distinct ones, given how many, are any such set with
    equal probability; a few too many are drawn, and some of them dropped at random.
    """
    if population <= 4 * count + 64:
        taken = torch.zeros(max(0, population), dtype=torch.bool, device="cpu")
        return taken.index_fill_(0, sample_distinct(population, count, generator), True).nonzero().squeeze(1)
    wanted = -population * math.log1p(-count / population)  # of so many draws ``count`` are distinct, on average
    draws = int(wanted + 8 * math.sqrt(wanted) + 16)
    dtype = torch.int32 if population < 2**31 else torch.int64
    while True:
        gaps = torch.rand(draws + 1, dtype=torch.float64, generator=generator, device="cpu").neg_().log1p_().neg_()
        sums = gaps.cumsum_(0)
        drawn = sums[:-1].mul_(population / sums[-1]).to(dtype)
        del gaps, sums
        distinct = drawn[torch.cat([drawn.new_ones(1, dtype=torch.bool), drawn[1:] != drawn[:-1]])]
        spare = distinct.shape[0] - count
        if spare >= 0 and int(distinct[-1]) < population:  # a product may round up
            break
    del drawn
    kept = torch.ones_like(distinct, dtype=torch.bool)
    kept.index_fill_(0, sample_distinct(distinct.shape[0], spare, generator), False)
    return distinct[kept].long()


def first_occurrences(drawn: Tensor) -> Tensor:
    """Drop repetitions, keeping the order: a later draw must not push out an earlier one."""
    ordered, position = drawn.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    del ordered
    return drawn[torch.empty_like(first).index_copy_(0, position, first)]
