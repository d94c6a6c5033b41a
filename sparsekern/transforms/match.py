"""How many blocks layers get so that their work is what was asked, in exact integers."""

from __future__ import annotations

from collections.abc import Sequence

from sparsekern.errors import InputError
from sparsekern.topology import DISTRIBUTIONS, Grid
from sparsekern.topology.distributions import fill, share


def match_blocks(
    grids: Sequence[Grid], tokens: Sequence[int], multiply_adds: float, distribution: str = "uniform"
) -> list[int]:
    """Return the blocks of each layer that together come nearest to a number of multiply-adds.

    Each layer has its part of the distribution to within a block; the sum is right to half a block of one layer. A
    block that sticks out of its matrix costs what blocks of that layer cost on average.

    Args:
        grids: of the layers.
        tokens: that each multiplies by.
        multiply_adds: for all of them together.
        distribution: how they are shared out; :func:`sparsekern.topology.allocate`.

    Raises:
        ValueError: too few for a block in each layer, more than all layers full, or an unknown distribution.
    """
    if distribution not in DISTRIBUTIONS:
        raise InputError(
            f"distribution is {distribution!r}; it must be one of {', '.join(DISTRIBUTIONS)}", parameter="distribution"
        )
    costs = [count * grid.numel / grid.cells for grid, count in zip(grids, tokens, strict=True)]
    full = [grid.cells * cost for grid, cost in zip(grids, costs, strict=True)]
    if multiply_adds < sum(costs):
        raise InputError(
            f"{multiply_adds:.0f} multiply-adds are left for {len(grids)} sparse layer(s), and one block in each takes "
            f"{sum(costs):.0f}: use smaller blocks or another sparsity"
        )
    if multiply_adds > sum(full) + max(costs) / 2:
        raise InputError(
            f"{multiply_adds:.0f} multiply-adds are to be spent in {len(grids)} sparse layer(s) that take "
            f"{sum(full):.0f} when full: choose a higher sparsity, or fewer candidates (pool)"
        )
    shares = [cost * share(grid, distribution) for grid, cost in zip(grids, costs, strict=True)]
    total = min(float(multiply_adds), sum(full))
    amounts = [work / cost for work, cost in zip(fill(shares, costs, full, total), costs, strict=True)]
    low = [min(grid.cells, int(amount + 1e-9)) for grid, amount in zip(grids, amounts, strict=True)]
    high = [min(grid.cells, n + 1) for grid, n in zip(grids, low, strict=True)]
    blocks = list(low)
    left = multiply_adds - sum(n * cost for n, cost in zip(blocks, costs, strict=True))
    order = sorted(range(len(grids)), key=lambda i: low[i] - amounts[i])  # largest remainders first
    for i in [*order, *sorted(order, key=lambda i: -costs[i])]:  # then whatever brings the sum nearer, large ones first
        for n in (low[i], high[i]):
            rest = left - (n - blocks[i]) * costs[i]
            if abs(rest) < abs(left):
                blocks[i], left = n, rest
    return blocks
