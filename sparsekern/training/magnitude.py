"""Methods that need no gradients: SET, Static, which moves no block, and gradual magnitude pruning.

SET: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
network science", Nature Communications 2018. The defaults are those with which Evci et al. 2020 (RigL) compare it.

Gradual pruning: Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression",
arXiv 1710.01878.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse, refuse_sharded
from sparsekern.nn.init import draw_values, fan_in
from sparsekern.nn.selectors import by_entry
from sparsekern.nn.sharded import copy_slots_, slot_scores
from sparsekern.topology import (
    Move,
    Topology,
    Units,
    blocks_at,
    check_sparsity,
    generator_for,
    ordered_keys,
    part_of,
    sample_absent,
    stored_blocks,
    units,
)
from sparsekern.topology.arguments import check_choice
from sparsekern.training.base import Method
from sparsekern.training.followers import OnMove, keep_slots_, used_slots
from sparsekern.training.scores import ascending, free_slots, lowest, protect_strongest


class SET(Method):
    """Sparse Evolutionary Training on blocks.

    An update moves the ``floor(drop_fraction * blocks)`` blocks of smallest Frobenius norm to places drawn uniformly
    among the empty ones, where they start from zero. A dropped block never returns in the same update.

    This is SET as RigL's paper and most later ones compare it. SET of its own paper is ``drop="signs",
    grown_values="random", anneal="constant"``, once an epoch: ``preset("set-mocanu")``.

    Args:
        drop: ``"norm"``: the weakest blocks. ``"signs"``: the same fraction of the positive and of the negative blocks,
            the weakest of each; a block of several elements has the sign of their sum.
        grown_values: ``"zero"``, or ``"random"``: drawn like a layer's initial values. In a copy of the model that
            follows, grown blocks start from zero in both cases.
        options: the arguments of :class:`Method`.

    Raises:
        ValueError: ``drop`` or ``grown_values`` is unknown, or what :class:`Method` raises.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.75, block_size=16)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparse = sk.SET(model, optimizer, update_every=100, stop=7500, drop_fraction=0.5)
        >>> sparse.step(), sparse.update()
        (False, True)
        >>> sparse.metrics()["churn/0"]
        0.5
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        drop: str = "norm",
        grown_values: str = "zero",
        **options: Any,
    ) -> None:
        check_choice("drop", drop, ("norm", "signs"))
        check_choice("grown_values", grown_values, ("zero", "random"))
        super().__init__(model, optimizer, **options)
        self.drop, self.grown_values = drop, grown_values

    def choose(self, name: str, layer: BlockSparse, fraction: float, generator: torch.Generator) -> Move | None:
        """Return the weakest blocks and as many empty places. Tied taps move together, by their common norm."""
        parts = units(layer.topology, layer.tie_taps)
        blocks = stored_blocks(layer.index) // parts.size
        empty = parts.topology.grid.cells - blocks
        strength = self.strength(name, layer, parts)
        if self.drop == "signs":
            slots = _weakest_of_each_sign(layer, parts, strength, fraction)
            if slots.shape[0] > empty:
                slots = slots[lowest(strength[slots], empty)]
        else:
            slots = lowest(strength, min(part_of(blocks, fraction), empty))
        return grow_at_random(layer, parts, slots, slots.shape[0], generator)

    @torch.no_grad()
    def fill(self, name: str, move: Move) -> None:
        """Draw the values of blocks that have just moved, with ``grown_values="random"``."""
        if self.grown_values == "zero":
            return
        layer = self.layers[name]
        whole = Topology(layer.grid, layer.row.cpu(), layer.col.cpu())
        moved = Topology(layer.grid, move.row.cpu(), move.col.cpu())
        generator = generator_for(self.seed, type(self).__name__, name, self.steps, "values")
        drawn = draw_values(moved, fan_in(whole), layer.values.dtype, generator, layer.init_scale)
        copy_slots_(layer.values, move.slots.long(), drawn.to(layer.values.device))


def grow_at_random(layer: BlockSparse, parts: Units, dropped: Tensor, count: int, generator: torch.Generator) -> Move:
    """Return the move that drops units and grows others, at places drawn uniformly among those that are empty before.

    Args:
        layer: the layer.
        parts: its units.
        dropped: ``(k,)`` units.
        count: number of units to grow, in the slots of the dropped ones and then in free ones; fewer where places or
            slots run out.
        generator: on the CPU.
    """
    topology, free = parts.topology, None
    present = topology.sorted_keys() if parts.slots is not None else ordered_keys(layer.index, topology)
    room = dropped.shape[0]
    if count > room:
        free = free_slots(layer)
        room += free.shape[0] // parts.size
    count = min(count, room, topology.grid.cells - present.shape[0])
    return parts.replaced(dropped, sample_absent(present, topology.grid.cells, count, generator, ordered=True), free)


