"""The units among which VR-PGE chooses, the budget of what may remain, and the projection on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse
from sparsekern.topology import Move, Topology, Units, one_tap, ordered_keys, sample_absent, to_places
from sparsekern.topology.arguments import check_choice, check_number
from sparsekern.training.scores import part_that_remains

Group = str | Callable[[BlockSparse], Tensor]
"""``"block"``, ``"row"``, ``"column"``, or a function that returns a whole number ``(Z,)`` for each slot of a layer."""

PROJECTIONS = ("sort", "bisection")

CHUNK = 2**16
"""Number of slots or units that are processed at a time: temporaries are many times as large."""

HALVINGS = 60
"""Number of halvings after which an interval of float64 cannot be halved further."""

NEAR = 1e-12
"""Relative change of the shift below which Newton's method stops."""


class Candidates:
    """The stored blocks of a layer in units, each of which is kept or left out as a whole.

    The unit of a slot never changes, whatever place the slot moves to.

    Args:
        layer: with at least one block.
        group: what forms a unit. ``"block"``: each block (with tied taps, the same channels of all taps); ``"row"``: a
            block row, that is some output features; ``"column"``: a block column of all taps; or a function of the
            layer that returns a number for each slot: slots of equal numbers form a unit.

    Attributes:
        count: number of units.
        unit: ``(Z,)`` int32, the unit of each slot; ``count`` for a free slot.

    Raises:
        ValueError: the group is unknown, a function returns something else, or the layer has no block.
    """

    def __init__(self, layer: BlockSparse, group: Group) -> None:
        topology, grid = layer.topology, layer.grid
        self.layer = layer
        self.may_move = group == "block"
        used = topology.used()
        if group == "block" and not layer.tie_taps:  # a unit a slot, in the order of the slots
            self.count = topology.blocks()
            self._check()
            self.unit = used.cumsum(0, dtype=torch.int32).sub_(1).masked_fill_(~used, self.count)
            return
        row, channel = topology.row.long(), topology.col.long() % grid.tap_cols
        if callable(group):
            label = group(layer)
            if not isinstance(label, Tensor) or label.shape != row.shape or label.is_floating_point():
                what = f"{label.dtype} {tuple(label.shape)}" if isinstance(label, Tensor) else type(label).__name__
                raise InputError(f"group returned {what}; it must return whole numbers ({row.shape[0]},), one a slot")
            label = label.to(row.device).long()
        elif group == "block":
            label = row * grid.tap_cols + channel
        elif group == "row":
            label = row
        else:
            check_choice("group", group, ("block", "row", "column"), " or a function of the layer")
            label = row // grid.group_rows * grid.tap_cols + channel
        names, units = label[used].unique(return_inverse=True)
        self.count = names.shape[0]
        self._check()
        self.unit = torch.full_like(topology.row, self.count).masked_scatter_(used, units.int())

    def _check(self) -> None:
        if not self.count:
            raise InputError("the layer has no block to choose from; store some, at a lower sparsity")

    def costs(self) -> Tensor:
        """Return the number of real elements of each unit, ``(count,)`` float64."""
        grid, topology = self.layer.grid, self.layer.topology
        total = torch.zeros(self.count + 1, dtype=torch.float64, device=topology.row.device)
        for row, col, unit in zip(*(t.split(CHUNK) for t in (topology.row, topology.col, self.unit)), strict=True):
            total.index_add_(0, unit, (grid.real_rows(row.long()) * grid.real_cols(col.long())).double())
        return total[: self.count]

    def slots(self, units: Tensor) -> Tensor:
        """Return a mask ``(Z,)`` of the slots that belong to the units of a mask ``(count,)``."""
        padded = torch.nn.functional.pad(units.to(self.unit.device), (0, 1))
        return padded.index_select(0, self.unit)

    def refill(self, dead: Tensor, limit: int, generator: torch.Generator) -> Move:
        """Return the move of units to empty places drawn at random; synchronises the device.

        Args:
            dead: ``(count,)`` bool, the units that may move. Those that do are drawn among them.
            limit: the largest number of units to move.
            generator: on the CPU.
        """
        layer, grid = self.layer, self.layer.grid
        units = dead.to(layer.row.device).nonzero().squeeze(1)
        if not units.shape[0]:
            return to_places(units, units, grid)
        if layer.tie_taps:
            taps = grid.taps
            order = self.unit.long() * taps + layer.col.clamp(min=0) // grid.tap_cols  # free slots have the last unit
            slots = order.argsort(stable=True)[: self.count * taps].view(-1, taps)  # of each unit, its taps in order
            plane = Topology(one_tap(grid), layer.row[slots[:, 0]], layer.col[slots[:, 0]] % grid.tap_cols)
            parts, present = Units(plane, slots, grid), plane.sorted_keys()
        else:
            parts, present = Units(layer.topology, None, grid), ordered_keys(layer.index, layer.topology)
        cells = parts.topology.grid.cells
        count = min(limit, units.shape[0], cells - present.shape[0])
        drawn = torch.randperm(units.shape[0], generator=generator, device="cpu")[:count]
        units = units[drawn.to(units.device)]
        keys = sample_absent(present, cells, count, generator)
        del present
        if not layer.tie_taps:  # units are numbered by their slots
            units = (self.unit < self.count).nonzero().squeeze(1)[units]
        return parts.replaced(units, keys)


