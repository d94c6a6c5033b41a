"""The base class of methods that grow blocks where the gradient is large, which probes tell."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sparsekern.errors import InputError
from sparsekern.kernels.contract import accumulate_dtype, is_finite
from sparsekern.nn import BlockSparse
from sparsekern.ops import Probe
from sparsekern.topology import Move, are_absent, generator_for, ordered_keys, part_of, stored_blocks, to_places
from sparsekern.topology.arguments import check_choice, check_whole
from sparsekern.training.base import Method
from sparsekern.training.growth.probe_set import ProbeSet
from sparsekern.training.scores import Offer, highest, lowest, norms_of, share_out, warn_of_no_room

_log = logging.getLogger("sparsekern")


class GradientMethod(Method):
    """Base class of methods that drop weak blocks, and grow where the gradient of the whole weight is large.

    The gradient of the whole weight is never stored. A probe (:class:`sparsekern.ops.Probe`) is armed in every layer
    for the step before an update (for two steps where a method has two stages), and its answer comes from the backwards
    of that step. So an update needs no extra pass. Call :meth:`step` after *every* ``optimizer.step()``.

    Answers add up over the backwards of a step and over ranks, as gradients do, and are cleared with them: gradients
    that ``zero_grad`` clears before the optimizer's step do not count, such as those of the first pass of SAM, of the
    other loss of a GAN, or of a step that gradient scaling skipped. Scaling multiplies all answers alike, and only
    their order matters. Where answers are not finite, the probes are armed again.

    Args:
        scope: ``"layer"``: every layer keeps its number of blocks. ``"global"``: all layers compete for blocks, and a
            layer with free slots (``capacity=`` of :func:`sparsekern.sparsify_`) may gain some.
        score_tokens: number of tokens of each backward, evenly spaced, on which places are scored; None for all. The
            cost of an update is proportional to it. A token of a convolution is an output position.
        score_sketches: number of random projections by which the gradient of a candidate is scored, in place of its
            Frobenius norm, which needs the whole gradient of each candidate from each rank: a rank sends
            ``4 * score_sketches + 4`` bytes a candidate then, whatever the block size. The mean square estimates the
            squared norm with a relative deviation of at most ``sqrt(2 / score_sketches)``. None: the exact norm.
        options: the arguments of :class:`Method`.

    Raises:
        ValueError: a number is out of range, here or in :class:`Method`.
        NotImplementedError: a layer ties its taps; these methods move single blocks.
    """

    moves_tied_taps = False
    sums_over_ranks = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scope: str = "layer",
        score_tokens: int | None = None,
        score_sketches: int | None = None,
        **options: Any,
    ) -> None:
        check_choice("scope", scope, ("layer", "global"))
        if score_tokens is not None:
            check_whole("score_tokens", score_tokens, 1, ", or None for all tokens")
        if score_sketches is not None:
            check_whole("score_sketches", score_sketches, 1)
        self.scope, self.score_tokens, self.score_sketches = scope, score_tokens, score_sketches
        self.moves_fraction = scope == "layer"
        super().__init__(model, optimizer, **options)
        if self.scope == "global" and len(self.layers) > 1:
            warn_of_no_room(dict(self.trained_layers()), "scope is 'global'", "use scope='layer'")
        self._stage: int | None = None
        self._armed_at = 0
        self._due = False
        self.ready = False  # whether the scores for an update are complete
        self._probes = ProbeSet(self.layers)
        self._warned = False
        weakref.finalize(self, self._probes.disarm).atexit = False  # layers must not keep probes of a dead method
        self._candidates: set[str] = set()  # layers whose probes ask for gradients of candidates
        self._keys: dict[str, Tensor] = {}  # candidates, distinct and ascending, int32 on the CPU
        self._width: dict[str, int] = {}  # of a layer's probe for candidates; never decreases
        self._versions: dict[str, tuple[int, int]] = {}  # of the coordinates when candidates were drawn
        self._offers: dict[str, Offer] = {}  # scored candidates

    def agreed(self) -> dict[str, object]:
        """Return the settings, by name, that must be the same on all ranks: also the size of what they send."""
        sketches = {} if self.score_sketches is None else {"score_sketches": self.score_sketches}
        return super().agreed() | sketches

    # Implemented by subclasses.

    def stages(self) -> int:
        """Return the number of steps before an update in which probes are armed."""
        raise NotImplementedError

    def prepare(self, stage: int) -> None:
        """Draw what the probes of a stage ask for; nothing by default. Candidates in ``_keys`` are saved."""

    def ask(self, stage: int, name: str, layer: BlockSparse) -> Probe | None:
        """Return the probe of a layer for a stage, or None. Called again after loading, it must return the same one."""
        raise NotImplementedError

    def hear(self, stage: int, answers: dict[str, Tensor]) -> int | None:
        """Process the answers of a stage; return the next stage, or None when the scores are complete."""
        raise NotImplementedError

    # Candidates: places drawn beforehand, whose gradients add up exactly.

    def ask_candidates(self, name: str, layer: BlockSparse) -> Probe:
        """Return a probe for the gradients of the layer's candidates."""
        keys = self._keys[name]
        self._candidates.add(name)
        width = self._width[name] = max(self._width.get(name, 0), keys.shape[0])
        padded = pad(keys, (0, width - keys.shape[0]), value=-1)  # one shape: one graph under torch.compile
        _, row, col = to_places(padded, padded, layer.grid)
        device = layer.row.device
        return Probe.candidates(layer.grid, row.to(device), col.to(device), dtype=self.dtype(layer), checked=True)

    def score_candidates(self, name: str, scores: Tensor) -> None:
        """Offer a layer's candidates by their scores ``(n,)``."""
        self._offers[name] = Offer(self._keys[name].to(scores.device), scores)

    def _over_ranks(self, name: str, answer: Tensor) -> Tensor:
        """Return the sum over ranks of an answer; of one with gradients of candidates, their scores ``(n,)``."""
        if name not in self._candidates:
            return self.ranks.sum(answer)
        gradients = answer[: self._keys[name].shape[0]]
        count, size = self.score_sketches, gradients[0].numel() if gradients.numel() else 0
        if count is not None and count < size:
            generator = self.generator(name, "score sketches")
            signs = torch.randint(2, (size, count), generator=generator, device="cpu") * 2 - 1
            # (n, count, 1): projections, whose square sums estimate squared norms
            gradients = (gradients.flatten(1) @ (signs.to(answer) / count**0.5))[..., None]
        return self.ranks.measures(gradients, norms_of)

    def offer(self, name: str, layer: BlockSparse, count: int) -> Offer:
        """Return empty places and their scores, among them the ``count`` best ones.

        Empty where all scores are zero: the layer was not used in this step.
        """
        offer = self._offers.get(name)
        if offer is None or not bool(offer.scores.any()):
            nothing = torch.empty(0, dtype=torch.int32, device=layer.row.device)
            return Offer(nothing, nothing.to(self.dtype(layer)))
        if self._versions.get(name) == _version(layer):
            return offer
        empty = are_absent(offer.keys, ordered_keys(layer.index, layer.topology), layer.grid.cells)
        return Offer(offer.keys[empty], offer.scores[empty])  # other code has moved blocks

    # Arming and reading probes.

    def begin(self) -> None:
        """Arm probes for an update in the first steps. The last line of a subclass's constructor."""
        if self._due_soon():
            self._arm(0)

    def step(self) -> bool:
        """Update the topology if due, and arm probes for the next update. Call it after *every* optimizer step."""
        self.check_step()
        began, spent = time.perf_counter(), self.seconds
        due = self.schedule.due_since(self._seen, self.steps)
        self._due = (due or self._due) and self.schedule.before_stop(self.steps)
        apart, self._seen = max(1, self.steps - self._seen), self.steps
        if self._stage is not None and self.steps == self._armed_at:
            return False
        moved = False
        if self._stage is not None:
            self._read_probes()
            if self.ready and self._due:
                moved = self.update()
            if self.ready:  # the schedule ended in between
                self.ready = False
                self._clear_scores()
        if self._stage is None and (self._due or self._due_soon(apart)):
            self._arm(0)
        if self._stage is not None or moved:
            self.seconds = spent + time.perf_counter() - began
        return moved

    def _due_soon(self, apart: int = 1) -> bool:
        """Return whether an update becomes due in the steps that its stages need.

        Args:
            apart: optimizer steps between calls of :meth:`step`, where it is not called after each.
        """
        return any(self.schedule.due(self.steps + ahead + 1) for ahead in range(self.stages() * apart))

    def update(self) -> bool:
        """Update the topology now; :meth:`step` calls it when the scores are :attr:`ready`.

        Raises:
            RuntimeError: the scores are not ready.
        """
        self.check_open()
        if not self.ready:
            raise RuntimeError(
                f"{type(self).__name__} has no scores to update by: probes are armed for the step before an update; "
                "call step() after every optimizer.step()"
            )
        self._due = self.ready = False
        return self.move(self._choose_and_clear, self.settle)

    def _choose_and_clear(self, fraction: float) -> dict[str, Move]:
        moves = self.choose_all(fraction)
        self._clear_scores()  # before the move allocates temporaries
        return moves

    def _arm(self, stage: int) -> None:
        self._disarm()
        self.prepare(stage)
        self._put(stage)

    def _put(self, stage: int) -> None:
        self._stage, self._armed_at = stage, self.steps
        self._candidates.clear()
        for name, layer in self.trained_layers():
            probe = self.ask(stage, name, layer)
            self._versions[name] = _version(layer)
            if probe is not None:
                self._probes.arm(name, probe.of_tokens(self.score_tokens or 0))

    def _disarm(self) -> None:
        self._probes.disarm()
        self._stage = None

    def _clear_scores(self) -> None:
        self._offers = {}

    def _read_probes(self) -> None:
        """Read the probes, and arm them for the next stage, or again for this one, if need be."""
        assert self._stage is not None
        stage = self._stage
        answers = {name: self._over_ranks(name, answer) for name, answer in self._probes.answers().items()}
        finite = all(is_finite(answer) for answer in answers.values())
        if answers and self.ranks.any(not finite, next(iter(answers.values())).device):
            self._arm(stage)
            return
        self._disarm()
        following = self.hear(stage, answers)
        if following is None:
            self.ready = True
        else:
            self._arm(following)

    def see_gradients(self) -> None:
        """Clear answers whose gradients were cleared."""
        self._probes.settle()

    def before_step(self) -> None:
        """Clear answers whose gradients were cleared: some optimizers clear gradients in their step."""
        super().before_step()
        self._probes.settle()

    def after_step(self, made: bool) -> None:
        """Count the step, and store its answers."""
        super().after_step(made)
        if made and (missed := self._probes.keep()) and not self._warned:
            self._warned = True
            _log.warning(
                "%s got no scores with the gradients of %s, and can grow nothing there: a captured graph (CUDA graphs, "
                "torch.jit.trace) does not contain its probes, nor do gradients that were assigned. Run the step "
                "before an update without the graph, or use SET",
                type(self).__name__,
                ", ".join(missed),
            )

    # Choosing blocks.

    def choose(self, name: str, layer: BlockSparse, fraction: float, generator: torch.Generator) -> Move | None:
        """Return the weakest blocks and as many of the places with the highest scores."""
        return self.exchange(name, layer, self.strength(name, layer), part_of(stored_blocks(layer.index), fraction))

    def exchange(self, name: str, layer: BlockSparse, strength: Tensor, count: int) -> Move:
        """Return the move of the ``count`` blocks of lowest strength ``(Z,)`` to the places with the highest scores."""
        slots = lowest(strength, count)
        count = slots.shape[0]
        offer = self.offer(name, layer, count)
        best = highest(offer.scores, count)
        if best.shape[0] < count:
            slots = lowest(strength, best.shape[0])
        return to_places(slots, offer.keys[best], layer.grid)

    def choose_all(self, fraction: float) -> dict[str, Move]:
        """Return the moves of all layers, each by itself, or in competition with ``scope="global"``."""
        if self.scope == "layer":
            return super().choose_all(fraction)
        layers = dict(self.trained_layers())
        total = part_of(sum(stored_blocks(layer.index) for layer in layers.values()), fraction)
        strengths = {name: self.strength(name, layer) for name, layer in layers.items()}
        offers = {name: self.offer(name, layer, min(total, layer.topology.slots)) for name, layer in layers.items()}
        return share_out(layers, strengths, offers, total)

    def generator(self, name: str, purpose: str) -> torch.Generator:
        """Return a CPU generator for a purpose, seeded from the seed, the method, the layer's name and the step."""
        return generator_for(self.seed, type(self).__name__, name, self.steps, purpose)

    def dtype(self, layer: BlockSparse) -> torch.dtype:
        """Return the dtype in which a layer's answers accumulate."""
        return accumulate_dtype(layer.values.dtype)

    # Saving and loading.

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, including the answers of probes so far."""
        return super().state_dict() | {
            "stage": self._stage,
            "armed_at": self._armed_at,
            "due": self._due,
            "probes": (dict(self._keys), self._probes.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, and arm the same probes."""
        super().load_state_dict(state)
        self._disarm()
        self._due, self._keys = state["due"], dict(state["probes"][0])
        self._width = {}  # the saved run's is not known
        self._resume(state)

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise what :meth:`load_state_dict` would raise, without loading anything."""
        super().check_state(state)
        if not (state["stage"] is None or (type(state["stage"]) is int and state["stage"] in (0, 1))):
            raise InputError(f"state['stage'] is {state['stage']!r}; a method has two stages at most, 0 and 1")
        keys, answers = state["probes"]
        for name, asked in keys.items():
            cells = self.layers[name].grid.cells if name in self.layers else 0
            whole = isinstance(asked, Tensor) and asked.dtype in (torch.int32, torch.int64) and asked.dim() == 1
            if not whole or not _ascend(asked.cpu(), cells):
                raise InputError(f"the state's candidates of {name!r} are no places of its grid")
        ProbeSet.check_state(answers)

    def _resume(self, state: dict[str, Any]) -> None:
        """Arm the probes of a state, and load their answers."""
        if state["stage"] is None:
            return
        now, self.steps = self.steps, state["armed_at"]  # random choices depend on it
        try:
            self._put(state["stage"])
        except KeyError as error:
            raise InputError(f"the state has no candidates of {error} for the stage that it is in") from None
        self.steps, self._versions = now, {}
        self._probes.load_state_dict(state["probes"][1])

    def compacted(self, kept: Mapping[BlockSparse, Tensor]) -> None:
        """Adapt to layers that kept only some slots, and arm the probes on their new values."""
        super().compacted(kept)
        armed = self.state_dict()
        self._disarm()
        self._resume(armed)

    def detach(self) -> None:
        """Remove all hooks and probes."""
        self._disarm()
        super().detach()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_probes": self.state_dict()}  # probes themselves are not saved

    def __setstate__(self, state: dict[str, Any]) -> None:
        asked = state["_probes"]
        super().__setstate__(state | {"_probes": ProbeSet(state["layers"]), "_stage": None})
        weakref.finalize(self, self._probes.disarm).atexit = False
        if not self.closed:
            self._resume(asked)


def _ascend(keys: Tensor, cells: int) -> bool:
    """Return whether keys are distinct places of a grid in ascending order, which a probe does not check."""
    inside = not keys.numel() or (int(keys[0]) >= 0 and int(keys[-1]) < cells)
    return inside and bool((keys[1:] > keys[:-1]).all())


def _version(layer: BlockSparse) -> tuple[int, int]:
    """Return the versions of the coordinates, which change with every write."""
    return layer.row._version, layer.col._version
