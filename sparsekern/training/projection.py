"""The nearest probabilities that a budget allows (VR-PGE)."""

from __future__ import annotations

import torch
from torch import Tensor

PROJECTIONS = ("sort", "bisection")

HALVINGS = 60
"""Of the bisection: an interval of float64 has nothing left to halve then."""


def project(
    wanted: Tensor, costs: Tensor, budget: float, floor: float = 0.0, how: str = "sort", halvings: int = HALVINGS
) -> Tensor:
    """Return the point of ``{floor <= s <= 1, sum(costs * s) <= budget}`` that is nearest to ``wanted``.

    It is ``clip(wanted - v * costs, floor, 1)`` with the smallest ``v >= 0`` that keeps the budget. Computed in float64
    without waiting for the device.

    Args:
        wanted: ``(U,)``, any numbers.
        costs: ``(U,)``, above 0.
        budget: at least ``floor * sum(costs)``.
        floor: the lowest probability, in [0, 1].
        how: ``"sort"``, exact, O(U log U); or ``"bisection"``, ``halvings`` sums over all, never above the budget.
        halvings: of the interval in which v lies.

    Returns:
        ``(U,)``, of the dtype of ``wanted``.

    Raises:
        ValueError: an unknown ``how``, or a budget that the floor alone exceeds.

    Source: Zhou et al. 2021 (arXiv 2111.05685) and its released code, which bisects; the costs are ours.
    """
    if how not in PROJECTIONS:
        raise ValueError(f"projection is {how!r}; it must be one of {', '.join(PROJECTIONS)}")
    if not wanted.numel():
        return wanted.clone()
    z, c = wanted.double(), costs.double()
    shift = _by_sorting(z, c, budget, floor) if how == "sort" else _by_halving(z, c, budget, floor, halvings)
    return (z - shift * c).clamp(floor, 1).to(wanted.dtype)


def _spent(z: Tensor, c: Tensor, shift: Tensor | float, floor: float) -> Tensor:
    return (c * (z - shift * c).clamp(floor, 1)).sum()


def _by_sorting(z: Tensor, c: Tensor, budget: float, floor: float) -> Tensor:
    """Return the shift, from the breakpoints of the piecewise linear cost in order."""
    leaves_one, reaches_floor = (z - 1) / c, (z - floor) / c
    breaks = torch.cat([leaves_one, reaches_floor]).clamp(min=0)
    slopes = torch.cat([-c.square(), c.square()])
    breaks, order = breaks.sort()
    slope = slopes[order].cumsum(0)  # behind each breakpoint; those before 0 count as at 0
    lengths = breaks.diff(prepend=breaks.new_zeros(1))
    before = torch.cat([slope.new_zeros(1), slope[:-1]])
    spent = _spent(z, c, 0.0, floor) + (before * lengths).cumsum(0)
    # The piece in which the budget is met ends at the first breakpoint with no more than it spent.
    end = breaks[(spent > budget).sum().clamp(max=breaks.shape[0] - 1)]
    start = torch.where(breaks < end, breaks, 0).amax()
    # Within it, from who is where: no error of the sums above is left.
    middle = z - (start + end) / 2 * c
    moving = (middle > floor) & (middle < 1)
    fixed = torch.where(middle >= 1, c, torch.where(moving, 0, floor * c)).sum()
    square = torch.where(moving, c.square(), 0).sum()
    shift = (torch.where(moving, c * z, 0).sum() + fixed - budget) / square
    shift = torch.where(square > 0, shift, end).clamp(min=0)
    return torch.where(_spent(z, c, 0.0, floor) <= budget, 0.0, shift)


def _by_halving(z: Tensor, c: Tensor, budget: float, floor: float, halvings: int) -> Tensor:
    low, high = z.new_zeros(()), ((z - floor) / c).amax().clamp(min=0)
    for _ in range(halvings):
        middle = (low + high) / 2
        over = _spent(z, c, middle, floor) > budget
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return torch.where(_spent(z, c, 0.0, floor) <= budget, 0.0, high)
