"""The number of blocks of each layer, from one sparsity for the whole network."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparsekern.errors import InputError
from sparsekern.topology.arguments import check_choice, check_number
from sparsekern.topology.grid import Grid

DISTRIBUTIONS = ("uniform", "er", "er-matrix", "erk")


def allocate(grids: Sequence[Grid], sparsity: float, distribution: str = "uniform") -> list[int]:
    """Return the number of blocks of each layer; all together they are ``round((1 - sparsity) * cells)``.

    ``uniform`` gives all layers the same density. The other distributions give linear layers blocks in proportion to
    ``R + C`` (Erdos-Renyi; Mocanu et al. 2018), and convolutions with ``taps = kh * kw`` in proportion to:

    * ``er`` (Evci et al. 2020, section 3): ``taps * (R + CB)``; each tap counts as a linear layer.
    * ``er-matrix`` (the code of Heddes et al. 2024): ``R + taps * CB``; the matrix is ``Cout x (taps * Cin)``.
    * ``erk`` (Evci et al. 2020, section 3): ``R + CB + (kh + kw) / sqrt(bo * bi)``; the kernel is scaled to the unit of
      the other terms, and with 1x1 blocks this is the formula of the paper.

    Blocks that do not fit into a layer go to the others in the same proportion. Every layer gets at least one block.

    Args:
        grids: the grids of the layers.
        sparsity: fraction of all blocks together that is not stored, in [0, 1).
        distribution: ``"uniform"``, ``"er"``, ``"er-matrix"`` or ``"erk"``.

    Raises:
        ValueError: the sparsity is outside [0, 1), the distribution is unknown, or there are fewer blocks than layers.
    """
    check_sparsity(sparsity)
    check_distribution(distribution)
    cells = [grid.cells for grid in grids]
    total = blocks_at(sparsity, sum(cells))
    if total < len(grids):
        raise InputError(
            f"sparsity {sparsity} leaves {total} of {sum(cells)} blocks for {len(grids)} layer(s); every layer needs "
            "at least one: lower the sparsity or use smaller blocks",
            parameter="sparsity",
        )
    shares = [share(grid, distribution) for grid in grids]
    return round_to_sum(fill(shares, [1.0] * len(grids), [float(c) for c in cells], float(total)), total)


def share(grid: Grid, distribution: str) -> float:
    """Return the number to which the blocks of a layer are proportional; see :func:`allocate`."""
    if distribution == "uniform":
        return float(grid.cells)
    if distribution == "er-matrix" or grid.kernel is None:
        return float(grid.rows + grid.cols)
    if distribution == "er":
        return float((grid.rows + grid.tap_cols) * grid.taps)
    return grid.rows + grid.tap_cols + sum(grid.kernel) / math.sqrt(grid.block[0] * grid.block[1])


def check_distribution(distribution: str) -> None:
    """Raise ValueError unless ``distribution`` is one of :data:`DISTRIBUTIONS`."""
    check_choice("distribution", distribution, DISTRIBUTIONS)


def check_sparsity(sparsity: float, name: str = "sparsity") -> None:
    """Raise ValueError unless ``sparsity``, the argument ``name``, is in [0, 1); TypeError if it is no number."""
    check_number(name, sparsity, "a number in [0, 1)")
    if not 0 <= sparsity < 1:
        hint = f" (did you mean {sparsity / 100:g}?)" if 1 < sparsity < 100 else ""
        raise InputError(
            f"{name} is {sparsity}; it is the fraction absent and must be in [0, 1){hint}",
            parameter=name,
        )


def blocks_at(sparsity: float, cells: int) -> int:
    """Return ``(1 - sparsity) * cells``, rounded to the nearest integer, halves up.

    A small tolerance makes up for the rounding of decimal fractions: in floating point ``1 - 0.9`` is less than 0.1.
    """
    return math.floor(cells - sparsity * cells + 0.5 + 1e-9)


def fill(shares: list[float], low: list[float], high: list[float], total: float) -> list[float]:
    """Return amounts in proportion to ``shares``, limited to [low, high], that add up to ``total``.

    Distributes the total in proportion, fixes the layers that break a bound, and repeats with the others. If both
    bounds are broken, the side with the larger excess is fixed first; it never has to be undone.
    """
    amounts = [0.0] * len(shares)
    open_ = list(range(len(shares)))
    left = total
    while open_:
        scale = left / sum(shares[i] for i in open_)
        above = [i for i in open_ if shares[i] * scale > high[i]]
        below = [i for i in open_ if shares[i] * scale < low[i]]
        if not above and not below:
            for i in open_:
                amounts[i] = shares[i] * scale
            break
        excess = sum(shares[i] * scale - high[i] for i in above)
        lack = sum(low[i] - shares[i] * scale for i in below)
        fixed, bound = (above, high) if excess >= lack else (below, low)
        for i in fixed:
            amounts[i] = bound[i]
            left -= bound[i]
        open_ = [i for i in open_ if i not in fixed]
    return amounts


def round_to_sum(amounts: list[float], total: int) -> list[int]:
    """Round to integers with the sum ``total``: round down, then add 1 to those with the largest remainders."""
    floors = [math.floor(amount + 1e-9) for amount in amounts]
    order = sorted(range(len(amounts)), key=lambda i: floors[i] - amounts[i])
    for i in order[: total - sum(floors)]:
        floors[i] += 1
    return floors