class Budget:
    """The costs of the units of all layers, in one vector, and the total cost that may remain.

    Args:
        candidates: by the names of the layers.
        sparsity, scope, costs, floor, projection: as in :class:`~sparsekern.training.VRPGE`. With the scope
            ``"layer"`` the same fraction of the candidates of each layer may remain.

    Attributes:
        units: number of units.
        parts: the part of the vector that holds the units of a layer, by its name.
        ratio: fraction of the cost of all candidates that may remain, which is also the first probability of each.

    Raises:
        ValueError: a number is out of range, a layer is unknown, or there are fewer candidates than are to remain.
    """

    def __init__(
        self,
        candidates: dict[str, Candidates],
        sparsity: float | None,
        scope: str,
        costs: Mapping[str, float] | str | None,
        floor: float,
        projection: str,
    ) -> None:
        rule = "'units', or numbers by the names of layers"
        if isinstance(costs, str) and costs != "units":
            raise InputError(f"costs is {costs!r}; it must be {rule}", parameter="costs")
        if not (costs is None or isinstance(costs, (str, Mapping))):
            raise TypeError(f"costs is {costs!r}; it must be {rule}")
        check_number("floor", floor, "the lowest probability, in [0, 1]")
        self._alike = costs == "units"
        if isinstance(costs, str):  # the mean cost of an element
            weights = {name: layer.count / float(layer.costs().sum()) for name, layer in candidates.items()}
        else:
            weights = dict.fromkeys(candidates, 1.0) | dict(costs or {})
        unknown = weights.keys() - candidates.keys()
        if unknown:
            raise InputError(f"costs names {', '.join(sorted(unknown))}; the layers are {', '.join(candidates)}")
        for name, weight in weights.items():
            check_number(f"costs of {name!r}", weight, "above 0", lambda cost: 0 < cost < math.inf)
        self.floor, self.candidates, self._weights, self._projection = floor, candidates, weights, projection
        self.parts: dict[str, slice] = {}
        end = 0
        for name, layer in candidates.items():
            self.parts[name] = slice(end, end := end + layer.count)
        self.units = end
        self.refresh()
        stored = float(self._costs.sum())
        whole = sum(c.layer.grid.numel * weights[name] for name, c in candidates.items()) / self._scale
        one_each = sum(float(self._costs[part].max()) for part in self.parts.values())
        self.ratio = part_that_remains(sparsity, stored, whole, one_each)
        if not 0 <= floor <= self.ratio:
            raise InputError(
                f"floor is {floor}; it must be 0 to {self.ratio:.4g}, the fraction of the candidates that may remain",
                parameter="floor",
            )
        parts = [slice(0, self.units)] if scope == "global" else list(self.parts.values())
        self._budgets = [(part, self.ratio * float(self._costs[part].sum())) for part in parts]

    def refresh(self) -> None:
        """Compute the costs again after candidates moved: blocks at an edge hold fewer elements."""
        costs = [
            torch.ones_like(layer.costs()) if self._alike else self._weights[name] * layer.costs()
            for name, layer in self.candidates.items()
        ]
        together = torch.cat([c.to(costs[0].device) for c in costs])
        if not hasattr(self, "_scale"):
            self._scale = float(together.mean())  # costs near 1, whatever the block size
        self._costs = together / self._scale

    def expected_elements(self, name: str, probabilities: Tensor) -> float:
        """Return the expected number of elements of a layer at probabilities ``(units,)``."""
        costs = self.candidates[name].costs().split(CHUNK)
        likely = probabilities[self.parts[name]].split(CHUNK)
        return float(torch.stack([(c * p.to(c)).sum() for c, p in zip(costs, likely, strict=True)]).sum())

    def project(self, wanted: Tensor) -> Tensor:
        """Return the nearest probabilities ``(units,)`` within the budget."""
        near = torch.empty_like(wanted)
        for part, budget in self._budgets:
            near[part] = project(wanted[part], self._costs[part], budget, self.floor, self._projection)
        return near

    def top(self, probabilities: Tensor) -> Tensor:
        """Return a mask ``(units,)`` of the most probable units within the budget."""
        chosen = torch.zeros_like(probabilities, dtype=torch.bool)
        for part, budget in self._budgets:
            chosen[part] = top_units(probabilities[part], self._costs[part], budget)
        return chosen