def _weakest_of_each_sign(layer: BlockSparse, parts: Units, strength: Tensor, fraction: float) -> Tensor:
    """Return a fraction of the positive units and of the negative ones, the weakest of each, in ascending order."""
    sums = slot_scores(layer.values, lambda blocks: blocks.sum((1, 2), dtype=strength.dtype))
    positive = parts.sums(sums) >= 0
    used = parts.topology.used()
    chosen = [
        lowest(strength.masked_fill(~side, torch.inf), part_of(int(side.sum()), fraction))
        for side in (positive & used, ~positive & used)
    ]
    return torch.cat(chosen).sort().values


class Static(Method):
    """The control of every comparison: the same layers and the same loop, but no block ever moves.

    Args:
        model, optimizer: as for :class:`Method`.
        options: of :class:`Method`, ``update_every``, ``start``, ``stop`` and ``offset``, which say when an update is
            counted and ranks are compared, ``seed``, ``check_ranks`` and ``process_group``.

    Raises:
        ValueError: an option about moves is given, or what :class:`Method` raises.
    """

    unused_options: ClassVar = ("drop_fraction", "anneal", "grown_state", "keep_connected", "min_age")
    moves_fraction = False

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        self.check_options(options)
        super().__init__(model, optimizer, **options)

    def choose(self, name: str, layer: BlockSparse, fraction: float, generator: torch.Generator) -> Move | None:
        """Return None."""
        return None


