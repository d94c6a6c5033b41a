"""Projection of probabilities onto a budget, and the choice of the most probable units within it (VR-PGE)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsekern.errors import InputError

PROJECTIONS = ("sort", "bisection")

HALVINGS = 60
"""Number of halvings after which an interval of float64 cannot be halved further."""

NEAR = 1e-12
"""Relative change of the shift below which Newton's method stops."""

CHUNK = 2**16
"""Number of units that are processed at a time in float64. Breakpoints are sorted for no more than these."""


def project(
    wanted: Tensor, costs: Tensor, budget: float, floor: float = 0.0, how: str = "sort", halvings: int = HALVINGS
) -> Tensor:
    """Return the point of ``{floor <= s <= 1, sum(costs * s) <= budget}`` that is nearest to ``wanted``.

    That is ``clip(wanted - v * costs, floor, 1)`` with the smallest ``v >= 0`` that keeps the budget. Computed in
    float64, without synchronising the device.

    Args:
        wanted: ``(U,)``.
        costs: ``(U,)``, above 0.
        budget: at least ``floor * sum(costs)``.
        floor: the lowest probability, in [0, 1].
        how: ``"sort"``: exact, O(U log U), and by Newton's method, in about a dozen sums over all units, where there
            are more than :data:`CHUNK`; or ``"bisection"``: ``halvings`` sums over all units, never above the budget.
        halvings: number of times that the interval of v is halved.

    Returns:
        ``(U,)``, of the dtype of ``wanted``.

    Raises:
        ValueError: ``how`` is unknown.

    Source: Zhou et al. 2021 (arXiv 2111.05685), whose released code bisects; the costs are an addition.
    """
    if how not in PROJECTIONS:
        raise InputError(f"projection is {how!r}; it must be one of {', '.join(PROJECTIONS)}", parameter="projection")
    if not wanted.numel():
        return wanted.clone()
    if how == "bisection":
        shift = _by_halving(wanted, costs, budget, floor, halvings)
    elif wanted.numel() <= CHUNK:
        shift = _by_sorting(wanted.double(), costs.double(), budget, floor)
    else:
        shift = _by_newton(wanted, costs, budget, floor)
    near = torch.empty_like(wanted)
    for into, (z, c) in zip(near.split(CHUNK), _chunks(wanted, costs), strict=True):
        into.copy_((z - shift * c).clamp_(floor, 1))
    return near


def _chunks(wanted: Tensor, costs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield both, :data:`CHUNK` units at a time, in float64."""
    for z, c in zip(wanted.split(CHUNK), costs.split(CHUNK), strict=True):
        yield z.double(), c.double()


def _spent(z: Tensor, c: Tensor, shift: Tensor | float, floor: float) -> Tensor:
    return (c * (z - shift * c).clamp(floor, 1)).sum()


def _spent_by_all(wanted: Tensor, costs: Tensor, shift: Tensor | float, floor: float) -> Tensor:
    parts = [_spent(z, c, shift, floor) for z, c in _chunks(wanted, costs)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _highest_shift(wanted: Tensor, costs: Tensor, floor: float) -> Tensor:
    """Return the shift at which the last unit reaches the floor."""
    return torch.stack([((z - floor) / c).amax() for z, c in _chunks(wanted, costs)]).amax().clamp(min=0)


def _by_sorting(z: Tensor, c: Tensor, budget: float, floor: float) -> Tensor:
    """Return the shift from the sorted breakpoints of the piecewise linear cost."""
    leaves_one, reaches_floor = (z - 1) / c, (z - floor) / c
    breaks = torch.cat([leaves_one, reaches_floor]).clamp(min=0)
    slopes = torch.cat([-c.square(), c.square()])
    breaks, order = breaks.sort()
    slope = slopes[order].cumsum(0)  # after each breakpoint; those below 0 count as 0
    lengths = breaks.diff(prepend=breaks.new_zeros(1))
    before = torch.cat([slope.new_zeros(1), slope[:-1]])
    spent = _spent(z, c, 0.0, floor) + (before * lengths).cumsum(0)
    # The piece that meets the budget ends at the first breakpoint where no more than the budget is spent.
    end = breaks[(spent > budget).sum().clamp(max=breaks.shape[0] - 1)]
    start = torch.where(breaks < end, breaks, 0).amax()
    # Solve it from the units that are neither at the floor nor at 1, without the rounding of the sums above.
    middle = z - (start + end) / 2 * c
    moving = (middle > floor) & (middle < 1)
    fixed = torch.where(middle >= 1, c, torch.where(moving, 0, floor * c)).sum()
    square = torch.where(moving, c.square(), 0).sum()
    shift = (torch.where(moving, c * z, 0).sum() + fixed - budget) / square
    shift = torch.where(square > 0, shift, end).clamp(min=0)
    return torch.where(_spent(z, c, 0.0, floor) <= budget, 0.0, shift)


def _by_newton(wanted: Tensor, costs: Tensor, budget: float, floor: float) -> Tensor:
    """Return the shift by Newton's method, which is exact once it is in the piece that meets the budget.

    The cost is not convex, and Newton's steps alone may cycle. So a step that leaves the interval of the shift, or
    follows one that did not halve the interval, goes to its middle. Returns, of all shifts tried, the one whose cost is
    nearest to the budget.
    """
    shift = low = costs.new_zeros((), dtype=torch.float64)
    high = _highest_shift(wanted, costs, floor)
    width, best, gap = torch.full_like(high, torch.inf), shift, torch.full_like(high, torch.inf)
    within: Tensor | None = None
    for _ in range(HALVINGS):
        spent, square = torch.zeros_like(shift), torch.zeros_like(shift)
        for z, c in _chunks(wanted, costs):
            at = z - shift * c
            moving = (at > floor) & (at < 1)
            spent += (c * at.clamp_(floor, 1)).sum()
            square += torch.where(moving, c.square(), 0).sum()
        within = spent <= budget if within is None else within
        low, high = torch.where(spent > budget, shift, low), torch.where(spent > budget, high, shift)
        nearer = (spent - budget).abs() < gap
        best, gap = torch.where(nearer, shift, best), torch.where(nearer, (spent - budget).abs(), gap)
        halved, width = 2 * (high - low) <= width, high - low
        into = shift + (spent - budget) / square
        done = into.isfinite() & ((into - shift).abs() <= NEAR * into)
        best = torch.where(done, into, best)
        shift = torch.where(done | (halved & (into > low) & (into < high)), into, (low + high) / 2)
        if shift.device.type == "cpu" and bool(done | within):  # elsewhere the test would synchronise the device
            break
    assert within is not None
    return torch.where(within, 0.0, best)


def _by_halving(wanted: Tensor, costs: Tensor, budget: float, floor: float, halvings: int) -> Tensor:
    low, high = costs.new_zeros((), dtype=torch.float64), _highest_shift(wanted, costs, floor)
    for _ in range(halvings):
        middle = (low + high) / 2
        over = _spent_by_all(wanted, costs, middle, floor) > budget
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return torch.where(_spent_by_all(wanted, costs, 0.0, floor) <= budget, 0.0, high)


def top_units(probabilities: Tensor, costs: Tensor, budget: float) -> Tensor:
    """Return a mask ``(U,)`` of the most probable units whose costs keep the budget; ties go to the first."""
    order = probabilities.argsort(descending=True, stable=True)
    fits = costs.double()[order].cumsum(0) <= budget * (1 + 1e-9)
    return torch.zeros_like(fits).index_copy_(0, order, fits)
