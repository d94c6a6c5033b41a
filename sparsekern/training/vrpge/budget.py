"""How much may remain, of the whole model or of each layer (VR-PGE)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.topology import check_sparsity
from sparsekern.topology.arguments import check_number
from sparsekern.training.vrpge.candidates import CHUNK, Candidates
from sparsekern.training.vrpge.projection import project
from sparsekern.training.vrpge.sampling import top_units


class Budget:
    """The costs of all units of all layers, one after the other, and what of them may be spent.

    Args:
        candidates: by the names of the layers.
        sparsity: fraction of the layers' elements that is to be absent; None: half of what is stored remains.
        scope: ``"global"``, one budget; or ``"layer"``, one each: the same fraction of each layer's candidates.
        costs: by the name of a layer, the cost of one element; 1 for the others. Or ``"units"``: every unit costs the
            same, whatever it holds.
        floor: the lowest probability.
        projection: how to project.

    Attributes:
        units: their number.
        ratio: fraction of the cost of all candidates that may remain; the first probability of each.

    Raises:
        ValueError: a number out of range, an unknown layer, or fewer candidates than are to remain.
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
        if isinstance(costs, str):  # what an element of a layer costs on average
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
        """Count the costs anew, after candidates moved: blocks at an edge hold fewer elements."""
        costs = [
            torch.ones_like(layer.costs()) if self._alike else self._weights[name] * layer.costs()
            for name, layer in self._candidates.items()
        ]
        together = torch.cat([c.to(costs[0].device) for c in costs])
        if not hasattr(self, "_scale"):
            self._scale = float(together.mean())  # numbers near 1, whatever the blocks
        self._costs = together / self._scale

    def part(self, name: str) -> slice:
        """Return where the units of a layer are."""
        return self._parts[name]

    def expected_elements(self, name: str, probabilities: Tensor) -> float:
        """Return how many elements of a layer remain on average, at probabilities ``(units,)``."""
        costs = self._candidates[name].costs().split(CHUNK)
        likely = probabilities[self.part(name)].split(CHUNK)
        return float(torch.stack([(c * p.to(c)).sum() for c, p in zip(costs, likely, strict=True)]).sum())

    def project(self, wanted: Tensor) -> Tensor:
        """Return the nearest probabilities ``(units,)`` within the budget; see :func:`project`."""
        near = torch.empty_like(wanted)
        for part, budget in self._budgets:
            near[part] = project(wanted[part], self._costs[part], budget, self.floor, self._projection)
        return near

    def top(self, probabilities: Tensor) -> Tensor:
        """Return a mask ``(units,)`` of the likeliest units within the budget."""
        chosen = torch.zeros_like(probabilities, dtype=torch.bool)
        for part, budget in self._budgets:
            chosen[part] = top_units(probabilities[part], self._costs[part], budget)
        return chosen