class Gradual(Method):
    """Gradual pruning of blocks (Zhu and Gupta 2017): frees the weakest blocks until a final sparsity is reached.

    The layers start at the sparsity that they have. That may be 0: ``sparsify_(model, 0.0, block_size=16)``. After
    optimizer step ``t`` the sparsity is that of the paper's equation 1, ::

        s(t) = final + (initial - final) * (1 - (t - start) / (last - start)) ** 3

    where ``last`` is the last update before ``stop``, which reaches ``final_sparsity``. A block's strength is its
    Frobenius norm, at 1x1 the magnitude. The slots of blocks that went are free and are never used again. Kernels do
    not compute them; ``compact=True`` gives their memory back, too, with the optimizer's work on it.

    Args:
        final_sparsity: fraction absent in the end, in [0, 1); or ``{selector: sparsity}`` with string selectors, of
            which the first match counts, as in :func:`sparsekern.sparsify_`.
        stop: see above; required.
        scope: ``"layer"``: every layer goes from its sparsity to the final one. ``"global"``: all layers together (with
            selectors, those of one entry), and the weakest of all blocks go, by norm over the root of the block size.
            The strongest block of each layer stays.
        compact: call :func:`sparsekern.compact_` after each update. The layers' ``values`` are then new parameters, and
            checkpoints resume by ``compact_(..., like=...)``.
        options: the arguments of :class:`Method`, but for those about blocks that move: ``drop_fraction``, ``anneal``,
            ``grown_state`` and ``min_age``.

    Raises:
        ValueError: an option is out of range, here or in :class:`Method`; no update is before ``stop``; the final
            sparsity is below that of all layers; or ``compact`` is asked for under DistributedDataParallel.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.0, block_size=16)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparse = sk.Gradual(model, optimizer, final_sparsity=0.75, stop=9, update_every=2)
        >>> for step in range(8):
        ...     model(torch.ones(8, 64)).square().mean().backward()
        ...     optimizer.step(); optimizer.zero_grad()
        ...     if sparse.step():
        ...         print(model[0].sparsity)
        0.4375
        0.625
        0.75
    """

    unused_options: ClassVar[tuple[str, ...]] = ("drop_fraction", "anneal", "grown_state", "min_age")
    moves_fraction = False

    initial_sparsity: ClassVar[float] = 0.0
    """The sparsity from which the publication starts; the layers decide."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        final_sparsity: float | Mapping[str, float] = 0.9,
        scope: str = "layer",
        compact: bool = False,
        **options: Any,
    ) -> None:
        self.check_options(options)
        check_choice("scope", scope, ("layer", "global"))
        super().__init__(model, optimizer, **options)
        self.scope, self.compact = scope, compact
        self._groups = self._final_blocks(model, final_sparsity)
        self.schedule.progress(0)  # raises if there is no update
        if compact:
            refuse_sharded(self.layers, "compact=True is for values that are not sharded; leave it out")
        if compact and (self._parallel or self.ranks.count > 1):
            raise InputError(
                "compact is True, but DistributedDataParallel holds the parameters: leave it out, and call compact_ on "
                "the module inside while it is not wrapped",
                parameter="compact",
            )

    def _final_blocks(
        self, model: nn.Module, final_sparsity: float | Mapping[str, float]
    ) -> list[tuple[list[str], int]]:
        """Return the groups of layers that have a common number of blocks, with the final one."""
        groups = []
        for sparsity, names in by_entry(model, self.layers, final_sparsity, "final_sparsity"):
            check_sparsity(sparsity, "final_sparsity")
            for those in [names] if self.scope == "global" else [[name] for name in names]:
                final = blocks_at(sparsity, sum(self.layers[name].grid.cells for name in those))
                groups.append((those, max(len(those), final)))
        if all(self._first_blocks(names) < final for names, final in groups):
            raise InputError(
                f"final_sparsity is {final_sparsity}, and all layers are sparser already; it must be higher, or the "
                "layers denser in the beginning",
                parameter="final_sparsity",
            )
        return groups

    def _first_blocks(self, names: list[str]) -> int:
        """Return the number of blocks that layers had in the beginning."""
        return sum(self.first_keys[name].shape[0] for name in names)

    def blocks_left(self, first: int, final: int) -> int:
        """Return how many of ``first`` blocks are to be left now, and ``final`` in the end."""
        left = (1 - self.schedule.progress(self.steps)) ** 3
        return math.floor(final + (first - final) * left + 0.5 + 1e-9)

    def choose_all(self, fraction: float) -> dict[str, Move]:
        """Return the moves that free the weakest blocks of each group of layers, as many as its schedule says."""
        trained = dict(self.trained_layers())
        moves: dict[str, Move] = {}
        for names, final in self._groups:
            wanted = self.blocks_left(self._first_blocks(names), final)
            surplus = sum(stored_blocks(self.layers[name].index) for name in names) - wanted
            if surplus > 0:
                moves |= self._free({name: trained[name] for name in names if name in trained}, surplus)
        return moves

    def _free(self, layers: dict[str, BlockSparse], count: int) -> dict[str, Move]:
        """Return the moves that free the ``count`` weakest blocks of some layers, in units that move together."""
        parts = {name: units(layer.topology, layer.tie_taps) for name, layer in layers.items()}
        cost = [part.size for part in parts.values()]
        strengths = [self.strength(name, layer, parts[name]) for name, layer in layers.items()]
        if len(layers) > 1:
            strengths = [protect_strongest(strength) for strength in strengths]
        weak = [lowest(s, (2 * count + c) // (2 * c)) for s, c in zip(strengths, cost, strict=True)]  # rounded
        if len(layers) > 1:
            area = [math.prod(layer.grid.block) * c for layer, c in zip(layers.values(), cost, strict=True)]
            norms = [(s[w] / math.sqrt(a)).cpu() for s, w, a in zip(strengths, weak, area, strict=True)]
            weak = [w[chosen.to(w.device)] for w, chosen in zip(weak, _weakest(norms, cost, count), strict=True)]
        return {name: parts[name].replaced(chosen, chosen[:0]) for name, chosen in zip(layers, weak, strict=True)}

    def update(self) -> bool:
        """Free blocks now, by the schedule, whether an update is due or not; returns whether any went."""
        if self.compact:
            self.check_compact()
        if not super().update():
            return False
        if self.compact:
            began = time.perf_counter()
            keep_slots_(self.layers, self.optimizer, {name: used_slots(layer) for name, layer in self.layers.items()})
            self.seconds += time.perf_counter() - began
        return True

    def follow(self, target: Tensor | nn.Module, *, layer: str | None = None, on_move: OnMove = "zero") -> None:
        """Register a copy of the model, or, without ``compact``, a tensor; see :meth:`Method.follow`."""
        if self.compact and isinstance(target, Tensor):
            raise InputError("compact is True, with which slots go: no tensor can follow them", parameter="compact")
        super().follow(target, layer=layer, on_move=on_move)


def _weakest(scores: list[Tensor], cost: list[int], count: int) -> list[Tensor]:
    """Return the positions in each list of the lowest scores of all lists, whose costs add up to about ``count``."""
    sizes = [part.shape[0] for part in scores]
    order = ascending(torch.cat(scores))
    costs = torch.tensor(cost, device="cpu").repeat_interleave(torch.tensor(sizes, device="cpu"))[order]
    chosen = torch.zeros(order.shape[0], dtype=torch.bool, device="cpu")
    chosen[order] = 2 * costs.cumsum(0) - costs <= 2 * count
    return [part.nonzero().squeeze(1) for part in chosen.split(sizes)]
