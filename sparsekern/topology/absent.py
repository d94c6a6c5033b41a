"""Uniform draws of cells that hold no block, in memory proportional to the blocks and never to the grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.topology.places import places_for


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
        ``(count,)`` int32 keys on the device of ``present``, in random order unless ``ordered``.

    Raises:
        ValueError: fewer than ``count`` cells are absent.
    """
    absent = cells - present.shape[0]
    if count > absent:
        raise InputError(f"{count} blocks were to be added, but only {absent} of {cells} cells are empty")
    present = present.int()
    if ordered and 4 * count + 64 < 3 * absent:
        return _sample_ascending(present, cells, count, generator)
    ranks = sample_distinct(absent, count, generator).to(present.device)
    ranks = ranks.sort().values if ordered else ranks
    # A present key p has p - position(p) absent cells before it. The absent cell of rank j is therefore j plus the
    # number of present keys with at most j absent cells before them.
    position = torch.arange(present.shape[0], dtype=torch.int32, device=present.device)
    return ranks.add_(torch.searchsorted(present - position, ranks, right=True, out_int32=True))


def _sample_ascending(present: Tensor, cells: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw a few too many cells with replacement, drop those that are present or repeated, and some more at random.

    The cells that are left before the last step, given how many, are any such set with equal probability.
    """
    absent = cells - present.shape[0]
    wanted = -cells * math.log1p(-count / absent)  # of so many draws ``count`` are distinct and absent, on average
    draws = int(wanted + 8 * math.sqrt(wanted) * cells / absent + 16)
    while True:
        drawn = torch.randint(cells, (draws,), generator=generator, dtype=torch.int32, device="cpu").to(present.device)
        kernels = places_for(drawn, present)
        keys = kernels.distinct(drawn, present, cells)
        spare = keys.shape[0] - count
        if spare >= 0:
            break
    left_out = sample_distinct(keys.shape[0], spare, generator).sort().values
    return kernels.leave_out_(keys, left_out.long().to(present.device))


def sample_distinct(population: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` distinct integers ``(count,)`` of ``range(population)``, int32 on the CPU, in random order.

    The population is below 2**31.

    Draws with replacement and keeps first occurrences, unless the population is small enough to be shuffled: so the
    memory is O(count).

    Raises:
        ValueError: there are fewer.
    """
    if not 0 <= count <= population:
        raise InputError(f"{count} distinct integers were asked for out of {population}; it must be 0 to {population}")
    if population <= 4 * count + 64:
        return torch.randperm(population, generator=generator, dtype=torch.int32, device="cpu")[:count]
    drawn = nothing = torch.empty(0, dtype=torch.int32, device="cpu")
    while drawn.shape[0] < count:
        more = 16 + (count - drawn.shape[0]) * 5 // 4
        again = torch.randint(population, (more,), generator=generator, dtype=torch.int32, device="cpu")
        drawn = torch.cat([drawn, again])
        drawn = drawn[places_for(drawn).first_occurrences(drawn, nothing, population)]
    return drawn[:count]
