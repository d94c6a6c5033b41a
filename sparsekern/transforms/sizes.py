"""Sizes of transformed layers from one sparsity (Thangarasa et al., "Sparse-IFT", ICML 2024, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsekern.errors import InputError
from sparsekern.topology import Grid, block_pair
from sparsekern.topology.distributions import check_distribution, fill, share

SMALLEST_MULTIPLE = 8
"""Widths and ranks are multiples of at least this number, because odd ones are slow on all hardware."""


@dataclass(frozen=True)
class Width:
    """The width of a network to build: ``width(512)`` returns the features of a layer that has 512 when dense.

    Args:
        multiplier: factor on the number of features, 1 or more.
        multiple: widths are rounded to the nearest multiple of this number, but never below the dense width.
    """

    multiplier: float = 1.0
    multiple: int = 1

    def __call__(self, features: int) -> int:
        """Return the features of a layer that has ``features`` in the dense network."""
        nearest = math.floor(features * self.multiplier / self.multiple + 0.5)
        return self.multiple * max(nearest, -(-features // self.multiple))


def wide_width(sparsity: float, block_size: int | tuple[int, int]) -> Width:
    """Return the width of a Sparse Wide network, ``sqrt(1 / (1 - s))``, in whole blocks."""
    return Width(math.sqrt(1 / (1 - sparsity)), math.lcm(SMALLEST_MULTIPLE, *block_pair(block_size)))


def parallel_branches(sparsity: float) -> int:
    """Return the number of branches of Sparse Parallel, ``1 / (1 - s)`` rounded, halves up."""
    return math.floor(1 / (1 - sparsity) + 0.5)


def factorized_features(inputs: int, outputs: int, sparsity: float, multiple: int) -> int:
    """Return the features between the factors, ``in * out / ((in + out) (1 - s))``, rounded up to a multiple.

    Args:
        inputs: inputs of the first factor; for a convolution, taps times input channels.
        outputs: outputs of the second factor.
        sparsity: sparsity of both factors.
        multiple: side of the blocks.
    """
    features = inputs * outputs / ((inputs + outputs) * (1 - sparsity))
    return multiple * math.ceil(features / multiple - 1e-9)


def doped_rank(inputs: int, outputs: int, sparsity: float) -> int:
    """Return the rank of the dense path of Sparse Doped, ``s * in * out / (in + out)``.

    It is rounded down to a multiple of 8, so that the sparse path keeps its share, and is at least 1.
    """
    rank = math.floor(sparsity * inputs * outputs / (inputs + outputs) + 1e-9)
    return rank // SMALLEST_MULTIPLE * SMALLEST_MULTIPLE or max(1, rank)


def match_blocks(
    grids: Sequence[Grid], tokens: Sequence[int], multiply_adds: float, distribution: str = "uniform"
) -> list[int]:
    """Return the number of blocks of each layer that together come nearest to a number of multiply-adds.

    Each layer is within one block of its share, and the sum within half a block of one layer. Blocks that extend beyond
    the matrix cost the average of their layer.

    Args:
        grids: the grids of the layers.
        tokens: number of tokens of each layer.
        multiply_adds: multiply-adds of all layers together.
        distribution: how they are distributed; see :func:`sparsekern.topology.allocate`.

    Raises:
        ValueError: there are too few for a block in each layer or too many for all layers, or the distribution is
            unknown.
    """
    check_distribution(distribution)
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
