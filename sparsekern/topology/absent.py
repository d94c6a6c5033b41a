"""Uniform draws of cells that hold no block, in memory proportional to the blocks and never to the grid."""

from __future__ import annotations

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
        ordered: return them ascending, which is faster than to sort them afterwards.

    Returns:
        ``(count,)`` int64 keys on the device of ``present``, in the order drawn unless ``ordered``.

    Raises:
        ValueError: fewer than ``count`` cells are absent.
    """
    absent = cells - present.shape[0]
    if count > absent:
        raise ValueError(f"{count} blocks were to be added, but only {absent} of {cells} cells are empty")
    ranks = sample_distinct(absent, count, generator).to(present.device)
    if ordered:
        ranks = ranks.sort().values
    # A present key p has p - position(p) absent cells before it. The absent cell of rank j is therefore j plus the
    # number of present keys with at most j absent cells before them.
    position = torch.arange(present.shape[0], device=present.device)
    return ranks + torch.searchsorted(present.long() - position, ranks, right=True)


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


def first_occurrences(drawn: Tensor) -> Tensor:
    """Drop repetitions, keeping the order: a later draw must not push out an earlier one."""
    ordered, position = drawn.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    del ordered
    return drawn[torch.empty_like(first).index_copy_(0, position, first)]
