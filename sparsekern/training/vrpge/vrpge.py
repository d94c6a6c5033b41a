"""VR-PGE: which blocks to keep is learnt from the losses of forward passes, while the weights train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse, refuse_sharded
from sparsekern.topology import generator_for
from sparsekern.topology.arguments import check_number, check_whole
from sparsekern.training.base import Method, is_rehearsal
from sparsekern.training.followers import Move
from sparsekern.training.vrpge.budget import Budget
from sparsekern.training.vrpge.candidates import Candidates, Group
from sparsekern.training.vrpge.masked import MaskedLayers, masked_passes
from sparsekern.training.vrpge.partial_step import StandIns
from sparsekern.training.vrpge.probabilities import Probabilities
from sparsekern.training.vrpge.projection import PROJECTIONS
from sparsekern.training.vrpge.sampling import draw_masks


class VRPGE(Method):
    """Every stored block is a candidate with a probability; a training step computes with those that a coin chose.

    Build the layers with more blocks than are to remain, and give what is to remain as ``sparsity``. Needs the form of
    a closure, and :meth:`evaluation` around an evaluation::

        model = sk.sparsify_(model, sparsity=0.8)
        sparse = sk.VRPGE(model, optimizer, sparsity=0.9, stop=0.75 * steps)
        for x, y in loader:
            sparse.backward(lambda: loss_fn(model(x), y))
            optimizer.step(); optimizer.zero_grad(set_to_none=True)
            sparse.step()

    Each step draws ``masks`` Bernoulli masks over the units. All see the same batch, the same dropout and the same
    norms; all but the first are forward passes without a graph. Blocks that a mask leaves out are not computed,
    neither forward nor backward. From the losses follows a step on the probabilities
    (:func:`~sparsekern.training.vrpge.sampling.score_gradient`), then their projection onto the budget
    (:func:`~sparsekern.training.vrpge.projection.project`). At ``stop``, or by :meth:`finish`, the likeliest units
    stay, the other slots become free, and training goes on with a fixed topology.

    One backward a step is what the paper says (arXiv 2111.05685); ``weight_step="all"`` has its code's.
    ``docs/methods.md`` has a table of all that differs from the paper and from its code.

    Args:
        model: whose sparse layers store the candidates; wrapped in DistributedDataParallel if it is to be.
        optimizer: holds their values.
        sparsity: fraction of the sparse layers' elements that is to be absent, on average over the masks and exactly
            at the end. Default: half of what is stored remains.
        masks: K, 2 or more. At an equal number of passes more masks say more than more steps.
        structure_every: optimizer steps between steps of the probabilities; the others take one pass only.
        group: what has a probability: ``"block"``, ``"row"``, ``"column"`` or a function; :class:`Candidates`. The
            noise grows with their number.
        scope: ``"global"``: one budget, so that layers compete; ``"layer"``: one each.
        probability_optimizer: ``"adam"`` or ``"sgd"``; its ``probability_rate`` falls to 0 along a cosine by ``stop``.
        score_clip: the largest norm of the scores; None for any.
        floor: the lowest probability. At 0, what fell to 0 is out until a refill moves it.
        refill: probability of a candidate that an update moves to a new empty place, because it had fallen to the
            floor; 0 for no such moves. Default: half the first one. Only for ``group="block"``.
        costs: by the name of a layer, what one of its elements costs, such as the output positions of a convolution:
            the budget then counts operations. 1 where nothing is said. Or ``"units"``, as in the paper, whose budget
            counts filters: every unit costs the same, and ``sparsity`` is the fraction of them that is left out.
        projection: ``"sort"``, the faster; or ``"bisection"``, which holds less beside the units: for 1x1 blocks.
        weight_step: ``"one"``: the weights see the first mask; ``"all"``: the mean over all masks, a backward each.
        unsampled: what the optimizer does to values that no mask of the step held: ``"lazy"``, nothing, neither decay
            nor momentum (synchronises the device once a layer and step); ``"decay"``, what it does at a
            gradient of zero.
        update_every: optimizer steps between refills; ``drop_fraction`` limits them to that part of a layer's units.
        options: of :class:`Method`: ``start``, before which probabilities stay equal, ``stop``, ``drop_fraction``,
            ``grown_state``, ``seed``; ``keep_connected`` and ``min_age`` have no effect.

    Raises:
        ValueError: a number out of range, or fewer candidates than are to remain.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.5, block_size=16)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparse = sk.VRPGE(model, optimizer, sparsity=0.75, stop=2)
        >>> for step in range(2):
        ...     loss = sparse.backward(lambda: model(torch.ones(8, 64)).square().mean())
        ...     optimizer.step(); optimizer.zero_grad()
        ...     finished = sparse.step()
        >>> finished, model[0].sparsity
        (True, 0.75)
    """

    pool = 2.0
    moves_fraction = False
    sums_over_ranks = True
    scopes = ("layer", "global")

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sparsity: float | None = None,
        masks: int = 2,
        structure_every: int = 1,
        group: Group = "block",
        scope: str = "global",
        probability_rate: float = 12e-3,
        probability_optimizer: str = "adam",
        score_clip: float | None = 3.0,
        floor: float = 0.0,
        refill: float | None = None,
        costs: dict[str, float] | str | None = None,
        projection: str = "sort",
        weight_step: str = "one",
        unsampled: str = "lazy",
        update_every: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(model, optimizer, update_every=update_every, **options)
        for name, value, least in (("masks", masks, 2), ("structure_every", structure_every, 1)):
            check_whole(name, value)
            if value < least:
                raise InputError(f"{name} is {value}; it must be {least} or more", parameter=name)
        for name, choice, known in (
            ("scope", scope, self.scopes),
            ("projection", projection, PROJECTIONS),
            ("weight_step", weight_step, ("one", "all")),
            ("unsampled", unsampled, ("lazy", "decay")),
        ):
            if choice not in known:
                raise InputError(f"{name} is {choice!r}; it must be one of {', '.join(known)}", parameter=name)
        self.model = model
        self.scope, self.masks, self.structure_every = scope, masks, structure_every
        self.weight_step, self.lazy = weight_step, unsampled == "lazy"
        trained = {name: layer for name, layer in self.layers.items() if layer.values.requires_grad}
        if not trained:
            raise InputError("the values of all sparse layers are frozen; VR-PGE needs one that trains")
        self.candidates = {name: Candidates(layer, group) for name, layer in trained.items()}
        self.budget = Budget(self.candidates, sparsity, scope, costs, floor, projection)
        device = next(iter(trained.values())).values.device
        self._masked = MaskedLayers(self.candidates, self.budget)
        self.probabilities = Probabilities(
            self.budget,
            device,
            rate=probability_rate,
            optimizer=probability_optimizer,
            clip=score_clip,
            group=self.process_group,
        )
        if refill is not None:
            check_number("refill", refill, "a probability, in [0, 1]")
        self.refill = self.budget.ratio / 2 if refill is None else refill
        if not 0 <= self.refill <= 1:
            raise InputError(f"refill is {refill}; it must be a probability, in [0, 1]", parameter="refill")
        self.finished = False
        self._masks: Tensor | None = None
        self._drawn_at = -1
        self._ending: Tensor | None = None
        self._refilled: dict[str, Tensor] = {}
        self._stand_ins = StandIns(self.optimizer)
        self.hook("before", "_before_step")
        self.hook("after", "_after_step")

    def backward(self, closure: Callable[[], Tensor], *, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Compute the loss and its gradients under the step's masks: ``sparse.backward(lambda: loss_fn(model(x), y))``.

        Runs the closure once a mask. It must do the same each time: what it draws from torch's global generators is
        drawn again alike, and running statistics of batch and instance norms see one pass only; other state that a
        forward changes, it changes K times. Several calls before an optimizer step have the same masks, and add up.

        Args:
            closure: computes the loss ``()`` of one batch, the forward of the model included.
            scaler: scales the loss before the backward.

        Returns:
            The loss under the first mask (the mean over all with ``weight_step="all"``), detached and not scaled.
        """
        if self.finished:
            return super().backward(closure, scaler=scaler)
        self.check_open()
        refuse_sharded(self.layers)
        if self._masks is None or self._drawn_at != self.steps:
            generator = generator_for(self.seed, type(self).__name__, "masks", self.steps)
            self._masks = draw_masks(self.probabilities.value, self.masks, generator)
            self._drawn_at = self.steps
            self.probabilities.forget()
        structure = self.steps >= self.schedule.start and self.steps % self.structure_every == 0
        every = self.weight_step == "all"
        passes = self.masks if structure or every else 1
        with self.writing():  # each mask is an index that layers are lent
            losses = masked_passes(self.model, self._masked, self._masks[:passes], closure, every, scaler)
        if structure:
            self.probabilities.note(losses)
        return losses.mean() if every else losses[0]

    def step(self) -> bool:
        """Step the probabilities, and refill or finish if it is time to; returns whether blocks moved."""
        self.check_step()
        if self.finished:
            self._seen = self.steps
            return False
        if self.steps > self._seen and self._masks is not None:
            self.probabilities.step(self._masks, self.schedule.cosine(self.steps))
        if self.schedule.stop is not None and self.steps >= self.schedule.stop:
            self._seen = self.steps
            return self.finish()
        return super().step()

    def update(self) -> bool:
        """Move candidates whose probability is at the floor to new empty places; returns whether any moved."""
        self._refilled = {}
        return super().update()

    def settle(self, moves: dict[str, Move]) -> None:
        """Give refilled units a fresh probability; at the end, note that the choice is made."""
        if self._ending is not None:
            for name, layer in self.layers.items():
                left, freed = layer.topology.blocks(), moves[name].slots.numel() if name in moves else 0
                self.books.churn[name] = 1 - left / max(1, left + freed)
            self.finished = True
            self._masked.clear()
            self._masks = None
        elif self._refilled:
            self.budget.refresh()
            self.probabilities.restart(self._refilled, self.refill)

    def choose(self, name: str, layer: BlockSparse, fraction: float, generator: torch.Generator) -> Move | None:
        """Return which candidates go to which new places, or, at the end, which slots become free."""
        candidates = self.candidates.get(name)
        if candidates is None:
            return None
        part = self.budget.part(name)
        if self._ending is not None:
            return self._masked.leaving(name, self._ending)
        if not candidates.may_move or self.refill == 0:
            return None
        dead = self.probabilities.value[part] <= self.budget.floor
        limit = math.floor(fraction * candidates.count + 1e-9)
        units, move = candidates.refill(dead, limit, generator)
        if units.numel():
            self._refilled[name] = units.to(self.probabilities.value.device)
        return move

    def finish(self) -> bool:
        """Keep the likeliest units that the budget allows and free the other slots, for good; returns whether any.

        From here on :meth:`backward` is one ordinary pass. Running statistics of norms were taken from many networks:
        call :func:`sparsekern.recalibrate_norms` before an evaluation that does not follow more training.
        """
        if self.finished:
            return False
        self._ending = self.budget.top(self.probabilities.value)
        try:
            return super().update()
        finally:
            self._ending = None

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Compute, in this context, with the units that :meth:`finish` would keep now. Not around :meth:`backward`."""
        with nullcontext() if self.finished else self._masked.lending(self.budget.top(self.probabilities.value)):
            yield

    @property
    def settled(self) -> bool:
        """Whether the choice is made: before, each step draws networks of its own."""
        return self.finished

    def metrics(self) -> dict[str, float]:
        """Return the numbers of :meth:`Method.metrics`, where ``sparsity/*`` is that of all candidates, and more.

        ``expected_sparsity/*`` fraction absent on average over the masks; ``undecided`` fraction of the units whose
        probability lies between 0.05 and 0.95.
        """
        numbers = super().metrics()
        left, total, s = 0.0, 0, self.probabilities.value
        learnt = {} if self.finished else self.candidates
        for name, layer in self.layers.items():
            expected = self.budget.expected_elements(name, s) if name in learnt else layer.topology.elements()
            numbers[f"expected_sparsity/{name}"] = 1 - expected / layer.grid.numel
            left, total = left + expected, total + layer.grid.numel
        numbers["expected_sparsity/global"] = 1 - left / total
        numbers["undecided"] = 0.0 if self.finished else int(((s > 0.05) & (s < 0.95)).count_nonzero()) / s.numel()
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, beside the model's and the optimizer's state. Masks follow from the seed."""
        return super().state_dict() | {
            "finished": self.finished,
            "probabilities": self.probabilities.state_dict(),
            "units": {name: candidates.unit.clone() for name, candidates in self.candidates.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: as :meth:`Method.load_state_dict`, or other candidates.
        """
        super().load_state_dict(state)
        self.finished = state["finished"]
        self.probabilities.load_state_dict(state["probabilities"])
        for name, candidates in self.candidates.items():
            candidates.unit.copy_(state["units"][name])
        self.probabilities.forget()
        self._masks, self._drawn_at = None, -1

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise what :meth:`load_state_dict` raises, and load nothing."""
        units = state.get("units") if isinstance(state, dict) else None
        if isinstance(units, dict):
            mine = {name: candidates.unit.shape for name, candidates in self.candidates.items()}
            if {name: getattr(unit, "shape", None) for name, unit in units.items()} != mine:
                raise InputError("the state has other candidates; build model and method as those that were saved")
        super().check_state(state)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._stand_ins.leave()

    def leave(self) -> None:
        """Act no more; parameters that a failed step left away are put back. All candidates stay."""
        self._stand_ins.leave()
        super().leave()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._stand_ins.leave()  # of a step that failed
        if self.finished or is_rehearsal(optimizer):
            return
        if self._masks is None or self._drawn_at != self.steps:
            raise RuntimeError(
                "the optimizer steps without a backward of VR-PGE: in place of loss.backward() write "
                "sparse.backward(lambda: loss_fn(model(x), y)), which draws masks and replays the batch"
            )
        if not self.lazy:
            return
        held = self._masks.any(0) if self.weight_step == "all" else self._masks[0]
        for name, candidates in self.candidates.items():
            slots = self._masked.slots(name, held).nonzero().squeeze(1)
            self._stand_ins.enter(name, candidates.layer.values, slots)
