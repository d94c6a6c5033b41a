"""VR-PGE: learns which blocks to keep from the losses of forward passes, while the weights train.

Zhou, Zhang, Chen, Diao and Zhang, "Efficient Neural Network Training via Forward and Backward Propagation
Sparsification", NeurIPS 2021 (arXiv 2111.05685).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse
from sparsekern.topology import Move, generator_for, part_of
from sparsekern.topology.arguments import check_choice, check_number, check_whole
from sparsekern.training.base import Method
from sparsekern.training.vrpge.budget import Budget, Candidates, Group
from sparsekern.training.vrpge.masks import MaskedLayers, PartialStep, Probabilities, draw_masks, masked_passes


class VRPGE(Method):
    """Learns a probability for each stored block; each step computes with a random subset of the blocks.

    Build the layers with more blocks than are to remain, and give the final sparsity as ``sparsity``. Training steps
    need the closure form, and evaluations the context :meth:`evaluation`::

        model = sk.sparsify_(model, sparsity=0.8)
        sparse = sk.VRPGE(model, optimizer, sparsity=0.9, stop=0.75 * steps)
        for x, y in loader:
            sparse.backward(lambda: loss_fn(model(x), y))
            optimizer.step(); optimizer.zero_grad(set_to_none=True)
            sparse.step()

    Each step draws ``masks`` Bernoulli masks over the units, and runs a forward pass under each with the same batch,
    dropout and norm statistics; the first one has a backward. Blocks outside a mask are not computed. The losses give a
    step of the probabilities (:func:`~sparsekern.training.vrpge.masks.score_gradient`), which are then
    projected onto the budget (:func:`~sparsekern.training.vrpge.budget.project`). At ``stop``, or in
    :meth:`finish`, the most probable units stay, the other slots become free, and training goes on with a fixed
    topology.

    One backward a step is as in the paper (arXiv 2111.05685); ``weight_step="all"`` is as in its code.
    ``docs/methods.md`` lists all differences from both.

    Args:
        model: its sparse layers store the candidates. Wrap it in DistributedDataParallel before, where that is used.
        optimizer: holds the values of the layers.
        sparsity: fraction of the sparse layers' elements that is absent, on average over the masks and exactly at the
            end. Default: half of the stored elements remain.
        masks: number of masks a step, 2 or more. For the same number of passes, more masks tell more than more steps.
        structure_every: optimizer steps between steps of the probabilities; the other steps take one pass only.
        group: what forms a unit, which has one probability: ``"block"``, ``"row"``, ``"column"``, or a function of the
            layer (see :class:`~sparsekern.training.vrpge.budget.Candidates`). The noise grows with their number.
        scope: ``"global"``: one budget for all layers, which compete; ``"layer"``: one for each.
        probability_rate: learning rate of the probabilities; it falls to 0 along a cosine until ``stop``.
        probability_optimizer: ``"adam"`` or ``"sgd"``.
        score_clip: the largest norm of the probabilities' gradient; None for no limit.
        floor: the lowest probability. With 0, a unit that reaches 0 stays out until a refill moves it.
        refill: new probability of units at the floor that an update moves to empty places; 0 for no such moves.
            Default: half the first probability. Only with ``group="block"``.
        costs: cost of one element by the name of its layer, such as the number of output positions of a convolution, so
            that the budget counts operations; 1 for layers that are not named. Or ``"units"``, as in the paper, whose
            budget counts filters: every unit costs the same, and ``sparsity`` is the fraction of units left out.
        projection: ``"sort"``, which is faster; or ``"bisection"``, which needs less memory: for 1x1 blocks.
        weight_step: ``"one"``: the weights are trained under the first mask; ``"all"``: under all masks, with a
            backward each.
        unsampled: what an optimizer step does to values that were in no mask: ``"lazy"``: nothing, neither decay nor
            momentum (synchronises the device once a layer and step); ``"decay"``: the same as at a gradient of zero.
        update_every: optimizer steps between refills, each of at most ``drop_fraction`` of a layer's units.
        options: of :class:`Method`, all but ``keep_connected`` and ``min_age``. Until ``start`` all probabilities stay
            equal.

    Raises:
        ValueError: a number is out of range, an option would have no effect, or there are fewer candidates than are to
            remain.

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

    unused_options: ClassVar = ("keep_connected", "min_age")
    pool: ClassVar[float] = 2.0
    """Candidates to store for each block that is to remain, by default."""
    moves_fraction = False
    sums_over_ranks = True

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
        self.check_options(options)
        check_whole("masks", masks, 2)
        check_whole("structure_every", structure_every, 1)
        check_choice("scope", scope, ("layer", "global"))
        check_choice("weight_step", weight_step, ("one", "all"))
        check_choice("unsampled", unsampled, ("lazy", "decay"))
        if refill is not None:
            check_number("refill", refill, "a probability, in [0, 1]", lambda chance: 0 <= chance <= 1)
        if refill and group != "block":
            raise InputError(
                f"refill is {refill}, which has no effect with group={group!r}: only single blocks move to new places",
                parameter="refill",
            )
        super().__init__(model, optimizer, update_every=update_every, **options)
        self.model = model
        self.scope, self.masks, self.structure_every = scope, masks, structure_every
        self.weight_step, self.lazy = weight_step, unsampled == "lazy"
        trained = dict(self.trained_layers())
        if not trained:
            raise InputError("the values of all sparse layers are frozen; VR-PGE needs one that trains")
        self.candidates = {name: Candidates(layer, group) for name, layer in trained.items()}
        self.budget = Budget(self.candidates, sparsity, scope, costs, floor, projection)
        device = next(iter(trained.values())).values.device
        self._masked = MaskedLayers(self.budget)
        self.probabilities = Probabilities(
            self.budget,
            device,
            rate=probability_rate,
            optimizer=probability_optimizer,
            clip=score_clip,
            mean_over_ranks=self.ranks.mean,
        )
        self.refill = self.budget.ratio / 2 if refill is None else refill
        self.finished = False  # whether the final units are chosen
        self._masks: Tensor | None = None
        self._drawn_at = -1
        self._partial_step = PartialStep(self.optimizer)

    def backward(self, closure: Callable[[], Tensor], *, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Compute the loss and its gradients under the step's masks: ``sparse.backward(lambda: loss_fn(model(x), y))``.

        Runs the closure once for each mask. Random numbers of torch's global generators are the same in each pass, and
        running statistics of batch and instance norms change once; other state that a forward changes is changed K
        times. Several calls before an optimizer step use the same masks, and their gradients add up.

        Args:
            closure: computes the loss ``()`` of one batch, the forward of the model included.
            scaler: scales the loss before the backward.

        Returns:
            The loss under the first mask (the mean over all with ``weight_step="all"``), detached and not scaled.
        """
        if self.finished:
            return super().backward(closure, scaler=scaler)
        self.check_open()
        if self._masks is None or self._drawn_at != self.steps:
            generator = generator_for(self.seed, type(self).__name__, "masks", self.steps)
            self._masks = draw_masks(self.probabilities.value, self.masks, generator)
            self._drawn_at = self.steps
            self.probabilities.clear_losses()
        structure = self.steps >= self.schedule.start and self.steps % self.structure_every == 0
        every = self.weight_step == "all"
        passes = self.masks if structure or every else 1
        with self.writing():  # layers are lent an index for each mask
            losses = masked_passes(self.model, self._masked, self._masks[:passes], closure, every, scaler)
        if structure:
            self.probabilities.add_losses(losses)
        return losses.mean() if every else losses[0]

    def step(self) -> bool:
        """Make a step of the probabilities, and refill or finish if that is due; returns whether blocks moved."""
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

    def check_compact(self) -> None:
        """Raise NotImplementedError: probabilities and masks are held for each slot."""
        super(Method, self).check_compact()

    def choose(self, name: str, layer: BlockSparse, fraction: float, generator: torch.Generator) -> Move | None:
        """Return the move of units at the floor to empty places."""
        candidates = self.candidates.get(name)
        if self.finished or candidates is None or not candidates.may_move or self.refill == 0:
            return None
        at_floor = self.probabilities.value[self.budget.parts[name]] <= self.budget.floor
        return candidates.refill(at_floor, part_of(candidates.count, fraction), generator)

    def settle(self, moves: dict[str, Move]) -> None:
        """Reset the probabilities of units that moved."""
        if moves:
            device = self.probabilities.value.device
            units = {name: self.candidates[name].unit[move.slots.long()] for name, move in moves.items()}
            self.budget.refresh()
            self.probabilities.restart({name: unit.long().to(device) for name, unit in units.items()}, self.refill)

    def finish(self) -> bool:
        """Keep the most probable units within the budget and free the other slots, for good; returns whether any.

        From then on :meth:`backward` is one ordinary pass. Running statistics of norms average over many networks: call
        :func:`sparsekern.recalibrate_norms` before an evaluation, unless more training follows.
        """
        if self.finished:
            return False
        self.check_open()
        return self.move(self._choose_final, self._end_choice)

    def _choose_final(self, fraction: float) -> dict[str, Move]:
        chosen, trained = self.budget.top(self.probabilities.value), dict(self.trained_layers())
        return {name: self._masked.leaving(name, chosen) for name in self.candidates if name in trained}

    def _end_choice(self, moves: dict[str, Move]) -> None:
        self._metrics.free(moves)
        self.finished = True
        self._masked.clear()
        self._masks = None

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Compute, in this context, with the units that :meth:`finish` would keep now. Not around :meth:`backward`."""
        with nullcontext() if self.finished else self._masked.lending(self.budget.top(self.probabilities.value)):
            yield

    def metrics(self) -> dict[str, float]:
        """Return the metrics of :meth:`Method.metrics`, in which ``sparsity/*`` counts all candidates, and two more.

        ``expected_sparsity/*`` fraction absent on average over the masks; ``undecided`` fraction of the units whose
        probability is between 0.05 and 0.95.
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
        """Return what a resumed run needs in addition to the states of model and optimizer."""
        return super().state_dict() | {
            "finished": self.finished,
            "probabilities": self.probabilities.state_dict(),
            "units": {name: candidates.unit.clone() for name, candidates in self.candidates.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
            ValueError: as :meth:`Method.load_state_dict`, or the state has other candidates.
        """
        super().load_state_dict(state)
        self.finished = state["finished"]
        self.probabilities.load_state_dict(state["probabilities"])
        for name, candidates in self.candidates.items():
            candidates.unit.copy_(state["units"][name])
        self.probabilities.clear_losses()
        self._masks, self._drawn_at = None, -1

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise what :meth:`load_state_dict` would raise, without loading anything."""
        units = state.get("units") if isinstance(state, dict) else None
        if isinstance(units, dict):
            mine = {name: candidates.unit.shape for name, candidates in self.candidates.items()}
            if {name: getattr(unit, "shape", None) for name, unit in units.items()} != mine:
                raise InputError("the state has other candidates; build model and method as those that were saved")
        super().check_state(state)

    def before_step(self) -> None:
        """Restrict the optimizer's step to the values that a mask held."""
        super().before_step()
        self._partial_step.end()  # of a step that failed
        if self.finished:
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
            self._partial_step.begin(name, candidates.layer.values, slots)

    def after_step(self, made: bool) -> None:
        """Put the whole parameters back, and count the step."""
        super().after_step(made)
        self._partial_step.end()

    def detach(self) -> None:
        """Remove all hooks, and put parameters back that a failed step left replaced. All candidates stay."""
        self._partial_step.end()
        super().detach()
