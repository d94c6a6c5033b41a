"""The units among which VR-PGE chooses, and the budget of what may remain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse
from sparsekern.topology import Move, check_sparsity, one_tap, ordered_keys, sample_absent
from sparsekern.topology.arguments import check_number
from sparsekern.training.vrpge.projection import project, top_units

Group = str | Callable[[BlockSparse], Tensor]
"""``"block"``, ``"row"``, ``"column"``, or a function that returns a whole number ``(Z,)`` for each slot of a layer."""

GROUPS = ("block", "row", "column")

CHUNK = 2**16
"""Number of slots that are processed at a time: temporaries are many times as large as the coordinates."""


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
        elif group == "column":
            label = row // grid.group_rows * grid.tap_cols + channel
        else:
            raise InputError(
                f"group is {group!r}; it must be one of {', '.join(GROUPS)} or a function of the layer",
                parameter="group",
            )
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
            nowhere = units.int()
            return Move(units, nowhere, nowhere)
        slots: Tensor | None = None
        if layer.tie_taps:
            plane, taps = one_tap(grid), grid.taps
            row, col = layer.row.long(), layer.col.long()
            order = self.unit.long() * taps + col.clamp(min=0) // grid.tap_cols  # free slots have the last unit
            slots = order.argsort(stable=True)[: self.count * taps].view(-1, taps)  # of each unit, its taps in order
            present = (row * plane.cols + col % plane.cols)[slots[:, 0]].sort().values
        else:
            plane, taps = grid, 1
            present = ordered_keys(layer.index, layer.topology)
        cells, cols = plane.cells, plane.cols
        count = min(limit, units.shape[0], cells - present.shape[0])
        drawn = torch.randperm(units.shape[0], generator=generator, device="cpu")[:count]
        units = units[drawn.to(units.device)]
        keys = sample_absent(present, cells, count, generator)
        del present
        if slots is None:
            slots = (self.unit < self.count).nonzero()  # units are numbered by their slots
        tap = torch.arange(taps, device=keys.device) * grid.tap_cols
        new_row = (keys // cols).int().repeat_interleave(taps)
        new_col = ((keys % cols)[:, None] + tap).flatten().int()
        return Move(slots[units].flatten(), new_row, new_col)


class Budget:
    """The costs of the units of all layers, in one vector, and the total cost that may remain.

    Args:
        candidates: by the names of the layers.
        sparsity: fraction of the layers' elements that is to be absent at the end; None: half of what is stored.
        scope: ``"global"``: one budget for all layers; ``"layer"``: one for each, the same fraction of its candidates.
        costs: the cost of one element by the name of its layer, 1 for layers that are not named. Or ``"units"``: every
            unit costs the same.
        floor: the lowest probability.
        projection: ``"sort"`` or ``"bisection"``; see :func:`~sparsekern.training.vrpge.projection.project`.

    Attributes:
        units: number of units.
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
            check_number(f"costs of {name!r}", weight, "a number above 0")
            if not (math.isfinite(weight) and weight > 0):
                raise InputError(f"costs of {name!r} is {weight}; it must be above 0")
        self.floor, self._candidates, self._weights, self._projection = floor, candidates, weights, projection
        self._parts: dict[str, slice] = {}
        end = 0
        for name, layer in candidates.items():
            self._parts[name] = slice(end, end := end + layer.count)
        self.units = end
        self.refresh()
        stored = float(self._costs.sum())
        whole = sum(c.layer.grid.numel * weights[name] for name, c in candidates.items()) / self._scale
        if sparsity is None:
            self.ratio = 0.5
        else:
            check_sparsity(sparsity)
            self.ratio = (1 - sparsity) * whole / stored
            if self.ratio > 1 + 1e-9:
                now, lower = 1 - stored / whole, max(0.0, 1 - 2 * (1 - sparsity))
                raise InputError(
                    f"sparsity is {sparsity}, but the layers store too few blocks to choose from: they are at sparsity "
                    f"{now:.4g}. Build them at a lower one, such as {lower:.4g}",
                    parameter="sparsity",
                )
            self.ratio = min(1.0, self.ratio)
        if not 0 <= floor <= self.ratio:
            raise InputError(
                f"floor is {floor}; it must be 0 to {self.ratio:.4g}, the fraction of the candidates that may remain",
                parameter="floor",
            )
        parts = [slice(0, self.units)] if scope == "global" else list(self._parts.values())
        self._budgets = [(part, self.ratio * float(self._costs[part].sum())) for part in parts]

    def refresh(self) -> None:
        """Compute the costs again after candidates moved: blocks at an edge hold fewer elements."""
        costs = [
            torch.ones_like(layer.costs()) if self._alike else self._weights[name] * layer.costs()
            for name, layer in self._candidates.items()
        ]
        together = torch.cat([c.to(costs[0].device) for c in costs])
        if not hasattr(self, "_scale"):
            self._scale = float(together.mean())  # costs near 1, whatever the block size
        self._costs = together / self._scale

    def part(self, name: str) -> slice:
        """Return the part of the vector that holds the units of a layer."""
        return self._parts[name]

    def expected_elements(self, name: str, probabilities: Tensor) -> float:
        """Return the expected number of elements of a layer at probabilities ``(units,)``."""
        costs = self._candidates[name].costs().split(CHUNK)
        likely = probabilities[self.part(name)].split(CHUNK)
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
