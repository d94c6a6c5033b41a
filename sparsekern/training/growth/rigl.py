"""RigL: drop the weakest blocks, and grow where the gradient of the whole weight is largest; and GraNet on top of it.

Evci, Gale, Menick, Castro and Elsen, "Rigging the Lottery: Making All Tickets Winners", ICML 2020. Liu et al., "Sparse
Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS 2021, arXiv 2106.10404.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse
from sparsekern.ops import Probe
from sparsekern.topology import Move, ordered_keys, part_of, stored_blocks, to_places
from sparsekern.topology.arguments import check_choice, check_number, check_whole
from sparsekern.training.growth.gradient import GradientMethod
from sparsekern.training.magnitude import Gradual
from sparsekern.training.scores import Offer, highest, lowest

LEAST_SKETCHES = 4
"""Minimum number of sketches: the squared norm then has a relative deviation of about 1.4."""

PROMISED = 16
"""Number of block rows and columns from which on memory must be proportional to the stored blocks."""

_log = logging.getLogger("sparsekern")


class RigL(GradientMethod):
    """RigL on blocks: growth where the gradient is largest (Evci et al., ICML 2020).

    An update moves the ``floor(drop_fraction * blocks)`` blocks of smallest Frobenius norm to the empty places where
    the blocks of the gradient have the largest norms. There they start from zero.

    Empty places are scored in one of these ways:

    * ``"exact"``: the backward computes the norms of all blocks of the gradient, one number a block. Norms do not add
      up, so this works on one rank, with one backward a step in which each layer is called once and the loss contains
      no derivative of it.
    * ``"screen"``: in the step before, each block of the gradient is projected on ``sketches`` random pairs of vectors.
      These numbers do add up, and their mean square estimates the squared norm with a relative deviation of about
      ``sqrt(8 / sketches)``. The best ``shortlist * k`` places are then scored exactly, as in :class:`GSE`. With
      ``score_sketches`` ranks do not add them up: each of p ranks names the best ``shortlist * k / p`` places by its
      own examples, and what any of them names is scored.
    * ``"auto"``: exact on one rank, and screen from the first step on in which norms would have to be added, which is
      logged.

    With 1x1 blocks the gradient of a block is one number, which adds up: scores are always exact. But there is one for
    each element of the dense matrix, which this package otherwise never stores: ``allow_dense_scores`` allows it. In
    layers of at least 16 x 16 blocks the number of scores must not exceed the number of values either: small blocks at
    a high sparsity need ``allow_dense_scores`` too, and without it are screened with fewer sketches, at least 4.

    Args:
        scoring: how empty places are scored: ``"auto"``, ``"exact"`` or ``"screen"``.
        sketches: the largest number of sketches a block, in screening.
        shortlist: the number of places that are scored exactly over the number that is grown, in screening.
        regrow: whether a dropped block may win its place back, as in the paper; it then keeps its values. Needs exact
            scores and ``scope="layer"``.
        skip_step: leave out the optimizer step of an update, as in the authors' code: gradients are cleared before it.
        allow_dense_scores: allow one score for each element of a matrix, or more scores than values.
        options: the arguments of :class:`GradientMethod` and :class:`Method`.

    Raises:
        ValueError: the scoring is unknown, a number is out of range, here or in :class:`Method`, there are too many
            scores without ``allow_dense_scores``, or scores are exact where norms do not add up. The last two also from
            :meth:`step`, where blocks turn out to need screening.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.75, block_size=16)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparse = sk.RigL(model, optimizer, update_every=2, drop_fraction=0.5)
        >>> for step in range(2):
        ...     loss = sparse.backward(lambda: model(torch.ones(8, 64)).square().mean())
        ...     optimizer.step(); optimizer.zero_grad()
        ...     moved = sparse.step()
        >>> moved, sparse.metrics()["churn/0"]
        (True, 0.5)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scoring: str = "auto",
        sketches: int = 16,
        shortlist: float = 4.0,
        regrow: bool = False,
        skip_step: bool = False,
        allow_dense_scores: bool = False,
        **options: Any,
    ) -> None:
        check_choice("scoring", scoring, ("auto", "exact", "screen"))
        check_whole("sketches", sketches, 1)
        check_number("shortlist", shortlist, "1 or more times what is grown", lambda factor: 1 <= factor < math.inf)
        if regrow and options.get("scope") == "global":
            raise InputError(
                "regrow is for scope='layer'; with scope='global' dropped blocks do not return at once",
                parameter="regrow",
            )
        super().__init__(model, optimizer, **options)
        for name, layer in self.layers.items():
            if is_dense(layer) and not allow_dense_scores:
                raise InputError(
                    f"{name!r} has 1x1 blocks, for which RigL scores every element of its {layer.grid.out_features} x "
                    f"{layer.grid.in_features} matrix: memory like a dense gradient's. Use GSE, or larger blocks, or "
                    "accept it with allow_dense_scores=True"
                )
        blocked = not all(is_dense(layer) for layer in self.layers.values())
        several = blocked and self.ranks.count > 1
        if several and scoring == "exact":
            raise InputError(
                "scoring is 'exact', but norms do not add up over ranks; use 'auto' or 'screen'", parameter="scoring"
            )
        self.scoring, self.sketches, self.shortlist = scoring, sketches, shortlist
        self.regrow, self.allow_dense_scores = regrow, allow_dense_scores
        self._grid_scores: dict[str, Tensor] = {}  # (R * C,) scores of layers in which every place is scored
        self._screen = False
        if blocked and (scoring == "screen" or several):
            self._start_screening()
        else:
            for name, layer in self.layers.items():
                if room_for_scores(layer) < 1 and not allow_dense_scores:
                    raise InputError(self._too_many(name, layer, "a norm", f"{layer.grid.cells} norms"))
        self._skip_step = skip_step
        self.begin()

    def stages(self) -> int:
        """Return 1, or 2 for screening."""
        return 2 if self._screen else 1

    def ask(self, stage: int, name: str, layer: BlockSparse) -> Probe | None:
        """Return a probe for all norms; in screening for sketches, and then for the gradients of the shortlist."""
        grid, device, dtype = layer.grid, layer.row.device, self.dtype(layer)
        last = stage == self.stages() - 1
        if is_dense(layer):  # a sketch with ones is the gradient itself
            ones = [torch.ones(1, n, dtype=dtype, device=device) for n in (grid.out_features, grid.in_features)]
            return Probe.sketch(grid, *ones) if last else None
        if not self._screen:
            return Probe.counted_norms(grid, dtype=dtype, device=device)
        return self.ask_candidates(name, layer) if last else self.ask_sketch(name, layer)

    def ask_sketch(self, name: str, layer: BlockSparse) -> Probe:
        """Return a probe for sketches of all blocks of the gradient."""
        grid, device, dtype = layer.grid, layer.row.device, self.dtype(layer)
        generator = self.generator(name, "sketch")
        u, v = (
            (torch.randint(2, (self._sketches(name, layer), n), generator=generator, device="cpu") * 2 - 1).to(
                device, dtype
            )
            for n in (grid.out_features, grid.in_features)
        )
        return Probe.sketch(grid, u, v)

    def hear(self, stage: int, answers: dict[str, Tensor]) -> int | None:
        """Store the scores, or the shortlist; start screening if norms were added up."""
        last = stage == self.stages() - 1
        for name, answer in answers.items():
            layer = self.layers[name]
            if not last:
                self._keys[name] = self._shortlist(layer, answer)
            elif is_dense(layer):  # the gradient itself
                self._grid_scores[name] = self.ranks.from_first(answer.abs_().flatten())
            elif self._screen:
                self.score_candidates(name, answer)
            elif (parts := int(answer[-1])) > 1:
                self._clear_scores()
                self._no_more_streaming(name, parts)
                return 0
            else:
                self._grid_scores[name] = answer[:-1]
        return None if last else 1

    def _shortlist(self, layer: BlockSparse, answer: Tensor) -> Tensor:
        """Return the keys of the empty places of highest estimated norm, ascending, int32 on the CPU."""
        squares = answer.square_().mean(0).flatten()
        if not self._proposes:
            self.ranks.from_first(squares)
        present = ordered_keys(layer.index, layer.topology).long()
        squares.index_fill_(0, present, -torch.inf)
        grown = max(1, part_of(present.shape[0], self.schedule.fraction(self.steps)))
        wanted = math.ceil(self.shortlist * grown)
        if not self._proposes:
            return highest(squares, wanted).int().cpu()
        return self.ranks.union(highest(squares, math.ceil(wanted / self.ranks.count)).int()).cpu()

    @property
    def _proposes(self) -> bool:
        """Whether each rank names places by its own sketches, in the first of two stages."""
        return self.stages() > 1 and self.score_sketches is not None and self.ranks.count > 1

    def _over_ranks(self, name: str, answer: Tensor) -> Tensor:
        return answer if self._proposes and self._stage == 0 else super()._over_ranks(name, answer)

    def _no_more_streaming(self, name: str, parts: int) -> None:
        why = (
            f"the gradient of {name!r} comes in {parts} parts a step (several batches, calls of the layer, or a "
            "derivative of it in the loss), and norms do not add up"
        )
        if self.scoring == "exact":
            raise InputError(f"scoring is 'exact', but {why}; use 'auto' or 'screen'", parameter="scoring")
        _log.warning("%s screens its blocks by sketches from now on: %s", type(self).__name__, why)
        self._start_screening()

    def _start_screening(self) -> None:
        if self.regrow:
            raise InputError("regrow needs the scores of all blocks, of one backward a step on one rank; leave it out")
        for name, layer in self.layers.items():
            if (used := self._sketches(name, layer)) < self.sketches:
                _log.warning(
                    "%s screens %r by %d sketches a block: more would not be fewer than values",
                    type(self).__name__,
                    name,
                    used,
                )
        self._screen = True

    def _sketches(self, name: str, layer: BlockSparse) -> int:
        """Return the number of sketches a block of a layer; raise ValueError if memory allows too few."""
        room = self.sketches if self.allow_dense_scores or is_dense(layer) else room_for_scores(layer)
        if room < min(LEAST_SKETCHES, self.sketches):
            least = min(LEAST_SKETCHES, self.sketches)
            raise InputError(self._too_many(name, layer, f"{least} numbers", f"{least * layer.grid.cells} of them"))
        return min(room, self.sketches)

    def _too_many(self, name: str, layer: BlockSparse, a_block: str, all_blocks: str) -> str:
        (bo, bi), slots = layer.grid.block, layer.topology.slots
        return (
            f"{name!r} has {bo}x{bi} blocks, for each of which {type(self).__name__} would hold {a_block}: "
            f"{all_blocks}, and the layer has {slots * bo * bi} values. Use GSE, or larger blocks, or accept it with "
            "allow_dense_scores=True"
        )

    def offer(self, name: str, layer: BlockSparse, count: int) -> Offer:
        """Return the best empty places and their scores."""
        scores = self._grid_scores.get(name)
        if scores is None or not bool(scores.any()):
            return super().offer(name, layer, count)
        scores = scores.index_fill_(0, ordered_keys(layer.index, layer.topology).long(), -torch.inf)
        best = highest(scores, count)
        return Offer(best.int(), scores[best])

    def exchange(self, name: str, layer: BlockSparse, strength: Tensor, count: int) -> Move:
        """Return the move of the weakest blocks to the best empty places, among which ``regrow`` counts their own."""
        if not self.regrow or name not in self._grid_scores:
            return super().exchange(name, layer, strength, count)
        slots = lowest(strength, count)
        theirs = self._grid_scores[name][layer.topology.keys()[slots].long()]
        offer = self.offer(name, layer, slots.shape[0])
        best = highest(torch.cat([theirs, offer.scores]), slots.shape[0])
        stay = torch.isin(torch.arange(slots.shape[0], device=best.device), best)
        grown = best[best >= slots.shape[0]] - slots.shape[0]
        return to_places(slots[~stay][: grown.shape[0]], offer.keys[grown], layer.grid)

    def _clear_scores(self) -> None:
        super()._clear_scores()
        self._grid_scores = {}

    def before_step(self) -> None:
        """With ``skip_step``, clear the gradients before the step of an update: the optimizer then changes nothing."""
        super().before_step()
        last = self._stage == self.stages() - 1
        if self._skip_step and last and (self._due or self.schedule.due(self.steps + 1)):
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, including whether blocks are screened."""
        return super().state_dict() | {"screen": self._screen}

    def _resume(self, state: dict[str, Any]) -> None:
        self._screen = state["screen"]
        super()._resume(state)


def is_dense(layer: BlockSparse) -> bool:
    """Return whether a layer has 1x1 blocks, so that there is a score for each element."""
    return layer.grid.block == (1, 1)


def room_for_scores(layer: BlockSparse) -> int:
    """Return the largest number of scores a block with which a layer has fewer scores than values."""
    grid, (bo, bi) = layer.grid, layer.grid.block
    if is_dense(layer) or min(grid.rows, grid.cols) < PROMISED:
        return grid.cells * bo * bi
    return (layer.topology.slots * bo * bi - 1) // grid.cells


class GraNet(Gradual, RigL):
    """Gradual pruning with zero-cost neuroregeneration on blocks (Liu et al., NeurIPS 2021, section 4).

    An update frees the weakest blocks, as :class:`Gradual` does, until the sparsity of its schedule is reached. Then
    each layer moves the ``floor(drop_fraction * blocks)`` weakest of the blocks that are left to the empty places where
    the blocks of the gradient have the largest norms, as :class:`RigL` does: the number of blocks stays. Blocks that
    were freed do not return in the same update.

    Args:
        final_sparsity, stop, compact: as in :class:`Gradual`.
        scope: of the blocks that are freed, as in :class:`Gradual`; in the paper that of all layers together. Each
            layer exchanges by itself.
        drop_fraction: fraction of the blocks left that are exchanged at ``start``; it falls along a cosine.
        options: the arguments of :class:`RigL` and :class:`Method`.

    Raises:
        ValueError: what :class:`Gradual` or :class:`RigL` raises.
        NotImplementedError: a layer ties its taps.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.5, block_size=16)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparse = sk.GraNet(model, optimizer, final_sparsity=0.75, stop=5, update_every=2)
        >>> for step in range(4):
        ...     model(torch.ones(8, 64)).square().mean().backward()
        ...     optimizer.step(); optimizer.zero_grad()
        ...     if sparse.step():
        ...         print(model[0].sparsity, sparse.metrics()["churn/0"])
        0.6875 0.8
        0.75 0.25
    """

    unused_options: ClassVar = ()
    initial_sparsity: ClassVar[float] = 0.5

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        final_sparsity: float | Mapping[str, float] = 0.9,
        scope: str = "global",
        drop_fraction: float | Callable[[int], float] = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            final_sparsity=final_sparsity,
            scope=scope,
            drop_fraction=drop_fraction,
            **options,
        )

    def choose_all(self, fraction: float) -> dict[str, Move]:
        """Return the moves of all layers: the blocks that go, and those that are exchanged."""
        moves = super().choose_all(fraction)
        for name, layer in self.trained_layers():
            strength, left = self.strength(name, layer), stored_blocks(layer.index)
            parts = [moves[name]] if name in moves else []
            for freed in parts:
                strength = strength.index_fill(0, freed.slots.long(), torch.inf)
                left -= freed.slots.shape[0]
            parts.append(self.exchange(name, layer, strength, part_of(left, fraction)))
            moves[name] = Move(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        return moves
