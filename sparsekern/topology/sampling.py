"""Random draws of cells, and the generators they come from, in memory proportional to the blocks, not to the grid."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekern.errors import InputError
from sparsekern.topology.arguments import check_whole
from sparsekern.topology.topology import places_for

ROUNDS = 8
"""Maximum number of rounds in :func:`sample_absent_pairs`; each draws at most twice as many cells as the one before."""

CHUNK = 2**15
"""Pairs drawn at a time, so that intermediate tensors stay in the cache."""


def generator_for(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU generator that depends on a seed and names only, such as a layer's name and a purpose.

    All random decisions of the package are drawn on the CPU, so they are the same on every device and every rank.

    Args:
        seed: a whole number.
        names: what the numbers are for; other names give independent numbers.

    Raises:
        TypeError: the seed is not a whole number.
    """
    check_whole("seed", seed)
    digest = hashlib.sha256(repr((int(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def sample_absent(
    present: Tensor, cells: int, count: int, generator: torch.Generator, *, ordered: bool = False
) -> Tensor:
    """Draw ``count`` distinct cells outside ``present``; every such set is equally likely.

    Args:
        present: ``(n,)`` distinct keys of the cells to avoid, ascending, on any device.
        cells: number of cells; keys are 0 to ``cells - 1``.
        count: number of cells to draw.
        generator: a CPU generator.
        ordered: return the keys ascending, which is faster than in random order.

    Returns:
        ``(count,)`` int32 keys on the device of ``present``, in random order unless ``ordered``.

    Raises:
        ValueError: fewer than ``count`` cells are absent.
    """
    absent = cells - present.shape[0]
    if count > absent:
        raise InputError(
            f"count is {count}, but only {absent} of {cells} cells are empty; draw fewer blocks", parameter="count"
        )
    present = present.int()
    if ordered and 4 * count + 64 < 3 * absent:
        return _sample_ascending(present, cells, count, generator)
    ranks = sample_distinct(absent, count, generator).to(present.device)
    ranks = ranks.sort().values if ordered else ranks
    # There are p - position(p) absent cells before a present key p. The absent cell of rank j is therefore j plus the
    # number of present keys with at most j absent cells before them.
    position = torch.arange(present.shape[0], dtype=torch.int32, device=present.device)
    return ranks.add_(torch.searchsorted(present - position, ranks, right=True, out_int32=True))


def _sample_ascending(present: Tensor, cells: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw more cells than needed with replacement, drop present and repeated ones, then drop the surplus at random.

    Given their number, the cells left before the last step are a uniformly random set.
    """
    absent = cells - present.shape[0]
    wanted = -cells * math.log1p(-count / absent)  # draws that give ``count`` distinct absent cells on average
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
    """Draw distinct integers from ``range(population)``, in random order, in memory proportional to ``count``.

    A small population is shuffled. From a larger one numbers are drawn with replacement, and first occurrences kept.

    Args:
        population: number of integers to draw from, below 2**31.
        count: how many to draw.
        generator: a CPU generator.

    Returns:
        ``(count,)`` int32 on the CPU.

    Raises:
        ValueError: ``count`` is negative or above the population.
    """
    if not 0 <= count <= population:
        raise InputError(
            f"count is {count}, for distinct integers of {population}; it must be 0 to {population}", parameter="count"
        )
    if population <= 4 * count + 64:
        return torch.randperm(population, generator=generator, dtype=torch.int32, device="cpu")[:count]
    drawn = nothing = torch.empty(0, dtype=torch.int32, device="cpu")
    while drawn.shape[0] < count:
        more = 16 + (count - drawn.shape[0]) * 5 // 4
        again = torch.randint(population, (more,), generator=generator, dtype=torch.int32, device="cpu")
        drawn = torch.cat([drawn, again])
        drawn = drawn[places_for(drawn).first_occurrences(drawn, nothing, population)]
    return drawn[:count]


def sample_pairs(rows: Tensor, cols: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw cells independently, cell ``(r, c)`` with probability proportional to ``rows[r] * cols[c]``.

    The joint distribution is never formed.

    Args:
        rows: ``(R,)`` weights, not negative; they need not add up to 1.
        cols: ``(C,)`` weights, likewise; or ``(G, C)`` if the rows form G equal groups with weights of their own. At
            least one cell must have a weight above 0.
        count: number of cells to draw, with replacement.
        generator: a CPU generator.

    Returns:
        ``(count,)`` int32 keys ``row * C + col`` on the CPU, in the order drawn; repetitions are kept.
    """
    by_row = _edges(row_weights(rows, cols))
    groups, width = cols.shape if cols.dim() == 2 else (1, cols.shape[0])
    by_col = _edges(cols.to("cpu", torch.float64).flatten())
    keys = torch.empty(count, dtype=torch.int32, device="cpu")
    for some in keys.split(CHUNK):
        row = _sample(by_row[1:], by_row[0], by_row[-1], some.shape[0], generator)
        if groups == 1:
            col = _sample(by_col[1:], by_col[0], by_col[-1], some.shape[0], generator)
        else:
            first = row // (rows.shape[0] // groups) * width  # where the weights of the row's group begin
            col = _sample(by_col[1:], by_col[first], by_col[first + width], some.shape[0], generator) - first
        torch.add(row * width, col, out=some)
    return keys


def row_weights(rows: Tensor, cols: Tensor) -> Tensor:
    """Return the sum of the weights of all cells in each row, ``(R,)`` float64 on the CPU.

    Args:
        rows, cols: weights as in :func:`sample_pairs`.
    """
    together = cols.to("cpu", torch.float64).sum(-1)
    each = together if cols.dim() == 1 else together.repeat_interleave(rows.shape[0] // cols.shape[0])
    return rows.to("cpu", torch.float64) * each


def _edges(weights: Tensor) -> Tensor:
    """Return the cumulative weights, starting with 0."""
    return pad(weights.cumsum(0), (1, 0))


def _sample(edges: Tensor, low: Tensor, high: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Invert cumulative weights from ``low`` to below ``high``; a category of weight zero is never drawn."""
    drawn = torch.rand(count, dtype=torch.float64, device="cpu", generator=generator)
    drawn.mul_(high - low).add_(low).clamp_(max=high.nextafter(low))  # the sum may be rounded up to high
    return places_for(edges).search(edges, drawn)


def sample_absent_pairs(present: Tensor, rows: Tensor, cols: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw up to ``count`` distinct cells outside ``present``, one after the other as :func:`sample_pairs` does.

    Cells that are present or already drawn are dropped. The result is shorter if the weights make too few other cells
    likely enough.

    Args:
        present: ``(n,)`` distinct keys to avoid, ascending.
        rows, cols, count, generator: as in :func:`sample_pairs`.

    Returns:
        ``(count,)`` or fewer int32 keys on the CPU, in the order drawn.
    """
    present, cells = present.to("cpu", torch.int32), rows.shape[0] * cols.shape[-1]
    drawn = torch.empty(0, dtype=torch.int32, device="cpu")
    more = 16 + count * 5 // 4
    for _ in range(ROUNDS if count else 0):
        before = drawn.shape[0]
        drawn = torch.cat([drawn, sample_pairs(rows, cols, more, generator)])
        drawn = drawn[places_for(drawn).first_occurrences(drawn, present, cells)]
        if drawn.shape[0] >= count:
            break
        useful = (drawn.shape[0] - before) / more  # fraction of the draws; it decreases from round to round
        more = min(2 * more, 16 + int(1.5 * (count - drawn.shape[0]) / max(useful, 1e-9)))
    return drawn[:count]


def distinct_absent(keys: Tensor, present: Tensor, cells: int) -> Tensor:
    """Return the distinct ``keys`` that are not in ``present``, ascending.

    Args:
        keys: ``(n,)`` int32 keys below ``cells``.
        present: ``(m,)`` int32 keys below ``cells``, distinct and ascending.
        cells: number of cells.
    """
    return places_for(keys, present).distinct(keys, present, cells)


def are_absent(keys: Tensor, present: Tensor, cells: int) -> Tensor:
    """Return ``(n,)`` bool: whether each key is not in ``present``.

    Args:
        keys: ``(n,)`` keys below ``cells``.
        present: ``(m,)`` keys below ``cells``, distinct and ascending.
        cells: number of cells.
    """
    keys, present = keys.int(), present.int()
    return places_for(keys, present).find(present, keys, cells) < 0
