"""RigL: drop the weakest blocks, grow where the gradient of the whole weight is largest, without forming it.

Evci, Gale, Menick, Castro and Elsen, "Rigging the Lottery: Making All Tickets Winners", ICML 2020.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse
from sparsekern.ops import Probe
from sparsekern.topology import ordered_keys, stored_blocks
from sparsekern.topology.arguments import check_number, check_whole
from sparsekern.training.base import is_rehearsal
from sparsekern.training.distributed import as_on_first_rank, ranks
from sparsekern.training.followers import Move, to_places
from sparsekern.training.growth.competition import Offer
from sparsekern.training.growth.gradient import GradientMethod
from sparsekern.training.scores import highest, lowest, part_of

SCORINGS = ("auto", "exact", "screen")

LEAST_SKETCHES = 4
"""So many a block tell blocks apart after all: the squared norm deviates by about 1.4 times itself."""

PROMISED = 16
"""Block rows and columns of a layer from which on memory is promised to follow the stored blocks."""

_log = logging.getLogger("sparsekern")


class RigL(GradientMethod):
    """RigL on blocks: growth where the gradient is largest (Evci et al., ICML 2020).

    At an update ``floor(drop_fraction * blocks)`` blocks of smallest Frobenius norm go to the empty places whose blocks
    of the gradient have the largest norms. They restart from zero.

    How all empty places are scored:

    * ``"exact"``: the norms of all blocks of the gradient are streamed out of the backward, one number a block. Norms
      do not add up, so this is for one rank, and one backward a step in which a layer is called once and the loss
      contains no derivative of it.
    * ``"screen"``: in the step before, every block's gradient is projected on ``sketches`` random pairs of vectors, so
      many numbers a block, which do add up; their mean square estimates the squared norm with a relative deviation of
      about ``sqrt(8 / sketches)``. The best ``shortlist * k`` of these are then scored exactly, as in :class:`GSE`.
    * ``"auto"``: exact on one rank, until norms would have to be added in a step: from then on screen. The log says so.

    At 1x1 a block's gradient is one number, and adds up: exact always. But then there is a score for every element of
    the dense matrix, which this package otherwise never holds: ``allow_dense_scores`` says that it may. Nor does it
    hold more scores of a layer than the layer has values, where that is at least 16 x 16 blocks: small blocks at a high
    sparsity need the same consent, and without it are screened by fewer sketches, 4 at least.

    Args:
        scoring: ``"auto"``, ``"exact"`` or ``"screen"``.
        sketches: numbers a block in screening, at most.
        shortlist: c, how many times more places are scored exactly than are grown, in screening.
        regrow: whether a block that is dropped may win its place back, as in the paper, and then stays as it is. Needs
            exact scores and ``scope="layer"``.
        skip_step: leave out the optimizer's step of an update, as the authors' code does: gradients are cleared before.
        allow_dense_scores: needed with 1x1 blocks, and where there would be more scores than values.
        options: the arguments of :class:`GradientMethod` and :class:`Method`.

    Raises:
        ValueError: an unknown scoring, a number out of range, here or in :class:`Method`, too many scores without
            ``allow_dense_scores``, or exact scores where norms do not add up; the last two also from :meth:`step`, when
            it is found out that blocks have to be screened.

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
        super().__init__(model, optimizer, **options)
        if scoring not in SCORINGS:
            raise InputError(f"scoring is {scoring!r}; it must be one of {', '.join(SCORINGS)}", parameter="scoring")
        check_whole("sketches", sketches)
        check_number("shortlist", shortlist, "1 or more times what is grown")
        if sketches < 1:
            raise InputError(f"sketches is {sketches}; it must be 1 or more", parameter="sketches")
        if not (math.isfinite(shortlist) and shortlist >= 1):
            raise InputError(
                f"shortlist is {shortlist}; it must be 1 or more times what is grown", parameter="shortlist"
            )
        if regrow and self.scope == "global":
            raise InputError(
                "regrow is for scope='layer'; with scope='global' dropped blocks do not return at once",
                parameter="regrow",
            )
        for name, layer in self.layers.items():
            if is_dense(layer) and not allow_dense_scores:
                raise InputError(
                    f"{name!r} has 1x1 blocks, for which RigL scores every element of its {layer.grid.out_features} x "
                    f"{layer.grid.in_features} matrix: memory like a dense gradient's. Use GSE, or larger blocks, or "
                    "accept it with allow_dense_scores=True"
                )
        blocked = not all(is_dense(layer) for layer in self.layers.values())
        several = blocked and ranks(self.process_group) > 1
        if several and scoring == "exact":
            raise InputError(
                "scoring is 'exact', but norms do not add up over ranks; use 'auto' or 'screen'", parameter="scoring"
            )
        self.scoring, self.sketches, self.shortlist = scoring, sketches, shortlist
        self.regrow, self.allow_dense_scores = regrow, allow_dense_scores
        self._grid_scores: dict[str, Tensor] = {}  # (R * C,), of layers in which every place was scored
        self._screen = False
        if blocked and (scoring == "screen" or several):
            self._start_screening()
        else:
            for name, layer in self.layers.items():
                if room_for_scores(layer) < 1 and not allow_dense_scores:
                    raise InputError(_too_many(name, layer, "a norm", f"{layer.grid.cells} norms"))
        if skip_step:
            self.hook("before", "_skip")
        self.begin()

    def stages(self) -> int:
        """Return 1, or 2 when screening."""
        return 2 if self._screen else 1

    def ask(self, stage: int, name: str, layer: BlockSparse) -> Probe | None:
        """Ask for all norms; when screening for a sketch, then for the gradients of the shortlist."""
        grid, device, dtype = layer.grid, layer.row.device, self.dtype(layer)
        last = stage == self.stages() - 1
        if is_dense(layer):  # one number a block: a sketch with ones is the gradient itself
            ones = [torch.ones(1, n, dtype=dtype, device=device) for n in (grid.out_features, grid.in_features)]
            return Probe.sketch(grid, *ones) if last else None
        if not self._screen:
            return Probe.counted_norms(grid, dtype=dtype, device=device)
        if last:
            return self.ask_candidates(name, layer)
        generator = self.generator(name, "sketch")
        u, v = (
            (torch.randint(2, (self._sketches(name, layer), n), generator=generator, device="cpu") * 2 - 1).to(
                device, dtype
            )
            for n in (grid.out_features, grid.in_features)
        )
        return Probe.sketch(grid, u, v)

    def hear(self, stage: int, answers: dict[str, Tensor]) -> int | None:
        """Take the scores, or the shortlist; start to screen when norms were added up."""
        last = stage == self.stages() - 1
        for name, answer in answers.items():
            layer = self.layers[name]
            if not last:
                self._keys[name] = self._shortlist(layer, answer)
            elif is_dense(layer):  # the gradient itself
                self._grid_scores[name] = as_on_first_rank(answer.abs_().flatten(), self.process_group)
            elif self._screen:
                self.score_candidates(name, answer)
            elif (parts := int(answer[-1])) > 1:
                self._forget_scores()
                self._no_more_streaming(name, parts)
                return 0
            else:
                self._grid_scores[name] = answer[:-1]
        return None if last else 1

    def _shortlist(self, layer: BlockSparse, answer: Tensor) -> Tensor:
        """Return the empty places of highest estimated norm, ascending, int32 on the CPU."""
        squares = answer.square_().mean(0).flatten()
        as_on_first_rank(squares, self.process_group)
        present = ordered_keys(layer.index, layer.topology).long()
        squares.index_fill_(0, present, -torch.inf)
        grown = max(1, part_of(present.shape[0], self.schedule.fraction(self.steps)))
        return highest(squares, math.ceil(self.shortlist * grown)).int().cpu()

    def _no_more_streaming(self, name: str, parts: int) -> None:
        why = (
            f"the gradient of {name!r} comes in {parts} parts a step (several batches, calls of the layer, or a "
            "derivative of it in the loss), and norms do not add up"
        )
        if self.scoring == "exact":
            raise InputError(f"scoring is 'exact', but {why}; use 'auto' or 'screen'", parameter="scoring")
        _log.warning("RigL screens its blocks by sketches from now on: %s", why)
        self._start_screening()

    def _start_screening(self) -> None:
        if self.regrow:
            raise InputError("regrow needs the scores of all blocks, of one backward a step on one rank; leave it out")
        for name, layer in self.layers.items():
            if (used := self._sketches(name, layer)) < self.sketches:
                _log.warning("RigL screens %r by %d sketches a block: more would not be fewer than values", name, used)
        self._screen = True

    def _sketches(self, name: str, layer: BlockSparse) -> int:
        """Return how many numbers a block a layer's screening may hold; ValueError if they are too few."""
        room = self.sketches if self.allow_dense_scores or is_dense(layer) else room_for_scores(layer)
        if room < min(LEAST_SKETCHES, self.sketches):
            least = min(LEAST_SKETCHES, self.sketches)
            raise InputError(_too_many(name, layer, f"{least} numbers", f"{least * layer.grid.cells} of them"))
        return min(room, self.sketches)

    def offer(self, name: str, layer: BlockSparse, count: int) -> Offer:
        """Return the best empty places."""
        scores = self._grid_scores.get(name)
        if scores is None or not bool(scores.any()):
            return super().offer(name, layer, count)
        scores = scores.index_fill_(0, ordered_keys(layer.index, layer.topology).long(), -torch.inf)
        best = highest(scores, count)
        return Offer(best.int(), scores[best])

    def choose(self, name: str, layer: BlockSparse, fraction: float, generator: torch.Generator) -> Move | None:
        """Return the weakest blocks and the best empty places; with ``regrow`` their own are among these."""
        if not self.regrow or name not in self._grid_scores:
            return super().choose(name, layer, fraction, generator)
        slots = lowest(self.strength(name, layer), part_of(stored_blocks(layer.index), fraction))
        theirs = self._grid_scores[name][layer.topology.keys()[slots].long()]
        offer = self.offer(name, layer, slots.shape[0])
        best = highest(torch.cat([theirs, offer.scores]), slots.shape[0])
        stay = torch.isin(torch.arange(slots.shape[0], device=best.device), best)
        grown = best[best >= slots.shape[0]] - slots.shape[0]
        return to_places(slots[~stay][: grown.shape[0]], offer.keys[grown], layer.grid)

    def _forget_scores(self) -> None:
        super()._forget_scores()
        self._grid_scores = {}

    def _skip(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Clear the gradients of the step that ends in an update: the optimizer leaves parameters without one alone."""
        if is_rehearsal(optimizer):
            return
        if self._stage == self.stages() - 1 and (self._due or self.schedule.due(self.steps + 1)):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, and whether blocks are screened."""
        return super().state_dict() | {"screen": self._screen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.check_state(state)
        self._screen = state["screen"]
        super().load_state_dict(state)


def is_dense(layer: BlockSparse) -> bool:
    """Return whether a score a block is a score an element."""
    return layer.grid.block == (1, 1)


def room_for_scores(layer: BlockSparse) -> int:
    """Return how many numbers a block are still fewer than the layer has values."""
    grid, (bo, bi) = layer.grid, layer.grid.block
    if is_dense(layer) or min(grid.rows, grid.cols) < PROMISED:
        return grid.cells * bo * bi
    return (layer.topology.slots * bo * bi - 1) // grid.cells


def _too_many(name: str, layer: BlockSparse, a_block: str, all_blocks: str) -> str:
    (bo, bi), slots = layer.grid.block, layer.topology.slots
    return (
        f"{name!r} has {bo}x{bi} blocks, for each of which RigL would hold {a_block}: {all_blocks}, and the layer has "
        f"{slots * bo * bi} values. Use GSE, or larger blocks, or accept it with allow_dense_scores=True"
    )
