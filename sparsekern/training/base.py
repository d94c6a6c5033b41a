"""The base class of training methods."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.kernels.contract import is_finite
from sparsekern.nn import BlockSparse, sparse_layers
from sparsekern.nn.sharded import parallel_modules, reshard, sharded_modules
from sparsekern.topology import Move, Units, generator_for, stored_blocks, units
from sparsekern.topology.arguments import check_whole
from sparsekern.training.attachment import STATE_VERSION, Attached, check_state_of_method, unwrapped
from sparsekern.training.distributed import Ranks
from sparsekern.training.followers import Followers, OnMove
from sparsekern.training.metrics import TopologyMetrics
from sparsekern.training.schedules import Schedule, whole_stop
from sparsekern.training.scores import block_norms, protect_last, warn_of_few_blocks

NEVER = -(2**30)
"""The update at which the blocks of the first topology were grown."""

_log = logging.getLogger("sparsekern")


class Method(Attached):
    """Base class of methods that move the blocks of sparse layers during training.

    A subclass implements :meth:`choose`, which says which blocks move where. Schedule, optimizer state, metrics, saving
    and agreement of ranks are the same for all methods. A method owns no loop and patches nothing. Call :meth:`step`
    after ``optimizer.step()``::

        sparse = sk.SET(model, optimizer, update_every=100, stop=0.75 * steps)
        for x, y in loader:
            loss_fn(model(x), y).backward()
            optimizer.step(); optimizer.zero_grad(set_to_none=True)
            sparse.step()

    Steps are counted when the optimizer makes them: a step that gradient scaling skips does not count. Layers whose
    values are frozen do not move.

    Args:
        model: contains at least one sparse layer.
        optimizer: holds the values of the layers.
        update_every: optimizer steps between updates of the topology.
        start, stop: first step at which an update may happen, and step from which on none happens (None: no end).
        drop_fraction: fraction of a layer's blocks that an update moves; it falls to 0 along a cosine until ``stop``.
            Or a function of the step.
        anneal: ``"cosine"``; ``"constant"`` for a fraction that does not fall; or ``"steps"`` for one that is halved
            after three quarters of the way to ``stop`` (MEST's default).
        offset: steps by which the schedule is delayed. See :class:`~sparsekern.training.Schedule`.
        grown_state: optimizer state of a moved block: ``"zero"`` or ``"mean_v"``. See :class:`Followers`.
        keep_connected: never drop the strongest block of a block row or block column, so that none becomes empty.
        min_age: updates during which a grown block, which starts at zero and is weak, is not dropped. 0 in the papers.
        seed: determines all random choices, together with the layer's name and the step.
        check_ranks: make the first rank's choice on all ranks, and check that all have the same seed, steps and blocks:
            when the method is built (on all ranks), before the first step, and after each update. Sends one integer.
        process_group: the ranks that train one model. Default: all, where torch.distributed is in use.

    Raises:
        ValueError: a number is out of range, an option has no effect, there is no sparse layer, the optimizer does not
            hold one or keeps a state that cannot follow, or ranks differ.
        TypeError: the optimizer is not a :class:`torch.optim.Optimizer`.
        NotImplementedError: the values are sharded, but not by slots, or not by ``fully_shard``; or a layer ties its
            taps, and the method moves single blocks.
    """

    unused_options: ClassVar[tuple[str, ...]] = ()
    """Options of this class that a subclass does not take: its constructor calls :meth:`check_options`."""

    moves_fraction: bool = True
    """Whether an update moves ``drop_fraction`` of the blocks of each layer."""

    moves_tied_taps: ClassVar[bool] = True
    """Whether layers may tie their taps, so that the blocks of all taps move together."""

    sums_over_ranks: ClassVar[bool] = False
    """Whether ranks communicate in addition to ``check_ranks``."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        update_every: int = 100,
        start: int = 0,
        stop: float | None = None,
        drop_fraction: float | Callable[[int], float] = 0.3,
        anneal: str = "cosine",
        offset: int = 0,
        grown_state: str = "zero",
        keep_connected: bool = False,
        min_age: int = 0,
        seed: int = 0,
        check_ranks: bool = True,
        process_group: dist.ProcessGroup | None = None,
        **others: Any,
    ) -> None:
        self.check_options(others, others)
        optimizer = unwrapped(optimizer)
        self.layers = sparse_layers(model)
        if not self.layers:
            raise InputError("the model has no sparse layer; call sparsekern.sparsify_ first")
        for name, layer in self.layers.items():
            if layer.tie_taps and not self.moves_tied_taps:
                raise NotImplementedError(
                    f"{name!r} has tie_taps=True, but {type(self).__name__} moves every block by itself; "
                    "leave the taps untied, or use SET or VRPGE"
                )
        check_whole("min_age", min_age, 0, " updates")
        check_whole("seed", seed)
        self._sharded = sharded_modules(model)
        reshard(self._sharded, self.layers)
        self.schedule = Schedule(update_every, start, whole_stop(stop), drop_fraction, anneal, offset)
        self.followers = Followers(self.layers, optimizer, grown_state)
        self.followers.check()
        self.optimizer = optimizer
        self.keep_connected, self.min_age = keep_connected, min_age
        self.seed = seed
        self.steps = self.updates = self._seen = 0
        self.seconds = 0.0
        self._metrics = TopologyMetrics(self.layers, seed)
        self._born = {name: torch.full_like(layer.row, NEVER) for name, layer in self.layers.items() if min_age}
        self.check_ranks, self.ranks = check_ranks, Ranks(process_group)
        self._parallel = parallel_modules(model)
        self._check_agreement()
        self._loaded = True
        if self.moves_fraction and not callable(drop_fraction):
            warn_of_few_blocks(self.layers, drop_fraction)
        self._warned_of_optimizer = False
        self.note_values()
        self.attach(self.layers.values())

    @classmethod
    def check_options(cls, options: Iterable[str], unused: Iterable[str] | None = None) -> None:
        """Raise ValueError if an option is given that has no effect: by default one of ``unused_options``."""
        for name in cls.unused_options if unused is None else unused:
            if name in options:
                raise InputError(
                    f"{name} is no option of {cls.__name__}, on which it would have no effect; leave it out",
                    parameter=name,
                )

    def __repr__(self) -> str:
        schedule = self.schedule
        return (
            f"{type(self).__name__}({len(self.layers)} layers, update_every={schedule.update_every}, "
            f"start={schedule.start}, stop={schedule.stop}, step {self.steps}, {self.updates} updates)"
        )

    @property
    def first_keys(self) -> dict[str, Tensor]:
        """The sorted keys ``row * C + col`` of each layer's first topology, on the CPU."""
        return self._metrics.start

    def choose(self, name: str, layer: BlockSparse, fraction: float, generator: torch.Generator) -> Move | None:
        """Return which blocks of a layer move where, or None. Changes nothing.

        Args:
            name: the layer's name.
            layer: the layer, after the optimizer's step.
            fraction: fraction of its blocks to move, in [0, 1].
            generator: a CPU generator seeded from the seed, the method, the layer's name and the step.
        """
        raise NotImplementedError

    def choose_all(self, fraction: float) -> dict[str, Move]:
        """Return the moves of all layers by name, by default those of :meth:`choose`. Changes nothing."""
        moves = {}
        for name, layer in self.trained_layers():
            generator = generator_for(self.seed, type(self).__name__, name, self.steps)
            move = self.choose(name, layer, fraction, generator)
            if move is not None:
                moves[name] = move
        return moves

    def trained_layers(self) -> list[tuple[str, BlockSparse]]:
        """Return the layers whose values are not frozen, with their names."""
        return [(name, layer) for name, layer in self.layers.items() if layer.values.requires_grad]

    def importance(self, name: str, layer: BlockSparse) -> Tensor:
        """Return what :meth:`strength` ranks the blocks by ``(Z,)``, infinite in free slots: their Frobenius norms."""
        return block_norms(layer)

    def strength(self, name: str, layer: BlockSparse, parts: Units | None = None) -> Tensor:
        """Return the :meth:`importance` ``(Z,)`` of each block, or its norm ``(U,)`` over each unit.

        It is infinite where no block may be dropped: in free slots, for blocks younger than ``min_age``, and for those
        that ``keep_connected`` protects.

        Raises:
            ValueError: a value is NaN or infinite, so that blocks have no order.
        """
        parts = units(layer.topology, tied=False) if parts is None else parts
        scores = self.importance(name, layer)
        full = stored_blocks(layer.index) == layer.topology.slots
        if not is_finite(scores if full else scores[layer.topology.used()]):
            raise InputError(
                f"values of {name!r} hold NaN or infinity at step {self.steps}, so its blocks have no order of "
                "strength: lower the learning rate, or clip the gradients"
            )
        if self.min_age:
            scores = scores.masked_fill(self.updates - self._born[name] <= self.min_age, torch.inf)
        scores = parts.norms(scores)
        return protect_last(parts.topology, scores) if self.keep_connected else scores

    def fill(self, name: str, move: Move) -> None:
        """Set the values of blocks that have just moved, which are zero; leaves them by default."""

    def step(self) -> bool:
        """Update the topology if an update is due; returns whether blocks moved. Call it after each optimizer step."""
        self.check_step()
        due = self.schedule.due_since(self._seen, self.steps)
        self._seen = self.steps
        return self.update() if due else False

    def check_step(self) -> None:
        """Check what would otherwise disable the method silently. The first line of every :meth:`step`.

        Logs a warning, once, where values changed but the method's optimizer made no step.

        Raises:
            RuntimeError: the method is closed.
            NotImplementedError: the values were sharded after it was built, or ranks run out of batches under ``Join``.
        """
        self.check_open()
        reshard(self._sharded, self.layers)
        if self.check_ranks or self.sums_over_ranks:
            self.ranks.refuse_join(self._parallel, type(self).__name__)
        steps, versions = self._noted
        self.note_values()
        if self.steps == steps and self._noted[1] != versions and not self._warned_of_optimizer:
            self._warned_of_optimizer = True
            _log.warning(
                "values of sparse layers changed, but the %s that %s was built with made no step since: no block "
                "moves. Build the method with the optimizer that steps",
                type(self.optimizer).__name__,
                type(self).__name__,
            )

    def note_values(self) -> None:
        """Record the versions of the values, for :meth:`check_step`, after other code than the optimizer wrote them."""
        self._noted = self.steps, sum(layer.values._version for layer in self.layers.values())

    def update(self) -> bool:
        """Update the topology now, whatever the schedule says; returns whether blocks moved."""
        self.check_open()
        return self.move(self.choose_all, self.settle)

    def move(
        self, choose: Callable[[float], dict[str, Move]], settle: Callable[[dict[str, Move]], None] | None = None
    ) -> bool:
        """Make the moves that a function chooses, of all layers or of none, with everything that follows the blocks.

        Args:
            choose: called with the scheduled fraction; returns moves by the name of the layer.
            settle: called with the moves when they are made.

        Returns:
            Whether blocks moved.
        """
        with self.writing():
            began = time.perf_counter()
            fraction = self.schedule.fraction(self.steps)
            self._metrics.begin_update()
            reshard(self._sharded, self.layers)
            self.followers.check()  # before blocks are chosen: their scores must be there
            moves = {name: move for name, move in choose(fraction).items() if move.slots.numel()}
            moves = self.ranks.first_choice(moves, self.layers) if self.check_ranks else moves
            self.followers.check_moves(moves)  # all of them, before the first layer moves
            self.followers.move(moves)
            for name, move in moves.items():
                self.fill(name, move)
                self._metrics.add(name, move)
                if self.min_age:
                    self._born[name].index_fill_(0, move.slots.long(), self.updates)
            self.updates += 1
            if settle is not None:
                settle(moves)
            self.note_values()
            self.seconds += time.perf_counter() - began
        self.followers.tell(moves)
        self._check_agreement()
        return bool(moves)

    def settle(self, moves: dict[str, Move]) -> None:
        """Adapt a subclass's own state to moves that were made; does nothing by default."""

    def check_compact(self) -> None:
        """Raise ValueError if a tensor follows the blocks, or a copy of the model has other blocks."""
        self.followers.check_compact()

    def compacted(self, kept: Mapping[BlockSparse, Tensor]) -> None:
        """Adapt to layers that kept only some slots."""
        self.followers.compacted(kept)
        for name, born in self._born.items():
            self._born[name] = born.index_select(0, kept[layer]) if (layer := self.layers[name]) in kept else born
        self.note_values()

    def agreed(self) -> dict[str, object]:
        """Return the settings, by name, that must be the same on all ranks."""
        schedule = (self.schedule.update_every, self.schedule.start, self.schedule.stop)
        facts = {"method": type(self).__name__, "seed": self.seed, "the steps made": self.steps}
        return facts | {"update_every, start and stop": schedule}

    def _check_agreement(self) -> None:
        if self.check_ranks:
            self.ranks.check_agreement(self.agreed(), self.layers)

    def before_step(self) -> None:
        """Check, before the first step after the method was built or loaded, that ranks loaded the same."""
        if self._loaded:
            self._check_agreement()
            self._loaded = False

    def after_step(self, made: bool) -> None:
        """Count a step that the optimizer made."""
        if made:
            self.steps += 1

    def see_gradients(self) -> None:
        """Notice that gradients were cleared, before other code than autograd writes into them; nothing by default."""

    def follow(self, target: Tensor | nn.Module, *, layer: str | None = None, on_move: OnMove = "zero") -> None:
        """Register a tensor, or a copy of the model, that moves with the blocks.

        Args:
            target: a tensor ``(Z, ...)``; or a copy of the model (such as an exponential moving average), whose blocks
                then move, and start from zero, with the model's.
            layer: the name of the layer that a tensor follows.
            on_move: ``"zero"``, ``"keep"``, or a function ``(tensor, slots)`` called for the slots that move.

        Raises:
            ValueError: the first axis is not the layer's slots, or the copy has other layers or blocks.
        """
        if isinstance(target, nn.Module):
            self.followers.add_model(target)
            self._sharded += sharded_modules(target)
            return
        if layer is None:
            raise InputError("layer is missing; a tensor follows the layer that it names", parameter="layer")
        self.followers.add_tensor(layer, target, on_move)

    def metrics(self) -> dict[str, float]:
        """Return numbers about the topology; synchronises the device.

        ``sparsity/*`` fraction absent; ``churn/*`` fraction of blocks that the last update moved; ``kept/*`` fraction
        of the first topology's places that are still used; ``itop/*`` fraction of all places that were ever used
        (estimated in a large grid, see :class:`~sparsekern.training.metrics.Coverage`); ``steps``, ``updates``, and
        the total ``update_seconds``.
        """
        return self._metrics.values() | {"steps": self.steps, "updates": self.updates, "update_seconds": self.seconds}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs in addition to the states of model and optimizer.

        Names and shapes are the same from the first step to the last, as ``torch.distributed.checkpoint`` needs.
        Entries that vary are in tuples, which it saves as they are.
        """
        return {
            "version": STATE_VERSION,
            "method": type(self).__name__,
            "steps": self.steps,
            "seen": self._seen,
            "updates": self.updates,
            "seconds": self.seconds,
            **self._metrics.state_dict(),
            "born": {name: born.cpu() for name, born in self._born.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
            ValueError: the state is damaged, or of another method, version or model.
            TypeError: it is not a dictionary.
        """
        self.check_state(state)
        reshard(self._sharded, self.layers)
        self._loaded = True
        self.steps, self._seen = state["steps"], state["seen"]
        self.updates, self.seconds = state["updates"], state["seconds"]
        self.note_values()
        self._metrics.load_state_dict(state)
        for name, born in self._born.items():
            born.copy_(state["born"].get(name, torch.tensor(NEVER)))

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise what :meth:`load_state_dict` would raise, without loading anything."""
        check_state_of_method(self, state)