def project(wanted: Tensor, costs: Tensor, budget: float, floor: float = 0.0, how: str = "sort") -> Tensor:
    """Return the point of ``{floor <= s <= 1, sum(costs * s) <= budget}`` that is nearest to ``wanted``.

    That is ``clip(wanted - v * costs, floor, 1)`` with the smallest ``v >= 0`` that keeps the budget. Computed in
    float64, without synchronising the device.

    Args:
        wanted: ``(U,)``.
        costs: ``(U,)``, above 0.
        budget: at least ``floor * sum(costs)``.
        floor: the lowest probability, in [0, 1].
        how: ``"sort"``: exact, O(U log U), and by Newton's method, in about a dozen sums over all units, where there
            are more than :data:`CHUNK`; or ``"bisection"``: 60 sums over all units, never above the budget.

    Returns:
        ``(U,)``, of the dtype of ``wanted``.

    Raises:
        ValueError: ``how`` is unknown.

    Source: Zhou et al. 2021 (arXiv 2111.05685), whose released code bisects; the costs are an addition.
    """
    check_choice("projection", how, PROJECTIONS)
    if not wanted.numel():
        return wanted.clone()
    if how == "bisection":
        shift = _by_halving(wanted, costs, budget, floor)
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


def _by_halving(wanted: Tensor, costs: Tensor, budget: float, floor: float) -> Tensor:
    low, high = costs.new_zeros((), dtype=torch.float64), _highest_shift(wanted, costs, floor)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        over = _spent_by_all(wanted, costs, middle, floor) > budget
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return torch.where(_spent_by_all(wanted, costs, 0.0, floor) <= budget, 0.0, high)


def top_units(probabilities: Tensor, costs: Tensor, budget: float) -> Tensor:
    """Return a mask ``(U,)`` of the most probable units whose costs keep the budget; ties go to the first."""
    order = probabilities.argsort(descending=True, stable=True)
    fits = costs.double()[order].cumsum(0) <= budget * (1 + 1e-9)
    return torch.zeros_like(fits).index_copy_(0, order, fits)
