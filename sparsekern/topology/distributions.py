"""How many blocks each layer gets, in exact integers, from one sparsity for the whole network."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparsekern.errors import InputError
from sparsekern.topology.arguments import check_number
from sparsekern.topology.grid import Grid

DISTRIBUTIONS = ("uniform", "er", "er-matrix", "erk")


def allocate(grids: Sequence[Grid], sparsity: float, distribution: str = "uniform") -> list[int]:
    """Return the number of blocks of each layer, of whose ``grids`` together ``round((1 - sparsity) * cells)``.

    ``uniform`` gives all layers the same density. The others are the same for linear layers, which get blocks in
    proportion to ``R + C`` (Erdos-Renyi; Mocanu et al. 2018), and differ for convolutions of ``taps = kh * kw``:

    * ``er`` (Evci et al. 2020, section 3): ``taps * (R + CB)``, for each tap as for a linear layer.
    * ``er-matrix`` (the code of Heddes et al. 2024): ``R + taps * CB``, as for the matrix ``Cout x (taps * Cin)``.
    * ``erk`` (Evci et al. 2020, section 3): ``R + CB + (kh + kw) / sqrt(bo * bi)``, the kernel counted in the unit of
      the rest: elements at 1x1, as in the paper.

    What a layer cannot hold goes to the others in the same proportion. Every layer keeps at least one block.

    Raises:
        ValueError: sparsity outside [0, 1), an unknown distribution, or fewer blocks than layers.
    """
    check_sparsity(sparsity)
    if distribution not in DISTRIBUTIONS:
        raise InputError(
            f"distribution is {distribution!r}; it must be one of {', '.join(DISTRIBUTIONS)}", parameter="distribution"
        )
    cells = [grid.cells for grid in grids]
    total = blocks_at(sparsity, sum(cells))
    if total < len(grids):
        raise InputError(
            f"sparsity {sparsity} leaves {total} of {sum(cells)} blocks for {len(grids)} layer(s); every layer needs "
            "at least one: lower the sparsity or use smaller blocks"
        )
    shares = [share(grid, distribution) for grid in grids]
    return round_to_sum(fill(shares, [1.0] * len(grids), [float(c) for c in cells], float(total)), total)


def share(grid: Grid, distribution: str) -> float:
    """Return the number that a layer's blocks are in proportion to; see :func:`allocate`."""
    if distribution == "uniform":
        return float(grid.cells)
    if distribution == "er-matrix" or grid.kernel is None:
        return float(grid.rows + grid.cols)
    if distribution == "er":
        return float((grid.rows + grid.tap_cols) * grid.taps)
    return grid.rows + grid.tap_cols + sum(grid.kernel) / math.sqrt(grid.block[0] * grid.block[1])


def check_sparsity(sparsity: float) -> None:
    """Raise ValueError unless ``sparsity`` is in [0, 1); TypeError if it is no number."""
    check_number("sparsity", sparsity, "a number in [0, 1)")
    if not 0 <= sparsity < 1:
        hint = f" (did you mean {sparsity / 100:g}?)" if 1 < sparsity < 100 else ""
        raise InputError(
            f"sparsity is {sparsity}; it is the fraction absent and must be in [0, 1){hint}", parameter="sparsity"
        )


def blocks_at(sparsity: float, cells: int) -> int:
    """Return ``(1 - sparsity) * cells`` rounded to the nearest integer, halves up.

    ``1 - 0.9`` is a little less than 0.1, and 0.9 a little more than nine tenths: what is meant as a half must not be
    rounded down for it.
    """
    return math.floor(cells - sparsity * cells + 0.5 + 1e-9)


def fill(shares: list[float], low: list[float], high: list[float], total: float) -> list[float]:
    """Return amounts in proportion to ``shares``, clipped to [low, high], that add up to ``total``.

    Repeats: distribute what is left in proportion, fix the layers that break a bound, until none does. Of the two
    kinds of breach the larger one in sum is fixed first, which never has to be taken back.
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
    """Round by largest remainders: floor everything, then give the missing units to the largest fractions."""
    floors = [math.floor(amount + 1e-9) for amount in amounts]
    order = sorted(range(len(amounts)), key=lambda i: floors[i] - amounts[i])
    for i in order[: total - sum(floors)]:
        floors[i] += 1
    return floors
