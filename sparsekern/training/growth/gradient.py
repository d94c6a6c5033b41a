"""Methods that grow where the gradient is large: arming probes, reading them, and choosing by their scores."""

from __future__ import annotations

import logging
import time
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from sparsekern.errors import InputError
from sparsekern.kernels.contract import accumulate_dtype
from sparsekern.nn import BlockSparse
from sparsekern.ops import Probe
from sparsekern.topology import are_absent, generator_for, ordered_keys, stored_blocks
from sparsekern.topology.arguments import check_whole
from sparsekern.training.base import Method
from sparsekern.training.distributed import as_on_first_rank
from sparsekern.training.followers import Move, to_places
from sparsekern.training.growth.competition import Offer, share_out
from sparsekern.training.growth.probe_set import ArmedProbes
from sparsekern.training.scores import highest, is_finite, lowest, norms_of, part_of

_log = logging.getLogger("sparsekern")


class GradientMethod(Method):
    """Drops weak blocks and grows where the gradient of the whole weight says so, without ever forming it.

    A probe (:class:`sparsekern.ops.Probe`) is armed in every layer for the steps that lead to an update, one after the
    other where a method needs two stages; it hears the gradient in the backwards of that very step. So an update needs
    no pass of its own, and call :meth:`step` after *every* ``optimizer.step()``.

    Answers add up over the backwards of a step and over ranks, as gradients do, and die with them: what ``zero_grad``
    drops before the optimizer's step counts for nothing, such as the first pass of SAM, the other loss of a GAN, or a
    step that gradient scaling skipped. Scaling multiplies all of them alike, and only their order counts. Answers that
    are not finite are asked for again.

    Args:
        score_tokens: score on so many tokens of each backward, evenly spread, instead of all: the cost of an update
            falls in proportion. None for all. Of a convolution a token is an output position.
        process_group: the ranks that share one model. Default: all, where torch.distributed is in use.
        options: the arguments of :class:`Method`.

    Raises:
        ValueError: a number out of range, here or in :class:`Method`.
        NotImplementedError: a layer ties its taps, and the method moves every block by itself.
    """

    scopes = ("layer", "global")
    sums_over_ranks = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        score_tokens: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, optimizer, process_group=process_group, **options)
        for name, layer in self.layers.items():
            if layer.tie_taps:
                raise NotImplementedError(
                    f"{name!r} has tie_taps=True, but {type(self).__name__} moves every block by itself; "
                    "leave the taps untied, or use SET or VRPGE"
                )
        if score_tokens is not None:
            check_whole("score_tokens", score_tokens)
        if score_tokens is not None and score_tokens < 1:
            raise InputError(
                f"score_tokens is {score_tokens}; it must be 1 or more, or None for all tokens",
                parameter="score_tokens",
            )
        if self.scope == "global":
            self._warn_of_no_room()
        self.score_tokens = score_tokens
        self._stage: int | None = None
        self._armed_at = 0
        self._due = False
        self._heard = False
        self._armed = ArmedProbes(self.layers)
        self._warned = False
        self.hook("before", "_settle")
        weakref.finalize(self, self._armed.disarm).atexit = False  # layers do not answer who is gone
        self._keys: dict[str, Tensor] = {}  # candidates, distinct and ascending, int32 on the CPU
        self._width: dict[str, int] = {}  # of a layer's probe for candidates; it only grows
        self._versions: dict[str, tuple[int, int]] = {}  # of the places when candidates were drawn
        self._offers: dict[str, Offer] = {}  # scored candidates

    def _warn_of_no_room(self) -> None:
        """Warn if layers are to compete for blocks and none could take any.

        No error: the weakest blocks of all layers may be exchanged within each, or there may be one layer only. And no
        warning of single layers: in a competition that goes on, as after loading, some have won all their slots.
        """
        layers = self._trained()
        if len(layers) > 1 and all(stored_blocks(layer.index) == layer.topology.slots for _, layer in layers):
            could = [name for name, layer in layers if layer.topology.slots < layer.grid.cells]
            if could:
                _log.warning(
                    "scope is 'global', but no layer has a free slot, so each keeps its number of blocks: %s. For "
                    "layers that compete, build the model with sparsify_(..., capacity=1.25), or use scope='layer'",
                    ", ".join(could),
                )

    # What a subclass says.

    def stages(self) -> int:
        """Return how many steps in a row are armed before an update."""
        raise NotImplementedError

    def prepare(self, stage: int) -> None:
        """Draw what one stage asks for; nothing by default. What it leaves in ``_keys`` is saved."""

    def ask(self, stage: int, name: str, layer: BlockSparse) -> Probe | None:
        """Return the probe of a layer for one stage, the same whenever it is asked for; None for none."""
        raise NotImplementedError

    def hear(self, stage: int, answers: dict[str, Tensor]) -> int | None:
        """Take the answers of one stage; return the stage to ask next, or None when the scores are complete."""
        raise NotImplementedError

    # Candidates: places chosen beforehand, whose gradients add up exactly.

    def ask_candidates(self, name: str, layer: BlockSparse) -> Probe:
        """Return a probe for the gradients of the layer's candidates."""
        keys = self._keys[name]
        width = self._width[name] = max(self._width.get(name, 0), keys.shape[0])
        padded = pad(keys, (0, width - keys.shape[0]), value=-1)  # one shape, hence one graph under torch.compile
        _, row, col = to_places(padded, padded, layer.grid)
        device = layer.row.device
        return Probe.candidates(layer.grid, row.to(device), col.to(device), dtype=self.dtype(layer), checked=True)

    def score_candidates(self, name: str, answer: Tensor) -> None:
        """Score a layer's candidates by the norms of their gradients."""
        keys = self._keys[name]
        norms = norms_of(answer[: keys.shape[0]])
        self._offers[name] = Offer(keys.to(norms.device), as_on_first_rank(norms, self.process_group))

    def offer(self, name: str, layer: BlockSparse, count: int) -> Offer:
        """Return empty places and their scores: at least the best ``count`` if there are so many.

        None where all scores are zero: the layer took no part in this step.
        """
        offer = self._offers.get(name)
        if offer is None or not bool(offer.scores.any()):
            nothing = torch.empty(0, dtype=torch.int32, device=layer.row.device)
            return Offer(nothing, nothing.to(self.dtype(layer)))
        if self._versions.get(name) == _version(layer):
            return offer
        empty = are_absent(offer.keys, ordered_keys(layer.index, layer.topology), layer.grid.cells)
        return Offer(offer.keys[empty], offer.scores[empty])  # somebody else may have moved blocks

    # When probes are armed and read.

    def begin(self) -> None:
        """Arm for an update that is due at the first steps; the last line of a subclass's constructor."""
        if self._due_soon():
            self._arm(0)

    def step(self) -> bool:
        """Update the topology if it is time to, and arm for the next one. Call it after *every* optimizer step."""
        self.check_step()
        began, spent = time.perf_counter(), self.seconds
        due = self.schedule.due_since(self._seen, self.steps)
        self._due = (due or self._due) and self.schedule.before_stop(self.steps)
        apart, self._seen = max(1, self.steps - self._seen), self.steps
        if self._stage is not None and self.steps == self._armed_at:
            return False
        moved = False
        if self._stage is not None:
            self._listen()
            if self._heard and self._due:
                moved = self.update()
            if self._heard:  # ready, but the last update is past
                self._heard = False
                self._forget_scores()
        if self._stage is None and (self._due or self._due_soon(apart)):
            self._arm(0)
        if self._stage is not None or moved:
            self.seconds = spent + time.perf_counter() - began
        return moved

    def _due_soon(self, apart: int = 1) -> bool:
        """Return whether an update becomes due before, or just when, all stages have been heard.

        Args:
            apart: optimizer steps from one call of :meth:`step` to the next, should it be called less often.
        """
        return any(self.schedule.due(self.steps + ahead + 1) for ahead in range(self.stages() * apart))

    def update(self) -> bool:
        """Update the topology now; only :meth:`step` knows when the scores are there.

        Raises:
            RuntimeError: there are no scores.
        """
        self.check_open()
        if not self._heard:
            raise RuntimeError(
                f"{type(self).__name__} has no scores to update by: probes are armed for the step before an update; "
                "call step() after every optimizer.step()"
            )
        self._due = self._heard = False
        return super().update()

    def _arm(self, stage: int) -> None:
        self._disarm()
        self.prepare(stage)
        self._put(stage)

    def _put(self, stage: int) -> None:
        self._stage, self._armed_at = stage, self.steps
        for name, layer in self._trained():
            probe = self.ask(stage, name, layer)
            self._versions[name] = _version(layer)
            if probe is not None:
                self._armed.arm(name, probe.of_tokens(self.score_tokens or 0))

    def _disarm(self) -> None:
        self._armed.disarm()
        self._stage = None

    def _forget_scores(self) -> None:
        self._offers = {}

    def _listen(self) -> None:
        """Read the probes; then ask on, ask again, or be done."""
        assert self._stage is not None
        stage = self._stage
        answers = self._armed.answers(self.process_group)
        if not all(is_finite(answer) for answer in answers.values()):
            self._arm(stage)
            return
        self._disarm()
        following = self.hear(stage, answers)
        if following is None:
            self._heard = True
        else:
            self._arm(following)

    def see_gradients(self) -> None:
        """Let the probes have heard nothing of gradients that were dropped."""
        self._armed.settle()

    def _settle(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._armed.settle()  # some optimizers drop gradients during their step

    def _count(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        before = self.steps
        super()._count(optimizer, args, kwargs)
        if self.steps > before and (deaf := self._armed.keep()) and not self._warned:
            self._warned = True
            _log.warning(
                "%s heard nothing of the gradients of %s, and can grow nothing there: a captured graph (CUDA graphs, "
                "torch.jit.trace) leaves out what it asks, and so do gradients that were assigned. Run the step before "
                "an update without the graph, or use SET",
                type(self).__name__,
                ", ".join(deaf),
            )

    def _trained(self) -> list[tuple[str, BlockSparse]]:
        return [(name, layer) for name, layer in self.layers.items() if layer.values.requires_grad]

    # Choosing.

    def choose(self, name: str, layer: BlockSparse, fraction: float, generator: torch.Generator) -> Move | None:
        """Return the weakest blocks and as many of the places with the highest scores."""
        strength = self.strength(name, layer)
        slots = lowest(strength, part_of(stored_blocks(layer.index), fraction))
        count = slots.shape[0]
        offer = self.offer(name, layer, count)
        best = highest(offer.scores, count)
        if best.shape[0] < count:
            slots = lowest(strength, best.shape[0])
        return to_places(slots, offer.keys[best], layer.grid)

    def choose_all(self, fraction: float) -> dict[str, Move]:
        """Return the moves of all layers: each for itself, or with ``scope="global"`` in competition."""
        moves = super().choose_all(fraction) if self.scope == "layer" else self._choose_globally(fraction)
        self._forget_scores()  # before the move makes temporaries of its own
        return moves

    def _choose_globally(self, fraction: float) -> dict[str, Move]:
        layers = dict(self._trained())
        total = part_of(sum(stored_blocks(layer.index) for layer in layers.values()), fraction)
        strengths = {name: self.strength(name, layer) for name, layer in layers.items()}
        offers = {name: self.offer(name, layer, min(total, layer.topology.slots)) for name, layer in layers.items()}
        return share_out(layers, strengths, offers, total)

    def generator(self, name: str, purpose: str) -> torch.Generator:
        """Return a CPU generator for what this step asks of a layer."""
        return generator_for(self.seed, type(self).__name__, name, self.steps, purpose)

    def dtype(self, layer: BlockSparse) -> torch.dtype:
        """Return the dtype in which a layer's answers add up."""
        return accumulate_dtype(layer.values.dtype)

    # Saving.

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, what the probes have heard so far included."""
        return super().state_dict() | {
            "stage": self._stage,
            "armed_at": self._armed_at,
            "due": self._due,
            "probes": (dict(self._keys), self._armed.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, with the same probes armed."""
        super().load_state_dict(state)
        self._disarm()
        self._due, self._keys = state["due"], dict(state["probes"][0])
        self._width = {}  # that of the run that was saved is not known
        self._resume(state)

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise what :meth:`load_state_dict` raises, and load nothing."""
        super().check_state(state)
        if not (state["stage"] is None or (type(state["stage"]) is int and state["stage"] in (0, 1))):
            raise InputError(f"state['stage'] is {state['stage']!r}; a method has two stages at most, 0 and 1")
        keys, answers = state["probes"]
        for name, asked in keys.items():
            cells = self.layers[name].grid.cells if name in self.layers else 0
            whole = isinstance(asked, Tensor) and asked.dtype in (torch.int32, torch.int64) and asked.dim() == 1
            if not whole or not _ascend(asked.cpu(), cells):
                raise InputError(f"the state's candidates of {name!r} are no places of its grid")
        ArmedProbes.check_state(answers)

    def _resume(self, state: dict[str, Any]) -> None:
        """Arm the probes that a state says, and let them have heard what it says."""
        if state["stage"] is None:
            return
        now, self.steps = self.steps, state["armed_at"]  # on which what is drawn depends
        try:
            self._put(state["stage"])
        except KeyError as error:
            raise InputError(f"the state has no candidates of {error} for the stage that it is in") from None
        self.steps, self._versions = now, {}
        self._armed.load_state_dict(state["probes"][1])

    def leave(self) -> None:
        """Act no more, and ask layers nothing more."""
        self._disarm()
        super().leave()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_armed": self.state_dict()}  # layers leave their probes behind, too

    def __setstate__(self, state: dict[str, Any]) -> None:
        asked = state["_armed"]
        super().__setstate__(state | {"_armed": ArmedProbes(state["layers"]), "_stage": None})
        weakref.finalize(self, self._armed.disarm).atexit = False
        if not self.closed:
            self._resume(asked)


def _ascend(keys: Tensor, cells: int) -> bool:
    """Return whether keys are distinct places of a grid in ascending order, as the index of a probe takes on trust."""
    inside = not keys.numel() or (int(keys[0]) >= 0 and int(keys[-1]) < cells)
    return inside and bool((keys[1:] > keys[:-1]).all())


def _version(layer: BlockSparse) -> tuple[int, int]:
    """Return numbers that change whenever somebody writes into the places of the blocks."""
    return layer.row._version, layer.col._version
